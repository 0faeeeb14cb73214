"""Our own proposer: thresholds on how large a shard may be, largest shards first, then one table after another anew.

For a threshold, each table takes the cheapest of its ways to be split whose shards stay below it, and shards go,
largest first, to the rank that has least to do in the phases that they take longest in, and has room. Of all thresholds
the shortest steps are improved further, see `improve`. All is arithmetic on arrays of ranks, so that 10,000 tables on
1,024 ranks take a minute or two, where proposers that make an object of each shard take days.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recsys.config import InputError
from recsys.sharding.cluster import GIB
from recsys.sharding.constraints import Allowed
from recsys.sharding.cost import CostModel
from recsys.sharding.improve import Budget, improve, shake
from recsys.sharding.options import Options, table_plan
from recsys.sharding.packing import Ground, Packing, levels
from recsys.sharding.plan import Plan
from recsys.sharding.room import find_room

THRESHOLDS = 16
LESS_MEMORY = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e3)
"""What a memory that is full in all counts beside the tables' time when they choose how to be split, tried in turn."""
FULL_RANKS = (0.0, 0.5, 4.0)
"""What a full memory counts beside a full rank when shards choose their places, tried in turn."""
PLACEMENTS = 2_000_000
"""Tables that packings may place in all before the search is content with what it has."""
ATTEMPTS = 60_000
"""Options that the improvement tries."""
SHAKES = 20_000
"""Options that are tried in the end, with several tables taken out at once."""
PACKING_SHARE = 0.6
"""Of the progress that is told of; the rest is improvement."""


