"""Loader: prepared Parquet to batches, shuffled, sharded over ranks, resumable at any step.

An epoch is one order of all rows: row groups in an order drawn from (seed, epoch), rows within a group permuted by
(seed, epoch, group). That order is cut in `slots` equal spans, and every global batch takes its share from each span,
so rows of many groups meet in a batch while only `slots` groups are open. Rank r of R reads slots
[r S / R, (r+1) S / R). So every row is read by exactly one rank, all ranks make the same number of steps, any
(epoch, step) is reached by arithmetic, and the rows of a global batch are the same for every R that divides `slots`.
"""

import itertools
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.schema import Schema

PREFETCHED_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How training rows are read."""

    slots: int = 48
    """Row groups that are open at once over all ranks; rounded up to a multiple of the ranks."""
    seed: int = 0
    """Seed of the order of rows."""

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class RowGroup:
    """One row group of a split, and where it stands in the order of its files."""

    path: Path
    index: int
    num_rows: int


class Loader:
    """Yields the batches of one rank.

    Args:
        folder: a prepared folder.
        split: train, valid or test.
        batch_size: rows of a global batch, over all ranks; a multiple of `world_size`.
        rank, world_size: which part of every global batch this loader yields.
        config: slots and seed.
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
        self.groups = _row_groups(folder, split, self.schema)
        self.num_rows = sum(group.num_rows for group in self.groups)
        self.batch_size = batch_size
        self.local_batch_size = batch_size // world_size
        self.seed = config.seed
        self.shuffle = shuffle
        self.steps_per_epoch = self.num_rows // batch_size if tail == "drop" else -(-self.num_rows // batch_size)
        if not self.steps_per_epoch:
            raise InputError(
                f"{folder / split} has {self.num_rows:,} rows, fewer than one global batch of {batch_size:,}; "
                f"lower the batch size to {self.num_rows} at most"
            )
        # Slot k takes rows [k B / S, (k+1) B / S) of every global batch: whole numbers, also where S does not divide B.
        slots = config.slots if shuffle else world_size
        if slots % world_size:
            raise InputError(
                f"{slots} slots cannot be shared by {world_size} ranks equally, and other slots mean other batches; "
                f"use --loader.slots {-(-slots // world_size) * world_size} from the first step of a run on"
            )
        shares = [k * batch_size // slots for k in range(slots + 1)]
        own = range(rank * slots // world_size, (rank + 1) * slots // world_size)
        self._slots = [(shares[k], shares[k + 1]) for k in own]
        self._one_each = _OneEach(self.schema, self.local_batch_size)
        self._files: dict[Path, pq.ParquetFile] = {}

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of one epoch from `first_step` on, in the calling thread."""
        order, starts = self._order(epoch)
        cursors = [
            (
                end - begin,
                _Cursor(self, epoch, order, starts, self.steps_per_epoch * begin + first_step * (end - begin)),
            )
            for begin, end in self._slots
        ]
        num_columns = 1 + len(self.schema.dense) + len(self.schema.sparse)
        for _ in range(first_step, self.steps_per_epoch):
            block = np.zeros((num_columns, self.local_batch_size), dtype=np.int32)
            weights = np.zeros(self.local_batch_size, dtype=np.float32)
            at = 0
            for share, cursor in cursors:
                weights[at : at + cursor.copy_rows(block[:, at : at + share])] = 1.0
                at += share
            batch = self._one_each.batch(block, weights)
            # Copies from page-locked memory to a CUDA device overlap with its work.
            yield batch.pin_memory() if torch.cuda.is_available() else batch

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

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups of an epoch in reading order, and the position in that order at which each starts."""
        order = np.arange(len(self.groups))
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        starts = np.cumsum([0, *(self.groups[i].num_rows for i in order)])
        return order, starts

    def read(self, group: int, epoch: int) -> np.ndarray:
        """Decode one row group to int32 [columns, rows]: label, dense (bits of float32), sparse; rows permuted."""
        source = self.groups[group]
        columns = [self.schema.labels[0], *self.schema.dense, *self.schema.sparse]
        if source.path not in self._files:
            self._files[source.path] = pq.ParquetFile(source.path)
        table = self._files[source.path].read_row_group(source.index, columns=columns, use_threads=False)
        rows = np.arange(source.num_rows)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch, group]).shuffle(rows)
        block = np.empty((len(columns), source.num_rows), dtype=np.int32)
        for name, out in zip(columns, block, strict=True):
            values = table[name].to_numpy()
            kind = np.float32 if name in self.schema.dense else np.int32
            values = values.astype(kind, copy=False).view(np.int32)
            np.take(values, rows, out=out)
        return block


