"""Merge rules: logits of M members to one logit a row.

Source: "Exploring Test-time Scaling via Prediction Merging on Large-Scale Recommendation" (arXiv 2512.07650).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def mean_logit(logits_BM: Tensor) -> Tensor:
    """Mean over members: logit_B = (1/M) sum_m logit_Bm.

    By convexity its logloss is at most the mean of the members' loglosses, on every batch.
    """
    return logits_BM.mean(dim=1)


def mean_probability(logits_BM: Tensor) -> Tensor:
    """Logit of the mean probability: log(sum_m p_Bm) - log(sum_m (1 - p_Bm)), computed without leaving log space."""
    log_p = torch.nn.functional.logsigmoid(logits_BM).logsumexp(dim=1)
    log_not_p = torch.nn.functional.logsigmoid(-logits_BM).logsumexp(dim=1)
    return log_p - log_not_p


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_logit": mean_logit,
    "mean_probability": mean_probability,
}
