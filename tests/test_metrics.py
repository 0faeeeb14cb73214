"""Click metrics agree with scikit-learn, and stay sensible where it gives up."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from recsys.metrics import calibration, click, groups, ranked
from recsys.metrics.click import ClickScores, auc, click_metrics, logloss
from recsys.metrics.groups import GroupedScores


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


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a few thousand rows fill many chunks and buckets."""
    for module in (ranked, click):
        monkeypatch.setattr(module, "CHUNK_ROWS", 700)
    monkeypatch.setattr(ranked, "BUCKET_ROWS", 300)
    monkeypatch.setattr(ranked, "SAMPLES", 50)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("num_values", [1, 2, 30, 10_000_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_ranked_metrics_are_scikit_learns_over_many_buckets(num_values: int, weighted: bool) -> None:
    labels, probabilities = sample(10_000)
    logits = np.log(probabilities / (1 - probabilities))
    logits = (np.round(logits * num_values) / num_values).astype(np.float32)
    rng = np.random.default_rng(1)
    weights = rng.exponential(size=len(labels)) * (rng.random(len(labels)) < 0.8) if weighted else np.ones(len(labels))
    weights = weights.astype(np.float32)
    scores = ClickScores()
    for begin in range(0, len(labels), 333):
        part = slice(begin, begin + 333)
        scores.add(logits[part], labels[part], weights[part])
    found = scores.metrics()
    wide, exact = weights.astype(np.float64), logits.astype(np.float64)
    assert found.auc == pytest.approx(roc_auc_score(labels, exact, sample_weight=wide), abs=1e-12)
    assert found.auprc == pytest.approx(average_precision_score(labels, exact, sample_weight=wide), abs=1e-12)
    p = 1 / (1 + np.exp(-exact))
    assert found.logloss == pytest.approx(log_loss(labels, p, sample_weight=wide), rel=1e-12)
    assert found.num_rows == (weights > 0).sum()


def test_one_heavy_tie_among_others_stays_exact(small_parts: None) -> None:
    labels, probabilities = sample(8_000)
    tied = np.where(np.random.default_rng(2).random(len(labels)) < 0.9, np.float32(0.25), probabilities)
    assert click_metrics(labels, tied).auc == pytest.approx(roc_auc_score(labels, tied), abs=1e-12)


def test_minus_zero_ties_with_zero() -> None:
    assert auc(np.array([0, 1]), np.array([0.0, -0.0])) == 0.5
    found = GroupedScores().add(np.zeros(2, np.int32), np.array([0.0, -0.0], np.float32), np.array([0, 1]), np.ones(2))
    assert found.metrics().gauc == 0.5


def test_a_prediction_that_is_nan_leaves_no_order() -> None:
    labels, probabilities = sample(100)
    probabilities[7] = np.nan
    found = click_metrics(labels, probabilities)
    assert all(math.isnan(value) for value in (found.auc, found.auprc, found.ece, found.logloss, found.calibration))
    assert found.auc_ci is None
    assert math.isnan(GroupedScores().add(labels, probabilities, labels, np.ones(100)).metrics().gauc)


def test_no_rows_have_no_metrics() -> None:
    found = ClickScores().metrics()
    assert found.num_rows == 0
    assert math.isnan(found.auc)


@pytest.mark.parametrize("weighted", [False, True])
def test_calibration_errors_are_those_of_a_plain_loop(weighted: bool) -> None:
    labels, probabilities = sample(3_000)
    weights = np.random.default_rng(1).exponential(size=3_000) if weighted else np.ones(3_000)
    found = click_metrics(labels, probabilities, weights)
    by_width = np.minimum((probabilities * calibration.BINS).astype(int), calibration.BINS - 1)
    order = np.argsort(probabilities)
    places = np.empty(3_000)
    places[order] = np.cumsum(weights[order]) - weights[order] / 2
    by_mass = (places / weights.sum() * calibration.BINS).astype(int)
    for bins, error in ((by_width, found.ece_width), (by_mass, found.ece)):
        expected = 0.0
        for index in range(calibration.BINS):
            rows = bins == index
            if rows.any():
                own = weights[rows]
                gap = np.average(probabilities[rows], weights=own) - np.average(labels[rows], weights=own)
                expected += own.sum() / weights.sum() * abs(gap)
        assert error == pytest.approx(expected, rel=1e-9)
    assert len(found.reliability) == calibration.BINS
    share = weights.sum() / calibration.BINS
    assert [weight for _, _, weight in found.reliability] == pytest.approx([share] * calibration.BINS, rel=0.05)
    assert [p for p, _, _ in found.reliability] == sorted(p for p, _, _ in found.reliability)


def test_a_tie_is_in_one_bin() -> None:
    found = click_metrics(np.array([0, 1, 0, 1]), np.full(4, 0.5))
    assert found.reliability == ((0.5, 0.5, 4.0),)
    assert found.ece == found.ece_width == 0.0


@pytest.mark.parametrize("weighted", [False, True])
def test_intervals_are_as_wide_as_resampling_makes_them(weighted: bool) -> None:
    labels, probabilities = sample(2_000)
    probabilities = np.round(probabilities, 2).clip(0.01, 0.99)
    rng = np.random.default_rng(3)
    weights = rng.exponential(size=2_000) if weighted else np.ones(2_000)
    found = click_metrics(labels, probabilities, weights)
    drawn = [
        click_metrics(labels[rows], probabilities[rows], weights[rows])
        for rows in (rng.integers(2_000, size=2_000) for _ in range(400))
    ]
    for name, interval in (("auc", found.auc_ci), ("logloss", found.logloss_ci), ("ne", found.ne_ci)):
        assert interval is not None
        low, high = interval
        assert low < getattr(found, name) < high
        spread = np.std([getattr(metrics, name) for metrics in drawn])
        # 400 draws tell a standard deviation to 3.5 %.
        assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.12)


def test_intervals_stay_where_metrics_can_be() -> None:
    perfect = click_metrics(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4]))
    assert perfect.auc_ci == (1.0, 1.0)
    almost = click_metrics(np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.2, 0.25, 0.3, 0.4])).auc_ci
    assert almost is not None
    assert almost[1] == 1.0


