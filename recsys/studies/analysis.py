"""Analysis: what merging gains over single members, from the predictions of all jobs of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recsys.merge.rules import NAMES
from recsys.studies.config import MergeStudyConfig
from recsys.studies.estimates import Difference, Estimate, estimate, paired_difference
from recsys.studies.jobs import ABLATIONS, Job, ablation_members
from recsys.studies.pool import METRICS, Pool, Scores, SetScores
from recsys.studies.rivals import Cost
from recsys.studies.sets import BACKBONES, all_sets


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
            merged=estimates_of([found.merged for found in group]),
            over_mean=estimates_of([found.over_mean for found in group]),
            over_best=estimates_of([found.over_best for found in group]),
            mflops=float(np.mean([sum(costs[name].flops for name in found.members) for found in group])) / 1e6,
        )
        for (source, size), group in groups.items()
    ]


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
                together=estimates_of([scores.merged for scores in together]),
                alone=estimates_of([scores.merged for scores in alone]),
                together_members=estimates_of([scores.mean_member for scores in together]),
                alone_members=estimates_of([scores.mean_member for scores in alone]),
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
        differences = {name: paired_difference(column(scores, name), column(usual, name)) for name in METRICS}
        found.append(
            RuleScores(
                rule=rule, size=size, num_sets=len(sets), merged=estimates_of(scores), over_mean_logit=differences
            )
        )
    return found


def estimates_of(scores: Sequence[Scores]) -> dict[str, Estimate]:
    """Mean of each metric."""
    return {name: estimate(column(scores, name)) for name in METRICS}


def column(scores: Sequence[Scores], name: str) -> list[float]:
    """One metric of all."""
    return [found[name] for found in scores]
