"""Analysis: what merging gains, from the predictions of all jobs of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recsys.merge.rules import NAMES
from recsys.studies.config import MergeStudyConfig
from recsys.studies.estimates import Difference, Estimate, Verdict, difference, estimate, paired_difference
from recsys.studies.jobs import ABLATIONS, ALONG, Job, ablation_members, member_name, rival_name
from recsys.studies.pool import METRICS, Pool, Scores, SetScores
from recsys.studies.rivals import Cost
from recsys.studies.sets import BACKBONES, all_sets, sets_of_seeds


@dataclass(frozen=True, kw_only=True)
class Point:
    """All sets of one source and one size."""

    source: str
    size: int
    num_sets: int
    merged: dict[str, Estimate]
    over_mean: dict[str, Estimate]
    """Gain over the mean of a set's own members, positive where the merge is better; paired, so that how good the
    members of a set are drops out."""
    over_best: dict[str, Estimate]
    """Gain over the best of a set's own members."""
    mflops: float
    """Inference of one row by all members of a set, mean over sets."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Merges of seeds against one bigger model, at about equal budget."""

    backbone: str
    kind: str
    """wider or deeper."""
    size: int
    """M of the merge, and of the budget."""
    flops_ratio: float
    """FLOPs of the model over those of the merge."""
    table_bytes_ratio: float
    merged: dict[str, Estimate]
    rival: dict[str, Estimate]
    differences: dict[str, Difference]
    """Merge minus model, on the same rows. Its standard error is of training randomness: that of models trained alone,
    of this backbone and all sizes, pooled. A merge varies less than they do, so that it is on the safe side."""
    row_error: float
    """Standard error over test rows of the difference in logloss, paired by row: what other rows would change."""
    wins: dict[str, float]
    """Share of (set, seed of the model) in which the merge is better."""
    verdicts: dict[str, Verdict]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Members trained together in some way against the same seeds trained alone."""

    kind: str
    size: int
    num_sets: int
    table_bytes_ratio: float
    together: dict[str, Estimate]
    """Metrics of the merge."""
    alone: dict[str, Estimate]
    together_members: dict[str, Estimate]
    """Metrics of the mean member of a set."""
    alone_members: dict[str, Estimate]
    differences: dict[str, Difference]
    """Merge of members trained together minus merge of the same seeds trained alone, paired."""


@dataclass(frozen=True, kw_only=True)
class RuleScores:
    """A merge rule over sets of backbones."""

    rule: str
    size: int
    num_sets: int
    merged: dict[str, Estimate]
    over_mean_logit: dict[str, Difference]
    """Rule minus mean_logit on the same sets, paired."""


def set_scores(pool: Pool, config: MergeStudyConfig) -> list[SetScores]:
    """Score every set of every source and size."""
    return [pool.set_scores(source, members) for (source, _), sets in all_sets(config).items() for members in sets]


def points(scores: Sequence[SetScores], costs: Mapping[str, Cost]) -> list[Point]:
    """Means over the sets of each source and size."""
    groups: dict[tuple[str, int], list[SetScores]] = {}
    for found in scores:
        groups.setdefault((found.source, found.size), []).append(found)
    return [
        Point(
            source=source,
            size=size,
            num_sets=len(group),
            merged=_estimates([found.merged for found in group]),
            over_mean=_estimates([found.over_mean for found in group]),
            over_best=_estimates([found.over_best for found in group]),
            mflops=float(np.mean([sum(costs[name].flops for name in found.members) for found in group])) / 1e6,
        )
        for (source, size), group in groups.items()
    ]


def comparisons(pool: Pool, config: MergeStudyConfig, costs: Mapping[str, Cost]) -> list[Comparison]:
    """Compare merges of M seeds of the main backbone with every bigger model of M times its budget."""
    found = []
    names_of = {
        (size, kind): [rival_name(config.main, kind, size, seed) for seed in range(config.rival_seeds)]
        for size in config.rivals
        for kind in ALONG
    }
    alone = [member_name(config.main, seed) for seed in range(config.num_seeds(config.main))]
    groups = [[pool.scores((name,)) for name in names] for names in (alone, *names_of.values())]
    for size in config.rivals:
        sets = sets_of_seeds(config, config.main, size)
        single = costs[member_name(config.main, 0)]
        for kind in ALONG:
            names = names_of[size, kind]
            merged, rival = [pool.scores(members) for members in sets], [pool.scores((name,)) for name in names]
            differences = {
                name: difference(
                    _column(merged, name), _column(rival, name), [_column(group, name) for group in groups]
                )
                for name in METRICS
            }
            found.append(
                Comparison(
                    backbone=config.main,
                    kind=kind,
                    size=size,
                    flops_ratio=costs[names[0]].flops / (size * single.flops),
                    table_bytes_ratio=costs[names[0]].table_bytes / (size * single.table_bytes),
                    merged=_estimates(merged),
                    rival=_estimates(rival),
                    differences=differences,
                    row_error=_row_error(pool, sets, names),
                    wins={name: _wins(_column(merged, name), _column(rival, name), METRICS[name]) for name in METRICS},
                    verdicts={name: differences[name].verdict(sign) for name, sign in METRICS.items()},
                )
            )
    return found


def ablations(pool: Pool, config: MergeStudyConfig, jobs: Sequence[Job]) -> list[Ablation]:
    """Compare jobs that share tables, or train on the joint loss, with the pool's members of the same seeds."""
    found = []
    for kind in ABLATIONS if config.ablation_sets else ():
        pairs = [
            list(zip(*ablation_members(config, kind, index), strict=True)) for index in range(config.ablation_sets)
        ]
        together = [pool.set_scores(kind, tuple(pair[0])) for pair in pairs]
        alone = [pool.set_scores(kind, tuple(pair[1])) for pair in pairs]
        job_bytes = {job.name: job.cost.table_bytes for job in jobs}
        alone_bytes = sum(job_bytes[name] for name in alone[0].members)
        found.append(
            Ablation(
                kind=kind,
                size=config.ablation_members,
                num_sets=len(pairs),
                table_bytes_ratio=job_bytes[f"{config.main}_{kind}_0"] / alone_bytes,
                together=_estimates([scores.merged for scores in together]),
                alone=_estimates([scores.merged for scores in alone]),
                together_members=_estimates([scores.mean_member for scores in together]),
                alone_members=_estimates([scores.mean_member for scores in alone]),
                differences={
                    name: paired_difference([s.merged[name] for s in together], [s.merged[name] for s in alone])
                    for name in METRICS
                },
            )
        )
    return found


