"""Merge rules: logits of M members to one logit a row.

Source: "Exploring Test-time Scaling via Prediction Merging on Large-Scale Recommendation" (arXiv 2512.07650), which
takes the mean logit; the other rules are measured against it.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def mean_logit(logits_BM: Tensor) -> Tensor:
    """Mean over members: logit_B = (1/M) sum_m logit_Bm.

    By convexity its logloss is at most the mean of the members' loglosses, on every batch.
    """
    return logits_BM.mean(dim=1)


def mean_probability(logits_BM: Tensor) -> Tensor:
    """Logit of the mean probability: log(sum_m p_Bm) - log(sum_m (1 - p_Bm)), computed without leaving log space.

    By convexity its logloss is at most the mean of the members' loglosses, on every batch.
    """
    return logsigmoid(logits_BM).logsumexp(dim=1) - logsigmoid(-logits_BM).logsumexp(dim=1)


def confidence(logits_BM: Tensor) -> Tensor:
    """Mean of logits with weights c_Bm / sum_m c_Bm, where c = 1 - H(p) / ln 2 says how far p is from a coin toss.

    H is the binary entropy of a member's probability in nats, so c runs from 0 (p = 1/2) to 1. A row where no member
    has any confidence, to rounding, gets the mean logit. The merged logit lies between the members'; nothing bounds
    its logloss by theirs, for a member that is sure and wrong outweighs the others.
    """
    confidences_BM = _confidences(logits_BM)
    total_B1 = confidences_BM.sum(dim=1, keepdim=True)
    # Below this a quotient has no digits left, and its gradient overflows.
    some_B1 = total_B1 > torch.finfo(logits_BM.dtype).eps ** 2
    weights_BM = torch.where(some_B1, confidences_BM / torch.where(some_B1, total_B1, 1.0), 1.0 / logits_BM.shape[1])
    return (weights_BM * logits_BM).sum(dim=1)


def _confidences(logits_BM: Tensor) -> Tensor:
    """1 - H(sigmoid(z)) / ln 2, accurate to some ulps of itself for small and for large |z| alike."""
    size_BM = logits_BM.abs().clamp(max=100.0)  # beyond, H is 0 in float64, and its gradient would be inf times 0
    # H = log(1 + e^-|z|) + |z| sigmoid(-|z|): no term grows, but ln 2 - H cancels where z is small. There, with
    # u = tanh(|z| / 2), ln 2 - H = |z| u / 2 + log(1 - u^2) / 2, which loses no more than a factor of 2.
    far_BM = math.log(2) + logsigmoid(size_BM) - size_BM * torch.sigmoid(-size_BM)
    inside_BM = size_BM.clamp(max=2.0)
    u_BM = torch.tanh(inside_BM / 2)
    near_BM = (inside_BM * u_BM + torch.log1p(-u_BM.square())) / 2
    return torch.where(size_BM < 2.0, near_BM, far_BM) / math.log(2)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_logit": mean_logit,
    "mean_probability": mean_probability,
    "confidence": confidence,
}
"""The rules that need no fitting, as functions of logits_BM; the first is the default."""

FITTED = ("weighted", "stacked")
"""The rules whose weights are fitted on validation rows, see recsys.merge.fit."""

NAMES = (*RULES, *FITTED)
"""Every rule."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A merge rule with what was fitted for it: a function logits_BM -> logit_B.

    `dataclasses.asdict` gives plain JSON values, and `Merge(**values)` reads them back.
    """

    rule: str
    """mean_logit, mean_probability, confidence, weighted (logits @ weights, weights non-negative with sum 1) or stacked
    (logits @ weights + bias)."""
    weights: tuple[float, ...] = ()
    """One a member, in the order of members; only for weighted and stacked."""
    bias: float = 0.0
    """In logits; only for stacked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))  # JSON has lists alone
        _check_rule(self.rule)
        fitted = self.rule in FITTED
        if fitted and not self.weights:
            raise ValueError(f"merge rule {self.rule!r} is fitted on validation rows, see fit")
        if not all(math.isfinite(number) for number in (*self.weights, self.bias)):
            raise ValueError(f"merge rule {self.rule!r} has a weight or bias that is not finite")
        if self.weights and not fitted:
            raise ValueError(f"merge rule {self.rule!r} takes no weights; {' and '.join(FITTED)} do")
        if self.bias and self.rule != "stacked":
            raise ValueError(f"merge rule {self.rule!r} takes no bias; stacked does")
        if self.rule == "weighted":
            negative = next((member for member, weight in enumerate(self.weights) if weight < 0), None)
            if negative is not None:
                raise ValueError(f"weight of member {negative} is negative ({self.weights[negative]}); use stacked")
            if not math.isclose(sum(self.weights), 1.0, abs_tol=1e-6):
                raise ValueError(f"weights of merge rule 'weighted' sum to {sum(self.weights)} instead of 1")

    def __call__(self, logits_BM: Tensor) -> Tensor:
        """Merge logits [B, M] to one logit a row [B]; raises ValueError where weights are not one a member."""
        if self.rule in RULES:
            return RULES[self.rule](logits_BM)
        if len(self.weights) != logits_BM.shape[1]:
            raise ValueError(
                f"merge rule {self.rule!r} has {len(self.weights)} weights, the logits {logits_BM.shape[1]} members"
            )
        return logits_BM @ logits_BM.new_tensor(self.weights) + self.bias

    def subset(self, members: Sequence[int]) -> "Merge":
        """Make the merge of the members that answer, whose logits then come in the order of `members`.

        - weighted: their weights, renormalised; the plain mean_logit where all of those are 0.
        - stacked: the plain mean_logit unless all members answer. Its weights and bias hold for all members together:
          they need not sum to 1 and some are below 0, each correcting what the others share, so that what is left of
          them without a member is neither calibrated nor of the scale of a logit.
        - the others: the rule itself.

        Raises ValueError where no member answers, one does twice, or one has no weight.
        """
        if not members:
            raise ValueError("no member answers: there is nothing to merge")
        if len(set(members)) < len(members):
            raise ValueError(f"a member answers twice: {list(members)}")
        if self.rule in RULES:
            return self
        unknown = [member for member in members if not 0 <= member < len(self.weights)]
        if unknown:
            raise ValueError(f"member {unknown[0]} has no weight: members are 0 to {len(self.weights) - 1}")
        weights = tuple(self.weights[member] for member in members)
        if len(members) == len(self.weights):
            return Merge(rule=self.rule, weights=weights, bias=self.bias)
        total = sum(weights)
        if self.rule == "stacked" or total == 0:
            return Merge(rule="mean_logit")
        return Merge(rule=self.rule, weights=tuple(weight / total for weight in weights))


def _check_rule(rule: str) -> None:
    if rule not in NAMES:
        close = difflib.get_close_matches(rule, NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(NAMES)}"
        raise ValueError(f"unknown merge rule {rule!r}; {hint}")
