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


def click_metrics(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> ClickMetrics:
    """Compute all metrics of predictions [N] for labels [N] that are 0 or 1; a row counts `weights` [N] times."""
    labels, probabilities = labels.astype(np.float64), probabilities.astype(np.float64)
    weights = np.ones_like(labels) if weights is None else weights.astype(np.float64)
    rate = np.average(labels, weights=weights)
    loss = logloss(labels, probabilities, weights)
    entropy = logloss(labels, np.full_like(labels, rate), weights)
    return ClickMetrics(
        auc=auc(labels, probabilities, weights),
        logloss=loss,
        ne=loss / entropy if 0 < rate < 1 else float("nan"),
        calibration=np.average(probabilities, weights=weights) / rate if rate else float("inf"),
        num_rows=len(labels),
    )


def logloss(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean cross-entropy in nats; probabilities are kept 1e-15 away from 0 and 1."""
    clipped = np.clip(probabilities, 1e-15, 1 - 1e-15)
    return float(-np.average(np.where(labels > 0, np.log(clipped), np.log1p(-clipped)), weights=weights))


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Share of (positive, negative) pairs that scores put in the right order, ties as half (Mann-Whitney).

    A pair counts the product of its rows' weights.
    """
    order = np.argsort(scores, kind="stable")
    ordered, is_positive = scores[order], labels[order] > 0
    counts = np.ones(len(order)) if weights is None else weights[order].astype(np.float64)
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    positive = np.add.reduceat(np.where(is_positive, counts, 0.0), first)
    negative = np.add.reduceat(np.where(is_positive, 0.0, counts), first)
    num_pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / num_pairs) if num_pairs else float("nan")
