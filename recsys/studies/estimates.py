"""Means with their standard errors, and the difference of two of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

Verdict = Literal["held", "refuted", "not decided"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean of values that are independent but for the rows that they share."""

    mean: float
    standard_error: float | None
    """Of the mean; None of fewer than two values."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One mean minus another, of independent values, or the mean of differences of pairs."""

    mean: float
    standard_error: float | None
    """None where there are not enough values for one."""
    low: float | None
    high: float | None
    """The 95 % interval, by Student's t."""

    def verdict(self, sign: int) -> Verdict:
        """Whether the first is better, `sign` being 1 where more is better and -1 where less is: at 95 %."""
        if self.low is None or self.high is None:
            return "not decided"
        better, worse = (self.low > 0, self.high < 0) if sign > 0 else (self.high < 0, self.low > 0)
        return "held" if better else "refuted" if worse else "not decided"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error, s / sqrt(n) with s from n - 1."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Estimate(mean=float(array.mean()), standard_error=error, count=len(array))


def pooled_variance(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Variance within groups that are taken to vary alike, and its degrees of freedom, which may be 0."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.square(np.asarray(group) - np.mean(group)).sum()) for group in groups)
    return (squares / freedom if freedom else math.nan), freedom


def difference(first: Sequence[float], second: Sequence[float], groups: Sequence[Sequence[float]]) -> Difference:
    """Difference of the means of two independent samples, whose values vary like those within `groups`.

    The standard error is s sqrt(1 / n_1 + 1 / n_2) with s pooled over the groups, whose degrees of freedom Student's t
    has: the contrast of an analysis of variance. Two values a side have hardly any of their own.
    """
    mean = float(np.mean(first) - np.mean(second))
    variance, freedom = pooled_variance(groups)
    if not freedom:
        return Difference(mean=mean, standard_error=None, low=None, high=None)
    return _interval(mean, math.sqrt(variance * (1 / len(first) + 1 / len(second))), freedom)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of first - second over pairs."""
    found = estimate([a - b for a, b in zip(first, second, strict=True)])
    if found.standard_error is None:
        return Difference(mean=found.mean, standard_error=None, low=None, high=None)
    return _interval(found.mean, found.standard_error, found.count - 1)


def _interval(mean: float, error: float, freedom: float) -> Difference:
    reach = float(stdtrit(freedom, 0.975)) * error
    return Difference(mean=mean, standard_error=error, low=mean - reach, high=mean + reach)
