"""The map of one feature, from ids of 64 bits to rows of a table: which ids have a row of their own, and which row.

An id is counted whenever it is seen in training, over all ranks and the whole batch. Seen more often than `admission`,
it gets a free row of its bucket (see `dynamic_kernels`), or waits for one. When the map settles, ids that wait take the
rows of ids with lower scores: how often they were seen (lfu), or at which step last (lru). Counts of ids without a row
are kept for as many ids as there are rows; beyond that, those with the lowest are forgotten and begin anew.
"""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from recsys.embeddings.config import Eviction

RESERVED_ROWS = 2
"""Row 0 is that of id 0, row 1 that of all ids without a row of their own."""


@dataclass(frozen=True, kw_only=True)
class MapRules:
    """What decides what a map does, beside the ids that it sees."""

    rows: int
    admission: int
    eviction: Eviction
    interval: int
    buckets: int

    def of_feature(self, num_ids: int) -> "MapRules":
        """The same with no more rows than a feature of so many ids can use, however they fall into buckets."""
        return MapRules(
            rows=min(self.rows, self.buckets * num_ids),
            admission=self.admission,
            eviction=self.eviction,
            interval=self.interval,
            buckets=self.buckets,
        )


class IdMap:
    """Some consecutive buckets of the map of one feature: those of a rank, or all.

    Args:
        rules: of the whole map.
        first, num_buckets: which buckets.
    """

    def __init__(self, rules: MapRules, first: int, num_buckets: int) -> None:
        self.rules, self.first, self.num_buckets = rules, first, num_buckets
        numbers = np.arange(first, first + num_buckets + 1)
        self.bounds = RESERVED_ROWS + numbers * rules.rows // rules.buckets
        most_rows = -(-rules.rows // rules.buckets)
        self.num_waiting = most_rows
        """Ids without a row that a bucket keeps beside those with one."""
        self.limit = most_rows + self.num_waiting
        num_places = self.limit * 2 + 1
        self.entries = torch.zeros(num_buckets, num_places, 2, dtype=torch.int64)
        """What a checkpoint holds; the rest follows from it."""
        self._used, self._num_free = (np.zeros(num_buckets, dtype=np.int64) for _ in range(2))
        self._free = np.zeros((num_buckets, most_rows), dtype=np.int32)
        self._is_new = True

    @cached_property
    def _kernels(self) -> ModuleType:
        from recsys.embeddings import dynamic_kernels  # noqa: PLC0415  (numba)

        return dynamic_kernels

    def find(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Write the row of each id to `rows`, int32, changing nothing."""
        self._kernels.find(ids, self.rules.buckets, self.first, self.entries.numpy(), rows)

    def learn(self, ids: np.ndarray, rows: np.ndarray, step: int) -> None:
        """Count the ids of a whole batch, of all ranks, admit some, and write the row of each to `rows`, int32.

        Args:
            ids: int32 or int64, in the order of the batch, all in these buckets, but 0.
            rows: as long.
            step: now, from 1.
        """
        kernels, entries, rules = self._kernels, self.entries.numpy(), self.rules
        self._follow()
        most = self.limit - self.num_waiting // 8
        if self._used.max(initial=0) > most:
            kernels.forget(entries, self._used, most, self.num_waiting // 4, step)
        seen_at = step if rules.eviction == "lru" else 0
        places = np.empty(len(ids), dtype=np.int64)
        kernels.count(ids, rules.buckets, self.first, entries, self._used, self.limit, seen_at, places)
        kernels.admit(ids, places, entries, self._free, self._num_free, rules.admission, seen_at, rows)

    def settle(self, step: int) -> np.ndarray:
        """Give rows to ids that wait for one; returns the rows that were another id's before, int32."""
        self._follow()
        evicted = np.empty(int(self.bounds[-1] - self.bounds[0]), dtype=np.int32)
        is_evicting = self.rules.eviction != "none"
        num_evicted = self._kernels.settle(
            self.entries.numpy(), self._used, self._free, self._num_free, is_evicting, step, evicted
        )
        return evicted[:num_evicted]

    def changed(self) -> None:
        """Tell that `entries` were written to."""
        self._is_new = True

    def _follow(self) -> None:
        """Find out what follows from entries that are new."""
        if self._is_new:
            entries = self.entries.numpy()
            self._kernels.free_rows(entries, self.bounds, self._used, self._free, self._num_free)
            self._is_new = False


def resized(entries: Tensor, old: MapRules, new: MapRules) -> tuple[Tensor, Tensor]:
    """Take the ids of a map over into one of another size: of each bucket those with the highest scores.

    Args:
        entries: of all buckets.
        old: their rules.
        new: the same but for `rows`.

    Returns:
        Entries of all buckets, and the row of each id that has one, before and after, int64 [ids, 2].
    """
    after = IdMap(new, 0, new.buckets)
    keys, marks = entries.numpy().reshape(-1, 2).T
    places = np.flatnonzero(keys)
    buckets, keys, marks = places // entries.shape[1], keys[places], marks[places]
    states, scores = marks >> 32, marks & 0xFFFFFFFF
    has_row = states >= RESERVED_ROWS
    most = np.where(has_row, np.diff(after.bounds)[buckets], after.num_waiting)
    # Of ids without a row, those that wait outrank those that are counted.
    order = np.lexsort((-scores, -np.where(has_row, 0, states), has_row, buckets))
    kept = np.sort(order[_number_within(buckets[order], has_row[order]) < most[order]])
    residents = kept[has_row[kept]]
    rows = after.bounds[buckets[residents]] + _number_within(buckets[residents])
    pairs = torch.from_numpy(np.stack([states[residents], rows], axis=1))
    marks[residents] = (rows << 32) | scores[residents]
    after._kernels.enter(keys[kept], marks[kept], new.buckets, after.entries.numpy())
    return after.entries, pairs


def _number_within(*groups: np.ndarray) -> np.ndarray:
    """Count neighbours of equal groups from 0."""
    size = len(groups[0])
    is_first = np.ones(size, dtype=np.bool_)
    is_first[1:] = np.logical_or.reduce([group[1:] != group[:-1] for group in groups])
    numbers = np.arange(size)
    return numbers - np.maximum.accumulate(np.where(is_first, numbers, 0))