def rules(pool: Pool, config: MergeStudyConfig) -> list[RuleScores]:
    """Compare merge rules on the largest sets of backbones of which there are two, else on the largest."""
    sizes = {size: sets for (source, size), sets in all_sets(config).items() if source == BACKBONES and size > 1}
    if not sizes:
        return []
    size = max((size for size, sets in sizes.items() if len(sets) > 1), default=max(sizes))
    sets = sizes[size]
    usual = [pool.scores(members) for members in sets]
    found = []
    for rule in NAMES:
        scores = [pool.scores(members, rule) for members in sets]
        differences = {name: paired_difference(_column(scores, name), _column(usual, name)) for name in METRICS}
        found.append(
            RuleScores(rule=rule, size=size, num_sets=len(sets), merged=_estimates(scores), over_mean_logit=differences)
        )
    return found


def _estimates(scores: Sequence[Scores]) -> dict[str, Estimate]:
    return {name: estimate(_column(scores, name)) for name in METRICS}


def _column(scores: Sequence[Scores], name: str) -> list[float]:
    return [found[name] for found in scores]


def _wins(merged: Sequence[float], rival: Sequence[float], sign: int) -> float:
    return float(np.mean([sign * (a - b) > 0 for a in merged for b in rival]))


def _row_error(pool: Pool, sets: Sequence[Sequence[str]], names: Sequence[str]) -> float:
    """Standard error of the weighted mean of loss differences, of the mean merge minus the mean model on each row."""
    merged_N = np.mean([pool.row_losses(members) for members in sets], axis=0)
    shares_N = pool.test.weights_N.astype(np.float64) / pool.test.weights_N.sum(dtype=np.float64)
    away_N = merged_N - np.mean([pool.row_losses((name,)) for name in names], axis=0)
    away_N -= shares_N @ away_N
    return float(np.sqrt(np.square(shares_N * away_N).sum()))