class _Cursor:
    """Reads one slot's span of an epoch, from a position in the order of rows; holds one row group open."""

    def __init__(self, loader: Loader, epoch: int, order: np.ndarray, starts: np.ndarray, position: int) -> None:
        self.loader, self.epoch, self.order, self.starts = loader, epoch, order, starts
        self.position = position
        self.open = -1
        self.block = np.empty((0, 0), dtype=np.int32)

    def copy_rows(self, out: np.ndarray) -> int:
        """Fill `out` [columns, n] with the next n rows; returns how many there were before the data ended."""
        done = 0
        while done < out.shape[1] and self.position < self.starts[-1]:
            index = int(np.searchsorted(self.starts, self.position, side="right")) - 1
            if index != self.open:
                self.open, self.block = index, self.loader.read(int(self.order[index]), self.epoch)
            begin = self.position - int(self.starts[index])
            taken = min(out.shape[1] - done, self.block.shape[1] - begin)
            out[:, done : done + taken] = self.block[:, begin : begin + taken]
            done += taken
            self.position += taken
        return done


class _OneEach:
    """Makes batches of features that have one id a row; their lengths and offsets never change and are built once."""

    def __init__(self, schema: Schema, batch_size: int) -> None:
        self.features = list(schema.sparse)
        self.num_dense = len(schema.dense)
        num_ids = len(self.features) * batch_size
        self.lengths = torch.ones(num_ids, dtype=torch.int32)
        self.offsets = torch.arange(num_ids + 1, dtype=torch.int32)
        self.per_key = [batch_size] * len(self.features)
        self.batch_size = batch_size

    def batch(self, block: np.ndarray, weights: np.ndarray) -> Batch:
        """Turn a block int32 [columns, B] into a batch, copying the dense columns alone."""
        dense = block[1 : 1 + self.num_dense].view(np.float32)
        ids = torch.from_numpy(block[1 + self.num_dense :].reshape(-1))
        return Batch(
            dense=torch.from_numpy(np.ascontiguousarray(dense.T)),
            sparse=KeyedJaggedTensor(
                keys=self.features,
                values=ids,
                lengths=self.lengths,
                offsets=self.offsets,
                stride=self.batch_size,
                length_per_key=self.per_key,
            ),
            labels=torch.from_numpy(block[0].astype(np.float32)),
            weights=torch.from_numpy(weights),
        )


def prefetch(batches: Iterator[Batch], depth: int = PREFETCHED_BATCHES) -> Iterator[Batch]:
    """Run `batches` in a thread that stays up to `depth` batches ahead; its exceptions arrive here.

    Closing the returned generator ends the thread.
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

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _row_groups(folder: Path, split: str, schema: Schema) -> list[RowGroup]:
    """List the row groups of a split in file order, having checked that its columns are the schema's."""
    paths = sorted((folder / split).glob("*.parquet"))
    if not paths:
        raise InputError(f"{folder / split}: no Parquet file in it; prepare again, or with another split rule")
    groups = []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a whole Parquet file ({error}); prepare again") from None
        missing = [c for c in (*schema.labels, *schema.dense, *schema.sparse) if c not in file.schema_arrow.names]
        if missing:
            raise InputError(f"{path}: column {missing[0]!r} of schema.json is not in it; prepare again")
        _check_ids(path, file.metadata, schema)
        groups += [RowGroup(path, i, file.metadata.row_group(i).num_rows) for i in range(file.num_row_groups)]
    if not sum(group.num_rows for group in groups):
        raise InputError(f"{folder / split}: no row in it; prepare a longer log, or with another split rule")
    return groups


def _check_ids(path: Path, metadata: pq.FileMetaData, schema: Schema) -> None:
    """Compare the largest id of each column, which Parquet notes per row group, with the schema's size.

    Nothing else would tell: TorchRec maps an id beyond a table's end to row 0.
    """
    columns = {metadata.schema.column(i).name: i for i in range(metadata.num_columns)}
    for feature, num_ids in schema.sparse.items():
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(columns[feature]).statistics
            if (
                statistics is not None
                and statistics.has_min_max
                and not 0 <= statistics.min <= statistics.max < num_ids
            ):
                raise InputError(
                    f"{path}, row group {group}: column {feature} holds ids {statistics.min} to {statistics.max}, "
                    f"but schema.json gives it {num_ids} ids; prepare again"
                )
