"""AUC of weights in bins of their logit: mergeable by addition, and off by a bounded amount."""

from torch import Tensor

BINS = 2**16
REACH = 16.0
"""Bins are equally wide over logits from -16 to 16; what lies beyond is in the outermost: p = 1e-7 and 1 - 1e-7."""


def bins_of(logits: Tensor) -> Tensor:
    """Index of each logit's bin, int64; nan goes to bin 0."""
    scaled = (logits.float() + REACH) * (BINS / (2 * REACH))
    return scaled.nan_to_num(0.0).clamp_(0, BINS - 1).long()


def area(weights_2K: Tensor) -> tuple[float, float]:
    """AUC of negative and positive weight by bin, and how far off it can be; both nan where a class has no weight.

    Pairs in one bin count half, as ties do: AUC = sum_k p_k (N_<k + n_k / 2) / (P N). Each of them is worth between 0
    and 1, so the AUC of the logits themselves differs by at most sum_k p_k n_k / (2 P N).
    """
    negative, positive = weights_2K.double().unbind()
    pairs = positive.sum() * negative.sum()
    if not pairs > 0:
        return float("nan"), float("nan")
    lower = negative.cumsum(0) - negative
    within = (positive * negative).sum() / 2
    return float((positive @ lower + within) / pairs), float(within / pairs)
