"""What people would train the same model with: plain PyTorch in its usual ways, and TorchRec out of the box.

Each takes the same members, the same initial tables, and the same batches from the same Parquet by our loader, so that
only embeddings, optimizers and precision differ: loading costs them what it costs us, which is less than their own
loaders would. All compute in fp32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.embeddings.init import fill_uniform
from recsys.embeddings.tables import TABLE_SEPARATOR
from recsys.members import MemberSpec
from recsys.model import RecModel


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a baseline trains."""

    specs: tuple[MemberSpec, ...]
    schema: Schema
    table_lr: float
    dense_lr: float
    device: torch.device

    def start(self) -> RecModel:
        """Our model without memory, which knows what each table starts from."""
        with torch.device("meta"):
            return RecModel(self.schema, self.specs)

    def tables(self, spec: MemberSpec) -> list[Tensor]:
        """Initial tables [rows, D] of a member, in field order: those of our trainer."""
        embedding, dim = self.start().embedding, spec.model.embedding_dim
        tables = []
        for feature, num_ids in self.schema.sparse.items():
            table = torch.empty(num_ids, dim, device=self.device)
            fill_uniform(
                table, *embedding.table_start(f"{spec.name}{TABLE_SEPARATOR}{feature}"), first=(0, 0), num_columns=dim
            )
            tables.append(table)
        return tables


class Baseline(Protocol):
    """Something that trains on batches."""

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """Train on the next batch; returns its loss, summed over members."""
        ...


def ids_by_field(batch: Batch, schema: Schema) -> Sequence[Tensor]:
    """Ids of each field, row after row, as int64."""
    return batch.sparse.values().long().split([part * len(batch.labels) for part in hotness(schema)])


def hotness(schema: Schema) -> list[int]:
    """Ids a row of each field."""
    return [schema.hotness.get(feature, 1) for feature in schema.sparse]
