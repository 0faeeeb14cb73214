"""Merges against bigger models: intervals, errors over rows and verdicts, beside other computations of the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_ind
from sklearn.metrics import log_loss, roc_auc_score

from recsys.data.schema import Schema
from recsys.recipes import criteo_kaggle
from recsys.studies import analysis
from recsys.studies.comparisons import Comparison, comparisons
from recsys.studies.config import MergeStudyConfig
from recsys.studies.estimates import Spread, spread, welch
from recsys.studies.findings import claim, limits, sentence
from recsys.studies.jobs import Job, plan
from recsys.studies.pool import Pool
from recsys.studies.row_errors import auc_influences, logloss_influences, standard_error
from recsys.training.predictions import Predictions

SCHEMA = Schema(name="made up", dense=("I1",), sparse={"C1": 50, "C2": 20}, labels=("label",))
CONFIG = MergeStudyConfig(
    out=Path("unused"), backbones=("dcnv2",), seeds=1, more_seeds=6, sizes=(1, 2, 4), rivals=(2, 4), ablation_sets=0
)
NUM_ROWS = 500


def made_up(jobs: list[Job], lift: float = 0.0) -> Pool:
    """Predictions of all jobs; those of bigger models are worse by noise of that spread."""
    rng = np.random.default_rng(3)
    names = tuple(name for job in jobs for name in job.members)
    extra = np.array([lift if job.kind == "rivals" else 0.0 for job in jobs])
    parts = []
    for _ in range(2):
        truth = rng.normal(-1, 1.5, NUM_ROWS)
        labels = (rng.random(NUM_ROWS) < 1 / (1 + np.exp(-truth))).astype(np.float32)
        logits = truth[:, None] + rng.normal(0, 0.8 + extra, (NUM_ROWS, len(names)))
        weights = rng.integers(1, 4, NUM_ROWS).astype(np.float32)
        parts.append(Predictions(names, logits.astype(np.float32), labels, weights))
    return Pool(*parts)


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return plan(CONFIG, criteo_kaggle(), SCHEMA)


@pytest.fixture(scope="module")
def pool(jobs: list[Job]) -> Pool:
    return made_up(jobs)


def logit(pool: Pool, *members: str) -> np.ndarray:
    return pool.test.logits_NM[:, [pool.test.names.index(name) for name in members]].astype(np.float64).mean(axis=1)


def metric(pool: Pool, name: str, *members: str) -> float:
    p = 1 / (1 + np.exp(-logit(pool, *members)))
    of = roc_auc_score if name == "auc" else log_loss
    return float(of(pool.test.labels_N, p, sample_weight=pool.test.weights_N))


SETS: dict[int, list[tuple[str, ...]]] = {
    2: [("dcnv2_s0", "dcnv2_s1"), ("dcnv2_s2", "dcnv2_s3"), ("dcnv2_s4", "dcnv2_s5")],
    4: [tuple(f"dcnv2_s{seed}" for seed in range(4))],
}


def test_the_interval_is_of_both_sides_own_spread_and_of_rows(pool: Pool, jobs: list[Job]) -> None:
    found = comparisons(pool, CONFIG, jobs)
    assert [(c.size, c.kind) for c in found] == [(m, k) for m in (2, 4) for k in ("wider", "deeper", "bigger")]
    singles = [f"dcnv2_s{seed}" for seed in range(6)]
    for comparison in found:
        sets, rivals = SETS[comparison.size], [f"dcnv2_{comparison.kind}{comparison.size}_s{seed}" for seed in range(3)]
        assert comparison.single_members == (comparison.size == 4)
        for name, sign in (("auc", 1), ("logloss", -1)):
            merged = [metric(pool, name, *group) for group in sets]
            models = [metric(pool, name, rival) for rival in rivals]
            own = merged if len(merged) > 2 else [metric(pool, name, single) for single in singles]
            spreads = float(np.var(own, ddof=1)) / len(merged), float(np.var(models, ddof=1)) / 3
            variances = [*spreads, comparison.row_errors[name] ** 2]
            total = sum(variances)
            freedom = total**2 / sum(v**2 / f for v, f in zip(variances, (len(own) - 1, 2, NUM_ROWS - 1), strict=True))
            difference = comparison.differences[name]
            assert difference.mean == pytest.approx(np.mean(merged) - np.mean(models), abs=1e-9)
            assert difference.standard_error == pytest.approx(np.sqrt(total), rel=1e-5)
            reach = student.ppf(0.975, freedom) * np.sqrt(total)
            assert difference.high == pytest.approx(difference.mean + reach, rel=1e-5)
            assert comparison.merge_errors[name] == pytest.approx(np.sqrt(variances[0]), rel=1e-5)
            assert comparison.rival_errors[name] == pytest.approx(np.sqrt(variances[1]), rel=1e-5)
            wins = np.mean([sign * (a - b) > 0 for a in merged for b in models])
            assert comparison.wins[name] == pytest.approx(wins)
        assert comparison.verdict == comparison.differences["logloss"].verdict(-1)
        assert comparison.reason == ""


def test_welch_is_that_of_scipy() -> None:
    first, second = [1.0, 1.2, 0.9, 1.4], [3.0, -2.0, 0.5]
    parts = [part for part in (spread(first), spread(second)) if part]
    found = welch(float(np.mean(first) - np.mean(second)), parts)
    expected = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert spread([1.0, 2.0]) is None
    assert spread([1.0, 2.0], instead=[1.0, 2.0, 3.0]) == Spread(variance=0.5, freedom=2)
    same = welch(0.25, [Spread(variance=0.0, freedom=2)] * 2)
    assert (same.standard_error, same.low, same.high) == (0.0, 0.25, 0.25)


@pytest.mark.parametrize(("num_rivals", "most"), [(3, 0.085), (4, 0.072)])
def test_rivals_that_vary_more_seldom_give_a_false_verdict(num_rivals: int, most: float) -> None:
    rng = np.random.default_rng(0)
    wrong, repeats = 0, 4000
    for _ in range(repeats):
        sides = spread(list(rng.normal(0, 0.5**0.5, 4))), spread(list(rng.normal(0, 3.0, num_rivals)))
        # Means are drawn anew: independent of the spread, as those of normal values are.
        mean = rng.normal(0, np.sqrt(0.5 / 4 + 9 / num_rivals + 0.25))
        found = welch(mean, [*(side for side in sides if side), Spread(variance=0.25, freedom=499)])
        wrong += found.verdict(1) != "not decided"
    assert 0.03 < wrong / repeats < most


def test_errors_over_rows_are_paired(pool: Pool, jobs: list[Job]) -> None:
    wider = comparisons(pool, CONFIG, jobs)[0]

    def losses(*members: str) -> np.ndarray:
        z = logit(pool, *members)
        return np.logaddexp(0, z) - pool.test.labels_N * z

    merged = np.mean([losses(*group) for group in SETS[2]], axis=0)
    away = merged - np.mean([losses(f"dcnv2_wider2_s{seed}") for seed in range(3)], axis=0)
    weights = pool.test.weights_N.astype(np.float64)
    mean = np.average(away, weights=weights)
    assert mean == pytest.approx(wider.differences["logloss"].mean, abs=1e-9)
    expected = np.sqrt((weights**2 * (away - mean) ** 2).sum()) / weights.sum()
    assert wider.row_errors["logloss"] == pytest.approx(expected, rel=1e-6)
    ratio = pool.scores(SETS[2][0])["ne"] / pool.scores(SETS[2][0])["logloss"]
    assert wider.row_errors["ne"] == pytest.approx(expected * ratio, rel=1e-6)


def test_auc_influences_are_delongs() -> None:
    rng = np.random.default_rng(1)
    labels = np.array([1, 0, 1, 0, 0, 1, 0, 0, 1, 0])
    first, second = rng.integers(0, 6, 10).astype(float), rng.normal(size=10)  # with ties, without

    def components(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = scores[labels == 1], scores[labels == 0]
        psi = (x[:, None] > y[None, :]) + 0.5 * (x[:, None] == y[None, :])
        return psi.mean(axis=1), psi.mean(axis=0)

    (x1, y1), (x2, y2) = components(first), components(second)
    variance = np.var(x1 - x2) / 4 + np.var(y1 - y2) / 6
    ones = np.ones(10)
    away = auc_influences(labels, first, ones) - auc_influences(labels, second, ones)
    assert standard_error(away) == pytest.approx(np.sqrt(variance))
    assert away.sum() == pytest.approx(0, abs=1e-12)


def test_errors_over_rows_are_what_other_rows_change() -> None:
    rng = np.random.default_rng(5)

    def draw() -> tuple[float, float, float, float]:
        truth = rng.normal(0, 1, 400)
        labels = (rng.random(400) < 1 / (1 + np.exp(-truth))).astype(float)
        weights = rng.integers(1, 3, 400).astype(float)
        one, other = truth + rng.normal(0, 0.5, 400), truth + rng.normal(0, 0.7, 400)
        loss = [np.logaddexp(0, z) - labels * z for z in (one, other)]
        of_auc = auc_influences(labels, one, weights) - auc_influences(labels, other, weights)
        of_loss = logloss_influences(loss[0], weights) - logloss_influences(loss[1], weights)
        aucs = [roc_auc_score(labels, z, sample_weight=weights) for z in (one, other)]
        mean_loss = np.average(loss[0] - loss[1], weights=weights)
        return aucs[0] - aucs[1], standard_error(of_auc), mean_loss, standard_error(of_loss)

    auc, auc_error, loss, loss_error = np.array([draw() for _ in range(400)]).T
    assert np.sqrt((auc_error**2).mean()) == pytest.approx(auc.std(), rel=0.12)
    assert np.sqrt((loss_error**2).mean()) == pytest.approx(loss.std(), rel=0.12)


def test_auc_influences_of_one_label_are_nan() -> None:
    assert np.isnan(auc_influences(np.ones(3), np.arange(3.0), np.ones(3))).all()


def test_worse_models_lose(jobs: list[Job]) -> None:
    found = comparisons(made_up(jobs, lift=3.0), CONFIG, jobs)
    for comparison in found:
        assert comparison.verdict == "held"
        assert sentence(comparison).endswith("of pairs. Held.")
    assert limits(found) == ""


def test_more_rows_are_asked_for_where_seeds_cannot_decide(pool: Pool, jobs: list[Job]) -> None:
    found = comparisons(pool, CONFIG, jobs)
    close = [
        replace(
            one,
            verdict="not decided",
            differences={"logloss": replace(one.differences["logloss"], mean=factor * one.row_errors["logloss"])},
        )
        for one, factor in zip(found, (1.9, -1.9, 2.0, -2.0, 5.0, -5.0), strict=True)
    ]
    assert limits(close).startswith("In 2 of the 6 undecided comparisons")


def test_fewer_than_three_seeds_decide_nothing() -> None:
    config = replace(CONFIG, rival_seeds=2)
    jobs = plan(config, criteo_kaggle(), SCHEMA)
    for found in comparisons(made_up(jobs, lift=3.0), config, jobs):
        assert (found.verdict, found.differences["logloss"].low) == ("not decided", None)
        assert claim(found) == "not decided: 2 seeds of the model"


def test_fewer_than_three_members_decide_nothing() -> None:
    config = replace(CONFIG, more_seeds=2, sizes=(1, 2), rivals=(2,))
    jobs = plan(config, criteo_kaggle(), SCHEMA)
    assert claim(comparisons(made_up(jobs), config, jobs)[0]) == "not decided: 2 members"


@pytest.mark.parametrize(("ratio", "takes_part"), [(0.89, False), (0.91, True), (1.09, True), (1.11, False)])
def test_models_of_another_budget_take_no_part(jobs: list[Job], ratio: float, takes_part: bool) -> None:
    pool, one = made_up(jobs, lift=3.0), jobs[0].cost
    off = [
        replace(job, cost=replace(job.cost, flops=round(ratio * 2 * one.flops))) if "wider2" in job.name else job
        for job in jobs
    ]
    found: Comparison = comparisons(pool, CONFIG, off)[0]
    assert claim(found) == ("held" if takes_part else f"no part: FLOPs ratio {ratio:.2f}")


def test_sizes_stand_beside_the_verdict(pool: Pool, jobs: list[Job]) -> None:
    found = {(c.size, c.kind): c for c in comparisons(pool, CONFIG, jobs)}
    member = found[2, "wider"].member_sizes
    assert (member["embedding_dim"], member["rank"], member["hidden"]) == (16, None, (256, 128))
    wider, bigger = found[4, "wider"].rival_sizes, found[4, "bigger"].rival_sizes
    assert (wider["embedding_dim"], bigger["embedding_dim"], bigger["rank"]) == (64, 16, None)
    assert isinstance(wider["rank"], int)
    assert found[4, "deeper"].rival_sizes["num_cross_layers"] == 12
    assert found[4, "bigger"].table_bytes_ratio == 0.25
    assert found[4, "wider"].table_bytes_ratio == 1


def test_a_study_without_rivals_has_none() -> None:
    config = replace(CONFIG, more_seeds_of=(), rivals=(), ablation_sets=0, seeds=2, sizes=(1, 2))
    jobs = plan(config, criteo_kaggle(), SCHEMA)
    assert comparisons(made_up(jobs), config, jobs) == []
    assert analysis.ablations(made_up(jobs), config, jobs) == []
