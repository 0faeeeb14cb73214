"""Row errors: how much a difference between two metrics would change on other test rows.

Both sides are scored on the same rows, so what counts is a row's influence on the difference: the metric is to first
order its expectation plus the sum of all rows' influences, which are independent, and the standard error is the root of
the sum of their squares.
"""

import numpy as np

from recsys.training.metrics import auc


def logloss_influences(losses_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """Influence of every row on the weighted mean of losses [N]."""
    shares_N = weights_N / weights_N.sum()
    influences_N: np.ndarray = shares_N * (losses_N - shares_N @ losses_N)
    return influences_N


def auc_influences(labels_N: np.ndarray, scores_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """Influence of every row on the AUC [N]; nan when all labels agree.

    A positive row's is its share among positives times (the share of negatives below it, ties as half, minus the AUC),
    and the other way round: the structural components of DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988), with
    n in place of their n - 1. Differences of two models' influences give the paired error.
    """
    is_positive = labels_N > 0
    _, place_N = np.unique(scores_N, return_inverse=True)
    placed_N = np.empty(len(scores_N))
    for rows, others in ((is_positive, ~is_positive), (~is_positive, is_positive)):
        at_U = np.bincount(place_N[others], weights_N[others], minlength=int(place_N.max()) + 1)
        below_U = np.cumsum(at_U) - at_U / 2
        placed_N[rows] = below_U[place_N[rows]] / at_U.sum() if at_U.sum() else np.nan
    right_N = np.where(is_positive, placed_N, 1.0 - placed_N)  # of a negative row: positives above it
    totals_N = np.where(is_positive, weights_N[is_positive].sum(), weights_N[~is_positive].sum())
    return weights_N / totals_N * (right_N - auc(labels_N, scores_N, weights_N))


def standard_error(influences_N: np.ndarray) -> float:
    """Root of the sum of squares."""
    return float(np.sqrt(np.square(influences_N).sum()))
