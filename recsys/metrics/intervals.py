"""Confidence intervals of 95 % in closed form: what metrics might have been on other rows of the same kind.

A metric is to first order its expectation plus the sum of the rows' influences, which are independent; so its variance
is about the sum of their squares, and the interval is the metric plus and minus 1.96 roots of it.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from recsys.metrics.click import Sums

Z = 1.959963984540054
"""The normal distribution's 0.975 quantile."""

Interval = tuple[float, float]


def _around(value: float, variance: float, low: float = -np.inf, high: float = np.inf) -> Interval:
    half = Z * np.sqrt(max(variance, 0.0))
    return max(float(value - half), low), min(float(value + half), high)


def auc_interval(auc: float, positive: float, negative: float, sums: np.ndarray) -> Interval:
    """Interval of an AUC, within [0, 1].

    DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988), with n in place of their n - 1, and weights:
    var = sum over positive rows of (w / P)^2 (v - AUC)^2 + the same over negative rows by N, where v is the share of
    the other class's weight that the row is on the right side of, ties as half.

    Args:
        auc: the metric.
        positive: P, weight of the rows with label 1.
        negative: N, weight of the others.
        sums: of w^2, w^2 v and w^2 v^2 over positive rows, and then over negative ones.
    """
    variance = 0.0
    for (squares, first, second), weight in ((sums[:3], positive), (sums[3:], negative)):
        variance += (second - 2 * auc * first + auc**2 * squares) / weight**2
    return _around(auc, variance, 0.0, 1.0)


def loss_intervals(
    total: float, rate: float, loss: float, entropy: float, sums: "Sums"
) -> tuple[Interval, Interval | None]:
    """Intervals of logloss and of NE = logloss / H(rate), the latter None when all labels agree.

    A row's influence on the logloss L is (w / W) (l - L); that on NE is (w / W) (l - L - NE H'(r) (y - r)) / H(r), with
    H'(r) = ln((1 - r) / r): the base rate r comes from the same rows.

    Args:
        total: weight W.
        rate: r, the mean label.
        loss: L.
        entropy: H(r).
        sums: over rows.
    """
    # Sums over rows of w^2 (l - L)^2, w^2 (l - L) (y - r) and w^2 (y - r)^2.
    of_loss = sums.w2l2 - 2 * loss * sums.w2l + loss**2 * sums.w2
    both = sums.w2ly - loss * sums.w2y - rate * sums.w2l + rate * loss * sums.w2
    of_label = sums.w2y - 2 * rate * sums.w2y + rate**2 * sums.w2
    around_loss = _around(loss, of_loss / total**2, 0.0)
    if not 0 < rate < 1:
        return around_loss, None
    ne, slope = loss / entropy, np.log1p(-rate) - np.log(rate)
    factor = ne * slope
    variance = (of_loss - 2 * factor * both + factor**2 * of_label) / (total * entropy) ** 2
    return around_loss, _around(ne, variance, 0.0)
