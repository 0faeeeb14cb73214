"""Numbers of a merge study against plain computations on made-up predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student
from sklearn.metrics import log_loss, roc_auc_score

from recsys.data.schema import Schema
from recsys.merge.fit import fit
from recsys.merge.rules import NAMES
from recsys.recipes import criteo_kaggle
from recsys.studies import analysis
from recsys.studies.config import MergeStudyConfig
from recsys.studies.estimates import estimate, paired_difference
from recsys.studies.jobs import plan
from recsys.studies.pool import Pool
from recsys.studies.whole_pool import greedy, likeness
from recsys.training.predictions import Predictions

SCHEMA = Schema(name="made up", dense=("I1",), sparse={"C1": 50, "C2": 20}, labels=("label",))
CONFIG = MergeStudyConfig(
    out=Path("unused"), backbones=("fnn", "dcnv2"), seeds=2, more_seeds=4, sizes=(1, 2, 4), rivals=(2,),
    ablation_members=2,
)  # fmt: skip
NUM_ROWS = 500


@pytest.fixture(scope="module")
def jobs() -> list:
    return plan(CONFIG, criteo_kaggle(), SCHEMA)


@pytest.fixture(scope="module")
def pool(jobs: list) -> Pool:
    rng = np.random.default_rng(3)
    names = tuple(name for job in jobs for name in job.members)
    parts = []
    for _ in range(2):
        truth = rng.normal(-1, 1.5, NUM_ROWS)
        labels = (rng.random(NUM_ROWS) < 1 / (1 + np.exp(-truth))).astype(np.float32)
        logits = truth[:, None] + rng.normal(0, 0.8, (NUM_ROWS, len(names)))
        weights = rng.integers(1, 4, NUM_ROWS).astype(np.float32)
        parts.append(Predictions(names, logits.astype(np.float32), labels, weights))
    return Pool(*parts)


def plain(pool: Pool, members: Any) -> dict[str, float]:
    """Metrics of the mean logit by other means."""
    columns = [pool.test.names.index(name) for name in members]
    p = 1 / (1 + np.exp(-pool.test.logits_NM[:, columns].astype(np.float64).mean(axis=1)))
    labels, weights = pool.test.labels_N.astype(np.float64), pool.test.weights_N.astype(np.float64)
    rate = np.average(labels, weights=weights)
    loss = log_loss(labels, p, sample_weight=weights)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return {"auc": roc_auc_score(labels, p, sample_weight=weights), "logloss": loss, "ne": loss / entropy}


def test_points_are_means_over_sets(pool: Pool, jobs: list) -> None:
    costs = {job.members[0]: job.cost for job in jobs if len(job.members) == 1}
    points = {(p.source, p.size): p for p in analysis.points(analysis.set_scores(pool, CONFIG), costs)}
    point = points["seeds of dcnv2", 2]
    sets = [("dcnv2_s0", "dcnv2_s1"), ("dcnv2_s2", "dcnv2_s3")]
    merged, alone = [plain(pool, group) for group in sets], [[plain(pool, (name,)) for name in s] for s in sets]
    assert point.num_sets == 2
    assert point.mflops == pytest.approx(2 * costs["dcnv2_s0"].flops / 1e6)
    for name, sign, best in (("auc", 1, max), ("logloss", -1, min), ("ne", -1, min)):
        values = [scores[name] for scores in merged]
        assert point.merged[name].mean == pytest.approx(np.mean(values), abs=1e-9)
        assert point.merged[name].standard_error == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-9)
        means = [np.mean([one[name] for one in group]) for group in alone]
        gains = [sign * (value - mean) for value, mean in zip(values, means, strict=True)]
        assert point.over_mean[name].mean == pytest.approx(np.mean(gains), abs=1e-9)
        assert point.over_mean[name].standard_error == pytest.approx(abs(gains[0] - gains[1]) / 2, abs=1e-9)
        bests = [best(one[name] for one in group) for group in alone]
        over_best = np.mean([sign * (value - other) for value, other in zip(values, bests, strict=True)])
        assert point.over_best[name].mean == pytest.approx(over_best, abs=1e-9)
    assert points["seeds of dcnv2", 4].merged["auc"].standard_error is None
    assert points["mixed", 1].over_mean["auc"].mean == 0


def test_the_gain_in_logloss_is_the_ambiguity(pool: Pool) -> None:
    for scores in analysis.set_scores(pool, CONFIG):
        assert scores.over_mean["logloss"] == pytest.approx(scores.ambiguity, abs=1e-10)
        assert scores.ambiguity >= 0


def test_ablations_are_paired_by_seed(pool: Pool, jobs: list) -> None:
    shared, joint = analysis.ablations(pool, CONFIG, jobs)
    assert (shared.kind, joint.kind, shared.num_sets) == ("shared", "joint", 2)
    assert (shared.table_bytes_ratio, joint.table_bytes_ratio) == (0.5, 1.0)
    away = [
        plain(pool, [f"dcnv2_shared_s{seed}" for seed in seeds])["auc"]
        - plain(pool, [f"dcnv2_s{seed}" for seed in seeds])["auc"]
        for seeds in ((0, 1), (2, 3))
    ]
    assert shared.differences["auc"].mean == pytest.approx(np.mean(away), abs=1e-9)
    assert shared.differences["auc"].standard_error == pytest.approx(abs(away[0] - away[1]) / 2, abs=1e-9)


def test_every_rule_is_scored_on_the_same_sets(pool: Pool) -> None:
    found = {scores.rule: scores for scores in analysis.rules(pool, CONFIG)}
    assert tuple(found) == NAMES
    assert {(scores.size, scores.num_sets) for scores in found.values()} == {(2, 2)}
    assert found["mean_logit"].over_mean_logit["auc"].mean == 0
    groups = (("fnn_s0", "dcnv2_s0"), ("dcnv2_s1", "fnn_s1"))
    assert found["mean_logit"].merged["auc"].mean == pytest.approx(np.mean([plain(pool, g)["auc"] for g in groups]))


def test_rules_are_fitted_on_validation_rows(pool: Pool) -> None:
    members = ("dcnv2_s0", "dcnv2_s1")
    merge = fit("stacked", *pool.valid.of(members).tensors)
    p = merge(pool.test.of(members).tensors[0]).sigmoid().numpy()
    expected = log_loss(pool.test.labels_N, p, sample_weight=pool.test.weights_N)
    assert pool.scores(members, "stacked")["logloss"] == pytest.approx(expected, rel=1e-7)
    assert pool.scores(members[::-1], "stacked") == pool.scores(members, "stacked")


def test_greedy_selection_is_made_on_validation_rows_and_shown_on_test_rows(pool: Pool) -> None:
    found = greedy(pool, CONFIG)
    columns = {name: pool.valid.logits_NM[:, i].astype(np.float64) for i, name in enumerate(pool.valid.names)}

    def loss(members: list[str]) -> float:
        p = 1 / (1 + np.exp(-np.mean([columns[name] for name in members], axis=0)))
        return log_loss(pool.valid.labels_N, p, sample_weight=pool.valid.weights_N)

    left = ["fnn_s0", "fnn_s1", "dcnv2_s0", "dcnv2_s1", "dcnv2_s2", "dcnv2_s3"]
    taken: list[str] = []
    while left:
        best = min(left, key=lambda name: loss([*taken, name]))
        left.remove(best)
        taken.append(best)
    assert list(found.members) == taken
    assert found.test[2]["auc"] == pytest.approx(plain(pool, taken[:3])["auc"])
    assert found.num_chosen == 1 + int(np.argmin([loss(taken[: count + 1]) for count in range(6)]))


def test_likeness_is_the_mean_over_pairs(pool: Pool) -> None:
    found = likeness(pool, CONFIG)
    names = ("fnn_s0", "fnn_s1", "dcnv2_s0", "dcnv2_s1", "dcnv2_s2", "dcnv2_s3")
    all_of_them = np.asarray(np.corrcoef(pool.test.of(names).logits_NM.astype(np.float64).T))
    assert found.correlations[0][0] == pytest.approx(all_of_them[0, 1], abs=1e-9)
    for i, j in ((0, 1), (1, 0)):
        assert found.correlations[i][j] == pytest.approx(all_of_them[:2, 2:].mean(), abs=1e-9)
    within = all_of_them[2:, 2:][~np.eye(4, dtype=bool)].mean()
    assert found.correlations[1][1] == pytest.approx(within, abs=1e-9)
    rate = np.average(pool.valid.labels_N, weights=pool.valid.weights_N)
    above = pool.test.of(names).logits_NM > np.log(rate / (1 - rate))
    assert found.disagreement[0][0] == pytest.approx((above[:, 0] != above[:, 1]).mean())


def test_estimates() -> None:
    assert estimate([2.0]).standard_error is None
    assert estimate([1.0, 3.0]).standard_error == pytest.approx(1.0)
    pairs = paired_difference([1.0, 2.0, 3.0], [0.5, 1.6, 2.4])
    assert pairs.mean == pytest.approx(0.5)
    assert pairs.low == pytest.approx(0.5 - student.ppf(0.975, 2) * 0.1 / np.sqrt(3))
    assert (pairs.verdict(1), pairs.verdict(-1)) == ("held", "refuted")
    assert paired_difference([1.0], [0.5]).verdict(1) == "not decided"
    assert paired_difference([1.0, 2.0], [2.0, 1.0]).verdict(1) == "not decided"
