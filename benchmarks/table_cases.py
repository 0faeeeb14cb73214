"""What benchmarks/tables.py times: tables of one size, the batches that look them up, and the bytes that this moves."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from recsys.memory import zeros_on_huge_pages
from recsys.native import available
from recsys.sharding.native import NativeTables
from recsys.sharding.torchrec import TableOptimizer
from recsys.sharding.workload import STATE_VALUES, OptimizerKind

Layout = Literal["separate", "interleaved"]
Ids = Literal["uniform", "zipf"]
Lookup = tuple[Tensor, Tensor]
"""Ids, and offsets of their bags."""
OURS, FBGEMM = "ours", "fbgemm"
PHASES = ("forward", "update", "step")
"""The last is the sum of the others."""
FLOAT_BYTES, ID_BYTES = 4, 8
LR, EPS, VALUE, GRADIENT = 0.01, 1e-8, 0.01, 1e-3
SEED = 7
NUM_BATCHES = 8
"""Taken in turn, so that no batch finds its rows in a cache from the time before."""
SPIN = f"import os\nwhile os.getppid() == {os.getpid()}:\n    for _ in range(10**6): pass"
"""A process that keeps a core busy, and ends with the one that started it."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tables of one size, over which members have rows of their own for equal ids."""

    features: int
    rows: int
    dim: int
    """Columns of one member."""
    members: int
    layout: Layout
    """separate: a table a member and feature. interleaved: a table a feature, whose rows hold those of all members."""
    optimizer: OptimizerKind

    @property
    def num_tables(self) -> int:
        """Tables that are looked up."""
        return self.features * (self.members if self.layout == "separate" else 1)

    @property
    def columns(self) -> int:
        """Of each table."""
        return self.dim * (self.members if self.layout == "interleaved" else 1)

    @property
    def row_bytes(self) -> int:
        """Of a row."""
        return FLOAT_BYTES * self.columns

    @property
    def state_bytes(self) -> int:
        """Of a row's optimizer."""
        of_row, of_element = STATE_VALUES[self.optimizer]
        return FLOAT_BYTES * (of_row + of_element * self.columns)

    @property
    def memory(self) -> int:
        """Bytes of all tables and their optimizer."""
        return self.num_tables * self.rows * (self.row_bytes + self.state_bytes)

    def within(self, memory: float) -> "Sizes":
        """As many of the features as fit in so many bytes, which may be none."""
        fit = int(memory // replace(self, features=1).memory)
        return replace(self, features=min(self.features, fit))


def make_tables(sizes: Sizes, device: torch.device) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's batch of tables, on huge pages as in training, with all of its memory touched: values change no time."""
    place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    if device.type == "cuda":
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    made = SplitTableBatchedEmbeddingBagsCodegen(
        [(sizes.rows, sizes.columns, *place)] * sizes.num_tables,
        device=device,
        **TableOptimizer(kind=sizes.optimizer, lr=LR, eps=EPS).fused_params,
    )
    if device.type == "cpu":
        for values in (made.weights_host, made.momentum1_host):
            zeros_on_huge_pages(values.detach())
    for weight in made.split_embedding_weights():
        weight.fill_(VALUE)
    for states in made.split_optimizer_states():
        for state in states:
            state.zero_()
    return made


def draw(sizes: Sizes, ids: Ids, exponent: float, bags: int, pooling: int) -> list[Tensor]:
    """Ids of several batches, [features, rows of a batch * pooling] each; of Zipf's law, the lowest come most often."""
    rng = np.random.default_rng(SEED)
    shape = (NUM_BATCHES, sizes.features, bags * pooling)
    if ids == "uniform":
        return list(torch.from_numpy(rng.integers(sizes.rows, size=shape)))
    shares = np.cumsum(np.arange(1, sizes.rows + 1) ** -exponent)
    found = shares.searchsorted(rng.random(shape) * shares[-1]).clip(max=sizes.rows - 1)
    return list(torch.from_numpy(found))


def lookups(sizes: Sizes, drawn: Sequence[Tensor], pooling: int, device: torch.device) -> list[Lookup]:
    """Batches as tables take them: members that have tables of their own look up the same ids one after the other."""
    made = []
    for each in drawn:
        ids = each.repeat(sizes.num_tables // sizes.features, 1).flatten().to(device)
        made.append((ids, torch.arange(0, len(ids) + 1, pooling, device=device)))
    return made


@dataclass(frozen=True)
class Traffic:
    """Bytes that cross the memory's bus at least, were every one to do so once: a batch's mean.

    The lookup reads ids, offsets, and each row that they name, and writes its sums. The update reads ids, offsets and
    gradients, and reads and writes each row and its state.
    """

    unique_rows: float
    forward: float
    update: float

    @property
    def step(self) -> float:
        """Both."""
        return self.forward + self.update


def traffic(sizes: Sizes, drawn: Sequence[Tensor], pooling: int) -> Traffic:
    """Count what batches that were drawn move."""
    copies = sizes.num_tables // sizes.features
    unique = copies * sum(len(feature.unique()) for each in drawn for feature in each) / len(drawn)
    num_ids = copies * drawn[0].numel()
    bags = num_ids // pooling
    both = ID_BYTES * (num_ids + bags) + bags * sizes.row_bytes
    return Traffic(
        unique_rows=unique,
        forward=both + unique * sizes.row_bytes,
        update=both + 2 * unique * (sizes.row_bytes + sizes.state_bytes),
    )


class Case:
    """One way to look tables up and to update them; `lookup` and `update` are what takes turns.

    Args:
        forward: ids and offsets to sums, whose backward updates.
        batches: taken in turn.
        synchronize: waits for the device.
    """

    def __init__(
        self, forward: Callable[..., Tensor], batches: Sequence[Lookup], synchronize: Callable[[], None]
    ) -> None:
        self._forward, self._batches, self._synchronize = forward, itertools.cycle(batches), synchronize
        self._grad = torch.full_like(forward(*batches[0]), GRADIENT)

    def lookup(self, steps: int) -> float:
        """Seconds of so many lookups."""
        self._synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self._forward(*next(self._batches))
        self._synchronize()
        return time.perf_counter() - started

    def update(self, steps: int) -> float:
        """Seconds of so many backward passes, which update, without those of the lookups before them."""
        seconds = 0.0
        for _ in range(steps):
            sums = self._forward(*next(self._batches))
            self._synchronize()
            started = time.perf_counter()
            sums.backward(self._grad)  # type: ignore[no-untyped-call]
            self._synchronize()
            seconds += time.perf_counter() - started
        return seconds


def cases(
    tables: SplitTableBatchedEmbeddingBagsCodegen, batches: Sequence[Lookup], synchronize: Callable[[], None]
) -> dict[str, Case]:
    """FBGEMM's way, and on a CPU ours, over the same tables."""
    made = {FBGEMM: Case(tables.forward, batches, synchronize)}
    if tables.use_cpu and available("tables"):
        made[OURS] = Case(NativeTables(tables), batches, synchronize)
    return made


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Have so many processes spin on this machine's cores meanwhile."""
    with ExitStack() as held:
        for _ in range(processes):
            spinning = subprocess.Popen([sys.executable, "-c", SPIN])
            held.callback(spinning.wait)
            held.callback(spinning.kill)
        yield
