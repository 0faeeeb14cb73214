"""Loader: prepared Parquet to batches, shuffled, sharded over ranks, resumable at any step.

An epoch is one order of all rows: row groups in an order drawn from (seed, epoch), rows within a group permuted by
(seed, epoch, group). That order is cut in `slots` equal spans, and every global batch takes its share from each span,
so rows of many groups meet in a batch while only `slots` groups are open. Rank r of R reads slots
[r S / R, (r+1) S / R). So every row is read by exactly one rank, all ranks make the same number of steps, any
(epoch, step) is reached by arithmetic, and the rows of a global batch are the same for every R that divides `slots`.
"""

import atexit
import itertools
import queue
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from recsys.config import InputError
from recsys.data.batch import Batch, BatchMaker
from recsys.data.groups import CorruptGroupError, Layout, RowGroup, row_groups
from recsys.data.multihot import MLPERF_SIZES, MultiHot
from recsys.data.order import Cursor, ReadAhead, pieces_of
from recsys.data.schema import Schema

PREFETCHED_BATCHES = 4
# Batches are filled several at once, so that long stretches are copied; this much stays in a CPU's cache.
FILLED_BYTES = 8 * 2**20
# Up to so many row groups are all kept until their last use; of more, those that two slots share are decoded twice.
KEPT_GROUPS_A_SLOT = 2


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How training rows are read."""

    slots: int = 48
    """Row groups that are open at once over all ranks; a multiple of the ranks."""
    seed: int = 0
    """Seed of the order of rows, and of the ids that multi_hot adds."""
    workers: int = 1
    """Threads of each rank that decode row groups ahead; batches do not depend on it."""
    multi_hot: Literal["none", "uniform", "pareto"] = "none"
    """Expand the one id of each feature to several while loading, drawn from this distribution."""
    multi_hot_sizes: tuple[int, ...] = ()
    """Ids a row of each feature, in field order; none means those of MLPerf's DLRM-DCNv2."""
    on_corrupt: Literal["fatal", "skip"] = "fatal"
    """What a row group does whose bytes were damaged after they were prepared. fatal: stop, and name it. skip: its rows
    get weight 0, and are counted; steps and all other rows stay the same, and a batch's loss is still divided by all of
    its rows."""

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("seed", 0), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.multi_hot_sizes and self.multi_hot == "none":
            raise ValueError("multi_hot_sizes without multi_hot; name uniform or pareto")


