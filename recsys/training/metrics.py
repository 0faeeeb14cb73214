"""Click metrics over held-out rows, exact, in float64."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ClickMetrics:
    """How well predicted probabilities fit clicks."""

    auc: float
    """Area under the ROC curve; nan when all labels agree."""
    logloss: float
    """Mean cross-entropy in nats."""
    ne: float
    """Normalised entropy: logloss over that of always predicting the base rate; nan when all labels agree."""
    calibration: float
    """Mean prediction over mean label; 1 is right."""
    num_rows: int


def click_metrics(labels: np.ndarray, probabilities: np.ndarray) -> ClickMetrics:
    """Compute all metrics of predictions [N] for labels [N] that are 0 or 1."""
    labels = labels.astype(np.float64)
    probabilities = probabilities.astype(np.float64)
    rate = labels.mean()
    loss = logloss(labels, probabilities)
    entropy = logloss(labels, np.full_like(labels, rate))
    return ClickMetrics(
        auc=auc(labels, probabilities),
        logloss=loss,
        ne=loss / entropy if 0 < rate < 1 else float("nan"),
        calibration=probabilities.mean() / rate if rate else float("inf"),
        num_rows=len(labels),
    )


def logloss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean cross-entropy in nats; probabilities are kept 1e-15 away from 0 and 1."""
    clipped = np.clip(probabilities, 1e-15, 1 - 1e-15)
    return float(-np.where(labels > 0, np.log(clipped), np.log1p(-clipped)).mean())


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve by the rank sum of positives, ties at their mean rank (Mann-Whitney)."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.concatenate([first, [len(ordered)]]))
    ranks = np.repeat(first + (sizes + 1) / 2, sizes)
    num_positive = float((labels > 0).sum())
    num_negative = len(labels) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    rank_sum = float(ranks[labels[order] > 0].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)
