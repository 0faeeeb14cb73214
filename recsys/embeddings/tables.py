"""Embedding tables of all members in one TorchRec collection, so that they are looked up in fused calls."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys.embeddings.bounds import IdBounds
from recsys.embeddings.config import TABLE_SEPARATOR, Owner
from recsys.embeddings.precision import DATA_TYPES


class Tables(nn.Module):
    """One table per (owner, feature), owners being members, or one owner whose tables all members share.

    Args:
        sparse: feature to number of ids, in field order.
        owners: whose tables; each has an embedding dimension D of its own.

    Parameters stay on the meta device until the collection is sharded; `init.init_tables` then fills the shards.
    """

    def __init__(self, sparse: Mapping[str, int], owners: Sequence[Owner]) -> None:
        super().__init__()
        self.bounds = IdBounds(sparse)
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"{owner.name}{TABLE_SEPARATOR}{feature}",
                    feature_names=[feature],
                    num_embeddings=num_ids,
                    embedding_dim=owner.config.embedding_dim,
                    pooling=PoolingType.SUM,
                    data_type=DATA_TYPES[owner.config.table_dtype],
                    init_fn=leave,
                )
                for owner in owners
                for feature, num_ids in sparse.items()
            ],
            device=torch.device("meta"),
        )
        # A feature that feeds one table gives a key of its own name, one that feeds several gives feature@table.
        self.fields = FieldOrder(
            groups=[
                [
                    feature if len(owners) == 1 else f"{feature}@{owner.name}{TABLE_SEPARATOR}{feature}"
                    for feature in sparse
                ]
                for owner in owners
            ],
            dims=[owner.config.embedding_dim for owner in owners],
        )

    def forward(self, ids: KeyedJaggedTensor) -> list[Tensor]:
        """Look up ids: one x_BFD an owner, fields in schema order.

        Raises:
            InputError: an id without a row, see `bounds`.
        """
        self.bounds(ids)
        return self.fields(self.tables(ids))


def leave(weight: Tensor) -> Tensor:
    """Initial values that change nothing: else TorchRec would draw all values of a table before `init_tables` does."""
    return weight


class FieldOrder(nn.Module):
    """Brings pooled embeddings, whose keys come in an order that depends on the sharding plan, into schema order.

    It copies whole runs of columns that already stand in order, and nothing where all of them do. (FBGEMM's permute of
    pooled embeddings goes row by row on a CPU: 16 times as long, see benchmarks/README.md.)
    """

    def __init__(self, groups: Sequence[Sequence[str]], dims: Sequence[int]) -> None:
        super().__init__()
        self.groups = [tuple(group) for group in groups]
        self.dims = list(dims)
        self._runs: dict[tuple[str, ...], list[list[slice]]] = {}

    def forward(self, pooled: KeyedTensor) -> list[Tensor]:
        """Split [B, sum of all widths] into one x_BFD a group."""
        keys = tuple(pooled.keys())
        if keys not in self._runs:
            self._runs[keys] = [_runs(group, keys, pooled.offset_per_key()) for group in self.groups]
        values = pooled.values()
        fields = []
        for runs, dim in zip(self._runs[keys], self.dims, strict=True):
            columns = [values[:, run] for run in runs]
            fields.append((columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)).unflatten(1, (-1, dim)))
        return fields


def _runs(group: Sequence[str], keys: Sequence[str], offsets: Sequence[int]) -> list[slice]:
    """Column ranges that hold `group` in order, neighbours joined."""
    runs: list[slice] = []
    for key in group:
        index = keys.index(key)
        begin, end = offsets[index], offsets[index + 1]
        if runs and runs[-1].stop == begin:
            begin = runs.pop().start
        runs.append(slice(begin, end))
    return runs
