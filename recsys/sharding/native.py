"""Sharded tables on a CPU, looked up and updated by our own operators instead of FBGEMM's.

They take half of the time of FBGEMM's where cores are free, and far less where they are shared, since its threads wait
for one another at every table; and FBGEMM fuses no Adam on a CPU at all. See benchmarks/README.md. TorchRec, plans and
checkpoints do not notice: weights and state stay where they are, and the arithmetic is FBGEMM's.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag

from recsys.memory import zeros_on_huge_pages
from recsys.native import available
from recsys.sharding.torchrec import batches_of_tables, dense_batches_of_tables
from recsys.sharding.workload import STATE_VALUES, OptimizerKind

KINDS: dict[EmbOptimType, OptimizerKind] = {
    EmbOptimType.EXACT_SGD: "sgd",
    EmbOptimType.EXACT_ADAGRAD: "adagrad",
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
}
"""Our words for what FBGEMM fuses on a CPU."""


class Rates(NamedTuple):
    """What an update goes by."""

    lrs: Sequence[float]
    """Of each feature."""
    eps: float
    limit: float = float("inf")
    """Elements of gradients are cut to within it."""
    betas: tuple[float, float] = (0.0, 0.0)
    updates: int = 1
    """This one among them."""


def use_native(module: nn.Module, dtype: torch.dtype = torch.float32, unfused: OptimizerKind | None = None) -> None:
    """Have tables that lie on a CPU looked up and updated by our operators, where they can be.

    Args:
        module: just sharded: its tables and their state hold zeros, or nothing that is needed.
        dtype: of what they give, float32 or bfloat16. All is summed in float32.
        unfused: the optimizer of tables under the kernel dense, which are then updated in their backward too, without a
            gradient as large as they are, by rates that must be given them (`unfused_tables`); None leaves them alone.
    """
    for part in batches_of_tables(module):
        if part.use_cpu and _fits(part) and available("tables"):
            for values in (part.weights_host, part.momentum1_host):
                zeros_on_huge_pages(values.detach())
            part.forward = NativeTables(part, dtype)
    if unfused is None:
        return
    for batch in dense_batches_of_tables(module):
        part = batch.emb_module
        if part.use_cpu and _is_plain(part) and available("tables"):
            part.forward = NativeTables(UnfusedTables(batch, unfused), dtype)


def unfused_tables(module: nn.Module) -> "Iterator[UnfusedTables]":
    """The tables under the kernel dense that our operators update."""
    for batch in dense_batches_of_tables(module):
        forward = batch.emb_module.forward
        if isinstance(forward, NativeTables) and isinstance(forward.tables, UnfusedTables):
            yield forward.tables


def _fits(part: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether the operators do what was asked of FBGEMM: float32 sums, and an optimizer without decay or norms."""
    rates = part.optimizer_args
    return (
        part.optimizer in KINDS
        and _is_plain(part)
        and rates.weight_decay_mode == WeightDecayMode.NONE.value
        and rates.weight_decay == rates.max_norm == 0
    )


def _is_plain(part: Any) -> bool:
    return (
        part.weights_precision == SparseType.FP32
        and part.output_dtype == SparseType.FP32.as_int()
        and part.pooling_mode == PoolingMode.SUM
    )


