"""Click metrics over held-out rows: exact, in float64, over one process or all ranks of a job."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import DTypeLike

from recsys.metrics.calibration import BINS, bin_means, expected_error, mass_bins, width_bins
from recsys.metrics.intervals import Interval, auc_interval, loss_intervals
from recsys.metrics.ranked import CHUNK_ROWS, NEGATIVE, NEGATIVE_SQUARES, POSITIVE, POSITIVE_SQUARES, Bucket, RankedRows

NAN = float("nan")
CLOSEST = 1e-15
"""Probabilities are kept this far from 0 and 1 where their logarithm is taken."""


@dataclass(frozen=True, kw_only=True)
class ClickMetrics:
    """How well predicted probabilities fit clicks. Intervals are of 95 %; fields with a default may be not computed."""

    auc: float
    """Area under the ROC curve; nan when all labels agree."""
    logloss: float
    """Mean cross-entropy in nats."""
    ne: float
    """Normalised entropy: logloss over that of always predicting the base rate; nan when all labels agree."""
    calibration: float
    """Mean prediction over mean label; 1 is right."""
    num_rows: int
    """Rows of weight above 0."""
    auprc: float = NAN
    """Area under the precision-recall curve, as average precision; nan when no label is 1."""
    ece: float = NAN
    """Expected calibration error over bins of equal mass, see recsys.metrics.calibration."""
    ece_width: float = NAN
    """The same over bins of equal width."""
    auc_ci: Interval | None = None
    logloss_ci: Interval | None = None
    ne_ci: Interval | None = None
    gauc: float | None = None
    """AUC within groups, where rows have some, see recsys.metrics.groups."""
    reliability: tuple[tuple[float, float, float], ...] = ()
    """Mean prediction, mean label and weight of each bin of equal mass, by rising prediction."""


class Sums(NamedTuple):
    """Sums over rows: w is a row's weight, y its label, p its prediction, l its cross-entropy."""

    rows: float
    w: float
    wy: float
    wp: float
    wl: float
    w2: float
    w2y: float
    w2l: float
    w2ly: float
    w2l2: float
    unranked: float
    """Rows whose score is nan."""


