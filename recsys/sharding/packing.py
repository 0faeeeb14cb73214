"""A packing: shards of all tables on ranks, what ranks hold and do, and where one more table would best go."""

from collections.abc import Iterable, Sequence

import numpy as np

from recsys.sharding.cost import CostModel
from recsys.sharding.options import Options, work_of

ROUNDING = 1e-9
"""Share of memory that is left to the rounding of sums."""


class Ground:
    """What all packings of a search stand on.

    Attributes:
        options: ways to split tables, priced.
        capacity: bytes that tables may fill on a rank [memories].
        every: seconds of a rank without tables [3, phases], see `Options`.
        work: of one shard [T, O, 3, phases].
    """

    def __init__(self, model: CostModel, options: Options, reserve: float) -> None:
        every = model.every_rank()
        self.options, self.model = options, model
        self.capacity = (model.capacity(reserve) - every.bytes.sum(axis=1)[0]) * (1 - ROUNDING)
        self.world, self.local = model.group.world_size, model.group.ranks_per_node
        self.reach = [option.reach for option in options.options]
        self.type_of = [option.sharding_type for option in options.options]
        self.within = np.array([option.sharding_type == "table_column_wise" for option in options.options])
        self.every, self.work = work_of(every)[0], options.work
        self._calls: dict[frozenset[str], np.ndarray] = {}

    def calls(self, types: Iterable[str]) -> np.ndarray:
        """Seconds by phase [phases] that every rank spends on starting kernels and collectives of these types."""
        key = frozenset(types)
        if key not in self._calls:
            self._calls[key] = self.model.calls(set(key))
        return self._calls[key]

    def bound(self, choice: np.ndarray) -> float:
        """Seconds of a step that no packing of these options [T] can get below."""
        index = np.arange(len(choice))
        work, shards = self.work[index, choice], self.options.num_shards[choice]
        mean = self.every + np.tensordot(shards, work, axes=1) / self.world
        longest = (self.every + work).max(axis=0)
        cores = self.model.group.hardware.cores
        slower = max(1.0, self.local / cores) if cores else 1.0  # where ranks share cores
        calls = self.calls(self.type_of[option] for option in np.unique(choice))
        return float(np.maximum((levels(mean) + calls) * slower, levels(longest) + calls).sum())

    def fits_in_all(self, choice: np.ndarray) -> bool:
        """Whether memory would be enough if ranks could share it."""
        held, shards = self.options.bytes[np.arange(len(choice)), choice], self.options.num_shards[choice]
        return bool((shards @ held <= self.capacity * self.world).all())

    def ranks(self, option: int, places: Sequence[int]) -> np.ndarray:
        """Ranks of the shards of a table."""
        if self.reach[option] != "node":
            return np.array(places, dtype=np.int64)
        return (np.array(places, dtype=np.int64)[:, None] * self.local + np.arange(self.local)).reshape(-1)


def levels(work: np.ndarray) -> np.ndarray:
    """Seconds [..., phases] of work [..., 3, phases]: the slower of both links, and all else."""
    seconds: np.ndarray = np.maximum(work[..., 0, :], work[..., 1, :]) + work[..., 2, :]
    return seconds


class Packing:
    """Tables on ranks.

    Attributes:
        choice: option of each table [T]; -1 where it has no place yet.
        places: of each table: a rank for each part of its columns, or a node, or all ranks.
        work: [ranks, 3, phases], see `Options`.
        bytes: [ranks, memories].
    """

    def __init__(self, ground: Ground) -> None:
        num_tables, num_memories = len(ground.work), len(ground.capacity)
        self.ground = ground
        self.choice = np.full(num_tables, -1)
        self.places: list[tuple[int, ...]] = [()] * num_tables
        self.work = np.repeat(ground.every[None], ground.world, axis=0)
        self.bytes = np.zeros((ground.world, num_memories))
        self.types: dict[str, int] = {}
        # No rank holds more than this, so that most shards need not look at each rank for room.
        self._fullest = np.zeros(num_memories)

    @property
    def seconds(self) -> float:
        """Of a step: phases one after another, each as long as on its slowest rank."""
        ground = self.ground
        return float(ground.model.group.shared(levels(self.work) + ground.calls(self.types)).max(axis=0).sum())

    def copy(self) -> "Packing":
        """The same, to be changed."""
        other = Packing(self.ground)
        other.choice, other.places = self.choice.copy(), list(self.places)
        other.work, other.bytes, other.types = self.work.copy(), self.bytes.copy(), dict(self.types)
        other._fullest = self._fullest.copy()
        return other

    def add(self, table: int, option: int, places: tuple[int, ...]) -> np.ndarray:
        """Put a table somewhere, and return the ranks."""
        ground = self.ground
        ranks = ground.ranks(option, places)
        self.work[ranks] += ground.work[table, option]
        self.bytes[ranks] += ground.options.bytes[table, option]
        np.maximum(self._fullest, self.bytes[ranks].max(axis=0), out=self._fullest)
        self.choice[table], self.places[table] = option, places
        kind = ground.type_of[option]
        self.types[kind] = self.types.get(kind, 0) + 1
        return ranks

    def remove(self, table: int) -> np.ndarray:
        """Take a table away, and return the ranks where it was."""
        ground, option = self.ground, int(self.choice[table])
        ranks = ground.ranks(option, self.places[table])
        self.work[ranks] -= ground.work[table, option]
        self.bytes[ranks] -= ground.options.bytes[table, option]
        self.choice[table], self.places[table] = -1, ()
        kind = ground.type_of[option]
        self.types[kind] -= 1
        if not self.types[kind]:
            del self.types[kind]
        return ranks

    def has_room(self, table: int, option: int) -> np.ndarray | bool:
        """Whether each rank has room for a shard [ranks]; a plain True where all of them do."""
        held, capacity = self.ground.options.bytes[table, option], self.ground.capacity
        if (self._fullest + held <= capacity).all():
            return True
        room: np.ndarray = (self.bytes + held <= capacity).all(axis=1)
        return room

    def best_places(self, table: int, option: int, scores: np.ndarray) -> tuple[int, ...] | None:
        """Where a table goes at the least score, each part to another place, where there is room; None if nowhere.

        Args:
            table: has no place yet.
            option: that it gets.
            scores: of each rank [ranks].
        """
        ground = self.ground
        reach, parts = ground.reach[option], ground.options.options[option].columns
        room = self.has_room(table, option)
        if reach == "world":
            return tuple(range(ground.world)) if np.all(room) else None
        if room is not True:
            scores = np.where(room, scores, np.inf)
        if reach == "node":
            scores = scores.reshape(-1, ground.local).sum(axis=1)
        elif ground.within[option]:
            scores = _within_a_node(scores.reshape(-1, ground.local), parts)
        if parts == 1:
            place = int(scores.argmin())
            return (place,) if np.isfinite(scores[place]) else None
        places = np.sort(np.argpartition(scores, parts - 1)[:parts])
        return tuple(places.tolist()) if np.isfinite(scores[places]).all() else None


def _within_a_node(scores: np.ndarray, parts: int) -> np.ndarray:
    """Leave [nodes, local] only the node whose `parts` least scores are least in all, as [ranks]."""
    best = np.sort(scores, axis=1)[:, :parts].sum(axis=1).argmin()
    within = np.full_like(scores, np.inf)
    within[best] = scores[best]
    return within.reshape(-1)
