"""Local improvement: takes tables out and puts each where, and split as, the step gets shortest."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recsys.sharding.packing import Packing, levels

POWERS = (8, 64, 512)
"""Of the norms that stand for the maximum over ranks, so that work taken off one of several slowest ranks counts."""
CLIP = 3.0
"""Times the slowest rank's level above which a rank is hopelessly slow; powers of more overflow."""
SWEEPS = 12
GAIN = 1e-6
"""Share of a step that a change must gain, else sweeps would go on over rounding."""
CLOSE = 1e-3
"""Share of a step that is not worth a search."""
PATIENCE = 500
"""Shakes that may gain nothing before they are given up."""
TOGETHER = 4
"""Tables that a shake takes out at once, at most."""
CELLS = 700
"""Ranks whose arithmetic takes about as long as numpy's calls for it."""


class Budget:
    """Attempts that improvements may still make; a count, not a time, so that a plan depends on its inputs alone."""

    def __init__(self, attempts: float, advance: Callable[[float], Any] = lambda _: None) -> None:
        self.all = self.left = attempts
        self._advance = advance

    def take(self, ranks: int, options: int) -> None:
        """Count the attempts of one table on these ranks."""
        amount = options * (1 + ranks / CELLS)
        self._advance(max(min(amount, self.left), 0) / self.all)
        self.left -= amount


def improve(packing: Packing, possible: np.ndarray, budget: Budget) -> Packing:
    """Put one table after another anew, and return the best packing that was met on the way.

    Args:
        packing: all tables have places; it is changed.
        possible: options that tables may have [T, O].
        budget: is taken from.
    """
    best, best_seconds = packing.copy(), packing.seconds
    for power in POWERS:
        for _ in range(SWEEPS):
            if budget.left <= 0 or not _Norm(packing, possible, power, budget).sweep():
                break
            if (seconds := packing.seconds) < best_seconds:
                best, best_seconds = packing.copy(), seconds
            elif _is_close(best, best_seconds):
                break
        if _is_close(best, best_seconds):
            break
    return best


def _is_close(packing: Packing, seconds: float) -> bool:
    """Whether tables that are split so could hardly be placed better."""
    return seconds <= packing.ground.bound(packing.choice) * (1 + CLOSE)


def shake(packing: Packing, possible: np.ndarray, budget: Budget) -> Packing:
    """Put some tables anew at once, again and again, as far as the budget goes; see `improve`."""
    generator = np.random.default_rng(0)
    best, best_seconds = packing.copy(), packing.seconds
    norm, kept = _Norm(packing, possible, POWERS[1], budget), 0
    size = norm.size()
    failed = 0
    while budget.left > 0 and len(size) > 1 and failed < PATIENCE and not _is_close(best, best_seconds):
        failed += 1
        # Small ones are moved to fill gaps, so that all are as likely; of small cases all are taken out at times.
        count = int(generator.integers(2, min(TOGETHER, len(size)) + 1))
        some = generator.choice(len(size), size=count, replace=False)
        if not norm.replace(some[np.argsort(-size[some], kind="stable")].tolist()):
            continue
        if (seconds := packing.seconds) < best_seconds * (1 - GAIN):
            best, best_seconds, failed = packing.copy(), seconds, 0
        kept += 1
        if kept % 16 == 0:  # scales follow what they measure, and sums lose their rounding
            norm = _Norm(packing, possible, POWERS[1], budget)
    return best