class FusedTables:
    """Weights, state and rates that FBGEMM has for a batch of tables with a fused optimizer.

    Attributes:
        part: FBGEMM's batch.
        weights: of all tables, one behind the other.
        means: of gradients, which lie as the weights do; none here.
        squares: accumulated squares of gradients.
        facts: what the operators know of each feature [F, 6]: see `Feature` in native/tables.cpp.
    """

    def __init__(self, part: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        self.part = part
        self.kind = KINDS[part.optimizer]
        self.weights: nn.Parameter = part.weights_host
        self.means = part.weights_host.new_empty(0)
        has_state = self.kind != "sgd"
        self.squares = part.momentum1_host.detach() if has_state else self.means
        table_of = list(part.feature_table_map)
        squares = part.momentum1_offsets.tolist() if has_state else [0] * len(table_of)
        self.facts = _facts(part, table_of, squares)

    def rates(self) -> Rates:
        """Of the next update."""
        part, args = self.part, self.part.optimizer_args
        limit = args.max_gradient if args.gradient_clipping else float("inf")
        return Rates([float(part.learning_rate_tensor)] * len(self.facts), args.eps, limit)


class UnfusedTables:
    """A batch of tables under the kernel dense, with the state of their optimizer, which FBGEMM has not.

    Args:
        batch: of at least one table.
        kind: what updates them.

    Attributes:
        rates: of the next update; to be set.
        part, weights, facts: as `FusedTables` has them.
    """

    rates: Callable[[], Rates]

    def __init__(self, batch: BatchedDenseEmbeddingBag, kind: OptimizerKind) -> None:
        self.part = part = batch.emb_module
        self.kind = kind
        self.weights: nn.Parameter = part.weights
        self._begins: list[int] = part.weights_physical_offsets
        self._first_rows = [0, *accumulate(rows for rows, _ in part.embedding_specs)]
        self._of_row, self._of_element = STATE_VALUES[kind]
        zeros_on_huge_pages(self.weights.detach())
        squares = self._first_rows if self._of_row else self._begins
        table_of = list(batch._feature_table_map)
        self.facts = _facts(part, table_of, [squares[table] for table in table_of])

    # Made when an optimizer asks for them: what only predicts has no state.

    @functools.cached_property
    def means(self) -> Tensor:
        """See `FusedTables`."""
        return _state(self.weights.numel() if self._of_row + self._of_element == 2 else 0)

    @functools.cached_property
    def squares(self) -> Tensor:
        """See `FusedTables`."""
        return _state(self._first_rows[-1] if self._of_row else self.weights.numel() * min(self._of_element, 1))

    def place(self, table: Tensor) -> slice | None:
        """Which of the weights are those of a tensor; None if they are elsewhere."""
        begin, beside = divmod(table.data_ptr() - self.weights.data_ptr(), self.weights.element_size())
        inside = beside == 0 <= begin <= self.weights.numel() - table.numel()
        return slice(begin, begin + table.numel()) if inside and table.numel() else None

    def state_at(self, place: slice, dim: int) -> list[Tensor]:
        """Means, if any, and squares, if any, of rows of `dim` columns."""
        found = [self.means[place].view(-1, dim)] if self.means.numel() else []
        if self._of_row:
            first = self._first_rows[self._begins.index(place.start)]
            found.append(self.squares[first : first + (place.stop - place.start) // dim])
        elif self.squares.numel():
            found.append(self.squares[place].view(-1, dim))
        return found


class NativeTables:
    """Takes the place of the `forward` of FBGEMM's batch of tables.

    Args:
        tables: float32, on a CPU.
        dtype: of the sums.
    """

    def __init__(
        self, tables: SplitTableBatchedEmbeddingBagsCodegen | UnfusedTables, dtype: torch.dtype = torch.float32
    ) -> None:
        self.tables = tables if isinstance(tables, UnfusedTables) else FusedTables(tables)
        self.dtype = dtype
        self._fbgemm, self._width = self.tables.part.forward, self.tables.part.total_D

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
        sums: Tensor = _Lookup.apply(self.tables.weights, self, ids, offsets)  # type: ignore[no-untyped-call]
        return sums

    def look_up(self, weights: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """The sums, without a gradient."""
        sums: Tensor = torch.ops.recsys.lookup_sum(weights, self.tables.facts, ids, offsets, self._width, self.dtype)
        return sums

    def update(self, ids: Tensor, offsets: Tensor, grad: Tensor) -> None:
        """Update the rows of the ids by the gradient of their sums."""
        tables, rates = self.tables, self.tables.rates()
        torch.ops.recsys.update_(
            tables.weights.detach(),
            tables.means,
            tables.squares,
            tables.facts,
            ids,
            offsets,
            grad,
            tables.kind,
            rates.lrs,
            rates.eps,
            rates.limit,
            *rates.betas,
            rates.updates,
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


def _state(size: int) -> Tensor:
    values = torch.zeros(size)
    zeros_on_huge_pages(values)
    return values


def _facts(part: Any, table_of: Sequence[int], squares: Sequence[int]) -> Tensor:
    """See `FusedTables`, of features whose tables and places among the squares are given."""
    assert list(table_of) == sorted(table_of), "features of one table stand next to one another"
    weights, columns = part.weights_offsets.tolist(), pairwise(part.D_offsets.tolist())
    facts = [
        (weights[f], squares[f], part.embedding_specs[table][0], end - begin, begin, table)
        for f, (table, (begin, end)) in enumerate(zip(table_of, columns, strict=True))
    ]
    return torch.tensor(facts, dtype=torch.int64)
