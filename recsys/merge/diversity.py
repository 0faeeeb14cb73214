"""How much members differ, and what their merge gains by it; all in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from recsys.merge.rows import Rows, losses
from recsys.merge.rules import RULES


def correlations(logits_NM: Tensor) -> Tensor:
    """Pearson correlation of the logits of every two members [M, M]; nan for one whose logits do not vary.

    Members of one log correlate by .95 and more, for most of the variance of a logit is what any model finds; what
    lies below 1 is what merging lives on (arXiv 2512.07650).
    """
    rows = _unlabelled(logits_NM)
    mean_M = torch.stack([shares_C @ logits_CM for logits_CM, _, shares_C in rows.chunks()]).sum(dim=0)
    covariance_MM = mean_M.new_zeros(rows.num_members, rows.num_members)
    for logits_CM, _, shares_C in rows.chunks():
        centred_CM = logits_CM - mean_M
        covariance_MM += centred_CM.T @ (centred_CM * shares_C.unsqueeze(1))
    varies_M = torch.stack([(logits_CM != logits_NM[0]).any(dim=0) for logits_CM, _, _ in rows.chunks()]).any(dim=0)
    deviation_M = torch.where(varies_M, covariance_MM.diagonal().sqrt(), torch.nan)
    correlations_MM = (covariance_MM / deviation_M / deviation_M.unsqueeze(1)).clamp(-1.0, 1.0)
    correlations_MM.diagonal()[varies_M] = 1.0
    return correlations_MM


def disagreement(logits_NM: Tensor, threshold_logit: float) -> Tensor:
    """Share of rows on which two members lie on different sides of a threshold [M, M].

    A logit equal to the threshold counts as below. For clicks the sensible threshold is the logit of the base rate,
    log(rate / (1 - rate)): hardly a row reaches a probability of 1/2, and members that all say "no click" agree on
    nothing of interest.
    """
    rows = _unlabelled(logits_NM)
    both_MM = rows.labels_N.new_zeros(rows.num_members, rows.num_members)
    for logits_CM, _, _ in rows.chunks():
        above_CM = (logits_CM > threshold_logit).double()
        both_MM += above_CM.T @ above_CM
    above_M = both_MM.diagonal()
    return (above_M + above_M.unsqueeze(1) - 2 * both_MM) / len(logits_NM)


@dataclass(frozen=True, kw_only=True)
class Ambiguity:
    """mean_member_logloss - merged_logloss = ambiguity >= 0, each in nats and computed on its own."""

    mean_member_logloss: float
    merged_logloss: float
    ambiguity: float
    """What the members' differences are worth: 0 where they agree on every row."""


def ambiguity(
    logits_NM: Tensor, labels_N: Tensor, weights_N: Tensor | None = None, rule: str = "mean_logit"
) -> Ambiguity:
    """Split the merged logloss into what members lose on average and what merging them gains, exactly.

    With means over rows (by weight), p_m(y) the probability that member m gives to the label, the gain is

    - mean_logit: mean_m softplus(z_m) - softplus(mean_m z_m), free of labels, because the label's term y z is linear;
    - mean_probability: log mean_m p_m(y) - mean_m log p_m(y).

    Both are gaps of Jensen's inequality. Source: the decomposition is that of Krogh & Vedelsby 1995, "Neural Network
    Ensembles, Cross Validation, and Active Learning", for cross-entropy instead of squared error; the merge is that of
    arXiv 2512.07650.

    Raises:
        ValueError: a rule other than these two, or rows that `Rows` refuses.
    """
    if rule not in _GAINS:
        raise ValueError(f"merge rule {rule!r} has no such decomposition; {' and '.join(_GAINS)} do")
    rows = Rows(logits_NM, labels_N, weights_N)
    merged = gain = 0.0
    for logits_CM, labels_C, shares_C in rows.chunks():
        merged += (shares_C @ losses(RULES[rule](logits_CM).unsqueeze(1), labels_C)).item()
        gain += (shares_C @ _GAINS[rule](logits_CM, labels_C).clamp(min=0.0)).item()
    members = rows.member_loglosses().mean().item()
    return Ambiguity(mean_member_logloss=members, merged_logloss=merged, ambiguity=gain)


def _gain_of_mean_logit(logits_CM: Tensor, _labels_C: Tensor) -> Tensor:
    return logsigmoid(-logits_CM.mean(dim=1)) - logsigmoid(-logits_CM).mean(dim=1)


def _gain_of_mean_probability(logits_CM: Tensor, labels_C: Tensor) -> Tensor:
    log_p_CM = -losses(logits_CM, labels_C)
    return log_p_CM.logsumexp(dim=1) - math.log(log_p_CM.shape[1]) - log_p_CM.mean(dim=1)


_GAINS = {"mean_logit": _gain_of_mean_logit, "mean_probability": _gain_of_mean_probability}


def _unlabelled(logits_NM: Tensor) -> Rows:
    return Rows(logits_NM, logits_NM.new_zeros(len(logits_NM)))
