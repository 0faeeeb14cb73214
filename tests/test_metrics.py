"""Click metrics agree with scikit-learn, and stay sensible where it gives up."""

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from recsys.training.metrics import auc, click_metrics, logloss


def sample(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels as float32, as the loader gives them, and probabilities that they follow."""
    rng = np.random.default_rng(seed)
    probabilities = rng.beta(1, 3, num_rows)
    return (rng.random(num_rows) < probabilities).astype(np.float32), probabilities


@pytest.mark.parametrize("num_values", [2, 10, 10_000])
def test_auc_is_scikit_learns_with_ties(num_values: int) -> None:
    labels, probabilities = sample(5_000)
    scores = np.round(probabilities * num_values)
    assert len(np.unique(scores)) < len(scores)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_without_ties() -> None:
    labels, probabilities = sample(5_000)
    assert len(np.unique(probabilities)) == len(probabilities)
    assert auc(labels, probabilities) == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)


def test_auc_at_its_ends() -> None:
    labels = np.array([0, 0, 1, 1])
    assert auc(labels, np.array([0.1, 0.2, 0.3, 0.4])) == 1.0
    assert auc(labels, np.array([0.4, 0.3, 0.2, 0.1])) == 0.0
    assert auc(labels, np.full(4, 0.25)) == 0.5


def test_logloss_is_scikit_learns() -> None:
    labels, probabilities = sample(5_000)
    assert logloss(labels, probabilities) == pytest.approx(log_loss(labels, probabilities), rel=1e-12)


@pytest.mark.parametrize("num_values", [10, 10_000_000])
def test_weighted_metrics_are_scikit_learns(num_values: int) -> None:
    labels, probabilities = sample(5_000)
    probabilities = np.clip(np.round(probabilities * num_values) / num_values, 0.01, 0.99)
    weights = np.random.default_rng(1).exponential(size=len(labels)).astype(np.float32)
    metrics = click_metrics(labels, probabilities, weights)
    assert metrics.auc == pytest.approx(roc_auc_score(labels, probabilities, sample_weight=weights), abs=1e-12)
    assert metrics.logloss == pytest.approx(log_loss(labels, probabilities, sample_weight=weights), rel=1e-12)
    rate = np.average(labels, weights=weights.astype(np.float64))
    base = log_loss(labels, np.full(len(labels), rate), sample_weight=weights)
    assert metrics.ne == pytest.approx(metrics.logloss / base, rel=1e-12)
    assert metrics.calibration == pytest.approx(np.average(probabilities, weights=weights) / rate, rel=1e-6)


def test_a_weight_counts_as_so_many_rows() -> None:
    labels, probabilities = sample(500)
    times = np.random.default_rng(1).integers(0, 4, len(labels))
    weighted = click_metrics(labels, probabilities, times)
    repeated = click_metrics(labels.repeat(times), probabilities.repeat(times))
    for name in ("auc", "logloss", "ne", "calibration"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-12)


def test_extreme_probabilities_cost_much_but_not_everything() -> None:
    never = -math.log(1e-15)
    assert logloss(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(never, rel=1e-3)
    assert logloss(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == pytest.approx(0.0, abs=1e-14)
    # Near 1 a float64 still has digits to spare, and they count.
    assert logloss(np.array([1.0]), np.array([1 - 1e-12])) == pytest.approx(1e-12, rel=1e-3)


def test_ne_is_1_for_the_base_rate_and_less_for_better() -> None:
    labels, probabilities = sample(5_000)
    assert click_metrics(labels, np.full(len(labels), labels.mean(dtype=np.float64))).ne == pytest.approx(1.0)
    assert click_metrics(labels, probabilities).ne < 0.95
    assert click_metrics(labels, 1 - probabilities).ne > 1.5


def test_calibration_is_predicted_over_real_clicks() -> None:
    labels, probabilities = np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.5, 0.25, 0.25, 0.5])
    assert click_metrics(labels, probabilities).calibration == pytest.approx(0.75)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_that_all_agree_have_neither_auc_nor_ne(label: float) -> None:
    metrics = click_metrics(np.full(5, label), np.linspace(0.1, 0.9, 5))
    assert math.isnan(metrics.auc)
    assert math.isnan(metrics.ne)
    assert math.isfinite(metrics.logloss)
    assert metrics.calibration == (0.5 if label else math.inf)


def test_float32_inputs_are_summed_in_float64() -> None:
    labels, probabilities = sample(100_000)
    narrow = probabilities.astype(np.float32)
    metrics = click_metrics(labels, narrow)
    assert metrics.num_rows == 100_000
    assert metrics.logloss == pytest.approx(log_loss(labels, narrow.astype(np.float64)), rel=1e-12)
    assert metrics.calibration == pytest.approx(narrow.sum(dtype=np.float64) / labels.sum(dtype=np.float64), rel=1e-12)