@pytest.mark.usefixtures("small_parts")
def test_gauc_and_segments_are_those_of_each_group_alone() -> None:
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.3, 8_000) - 1).clip(max=2_000).astype(np.int32)
    logits = np.round(rng.normal(size=8_000), 1).astype(np.float32)
    labels = (rng.random(8_000) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    weights = rng.integers(0, 4, 8_000).astype(np.float64)
    scores = GroupedScores()
    for begin in range(0, 8_000, 700):
        part = slice(begin, begin + 700)
        scores.add(ids[part], logits[part], labels[part], weights[part])
    found = scores.metrics()
    total, counted = 0.0, 0.0
    sizes = {}
    for id_ in np.unique(ids[weights > 0]):
        rows = (ids == id_) & (weights > 0)
        sizes[int(id_)] = weights[rows].sum()
        if len(set(labels[rows])) == 2:
            total += weights[rows].sum() * roc_auc_score(labels[rows], logits[rows], sample_weight=weights[rows])
            counted += weights[rows].sum()
    assert found.gauc == pytest.approx(total / counted, abs=1e-12)
    assert found.share == pytest.approx(counted / weights.sum(), abs=1e-12)
    assert found.num_groups == len(sizes)
    largest = sorted(sizes, key=lambda id_: (-sizes[id_], id_))[: groups.SEGMENTS]
    assert list(found.segments) == largest
    for id_ in largest:
        rows = (ids == id_) & (weights > 0)
        p = 1 / (1 + np.exp(-logits[rows].astype(np.float64)))
        expected = click_metrics(labels[rows], p, weights[rows])
        for name in ("auc", "logloss", "ne", "calibration", "num_rows"):
            assert getattr(found.segments[id_], name) == pytest.approx(getattr(expected, name), rel=1e-9)


def test_groups_of_one_label_have_no_gauc() -> None:
    ids = np.array([0, 0, 1, 1], np.int32)
    found = GroupedScores().add(ids, np.arange(4.0), np.array([0, 0, 1, 1]), np.ones(4)).metrics()
    assert math.isnan(found.gauc)
    assert found.share == 0
