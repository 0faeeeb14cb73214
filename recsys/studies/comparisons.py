"""Comparisons: merges of M seeds against one bigger model with the FLOPs of M members."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recsys.studies.analysis import column, estimates_of
from recsys.studies.config import MergeStudyConfig, RivalKind
from recsys.studies.estimates import ENOUGH, Difference, Estimate, Spread, Verdict, spread, welch
from recsys.studies.jobs import Job, member_name, rival_name
from recsys.studies.pool import METRICS, Pool, Scores
from recsys.studies.rivals import Size, sizes_of
from recsys.studies.row_errors import standard_error
from recsys.studies.sets import sets_of_seeds

JUDGED = "logloss"
"""The metric that the claim is judged by; the others are reported beside it."""
SAME_FLOPS = (0.9, 1.1)
"""Ratios within which FLOPs count as equal."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Merges of seeds against one bigger model."""

    backbone: str
    kind: RivalKind
    size: int
    """M of the merge, and of the budget."""
    flops_ratio: float
    """FLOPs of the model over those of the merge."""
    table_bytes_ratio: float
    member_sizes: dict[str, Size]
    rival_sizes: dict[str, Size]
    """A cross network's rank of None is full matrices."""
    merged: dict[str, Estimate]
    rival: dict[str, Estimate]
    differences: dict[str, Difference]
    """Merge minus model, on the same rows. The interval is Welch's: it counts with the spread of merges, with that of
    models, each of its own, and with the error over rows."""
    merge_errors: dict[str, float | None]
    """Standard error of the mean merge by training randomness: of its disjoint sets; of fewer than three, that of
    single members over the root of the sets, which is too much, because a merge varies less than they do."""
    rival_errors: dict[str, float | None]
    """Standard error of the mean model by training randomness, of its own seeds."""
    row_errors: dict[str, float]
    """Standard error over test rows of the difference, paired by row: what other rows would change."""
    single_members: bool
    """Whether the spread of single members stands for that of merges."""
    wins: dict[str, float]
    """Share of (set, seed of the model) in which the merge is better."""
    verdict: Verdict
    """By JUDGED alone."""
    reason: str
    """Why nothing is decided, or why it takes no part, where it is not the interval."""


def comparisons(pool: Pool, config: MergeStudyConfig, jobs: Sequence[Job]) -> list[Comparison]:
    """Compare merges of M seeds of the main backbone with every bigger model of M times its FLOPs."""
    if not config.rivals:
        return []
    of_name = {job.name: job for job in jobs}
    return [
        _comparison(pool, config, of_name, size=size, kind=kind)
        for size in config.rivals
        for kind in config.rival_kinds
    ]


def _comparison(
    pool: Pool, config: MergeStudyConfig, jobs: Mapping[str, Job], *, size: int, kind: RivalKind
) -> Comparison:
    alone = [member_name(config.main, seed) for seed in range(config.num_seeds(config.main))]
    sets = sets_of_seeds(config, config.main, size)
    names = [rival_name(config.main, kind, size, seed) for seed in range(config.rival_seeds)]
    one, other = jobs[alone[0]], jobs[names[0]]
    singles, rival = ([pool.scores((name,)) for name in group] for group in (alone, names))
    merged = [pool.scores(members) for members in sets]
    rows = _row_errors(pool, sets, names)
    sides = {
        name: (spread(column(merged, name), instead=column(singles, name)), spread(column(rival, name)))
        for name in METRICS
    }
    differences = {
        name: _difference(column(merged, name), column(rival, name), sides[name], rows[name], len(pool.test.labels_N))
        for name in METRICS
    }
    flops_ratio = other.cost.flops / (size * one.cost.flops)
    reason = _reason(flops_ratio, len(rival), len(singles))
    return Comparison(
        backbone=config.main,
        kind=kind,
        size=size,
        flops_ratio=flops_ratio,
        table_bytes_ratio=other.cost.table_bytes / (size * one.cost.table_bytes),
        member_sizes=sizes_of(one.config.specs()[0]),
        rival_sizes=sizes_of(other.config.specs()[0]),
        merged=estimates_of(merged),
        rival=estimates_of(rival),
        differences=differences,
        merge_errors={name: _root(side) for name, (side, _) in sides.items()},
        rival_errors={name: _root(side) for name, (_, side) in sides.items()},
        row_errors=rows,
        single_members=len(sets) < ENOUGH,
        wins={name: _wins(merged, rival, name) for name in METRICS},
        verdict="no part" if _is_apart(flops_ratio) else differences[JUDGED].verdict(METRICS[JUDGED]),
        reason=reason,
    )


def _is_apart(flops_ratio: float) -> bool:
    return not SAME_FLOPS[0] <= flops_ratio <= SAME_FLOPS[1]


def _reason(flops_ratio: float, num_rivals: int, num_singles: int) -> str:
    if _is_apart(flops_ratio):
        return f"FLOPs ratio {flops_ratio:.2f}"
    if num_rivals < ENOUGH:
        return f"{num_rivals} seed{'s' if num_rivals > 1 else ''} of the model"
    return f"{num_singles} members" if num_singles < ENOUGH else ""


def _difference(
    merged: Sequence[float],
    rival: Sequence[float],
    sides: tuple[Spread | None, Spread | None],
    row_error: float,
    num_rows: int,
) -> Difference:
    mean = float(np.mean(merged) - np.mean(rival))
    parts = [side for side in sides if side is not None]
    if len(parts) < len(sides):
        return Difference(mean=mean, standard_error=None, low=None, high=None)
    return welch(mean, [*parts, Spread(variance=row_error**2, freedom=num_rows - 1)])


def _root(side: Spread | None) -> float | None:
    return None if side is None else float(np.sqrt(side.variance))


def _wins(merged: Sequence[Scores], rival: Sequence[Scores], name: str) -> float:
    return float(np.mean([METRICS[name] * (a[name] - b[name]) > 0 for a in merged for b in rival]))


def _row_errors(pool: Pool, sets: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, float]:
    """Standard error over rows of the mean merge minus the mean model."""
    merged, rival = [pool.influences(members) for members in sets], [pool.influences((name,)) for name in names]
    return {
        name: standard_error(np.mean([i[name] for i in merged], axis=0) - np.mean([i[name] for i in rival], axis=0))
        for name in METRICS
    }
