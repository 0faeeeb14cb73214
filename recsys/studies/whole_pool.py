"""What the pool as a whole tells: how alike its members are, and in which order greedy selection takes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.merge.diversity import correlations, disagreement
from recsys.merge.selection import greedy_selection
from recsys.studies.config import MergeStudyConfig
from recsys.studies.pool import Pool, Scores
from recsys.studies.sets import pool_names

Matrix = list[list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Means over pairs of members, a backbone a row and a column; on the diagonal pairs of seeds, None of one seed."""

    backbones: tuple[str, ...]
    correlations: Matrix
    """Pearson's, of logits."""
    disagreement: Matrix
    """Share of rows that two members put on different sides of the base rate."""


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Members as greedy selection on the validation rows takes them, and the first 1, 2, ... of them merged."""

    members: tuple[str, ...]
    valid_loglosses: tuple[float, ...]
    test: list[Scores]
    num_chosen: int
    """Members whose merge is best on the validation rows."""


def likeness(pool: Pool, config: MergeStudyConfig) -> Likeness:
    """Compare members of the pool with one another, on the test rows."""
    names = pool_names(config)
    logits_NM = torch.from_numpy(pool.test.of(names).logits_NM)
    rate = pool.base_rate
    threshold = math.log(rate / (1 - rate)) if 0 < rate < 1 else 0.0
    places = [[i for i, name in enumerate(names) if name.rpartition("_s")[0] == b] for b in config.backbones]
    return Likeness(
        backbones=config.backbones,
        correlations=_by_backbone(correlations(logits_NM), places),
        disagreement=_by_backbone(disagreement(logits_NM, threshold), places),
    )


def _by_backbone(values_MM: Tensor, places: Sequence[Sequence[int]]) -> Matrix:
    return [[_mean_of_pairs(values_MM, rows, columns) for columns in places] for rows in places]


def _mean_of_pairs(values_MM: Tensor, rows: Sequence[int], columns: Sequence[int]) -> float | None:
    pairs = [values_MM[i, j].item() for i in rows for j in columns if i != j]
    return sum(pairs) / len(pairs) if pairs else None


def greedy(pool: Pool, config: MergeStudyConfig) -> Greedy:
    """Select greedily over the whole pool, and score every step."""
    names = pool_names(config)
    valid = pool.valid.of(names)
    found = greedy_selection(torch.from_numpy(valid.logits_NM), *valid.tensors[1:], max_members=len(names))
    members = tuple(names[index] for index in found.members)
    return Greedy(
        members=members,
        valid_loglosses=found.loglosses,
        test=[pool.scores(members[: place + 1]) for place in range(len(members))],
        num_chosen=found.loglosses.index(min(found.loglosses)) + 1,
    )
