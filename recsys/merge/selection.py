"""Which members to keep: greedy forward selection on validation rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.merge.rows import Rows, losses


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Members in the order in which they were taken."""

    members: tuple[int, ...]
    loglosses: tuple[float, ...]
    """Logloss in nats of the mean logit of the first 1, 2, ... of them; it may rise where the rest only hurts."""


def greedy_selection(
    logits_NM: Tensor, labels_N: Tensor, weights_N: Tensor | None = None, *, max_members: int
) -> Selection:
    """Take the member, `max_members` times, that with those already taken has the mean logit of least logloss.

    Without replacement; of equals the first. It goes on when the logloss rises, so that the caller sees the whole
    curve. One pass over the rows a member taken, against a running sum of the logits of those taken, in float64.
    Source: Caruana et al. 2004, "Ensemble Selection from Libraries of Models", section 2.

    Args:
        logits_NM: logits of M members on N rows that none was trained on.
        labels_N: 0 or 1.
        weights_N: how often each row counts, 0 or more; once where left out.
        max_members: members to take, at least 1; all M where it is more.

    Raises:
        ValueError: `max_members` below 1, or rows that `Rows` refuses.
    """
    if max_members < 1:
        raise ValueError(f"max_members is {max_members}; at least 1 member is taken")
    rows = Rows(logits_NM, labels_N, weights_N)
    sums_N = torch.zeros_like(rows.labels_N)
    left = list(range(rows.num_members))
    taken: list[int] = []
    loglosses: list[float] = []
    while left and len(taken) < max_members:
        candidates = _loglosses_with(rows, sums_N, len(taken), left)
        place = candidates.index(min(candidates))
        taken.append(left.pop(place))
        loglosses.append(candidates[place])
        sums_N += rows.logits_NM[:, taken[-1]]
    return Selection(members=tuple(taken), loglosses=tuple(loglosses))


def _loglosses_with(rows: Rows, sums_N: Tensor, num_taken: int, left: list[int]) -> list[float]:
    """Logloss of the mean logit of those taken and each of those left."""
    total, start = sums_N.new_zeros(len(left)), 0
    for logits_CM, labels_C, shares_C in rows.chunks():
        sums_C1 = sums_N[start : start + len(labels_C)].unsqueeze(1)
        total += shares_C @ losses((sums_C1 + logits_CM[:, left]) / (num_taken + 1), labels_C)
        start += len(labels_C)
    return total.tolist()