class Loader:
    """Yields the batches of one rank.

    Args:
        folder: a prepared folder.
        split: train, valid or test.
        batch_size: rows of a global batch, over all ranks; a multiple of `world_size`.
        rank, world_size: which part of every global batch this loader yields.
        config: slots, seed, threads and multi-hot ids.
        shuffle: False keeps the order of the files.
        tail: what becomes of the rows that do not fill a last global batch: "drop" leaves them out (others each
            epoch, by the shuffle), "pad" takes one step more and fills up the last spans with rows of weight 0.

    Raises:
        InputError: the split is missing, does not fit the schema, or has fewer rows than one batch.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        config: LoaderConfig | None = None,
        shuffle: bool = True,
        tail: Literal["drop", "pad"] = "drop",
    ) -> None:
        config = config or LoaderConfig()
        if batch_size < 1 or batch_size % world_size:
            right = max(round(batch_size / world_size), 1) * world_size
            raise InputError(f"batch size {batch_size} cannot be shared by {world_size} ranks equally; {right} can")
        self.schema = Schema.load(folder)
        self.groups = row_groups(folder, split, self.schema)
        self.num_rows = sum(group.num_rows for group in self.groups)
        self.batch_size = batch_size
        self.local_batch_size = batch_size // world_size
        self.seed, self.workers = config.seed, config.workers
        self.on_corrupt = config.on_corrupt
        self.skipped: dict[str, int] = {}
        """Where the row groups stand that were left out so far, and how many rows each has; what this rank has read."""
        self.shuffle = shuffle
        self.steps_per_epoch = self.num_rows // batch_size if tail == "drop" else -(-self.num_rows // batch_size)
        if not self.steps_per_epoch:
            raise InputError(
                f"{folder / split} has {self.num_rows:,} rows, fewer than one global batch of {batch_size:,}; "
                f"lower the batch size to {self.num_rows} at most"
            )
        self._slots = _slots(config.slots if shuffle else world_size, batch_size, rank, world_size)
        self._layout = Layout(self.schema)
        self._memory: list[np.ndarray] = []
        multi_hot = None
        if config.multi_hot != "none":
            multi_hot = MultiHot(self.schema, config.multi_hot_sizes or MLPERF_SIZES, config.multi_hot, config.seed)
        self._maker = BatchMaker(self._layout, self.local_batch_size, multi_hot)

    @property
    def tail_rows(self) -> int:
        """Rows that an epoch leaves out: fewer than a global batch with tail "drop", none with "pad"."""
        return max(self.num_rows - self.steps_per_epoch * self.batch_size, 0)

    @property
    def tail_share(self) -> float:
        """Share of all rows that an epoch leaves out."""
        return self.tail_rows / self.num_rows

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of one epoch from `first_step` on, put together in the calling thread."""
        width, rows = self._layout.width, self.local_batch_size
        at_once = max(FILLED_BYTES // (4 * width * rows), 1)
        cursors = self._cursors(epoch, first_step)
        openings = [
            (call, index, use) for index, cursor in enumerate(cursors) for call, use in cursor.openings(at_once)
        ]
        # Sorting is stable: within one call of `fill`, a cursor's pieces keep their order.
        uses = [use for _, _, use in sorted(openings, key=lambda opening: opening[:2])]
        memory = self._memory.pop() if self._memory else self._new_memory()
        with ReadAhead(partial(self._decode, epoch), uses, self.workers, memory) as groups:
            for step in range(first_step, self.steps_per_epoch, at_once):
                num_steps = min(at_once, self.steps_per_epoch - step)
                blocks = self._maker.empty(num_steps, width * rows, dtype=torch.int32)
                views = self._layout.views(blocks.numpy())
                for cursor in cursors:
                    cursor.fill(views, num_steps, groups)
                yield from self._maker.batches(blocks)
        self._memory.append(memory)

    def stream(self, step: int = 0) -> Iterator[Batch]:
        """Yield batches without end from global step `step` on, epoch after epoch, prefetched in a thread."""
        epoch, first_step = divmod(step, self.steps_per_epoch)

        def batches() -> Iterator[Batch]:
            yield from self.epoch(epoch, first_step)
            for later in itertools.count(epoch + 1):
                yield from self.epoch(later)

        return prefetch(batches())

    def once(self) -> Iterator[Batch]:
        """Yield every batch of epoch 0, prefetched in a thread."""
        return prefetch(self.epoch(0))

    def _cursors(self, epoch: int, first_step: int) -> list[Cursor]:
        """One a slot of this rank."""
        order = np.arange(len(self.groups))
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        sizes = np.array([group.num_rows for group in self.groups])
        steps, first_row = self.steps_per_epoch, self._slots[0][0]
        pieces = [pieces_of(order, sizes, steps * begin, steps * end) for begin, end in self._slots]
        kept = len({piece.group for own in pieces for piece in own}) <= KEPT_GROUPS_A_SLOT * len(self._slots)
        cursors = []
        for number, (begin, end) in enumerate(self._slots):
            rows = range(begin - first_row, end - first_row)
            copy = 0 if kept else number
            cursors.append(Cursor(self._layout, pieces[number], rows, first_step * len(rows), copy))
        return cursors

    def _new_memory(self) -> np.ndarray:
        """Memory for all blocks of an epoch at once: in one piece, the system gives it in huge pages."""
        num_blocks = KEPT_GROUPS_A_SLOT * len(self._slots) + ReadAhead.AHEAD * self.workers
        largest = max(group.num_rows for group in self.groups)
        return np.empty((num_blocks, self._layout.width * largest), dtype=np.int32)

    def _decode(self, epoch: int, group: int, memory: np.ndarray) -> np.ndarray:
        """Block of one row group, its rows permuted."""
        source = self.groups[group]
        order = None
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, group]).permutation(source.num_rows)
        try:
            return self._layout.decode(source, order, memory)
        except CorruptGroupError as error:
            if self.on_corrupt == "fatal":
                raise
            return self._left_out(source, error, memory)

    def _left_out(self, group: RowGroup, error: CorruptGroupError, memory: np.ndarray) -> np.ndarray:
        """Block of a row group that cannot be had: rows of zeros have weight 0, as those that fill up a batch."""
        where = f"{group.path}, row group {group.index}"
        if where not in self.skipped:  # it may be read again: for another slot, or in another epoch
            self.skipped[where] = group.num_rows
            print(f"recsys: {error.problem}: its {group.num_rows:,} rows get weight 0", file=sys.stderr)  # noqa: T201
        block = memory[: self._layout.width * group.num_rows]
        block[:] = 0
        return block


def _slots(num_slots: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """List a rank's slots as (begin, end): each takes rows [begin, end) of every global batch.

    Slot k of S has rows [k B / S, (k+1) B / S): whole numbers, also where S does not divide B. Slots that get no row
    are left out.
    """
    if num_slots % world_size:
        raise InputError(
            f"{num_slots} slots cannot be shared by {world_size} ranks equally, and other slots mean other batches; "
            f"use --loader.slots {-(-num_slots // world_size) * world_size} from the first step of a run on"
        )
    shares = [(k * batch_size // num_slots, (k + 1) * batch_size // num_slots) for k in range(num_slots)]
    first, last = (r * batch_size // world_size for r in (rank, rank + 1))
    return [(begin, end) for begin, end in shares if end > begin and first <= begin < last]


def prefetch(batches: Iterator[Batch], depth: int = PREFETCHED_BATCHES) -> Iterator[Batch]:
    """Run `batches` in a thread that stays up to `depth` batches ahead; its exceptions arrive here.

    Closing the returned generator ends the thread, and so does the end of the process: a thread that decodes while the
    interpreter goes down would abort it.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)
        finally:
            if isinstance(batches, Generator):
                batches.close()  # and with it the threads that decode

    thread = threading.Thread(target=work, name="loader", daemon=True)

    def end() -> None:
        stopped.set()
        thread.join()

    thread.start()
    atexit.register(end)
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        end()
        atexit.unregister(end)
