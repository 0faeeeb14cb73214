"""Calibration in bins: whether of the rows that are predicted p, a share of p clicks.

Expected calibration error, Naeini, Cooper & Hauskrecht (AAAI 2015): ECE = sum_b W_b / W |mean prediction of bin b -
mean label of bin b|, over bins of equal width as there, or of equal mass (Nixon et al., "Measuring Calibration in Deep
Learning", 2019): with click rates of some per cent, nearly all rows lie in the first bins of equal width. Rows of equal
prediction are in one bin of equal mass, that of their middle.
"""

import numpy as np

BINS = 15

PREDICTED, CLICKED, WEIGHT = range(3)
"""Columns of bins [15, 3]: weighted sums of predictions and of labels, and of weights."""


def width_bins(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Bins of equal width over [0, 1]."""
    index = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    return _binned(index, (weights * probabilities, weights * labels, weights))


def mass_bins(places_G: np.ndarray, probabilities_G: np.ndarray, weights_G2: np.ndarray) -> np.ndarray:
    """Bins of equal mass, of groups of one prediction each.

    Args:
        places_G: share of all weight that is predicted lower, with half of the group's own.
        probabilities_G: the predictions.
        weights_G2: positive and negative weight.
    """
    index = np.minimum((places_G * BINS).astype(np.int64), BINS - 1)
    total_G = weights_G2.sum(axis=1)
    return _binned(index, (total_G * probabilities_G, weights_G2[:, 0], total_G))


def bin_means(bins: np.ndarray) -> tuple[tuple[float, float, float], ...]:
    """Mean prediction, mean label and weight of each bin that has rows."""
    filled = bins[bins[:, WEIGHT] > 0]
    means = filled[:, :WEIGHT] / filled[:, WEIGHT:]
    return tuple((float(p), float(y), float(w)) for (p, y), w in zip(means, filled[:, WEIGHT], strict=True))


def _binned(index: np.ndarray, columns: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.stack([np.bincount(index, column, minlength=BINS) for column in columns], axis=1)


def expected_error(bins: np.ndarray) -> float:
    """Compute the ECE of bins."""
    return float(np.abs(bins[:, PREDICTED] - bins[:, CLICKED]).sum() / bins[:, WEIGHT].sum())