class Search:
    """Finds plans for one workload on one cluster."""

    def __init__(self, model: CostModel, rules: Sequence[Allowed], reserve: float) -> None:
        self.model, self.rules = model, rules
        self.all = Options(model, rules)
        self.ground = Ground(model, self.all, reserve)
        # What no rank can hold is not worth a try.
        self.possible = self.all.possible & (self.all.bytes <= self.ground.capacity).all(axis=2)
        self._types = np.array(self.ground.type_of)
        self._met: dict[bytes, Packing | None] = {}
        self._placed = 0
        lost = np.flatnonzero(~self.possible.any(axis=1))
        if len(lost):
            raise InputError(self._too_big(int(lost[0])))

    def _too_big(self, index: int) -> str:
        table, ground = self.model.workload.tables[index], self.ground
        options = np.flatnonzero(self.all.possible[index])
        least = min(options, key=lambda option: float(self.all.bytes[index, option, 0]))
        option = self.all.options[least]
        return (
            f"nothing fits: table {table.name} ({table.weight_bytes / GIB:,.1f} GiB of weights) needs "
            f"{self.all.bytes[index, least].max() / GIB:,.1f} GiB a rank even {option.sharding_type} under the kernel "
            f"{option.kernel}, where {max(ground.capacity[0], 0) / GIB:,.1f} GiB are free on {self.model.cluster.name}"
        )

    def best(self, advance: Callable[..., Any] = lambda *_: None) -> Plan:
        """Return the plan with the shortest step.

        Args:
            advance: told of progress, from 0 to 1 in all, and of the step so far.

        Raises:
            InputError: no plan was found that fits.
        """
        sets = self._type_sets()
        of_set: list[tuple[Packing, np.ndarray]] = []
        least = np.inf
        for possible in sets:
            packing = self._pack_all(possible, least, lambda part: advance(part * PACKING_SHARE / len(sets)))
            if packing is not None:
                of_set.append((packing, possible))
                least = min(least, packing.seconds)
        if not of_set:
            found = find_room(self.ground, self.possible)
            if found is None:
                raise InputError(self._full())
            of_set.append((found, self.possible))
        of_set.sort(key=lambda packed: packed[0].seconds)
        budget = Budget(ATTEMPTS, lambda part: advance(part * (1 - PACKING_SHARE)))
        # Each set for itself, and then the best of them with all options. Sets often come to the same packing.
        apart: dict[int, tuple[Packing, np.ndarray]] = {}
        for packing, possible in of_set:
            apart.setdefault(id(packing), (packing, possible))
        best = min((improve(packing.copy(), possible, budget) for packing, possible in apart.values()), key=_seconds)
        best = improve(best, self.possible, Budget(max(budget.left, ATTEMPTS / 4)))
        best = shake(best, self.possible, Budget(SHAKES))
        advance(max(budget.left, 0.0) / ATTEMPTS * (1 - PACKING_SHARE), f"step {best.seconds * 1e3:.2f} ms")
        return self._plan(best)

    def _full(self) -> str:
        least = np.where(self.possible, self.all.bytes[:, :, 0] * self.all.num_shards, np.inf).min(axis=1).sum()
        free = max(self.ground.capacity[0], 0) * self.ground.world
        need = f"nothing fits: the tables need {least / GIB:,.1f} GiB in all with what they take in a step, and "
        if least <= free:
            return (
                f"{need}{free / GIB:,.1f} GiB would be free on {self.model.cluster.name}, though not table by table; "
                "allow more --sharding.types, such as row_wise"
            )
        return f"{need}{free / GIB:,.1f} GiB are free on {self.model.cluster.name}"

    def _type_sets(self) -> list[np.ndarray]:
        """Options [T, O] of all types together, and of fewer, since each type that occurs costs collectives."""
        everything = sorted(set(self._types))
        pairs = [{"table_wise", name} for name in everything if "table_wise" in everything]
        sets = []
        for types in (set(everything), *pairs, *({name} for name in everything)):
            possible = self.possible & np.isin(self._types, list(types))
            # Tables that are bound to other types keep what they may have.
            sets.append(np.where(possible.any(axis=1)[:, None], possible, self.possible))
        return list({possible.tobytes(): possible for possible in sets}.values())

    def _pack_all(self, possible: np.ndarray, least: float, advance: Callable[[float], Any]) -> Packing | None:
        """Pack under one threshold after another, unless what is known to take `least` seconds must be better."""
        best = None
        for threshold in self._thresholds(possible):
            packing = self._try(possible, threshold, least if best is None else min(least, best.seconds))
            if packing is not None and (best is None or packing.seconds < best.seconds):
                best = packing
            advance(1 / THRESHOLDS)
        return best

    def _thresholds(self, possible: np.ndarray) -> np.ndarray:
        seconds = np.where(possible, self.all.seconds, np.inf)
        cheapest = np.where(possible, self.all.total, np.inf).min(axis=1)
        low = max(cheapest.sum() / self.ground.world / 8, float(seconds.min(axis=1).min()), 1e-12)
        high = max(float(np.where(possible, self.all.seconds, 0).max()), low * 1.01)
        return np.geomspace(high, low, THRESHOLDS)

    def _try(self, possible: np.ndarray, threshold: float, least: float) -> Packing | None:
        """Pack with the cheapest options below a threshold, giving memory more weight until all find room."""
        small = possible & (self.all.seconds <= threshold)
        smallest = np.where(possible, self.all.seconds, np.inf).argmin(axis=1)
        small[np.arange(len(small)), smallest] |= ~small.any(axis=1)
        full = self.all.bytes[:, :, 0] * self.all.num_shards / (max(self.ground.capacity[0], 1.0) * self.ground.world)
        scale = np.where(small, self.all.total, np.inf).min(axis=1).sum()
        for weight in LESS_MEMORY:
            choice = np.where(small, self.all.total + weight * scale * full, np.inf).argmin(axis=1)
            if self.ground.fits_in_all(choice):
                if self.ground.bound(choice) > least and len(choice) > 1000:
                    return None  # and options that take less memory take longer
                packing = self._pack(choice)
                if packing is not None:
                    return packing
        return None

    def _pack(self, choice: np.ndarray) -> Packing | None:
        key = choice.tobytes()
        if key not in self._met:
            self._met[key] = None
            for memory_weight in FULL_RANKS:
                if self._placed > PLACEMENTS:
                    break
                self._placed += len(choice)
                if (packing := self._place(choice, memory_weight)) is not None:
                    self._met[key] = packing
                    break
        return self._met[key]

    def _place(self, choice: np.ndarray, memory_weight: float) -> Packing | None:
        """Largest first; those that need every rank or a whole node before the others."""
        packing, ground, index = Packing(self.ground), self.ground, np.arange(len(choice))
        shards = levels(ground.work[index, choice])
        held = self.all.bytes[index, choice, 0] / max(ground.capacity[0], 1.0)
        mean = np.maximum((shards * self.all.num_shards[choice, None]).sum() / ground.world, 1e-12)
        size = shards.sum(axis=1) / mean + memory_weight * held
        reach = np.array([("world", "node", "rank").index(ground.reach[option]) for option in choice])
        busy = levels(packing.work) / mean
        for table in np.lexsort((index, -size, reach)).tolist():
            option, own = int(choice[table]), shards[table] / mean
            # Squares of loads grow least where the phases that this one loads are idle.
            scores = busy @ own if reach[table] else busy[:, 0]
            if memory_weight:
                scores = scores + memory_weight * held[table] * packing.bytes[:, 0] / max(ground.capacity[0], 1.0)
            places = packing.best_places(table, option, scores)
            if places is None:
                return None
            ranks = packing.add(table, option, places)
            busy[ranks] += own
        return packing

    def _plan(self, packing: Packing) -> Plan:
        specs = self.model.workload.tables
        return Plan(
            tables={
                spec.name: table_plan(
                    self.all.options[packing.choice[index]],
                    spec.rows,
                    spec.dim,
                    packing.places[index],
                    self.ground.local,
                )
                for index, spec in enumerate(specs)
            },
            shapes={spec.name: (spec.rows, spec.dim) for spec in specs},
            world_size=self.ground.world,
            ranks_per_node=self.ground.local,
            replicas=self.model.replicas,
        )


def _seconds(packing: Packing) -> float:
    return packing.seconds
