"""Means with their standard errors, and the difference of two of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

Verdict = Literal["held", "refuted", "not decided", "no part"]
"""On a claim; a comparison that cannot speak about it takes no part."""
ENOUGH = 3
"""Values that a variance is taken from, at least."""


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
    """Of all that the interval counts with; None where there are not enough values for one."""
    low: float | None
    high: float | None
    """The 95 % interval, by Student's t."""

    def verdict(self, sign: int) -> Verdict:
        """Whether the first is better, `sign` being 1 where more is better and -1 where less is: at 95 %."""
        if self.low is None or self.high is None:
            return "not decided"
        better, worse = (self.low > 0, self.high < 0) if sign > 0 else (self.high < 0, self.low > 0)
        return "held" if better else "refuted" if worse else "not decided"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Variance of a mean, and how well it is known."""

    variance: float
    freedom: float
    """Degrees of freedom."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error, s / sqrt(n) with s from n - 1."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Estimate(mean=float(array.mean()), standard_error=error, count=len(array))


def spread(values: Sequence[float], instead: Sequence[float] = ()) -> Spread | None:
    """How sure the mean of `values` is; None where neither they nor `instead` are ENOUGH to tell.

    Args:
        values: independent, of one distribution.
        instead: where `values` are fewer than ENOUGH, these tell how much one value varies.
    """
    source = values if len(values) >= ENOUGH else instead
    if len(source) < ENOUGH:
        return None
    return Spread(variance=float(np.var(source, ddof=1)) / len(values), freedom=len(source) - 1)


def welch(mean: float, parts: Sequence[Spread]) -> Difference:
    """Interval around a difference whose error is the sum of independent parts, each with a variance of its own.

    Standard error: root of the sum of the parts' variances v. Degrees of freedom, by Welch and Satterthwaite:
    (sum v)^2 / sum(v^2 / f). Nothing is pooled, so that one side may vary more than the other.

    How often it leaves out a true difference, 5 % being promised, in 200,000 simulated comparisons each of 8 or 16
    members that vary by 1 (merges of 2 or 4 of them, or merges that vary by 1 too), 3 or 4 models that vary by 1/3, 1
    or 3, and an error over rows of 0 or 0.5: in 4 to 6 % with 4 models, 6.5 % where they vary by 3; in 4 to 7 % with 3
    models, 7.8 % where they vary by 3; in 0.3 to 2 % where single members stand for two merges that vary less. One
    variance pooled over members and models, without an error over rows, gave up to 34 %.
    """
    total = sum(part.variance for part in parts)
    if not total:
        return Difference(mean=mean, standard_error=0.0, low=mean, high=mean)
    freedom = total**2 / sum(part.variance**2 / part.freedom for part in parts)
    return _interval(mean, math.sqrt(total), freedom)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of first - second over pairs."""
    found = estimate([a - b for a, b in zip(first, second, strict=True)])
    if found.standard_error is None:
        return Difference(mean=found.mean, standard_error=None, low=None, high=None)
    return _interval(found.mean, found.standard_error, found.count - 1)


def _interval(mean: float, error: float, freedom: float) -> Difference:
    reach = float(stdtrit(freedom, 0.975)) * error
    return Difference(mean=mean, standard_error=error, low=mean - reach, high=mean + reach)
