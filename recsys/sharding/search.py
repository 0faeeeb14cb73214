"""Our own proposer: thresholds on how large a shard may be, longest shards first, then moves off the slowest ranks.

For a threshold, each table takes the cheapest of its ways to be split whose shards stay below it, and shards go,
longest first, to the rank that has least to do and has room (Graham's LPT rule). Of all thresholds the plan with the
shortest step wins, and is then improved by moving shards away from the ranks that a phase waits for. All is arithmetic
on arrays of tables, so that 10,000 of them on 1,024 ranks take minutes, where proposers that build an object a shard
take hours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from recsys.config import InputError
from recsys.sharding.cluster import GIB, PHASES
from recsys.sharding.constraints import Allowed
from recsys.sharding.cost import CostModel
from recsys.sharding.options import Options, table_plan
from recsys.sharding.plan import Plan

THRESHOLDS = 16
MEMORY_WEIGHTS = (0.0, 0.5, 2.0, 8.0)
"""What a full memory counts beside a full rank, tried in turn where shards do not find room."""
MOVES = 2000


@dataclass
class Packing:
    """Shards on ranks.

    Args:
        choice: option of each table [T].
        places: of each table: a rank for each part, or a node.
        rest, node, network: seconds by phase [ranks, phases].
        bytes: [ranks, memories].
    """

    choice: np.ndarray
    places: list[Sequence[int]]
    rest: np.ndarray
    node: np.ndarray
    network: np.ndarray
    bytes: np.ndarray
    seconds: float = field(default=float("inf"))


class Search:
    """Finds plans for one workload on one cluster."""

    def __init__(self, model: CostModel, rules: Sequence[Allowed], reserve: float) -> None:
        self.model, self.rules = model, rules
        self.every = model.every_rank()
        self.capacity = model.capacity(reserve) - self.every.bytes.sum(axis=1)[0]
        self.all = Options(model, rules)
        self.world, self.local = model.group.world_size, model.group.ranks_per_node
        # What no rank can hold is not worth a try.
        self.possible = self.all.possible & (self.all.bytes <= self.capacity).all(axis=2)
        lost = np.flatnonzero(~self.possible.any(axis=1))
        if len(lost):
            raise InputError(self._too_big(int(lost[0])))

    def _too_big(self, index: int) -> str:
        table = self.model.workload.tables[index]
        options = np.flatnonzero(self.all.possible[index])
        if not len(options):
            return (
                f"table {table.name}: none of {', '.join(self.rules[index].types)} can split its {table.dim} columns "
                f"over {self.model.group.name}; allow table_wise or row_wise"
            )
        least = min(options, key=lambda option: float(self.all.bytes[index, option, 0]))
        option = self.all.options[least]
        return (
            f"nothing fits: table {table.name} ({table.weight_bytes / GIB:,.1f} GiB of weights) needs "
            f"{self.all.bytes[index, least].max() / GIB:,.1f} GiB a rank even {option.sharding_type} under the kernel "
            f"{option.kernel}, where {max(self.capacity[0], 0) / GIB:,.1f} GiB are free on {self.model.cluster.name}"
        )

    def best(self, advance: Callable[..., None] = lambda amount, note="": None) -> Plan:
        """Return the plan with the shortest step.

        Raises:
            InputError: no plan was found that fits.
        """
        best: Packing | None = None
        tried: set[bytes] = set()
        trials = [(types, threshold) for types in self._type_sets() for threshold in self._thresholds()]
        for types, threshold in trials:
            packing = self._try(types, threshold, tried)
            if packing is not None and (best is None or packing.seconds < best.seconds):
                best = packing
            advance(1 / len(trials), "" if best is None else f"step {best.seconds * 1e3:.2f} ms")
        if best is None:
            raise InputError(self._full())
        self._improve(best)
        return self._plan(best)

    def _full(self) -> str:
        least = np.where(self.possible, self.all.bytes[:, :, 0] * self.all.num_shards, np.inf).min(axis=1).sum()
        return (
            f"nothing fits: the tables need {least / GIB:,.1f} GiB in all with what they take in a step, and "
            f"{max(self.capacity[0], 0) * self.world / GIB:,.1f} GiB are free on {self.model.cluster.name}"
        )

    def _type_sets(self) -> list[frozenset[str]]:
        """All types together, and fewer, since each type that occurs costs collectives of its own."""
        everything = frozenset(option.sharding_type for option in self.all.options)
        pairs = [frozenset({"table_wise", name}) for name in everything if "table_wise" in everything]
        sets = [everything, *sorted(pairs, key=sorted), *sorted((frozenset({name}) for name in everything), key=sorted)]
        return list(dict.fromkeys(sets))

    def _thresholds(self) -> np.ndarray:
        seconds = np.where(self.possible, self.all.seconds, np.inf)
        cheapest = np.where(self.possible, self.all.total, np.inf).min(axis=1)
        low = max(cheapest.sum() / self.world / 8, float(seconds.min(axis=1).min()), 1e-12)
        high = max(float(np.where(self.possible, self.all.seconds, 0).max()), low * 1.01)
        return np.geomspace(high, low, THRESHOLDS)

    def _try(self, types: frozenset[str], threshold: float, tried: set[bytes]) -> Packing | None:
        """Pack with the cheapest options below a threshold, giving memory more weight until all find room."""
        of_types = np.array([option.sharding_type in types for option in self.all.options])
        possible = self.possible & of_types
        # Tables that are bound to other types keep what they may have.
        possible = np.where(possible.any(axis=1)[:, None], possible, self.possible)
        small = possible & (self.all.seconds <= threshold)
        smallest = np.where(possible, self.all.seconds, np.inf).argmin(axis=1)
        small[np.arange(len(small)), smallest] |= ~small.any(axis=1)
        full = self.all.bytes[:, :, 0] * self.all.num_shards / (self.capacity[0] * self.world)
        scale = np.where(small, self.all.total, np.inf).min(axis=1).sum()
        for weight in (0.0, 0.1, 1.0, 10.0, 1e3):
            choice = np.where(small, self.all.total + weight * scale * full, np.inf).argmin(axis=1)
            if choice.tobytes() in tried:
                return None
            tried.add(choice.tobytes())
            for beside in MEMORY_WEIGHTS:
                packing = self._pack(choice, beside)
                if packing is not None:
                    return packing
        return None

    def _pack(self, choice: np.ndarray, memory_weight: float) -> Packing | None:
        options, index = self.all, np.arange(len(choice))
        rest, node, network = (getattr(options, name)[index, choice] for name in ("rest", "node", "network"))
        held, seconds = options.bytes[index, choice], options.seconds[index, choice]
        reach = np.array([option.reach for option in options.options])[choice]
        packing = Packing(
            choice=choice,
            places=[()] * len(choice),
            rest=np.zeros((self.world, len(PHASES))),
            node=np.zeros((self.world, len(PHASES))),
            network=np.zeros((self.world, len(PHASES))),
            bytes=np.zeros((self.world, held.shape[1])),
        )
        everywhere = np.flatnonzero(reach == "world")
        for total, part in self._parts(packing, rest, node, network, held):
            np.add(total, part[everywhere].sum(axis=0), out=total)
        for table in everywhere:
            packing.places[table] = range(self.world)
        if (packing.bytes > self.capacity).any():
            return None
        mean = max(float((seconds * options.num_shards[choice]).sum()) / self.world, 1e-12)
        weights = seconds / mean + memory_weight * held[:, 0] / self.capacity[0]
        start = packing.bytes[:, 0].max() / self.capacity[0] * memory_weight
        for kind, places in (("node", self.world // self.local), ("rank", self.world)):
            mine = np.flatnonzero(reach == kind)
            if not len(mine):
                continue
            counts = np.array([options.options[option].columns for option in choice[mine]])
            loads = self._loads(packing, mean, memory_weight) if kind == "rank" else np.full(places, start)
            if not self._place(packing, mine, counts, weights, held, loads, (rest, node, network)):
                return None
        packing.seconds = self._seconds(packing)
        return packing

    def _loads(self, packing: Packing, mean: float, memory_weight: float) -> np.ndarray:
        seconds = (packing.rest + np.maximum(packing.node, packing.network)).sum(axis=1)
        loads: np.ndarray = seconds / mean + memory_weight * packing.bytes[:, 0] / self.capacity[0]
        return loads

    def _place(
        self,
        packing: Packing,
        tables: np.ndarray,
        counts: np.ndarray,
        weights: np.ndarray,
        held: np.ndarray,
        loads: np.ndarray,
        costs: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> bool:
        """Longest first: each part of a table to another of the places that have least to do and room for it."""
        size = self.world // len(loads)  # 1, or a node's ranks
        full = packing.bytes.reshape(len(loads), size, -1).max(axis=1)
        all_ranks: list[int] = []
        of: list[int] = []
        for at in np.lexsort((tables, -weights[tables])):
            table, parts = int(tables[at]), int(counts[at])
            busy = np.where((full + held[table] <= self.capacity).all(axis=1), loads, np.inf)
            if self.all.options[packing.choice[table]].sharding_type == "table_column_wise":
                busy = self._within_a_node(busy, parts)
            places = np.sort(np.argpartition(busy, parts - 1)[:parts]) if parts > 1 else np.array([busy.argmin()])
            if not np.isfinite(busy[places]).all():
                return False
            loads[places] += weights[table]
            full[places] += held[table]
            packing.places[table] = places.tolist()
            for place in packing.places[table]:
                all_ranks += range(place * size, (place + 1) * size)
                of += [table] * size
        ranks = np.array(all_ranks, dtype=np.int64)
        for total, part in self._parts(packing, *costs, held):
            np.add.at(total, ranks, part[of])
        return True

    def _within_a_node(self, busy: np.ndarray, parts: int) -> np.ndarray:
        """Leave only the node whose `parts` least busy ranks have least to do."""
        by_node = busy.reshape(-1, self.local)
        best = np.sort(by_node, axis=1)[:, :parts].sum(axis=1).argmin()
        within = np.full_like(by_node, np.inf)
        within[best] = by_node[best]
        return within.reshape(-1)

    @staticmethod
    def _parts(
        packing: Packing, rest: np.ndarray, node: np.ndarray, network: np.ndarray, held: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(packing.rest, rest), (packing.node, node), (packing.network, network), (packing.bytes, held)]

    def _seconds(self, packing: Packing) -> float:
        """Of a step: phases one after another, each as long as on its slowest rank."""
        calls = self.model.calls({self.all.options[option].sharding_type for option in np.unique(packing.choice)})
        every = self.every
        links = np.maximum(packing.node + every.node, packing.network + every.network)
        return float((packing.rest + every.rest + calls + links).max(axis=0).sum())

    def _improve(self, packing: Packing) -> None:
        """Move whole tables off the rank that phases wait for, as long as the step gets shorter."""
        options = self.all
        movable: dict[int, list[int]] = {}
        for table, places in enumerate(packing.places):
            option = options.options[packing.choice[table]]
            if option.reach == "rank" and option.columns == 1:
                movable.setdefault(places[0], []).append(table)
        for _ in range(MOVES):
            seconds = packing.rest + np.maximum(packing.node, packing.network)
            slowest = seconds.max(axis=0)
            source = int((seconds >= slowest * (1 - 1e-9)).astype(float).dot(slowest).argmax())
            if not self._move_one(packing, source, movable, seconds):
                return

    def _move_one(self, packing: Packing, source: int, movable: dict[int, list[int]], seconds: np.ndarray) -> bool:
        target = int(seconds.sum(axis=1).argmin())
        before = self._seconds(packing)
        for table in sorted(movable.get(source, []), key=lambda at: -self.all.seconds[at, packing.choice[at]])[:32]:
            self._shift(packing, table, source, -1)
            self._shift(packing, table, target, +1)
            after = self._seconds(packing)
            if after < before * (1 - 1e-6) and (packing.bytes[target] <= self.capacity).all():
                packing.places[table] = [target]
                packing.seconds = after
                movable[source].remove(table)
                movable.setdefault(target, []).append(table)
                return True
            self._shift(packing, table, target, -1)
            self._shift(packing, table, source, +1)
        return False

    def _shift(self, packing: Packing, table: int, rank: int, sign: int) -> None:
        at = (table, packing.choice[table])
        for total, part in self._parts(packing, self.all.rest, self.all.node, self.all.network, self.all.bytes):
            total[rank] += sign * part[at]

    def _plan(self, packing: Packing) -> Plan:
        specs = self.model.workload.tables
        return Plan(
            tables={
                spec.name: table_plan(
                    self.all.options[packing.choice[index]], spec.rows, spec.dim, packing.places[index], self.local
                )
                for index, spec in enumerate(specs)
            },
            shapes={spec.name: (spec.rows, spec.dim) for spec in specs},
            world_size=self.world,
            ranks_per_node=self.local,
            replicas=self.model.replicas,
        )