class _Norm:
    """What a packing is improved by: a step, with a norm for the maximum over ranks.

    seconds ~ sum over phases p of scale_p (sum over ranks r of (level_rp / scale_p)^power)^(1 / power)
    """

    def __init__(self, packing: Packing, possible: np.ndarray, power: int, budget: Budget) -> None:
        self.packing, self.ground, self.possible, self.budget = packing, packing.ground, possible, budget
        self.power = power
        self.cores = packing.ground.model.group.hardware.cores
        self.shares_cores = 0 < self.cores < packing.ground.local
        seconds = levels(packing.work)
        self.scale = np.maximum(seconds.max(axis=0), 1e-9 * seconds.max())
        self.level = self._level(packing.work)
        self.sums = self.level.sum(axis=0)

    def size(self) -> np.ndarray:
        """Seconds of all shards of each table [T]."""
        choice = self.packing.choice
        sizes: np.ndarray = self.ground.options.total[np.arange(len(choice)), choice]
        return sizes

    def sweep(self) -> bool:
        """Put each table anew, largest first, and return whether anything changed."""
        changed = False
        for table in np.argsort(-self.size(), kind="stable").tolist():
            if self.budget.left <= 0:
                break
            changed |= self.replace([table])
        return changed

    def replace(self, tables: Sequence[int]) -> bool:
        """Take tables out and put them in again, one by one, each at its best; or back, where that gains nothing."""
        packing = self.packing
        before, limit = [], self._value(packing.types) * (1 - GAIN)
        for table in tables:
            before.append((table, int(packing.choice[table]), packing.places[table]))
            self._update(packing.remove(table))
        np.maximum(self.sums, 0.0, out=self.sums)
        value = math.inf
        for table in tables:
            options = np.flatnonzero(self.possible[table]).tolist()
            self.budget.take(self.ground.world, len(options))
            value, option, places = min((self._try(table, option) for option in options), key=_first)
            if places is None:
                break
            self._update(packing.add(table, option, places))
        if value < limit:
            return True
        for table in tables:
            if packing.choice[table] >= 0:
                packing.remove(table)
        for table, option, places in before:
            packing.add(table, option, places)
        self.level = self._level(packing.work)
        self.sums = self.level.sum(axis=0)
        return False

    def _level(self, work: np.ndarray) -> np.ndarray:
        """Powers [ranks (and nodes, where ranks share cores), phases] of what ranks do."""
        seconds = levels(work) / self.scale
        if self.shares_cores:
            nodes = seconds.reshape(-1, self.ground.local, seconds.shape[1]).sum(axis=1) / self.cores
            seconds = np.concatenate([seconds, nodes])
        return self._raised(seconds)

    def _raised(self, seconds: np.ndarray) -> np.ndarray:
        seconds = np.minimum(seconds, CLIP)
        for _ in range(int(math.log2(self.power))):
            np.square(seconds, out=seconds)
        return seconds

    def _root(self, sums: np.ndarray) -> np.ndarray:
        """Seconds [...] of sums of powers [..., phases]."""
        seconds: np.ndarray = (np.maximum(sums, 0.0) ** (1 / self.power)) @ self.scale
        return seconds

    def _value(self, types: dict[str, int]) -> float:
        return float(self._root(self.sums) + self.ground.calls(types).sum())

    def _update(self, ranks: np.ndarray) -> None:
        """Take over what ranks do now."""
        if self.shares_cores:  # few ranks, on a CPU
            self.level = self._level(self.packing.work)
            self.sums = self.level.sum(axis=0)
            return
        before = self.level[ranks].sum(axis=0)
        self.level[ranks] = self._raised(levels(self.packing.work[ranks]) / self.scale)
        self.sums = self.sums + self.level[ranks].sum(axis=0) - before

    def _try(self, table: int, option: int) -> tuple[float, int, tuple[int, ...] | None]:
        """Seconds with a table that has no place yet, and where that would be; infinite if nowhere."""
        packing, ground = self.packing, self.ground
        if self.shares_cores:
            gains = self._gains_of_cores(table, option)
        else:
            gains = self._raised(levels(packing.work + ground.work[table, option]) / self.scale) - self.level
        # A node's score is the sum of its ranks', so what all have in common must not count.
        places = packing.best_places(table, option, self._root(self.sums + gains) - self._root(self.sums))
        if places is None:
            return math.inf, option, None
        kind, types = ground.type_of[option], packing.types
        types = types if kind in types else {**types, kind: 1}
        sums = self.sums + gains[ground.ranks(option, places)].sum(axis=0)
        return float(self._root(sums) + ground.calls(types).sum()), option, places

    def _gains_of_cores(self, table: int, option: int) -> np.ndarray:
        """As gains of ranks [ranks, phases], where a node's cores get a rank's work too, whichever rank does it."""
        ground = self.ground
        own = self._raised(levels(self.packing.work + ground.work[table, option]) / self.scale)
        added = levels(ground.work[table, option]) / self.scale / self.cores
        before = self.level[ground.world :]
        nodes = self._raised(before ** (1 / self.power) + added) - before
        gains: np.ndarray = own - self.level[: ground.world] + np.repeat(nodes, ground.local, axis=0)
        return gains


def _first(tried: tuple[float, int, tuple[int, ...] | None]) -> float:
    return tried[0]
