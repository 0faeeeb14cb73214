"""What a step must at least do on this machine: matrix products, bytes of tables, and how fast either can go here.

The floor of a backbone is the time of its matrix products alone, forward and both backward ones: they are recorded
from one real step and run again as bare products, at their true shapes and layouts, back to back.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recsys.backbones.fused import unfused
from recsys.data.schema import Schema
from recsys.members import MemberSpec
from recsys.model import Member

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm: "mm", ATEN.addmm: "mm", ATEN.bmm: "bmm", ATEN.baddbmm: "bmm"}
"""What multiplies, and what it is without the bias that it adds to: the last two operands' product."""
ROW_BYTES = 64
"""One line of memory, or a table's row of 16 float32."""
COPIED_BYTES = {"cpu": 256 * 2**20, "cuda": 2**31}
"""More than any cache holds."""
GATHERED_ROWS = {"cpu": 1 << 20, "cuda": 1 << 24}
SQUARE = {"cpu": 2048, "cuda": 8192}
REPEATS = 7


@dataclass(frozen=True)
class Operand:
    """What a matrix looks like in memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]

    def made(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Random values laid out alike; what is broadcast, with a stride of 0, stays one value."""
        stored = [1 if not stride else size for size, stride in zip(self.size, self.stride, strict=True)]
        matrix = torch.empty_strided(stored, self.stride, dtype=dtype, device=device)
        return matrix.copy_(torch.randn(stored, device=device)).expand(self.size)


@dataclass(frozen=True)
class Product:
    """One matrix product, plain or batched."""

    operator: str
    """mm or bmm."""
    operands: tuple[Operand, ...]

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        *batch, rows, inner = self.operands[0].size
        return 2 * (batch[0] if batch else 1) * rows * inner * self.operands[-1].size[-1]

    def bare(self, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
        """The product alone, of values that are there, into memory that is."""
        values = [operand.made(dtype, device) for operand in self.operands]
        operator = getattr(torch, self.operator)
        out = operator(*values)
        return lambda: operator(*values, out=out)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the matrix products that run under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            operands = [Operand(tuple(x.shape), x.stride()) for x in args if isinstance(x, Tensor)]
            self.products.append(Product(PRODUCTS[func.overloadpacket], tuple(operands[-2:])))
        return func(*args, **(kwargs or {}))


def member_products(
    spec: MemberSpec, schema: Schema, batch_size: int, device: torch.device, *, backward: bool = True
) -> list[Product]:
    """The products of one member's step, or prediction, under bf16 autocast, in their order.

    Args:
        spec: the member; it is built anew, and run as it is without being compiled.
        schema: for the fields and dense columns.
        batch_size: rows of this rank.
        device: where it is run.
        backward: whether it is a step, forward and backward, and not a prediction, forward alone.
    """
    member = Member(spec, schema).to(device).train(backward)
    x_BFD = torch.randn(batch_size, len(schema.sparse), spec.model.embedding_dim, device=device, requires_grad=backward)
    dense_BN = torch.randn(batch_size, len(schema.dense), device=device)
    with unfused(), torch.set_grad_enabled(backward), _Recorder() as recorder:
        with torch.autocast(device.type, torch.bfloat16):
            logits_B = member(x_BFD, dense_BN)
        if backward:
            logits_B.float().sum().backward()
    return recorder.products


class Floor:
    """A step that runs nothing but products, back to back."""

    def __init__(self, products: Iterable[Product], dtype: torch.dtype, device: torch.device) -> None:
        products = list(products)
        self.flops = sum(product.flops for product in products)
        self._bare = [product.bare(dtype, device) for product in products]

    def __call__(self) -> None:
        """Run all of them once."""
        for product in self._bare:
            product()


@dataclass(frozen=True, kw_only=True)
class TableTraffic:
    """Bytes that tables must move in one step, over all members and fields of a rank.

    A lookup reads each row once, however often it is in the batch, and writes what is pooled; the backward reads the
    gradient of that, and reads and writes each row that is looked up, and its optimizer's state, once.
    """

    bags: int
    """Vectors that come out: one a row and field."""
    unique_rows: int
    """Rows that the batch looks up, each counted once."""
    row_bytes: int
    state_bytes: int
    """Of a row's optimizer."""
    output_bytes: int
    """Of one vector that comes out."""

    @property
    def random(self) -> int:
        """Bytes that lie anywhere: of rows, and of their state."""
        return self.unique_rows * (3 * self.row_bytes + 2 * self.state_bytes)

    @property
    def streamed(self) -> int:
        """Bytes that lie side by side: what comes out, and its gradient."""
        return 2 * self.bags * self.output_bytes

    @property
    def total(self) -> int:
        """All of them."""
        return self.random + self.streamed

    def seconds(self, ceilings: "Ceilings") -> float:
        """What they take at the speed of a copy: the floor of the tables, which rows at random places do not reach."""
        return self.total / ceilings.copy_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """How fast this machine is at what a step does, with the threads of the run; the best of a few."""

    copy_bytes_per_s: float
    """Read and written, from one large block of memory to another."""
    gather_bytes_per_s: float
    """Read from rows of 64 bytes at random places, and written side by side."""
    bf16_square_flops_per_s: float
    fp32_square_flops_per_s: float
    """Of a large product of square matrices."""
    bf16_product_flops_per_s: float
    fp32_product_flops_per_s: float
    """Of the products of the model, at their true shapes."""


def ceilings(products: Sequence[Product], device: torch.device, synchronize: Callable[[], None]) -> Ceilings:
    """Measure all of them."""

    def best(step: Callable[[], object]) -> float:
        seconds = []
        for _ in range(REPEATS + 1):  # the first one warms up
            synchronize()
            started = time.perf_counter()
            step()
            synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    def flops_per_s(of: Sequence[Product], dtype: torch.dtype) -> float:
        floor = Floor(of, dtype, device)
        return floor.flops / best(floor)

    side = Operand((SQUARE[device.type],) * 2, (SQUARE[device.type], 1))
    square = [Product("mm", (side, side))]
    return Ceilings(
        copy_bytes_per_s=2 * COPIED_BYTES[device.type] / best(_copy(device)),
        gather_bytes_per_s=2 * GATHERED_ROWS[device.type] * ROW_BYTES / min(best(step) for step in _gathers(device)),
        bf16_square_flops_per_s=flops_per_s(square, torch.bfloat16),
        fp32_square_flops_per_s=flops_per_s(square, torch.float32),
        bf16_product_flops_per_s=flops_per_s(products, torch.bfloat16),
        fp32_product_flops_per_s=flops_per_s(products, torch.float32),
    )


def _copy(device: torch.device) -> Callable[[], Tensor]:
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def _gathers(device: torch.device) -> list[Callable[[], Tensor]]:
    """Random rows in both ways that torch has, of which one prefetches on a CPU."""
    table = torch.ones(COPIED_BYTES[device.type] // ROW_BYTES, ROW_BYTES // 4, device=device)
    rows = torch.randint(len(table), (GATHERED_ROWS[device.type],), device=device)
    bags = torch.arange(len(rows), device=device)
    out = torch.empty(len(rows), ROW_BYTES // 4, device=device)
    return [
        lambda: torch.index_select(table, 0, rows, out=out),
        lambda: nn.functional.embedding_bag(rows, table, bags, mode="sum"),
    ]
