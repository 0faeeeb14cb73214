"""Rows of dynamic tables that change hands: the next id finds them as if they had never been used."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.config import InputError
from recsys.embeddings.config import TABLE_SEPARATOR, Owner
from recsys.embeddings.dynamic import DynamicGroup
from recsys.embeddings.fields import Embeddings
from recsys.embeddings.init import fill_rows

TABLE = "embedding_bags."


class Part(NamedTuple):
    """A stretch of rows of a table, or of its optimizer's state, that this rank holds."""

    values: Tensor
    """[rows, columns], or [rows] of state."""
    first: tuple[int, int]
    """Its corner in the whole."""
    num_columns: int
    """Of the whole."""


class FreshRows:
    """Gives rows of the tables of some owners their initial values, and their optimizer state zeros.

    Args:
        tables: by name, what this rank holds of their weights.
        states: by name, what it holds of their optimizer's state.
        embeddings: know what tables start from.
        owners: whose tables.
    """

    def __init__(
        self,
        tables: Mapping[str, list[Part]],
        states: Mapping[str, list[Part]],
        embeddings: Embeddings,
        owners: list[str],
    ) -> None:
        self._tables, self._states, self._start, self._owners = tables, states, embeddings.table_start, owners

    @torch.no_grad()
    def __call__(self, feature: str, rows: np.ndarray) -> None:
        """Reset rows, given by their numbers in the whole tables of a feature, where they lie here."""
        for owner in self._owners:
            table = f"{owner}{TABLE_SEPARATOR}{feature}"
            seed, scale = self._start(table)
            for part in self._tables[table]:
                here = _within(part, rows)
                fill_rows(part.values, here, seed, scale, first=part.first, num_columns=part.num_columns)
            for part in self._states[table]:
                part.values[_within(part, rows)] = 0


def connect(task: nn.Module, embeddings: Embeddings, state: Mapping[str, Any]) -> None:
    """Let the maps of dynamic tables reset the rows that they give to other ids.

    Args:
        task: sharded.
        embeddings: of it.
        state: of the tables' optimizer, fused or not, by parameter.

    Raises:
        InputError: a dynamic table is data-parallel.
    """
    groups = [module for module in embeddings.modules() if isinstance(module, DynamicGroup)]
    if not groups:
        return
    # It would warn that it cannot distribute the tables' input ahead: rows are known only when a step begins.
    for name in ("tracing", "utils"):
        logging.getLogger(f"torchrec.distributed.train_pipeline.{name}").setLevel(logging.ERROR)
    weights = {key.split(TABLE)[1].removesuffix(".weight"): value for key, value in _weights(task)}
    states = {key.split(TABLE)[1].removesuffix(".weight"): values for key, values in state.items()}
    for group in groups:
        names = [f"{owner}{TABLE_SEPARATOR}{feature}" for owner in group.owners for feature in group.maps.rules]
        tables = {name: weights[name] for name in names}
        for name, weight in tables.items():
            if not isinstance(weight, ShardedTensor):
                raise InputError(
                    f"table {name} of dynamic ids is data_parallel, so that no rank could reset its rows alone; use "
                    "another sharding type for it"
                )
            assert name in states or not weight.local_shards(), "the state of all tables, not of the fused ones alone"
        group.maps.reset = FreshRows(
            {name: parts_of(weight) for name, weight in tables.items()},
            {name: [part for value in states.get(name, {}).values() for part in parts_of(value)] for name in names},
            embeddings,
            group.owners,
        )


def check_caches(kernels: Mapping[str, str], owners: Mapping[str, Owner]) -> None:
    """See that no kernel keeps copies of a dynamic table's rows, which a reset would not reach.

    Args:
        kernels: table, its owner's name first, to its compute kernel.
        owners: by name.

    Raises:
        InputError: one does, naming the table.
    """
    for table, kernel in kernels.items():
        owner = owners.get(table.partition(TABLE_SEPARATOR)[0])
        if owner and owner.config.embeddings == "dynamic" and kernel in ("fused_uvm_caching", "key_value"):
            raise InputError(
                f"table {table} of dynamic ids under the kernel {kernel}: rows in its cache would outlive the ids that "
                "they were given to; use fused or fused_uvm for it"
            )


def parts_of(value: ShardedTensor) -> list[Part]:
    """What this rank holds of a table, or of its state."""
    return [
        Part(shard.tensor, (shard.metadata.shard_offsets[0], [*shard.metadata.shard_offsets, 0][1]), value.size()[-1])
        for shard in value.local_shards()
    ]


def _weights(task: nn.Module) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in task.state_dict().items() if TABLE in key]


def _within(part: Part, rows: np.ndarray) -> Tensor:
    """Rows of the whole that lie in a part, by their numbers in it."""
    here = rows.astype(np.int64) - part.first[0]
    here = here[(here >= 0) & (here < part.values.size(0))]
    return torch.from_numpy(here).to(part.values.device)