class ClickScores:
    """Rows whose metrics are asked for at the end: 8 bytes each with the smallest types.

    Args:
        key: type in which scores are kept and compared; float32 or float64.
        weight: type of weights; float32 or float64.
        of_logits: scores are logits; else probabilities.
    """

    def __init__(self, key: DTypeLike = np.float32, weight: DTypeLike = np.float32, *, of_logits: bool = True) -> None:
        self._rows, self._of_logits = RankedRows(key, weight), of_logits
        self._sums = np.zeros(len(Sums._fields))
        self._bins = np.zeros((BINS, 3))

    def add(self, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> "ClickScores":
        """Take rows; labels are 0 or 1, rows of weight 0 count nowhere. Returns this object."""
        for begin in range(0, len(scores), CHUNK_ROWS):
            part = slice(begin, begin + CHUNK_ROWS)
            counts = weights[part] > 0
            own, y, w = (values[part][counts].astype(np.float64) for values in (scores, labels, weights))
            p, is_nan = self._probabilities(own), np.isnan(own)
            losses, squares = cross_entropy(y, p), np.square(w)
            terms = (w, w * y, w * p, w * losses, squares, squares * y, squares * losses)
            both = (squares * losses * y, squares * losses**2)
            self._sums += [len(w), *(term.sum() for term in (*terms, *both)), is_nan.sum()]
            sane = ~is_nan
            self._bins += width_bins(p[sane], y[sane], w[sane])
            self._rows.add(scores[part][counts][sane], y[sane], w[sane])
        return self

    def _probabilities(self, scores: np.ndarray) -> np.ndarray:
        if not self._of_logits:
            return scores
        return torch.from_numpy(scores).sigmoid().numpy()

    def metrics(self, group: dist.ProcessGroup | None = None) -> ClickMetrics:
        """Metrics of the rows of all ranks of a group, who all call it; without one, of this process."""
        order = _Order()
        for bucket in self._rows.buckets(group):
            order.add(bucket, self._probabilities(bucket.keys_G.astype(np.float64)))
        if group:
            for values in (self._sums, self._bins, order.sums, order.bins):
                dist.all_reduce(torch.from_numpy(values), group=group)
        return _metrics(Sums(*self._sums), self._bins, order)


class _Order:
    """What metrics that need the order of rows add up over buckets."""

    def __init__(self) -> None:
        self.sums = np.zeros(8)
        """Pairs in the right order; of positive and of negative rows each the sums of w^2, w^2 v and w^2 v^2, where
        v is the share of the other rows that are on the right side; precision times recall's steps."""
        self.bins = np.zeros((BINS, 3))

    def add(self, bucket: Bucket, probabilities_G: np.ndarray) -> None:
        """Add one bucket."""
        sums, (positive, negative) = bucket.sums_G5, bucket.totals
        own_G2 = sums[:, : NEGATIVE + 1]
        lower_G2 = bucket.lower
        below = lower_G2[:, NEGATIVE] + own_G2[:, NEGATIVE] / 2
        above = positive - lower_G2[:, POSITIVE] - own_G2[:, POSITIVE] / 2
        self.sums[0] += own_G2[:, POSITIVE] @ below
        if positive and negative:
            for column, at, right in ((POSITIVE_SQUARES, 1, below / negative), (NEGATIVE_SQUARES, 4, above / positive)):
                self.sums[at : at + 3] += [(sums[:, column] * right**power).sum() for power in range(3)]
        if positive:
            not_lower_G2 = bucket.totals - lower_G2
            precision = not_lower_G2[:, POSITIVE] / not_lower_G2.sum(axis=1)
            self.sums[7] += own_G2[:, POSITIVE] @ precision / positive
        place = (lower_G2.sum(axis=1) + own_G2.sum(axis=1) / 2) / bucket.totals.sum()
        self.bins += mass_bins(place, probabilities_G, own_G2)


def _metrics(sums: Sums, of_width: np.ndarray, order: _Order) -> ClickMetrics:
    if not sums.rows:
        return ClickMetrics(auc=NAN, logloss=NAN, ne=NAN, calibration=NAN, num_rows=0)
    rate, loss = sums.wy / sums.w, sums.wl / sums.w
    is_ranked = not sums.unranked
    pairs = sums.wy * (sums.w - sums.wy) if is_ranked else 0.0
    auc = order.sums[0] / pairs if pairs else NAN
    entropy = base_entropy(rate) if 0 < rate < 1 else NAN
    logloss_ci, ne_ci = loss_intervals(sums.w, rate, loss, entropy, sums)
    return ClickMetrics(
        auc=float(auc),
        logloss=float(loss),
        ne=float(loss / entropy),
        calibration=float(sums.wp / sums.wy) if rate else float("inf"),
        num_rows=round(sums.rows),
        auprc=float(order.sums[7]) if is_ranked and rate else NAN,
        ece=expected_error(order.bins) if is_ranked else NAN,
        ece_width=expected_error(of_width) if is_ranked else NAN,
        auc_ci=auc_interval(auc, sums.wy, sums.w - sums.wy, order.sums[1:7]) if pairs else None,
        logloss_ci=logloss_ci,
        ne_ci=ne_ci,
        reliability=bin_means(order.bins),
    )


def click_metrics(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> ClickMetrics:
    """Compute all metrics of predictions [N] for labels [N] that are 0 or 1; a row counts `weights` [N] times."""
    weights = np.ones(len(labels)) if weights is None else weights
    return ClickScores(np.float64, np.float64, of_logits=False).add(probabilities, labels, weights).metrics()


def base_entropy(rate: float) -> float:
    """Logloss of always predicting the base rate, in nats; the rate lies between 0 and 1."""
    return float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate))


def cross_entropy(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Of each row, in nats; probabilities are kept 1e-15 away from 0 and 1."""
    clipped = np.clip(probabilities, CLOSEST, 1 - CLOSEST)
    losses: np.ndarray = -np.where(labels > 0, np.log(clipped), np.log1p(-clipped))
    return losses


def logloss(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean cross-entropy in nats; probabilities are kept 1e-15 away from 0 and 1."""
    return float(np.average(cross_entropy(labels, probabilities), weights=weights))


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Share of (positive, negative) pairs that scores put in the right order, ties as half (Mann-Whitney).

    A pair counts the product of its rows' weights.
    """
    rows = RankedRows(np.float64, np.float64)
    rows.add(scores, labels, np.ones(len(scores)) if weights is None else weights)
    order = _Order()
    pairs = 0.0
    for bucket in rows.buckets():
        order.add(bucket, bucket.keys_G)
        pairs = bucket.totals.prod()
    return float(order.sums[0] / pairs) if pairs else NAN
