"""Sharded tables on a CPU, looked up and updated by our own operators instead of FBGEMM's.

They take half of the time of FBGEMM's where cores are free, and far less where they are shared, since its threads wait
for one another at every table; see benchmarks/README.md. TorchRec, plans and checkpoints do not notice: weights and
state stay where they are, and the arithmetic is FBGEMM's.
"""

from itertools import pairwise
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn

from recsys.memory import zeros_on_huge_pages
from recsys.native import available
from recsys.sharding.torchrec import batches_of_tables

KINDS: dict[EmbOptimType, str] = {
    EmbOptimType.EXACT_SGD: "sgd",
    EmbOptimType.EXACT_ADAGRAD: "adagrad",
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
}
"""The operators' words for FBGEMM's."""


def use_native(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Have tables that lie on a CPU looked up and updated by our operators, where they can be.

    Args:
        module: just sharded: its tables and their state hold zeros.
        dtype: of what they give, float32 or bfloat16. All is summed in float32.
    """
    for part in batches_of_tables(module):
        if part.use_cpu and _fits(part) and available("tables"):
            for values in (part.weights_host, part.momentum1_host):
                zeros_on_huge_pages(values.detach())
            part.forward = NativeTables(part, dtype)


def _fits(tables: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether the operators do what was asked of FBGEMM: float32 sums, and an optimizer without decay or norms."""
    rates = tables.optimizer_args
    return (
        tables.optimizer in KINDS
        and tables.weights_precision == SparseType.FP32
        and tables.output_dtype == SparseType.FP32.as_int()
        and tables.pooling_mode == PoolingMode.SUM
        and rates.weight_decay_mode == WeightDecayMode.NONE.value
        and rates.weight_decay == rates.max_norm == 0
    )


class NativeTables:
    """Takes the place of the `forward` of FBGEMM's batch of tables, whose weights, state and rate it uses.

    Args:
        tables: float32, on a CPU.
        dtype: of the sums.
    """

    def __init__(self, tables: SplitTableBatchedEmbeddingBagsCodegen, dtype: torch.dtype = torch.float32) -> None:
        self._tables = tables
        self.dtype = dtype
        self._fbgemm = tables.forward
        self._kind = KINDS[tables.optimizer]
        self._facts = _facts(tables)

    def __call__(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, **more: Any
    ) -> Tensor:
        """Look up ids [N] in bags that begin at offsets [F B + 1]: their sums, [B, sum of the features' widths].

        Weighted sums, and batches that differ in size from feature to feature, are left to FBGEMM.

        Raises:
            IndexError: an id without a row.
        """
        if per_sample_weights is not None or any(value is not None for value in more.values()):
            return self._fbgemm(indices, offsets, per_sample_weights, **more)
        ids, offsets = indices.contiguous(), offsets.to(indices.dtype).contiguous()
        sums: Tensor = _Lookup.apply(self._tables.weights_host, self, ids, offsets)  # type: ignore[no-untyped-call]
        return sums

    def look_up(self, weights: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """The sums, without a gradient."""
        width = self._tables.total_D
        sums: Tensor = torch.ops.recsys.lookup_sum(weights, self._facts, ids, offsets, width, self.dtype)
        return sums

    def update(self, ids: Tensor, offsets: Tensor, grad: Tensor) -> None:
        """Update the rows of the ids by the gradient of their sums."""
        tables, rates = self._tables, self._tables.optimizer_args
        torch.ops.recsys.update_(
            tables.weights_host.detach(),
            tables.momentum1_host.detach() if self._kind != "sgd" else tables.weights_host.new_empty(0),
            self._facts,
            ids,
            offsets,
            grad,
            self._kind,
            float(tables.learning_rate_tensor),
            rates.eps,
            rates.max_gradient if rates.gradient_clipping else float("inf"),
        )


class _Lookup(torch.autograd.Function):
    """Updates within its backward, as FBGEMM does, so that no gradient of a table is ever made."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, native: NativeTables, ids: Tensor, offsets: Tensor) -> Tensor:
        ctx.native = native
        ctx.save_for_backward(ids, offsets)
        return native.look_up(weights, ids, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.native.update(*ctx.saved_tensors, grad)
        return None, None, None, None


def _facts(tables: SplitTableBatchedEmbeddingBagsCodegen) -> Tensor:
    """What the operators know of each feature [F, 6]: see `Feature` in native/tables.cpp."""
    table_of = list(tables.feature_table_map)
    assert table_of == sorted(table_of), "features of one table stand next to one another"
    states = tables.momentum1_offsets.tolist() if KINDS[tables.optimizer] != "sgd" else [0] * len(table_of)
    columns = tables.D_offsets.tolist()
    weights = tables.weights_offsets.tolist()
    facts = [
        (weights[f], states[f], tables.embedding_specs[table][0], end - begin, begin, table)
        for f, (table, (begin, end)) in enumerate(zip(table_of, pairwise(columns), strict=True))
    ]
    return torch.tensor(facts, dtype=torch.int64)
