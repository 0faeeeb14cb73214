"""Labelled rows in the order of their scores, over all ranks of a job, a bounded part of them at a time.

Rows are kept where they arise, in chunks that are sorted one by one. Asked for their order, ranks agree on splitters of
about equally many rows, of which they know the weight below each; then each bucket between two splitters goes to one
rank, some at a time, which merges it. Equal scores are in one bucket, whatever their number: what a rank sends of them
is one line of sums. So metrics that need an order are exact, and no rank holds more than its own rows (a key and 4
bytes each) and a few buckets.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import DTypeLike

CHUNK_ROWS = 2**20
"""Rows that are sorted together when so many are there."""
BUCKET_ROWS = 2**18
SAMPLES = 1024
"""Scores that a chunk gives to the choice of splitters: buckets differ by 2^20 / 1024 rows a chunk at most."""

POSITIVE, NEGATIVE, POSITIVE_SQUARES, NEGATIVE_SQUARES, ROWS = range(5)
"""Columns of sums: weight of positive and of negative rows, their squared weights, and their number."""
WIDTH = 5


@dataclass(frozen=True)
class Bucket:
    """All rows of the job whose scores lie between two splitters, those of one score together."""

    index: int
    """Place among the buckets, the lowest scores first."""
    keys_G: np.ndarray
    """Scores, rising, each once; there may be none."""
    sums_G5: np.ndarray
    below: np.ndarray
    """Positive and negative weight of lower buckets [2]."""
    totals: np.ndarray
    """Positive and negative weight of all buckets [2]."""

    @property
    def lower(self) -> np.ndarray:
        """Positive and negative weight of all rows with lower scores [G, 2]."""
        weights_G2 = self.sums_G5[:, : NEGATIVE + 1]
        lower_G2: np.ndarray = self.below + np.cumsum(weights_G2, axis=0) - weights_G2
        return lower_G2


class RankedRows:
    """Rows of this rank: a key to sort by, a label and a weight above 0.

    Args:
        key: type of the keys: float32, float64 or an unsigned integer. Keys are finite or infinite, never nan.
        weight: float32 or float64.
    """

    def __init__(self, key: DTypeLike = np.float32, weight: DTypeLike = np.float32) -> None:
        self._key, self._weight = np.dtype(key), np.dtype(weight)
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []
        self._open: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_open = 0

    def add(self, keys: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> None:
        """Take rows; labels are 0 or 1, rows of weight 0 count nowhere."""
        for begin in range(0, len(keys), CHUNK_ROWS):
            part = slice(begin, begin + CHUNK_ROWS)
            own = weights[part].astype(self._weight)
            counts = own > 0
            # A weight's sign keeps the label.
            signed = np.where(labels[part] > 0, own, -own)[counts]
            self._open.append((keys[part][counts].astype(self._key), signed))
            self._num_open += len(signed)
            if self._num_open >= CHUNK_ROWS:
                self._close()

    def _close(self) -> None:
        """Sort what has come since the last chunk, and cut it in chunks."""
        keys, signed = (np.concatenate(parts) for parts in zip(*self._open, strict=True))
        order = np.argsort(keys)
        self._chunks.append((keys[order], signed[order]))
        self._open, self._num_open = [], 0

    def buckets(self, group: dist.ProcessGroup | None = None) -> Iterator[Bucket]:
        """Yield this rank's buckets in rising order; all ranks of the group call it, and get as many each.

        Args:
            group: whose ranks have rows each; without one, this process has all of them.
        """
        if self._num_open:
            self._close()
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        splitters = self._splitters(group, size)
        cuts = [_cuts(keys, splitters) for keys, _ in self._chunks]
        weights = self._weights(cuts, len(splitters) + 1, group)
        below = np.cumsum(weights, axis=0) - weights
        for first in range(0, len(splitters) + 1, size):
            mine = [self._bucket(cuts, index) for index in range(first, first + size)]
            keys, sums = exchange(mine, group) if group else mine[0]
            index = first + rank
            yield Bucket(index, *_merged(keys, sums), below[index], weights.sum(axis=0))

    def _splitters(self, group: dist.ProcessGroup | None, size: int) -> np.ndarray:
        """Keys at which buckets begin but the first, rising; one fewer than a multiple of the ranks."""
        samples = [keys[:: max(len(keys) // SAMPLES, 1)] for keys, _ in self._chunks]
        shares = [
            np.full(len(part), len(keys) / len(part)) for part, (keys, _) in zip(samples, self._chunks, strict=True)
        ]
        found = [np.concatenate([np.empty(0, self._key), *samples]), np.concatenate([np.empty(0), *shares])]
        if group:
            gathered: list = [None] * size
            dist.all_gather_object(gathered, found, group)
            found = [np.concatenate(parts) for parts in zip(*gathered, strict=True)]
        keys, rows = found
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], np.cumsum(rows[order])
        num_buckets = -(-int(rows[-1] if len(rows) else 0) // BUCKET_ROWS)
        num_buckets = max(-(-num_buckets // size), 1) * size
        if not len(keys):
            return np.zeros(num_buckets - 1, self._key)
        wanted = rows[-1] / num_buckets * np.arange(1, num_buckets)
        # A key that many rows share may come twice: buckets between its places are empty.
        return keys[np.searchsorted(rows, wanted)]

    def _weights(self, cuts: list[np.ndarray], num_buckets: int, group: dist.ProcessGroup | None) -> np.ndarray:
        """Positive and negative weight of every bucket over all ranks [buckets, 2]."""
        weights = np.zeros((num_buckets, 2))
        for (_, signed), at in zip(self._chunks, cuts, strict=True):
            for column, own in enumerate((np.maximum(signed, 0), np.maximum(-signed, 0))):
                running = np.concatenate([[0.0], np.cumsum(own, dtype=np.float64)])
                weights[:, column] += np.diff(running[at])
        if group:
            dist.all_reduce(torch.from_numpy(weights), group=group)
        return weights

    def _bucket(self, cuts: list[np.ndarray], index: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and sums of this rank's rows in a bucket; each chunk's are sorted."""
        parts = [(np.empty(0, self._key), np.empty((0, WIDTH)))]
        for (keys, signed), at in zip(self._chunks, cuts, strict=True):
            rows = slice(at[index], at[index + 1])
            if at[index] < at[index + 1]:
                parts.append(_summed(keys[rows], _sums(signed[rows])))
        keys, sums = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return keys, sums


def _cuts(keys: np.ndarray, splitters: np.ndarray) -> np.ndarray:
    """Where buckets begin and end in sorted keys [buckets + 1]."""
    return np.concatenate([[0], np.searchsorted(keys, splitters), [len(keys)]])


def _sums(signed: np.ndarray) -> np.ndarray:
    """Sums of single rows [N, 5]."""
    sums = np.empty((len(signed), WIDTH))
    np.maximum(signed, 0, out=sums[:, POSITIVE])
    np.maximum(-signed, 0, out=sums[:, NEGATIVE])
    np.square(sums[:, :POSITIVE_SQUARES], out=sums[:, POSITIVE_SQUARES:ROWS])
    sums[:, ROWS] = 1
    return sums


def _summed(keys: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up the lines of each key; keys are sorted."""
    is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
    if is_first.all():
        return keys, sums
    first = np.flatnonzero(is_first)
    return keys[first], np.add.reduceat(sums, first, axis=0)


def _merged(keys: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(keys):
        return keys, sums
    order = np.argsort(keys, kind="stable")
    return _summed(keys[order], sums[order])


def exchange(parts: list[tuple[np.ndarray, np.ndarray]], group: dist.ProcessGroup) -> tuple[np.ndarray, np.ndarray]:
    """Send part i, keys [N] and sums [N, 5], to rank i; returns what all ranks sent to this one."""
    lengths = torch.tensor([len(keys) for keys, _ in parts])
    theirs = torch.empty_like(lengths)
    dist.all_to_all_single(theirs, lengths, group=group)
    received = []
    for column in (0, 1):
        # Keys travel as bytes: gloo knows no unsigned integers.
        sent = np.concatenate([part[column] for part in parts])
        width = sent.itemsize * (sent.shape[1] if sent.ndim > 1 else 1)
        found = torch.empty(int(theirs.sum()) * width, dtype=torch.uint8)
        outgoing = torch.from_numpy(sent.reshape(-1).view(np.uint8))
        sizes = ((theirs * width).tolist(), (lengths * width).tolist())
        dist.all_to_all_single(found, outgoing, *sizes, group=group)
        received.append(found.numpy().view(sent.dtype).reshape(-1, *sent.shape[1:]))
    return received[0], received[1]
