"""Evaluation without gathering: equal to that of gathered predictions, on any ranks, and by groups of rows."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from recsys.cli import main
from recsys.config import InputError
from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.merge.rules import Merge
from recsys.metrics import ranked
from recsys.training import share as shares
from recsys.training.evaluate import EvaluateConfig, evaluate
from recsys.training.predict import Predictor
from recsys.training.predictions import MERGED, member_metrics
from recsys.training.share import check_groups, validate
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config

MEMBERS = ("dcnv2", "rankmixer")
BY = "C9"
OF_BINS = {"reliability", "ece", "ece_width"}
"""Metrics that jump where a prediction at the edge of a bin is rounded otherwise."""


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "run"
    with process_group() as world:
        torch.set_num_threads(1)
        Trainer(small_config(prepared, out=out, members=MEMBERS), world).train()
    return out


def _evaluate(world: World, run: Path, folder: Path) -> None:
    ranked.CHUNK_ROWS, ranked.BUCKET_ROWS, shares.CHUNK_ROWS = 100, 50, 130
    evaluate(EvaluateConfig(run=run, split="test", by=BY, json=folder / f"{world.size}.json"), world)
    share = Predictor(run, world).share("valid")
    assert validate(share, "mean_logit").order == validate(share, "weighted").order
    found = validate(share, "stacked")
    torch.save([dataclasses.asdict(found.metrics[MERGED]), found.merge], folder / f"{world.size}-{world.rank}.pt")


@pytest.mark.slow
def test_two_ranks_find_what_one_does(run: Path, tmp_path: Path) -> None:
    on_ranks(2, _evaluate, run, tmp_path)
    with process_group() as world:
        evaluate(EvaluateConfig(run=run, split="test", by=BY, json=tmp_path / "1.json"), world)
        one = validate(Predictor(run, world).share("valid"), "stacked")
    alone, together = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 2))
    check_alike(together["metrics"], alone["metrics"])
    check_alike(together["groups"], alone["groups"])
    both = [torch.load(tmp_path / f"2-{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert both[0] == both[1]
    assert both[0][1].weights == pytest.approx(one.merge.weights, rel=1e-5)
    check_alike(both[0][0], dataclasses.asdict(one.metrics[MERGED]))


def check_alike(found: object, expected: object) -> None:
    """Compare nested values; predictions of two ranks differ by rounding."""
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected)
        for name, value in expected.items():
            if name not in OF_BINS:
                check_alike(found[name], value)
    elif expected is None:
        assert found is None
    elif isinstance(expected, list | tuple):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-3)
    else:
        assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_metrics_are_those_of_gathered_predictions(run: Path) -> None:
    with process_group() as world:
        predictor = Predictor(run, world)
        merge, share = Merge(rule="mean_logit"), predictor.share("test")
        found, gathered = share.metrics(merge), share.gathered()
    assert gathered is not None
    for name, expected in member_metrics(gathered, merge).items():
        for metric, value in dataclasses.asdict(expected).items():
            if value is not None:
                np.testing.assert_allclose(np.array(getattr(found[name], metric)), np.array(value), rtol=1e-9)


def test_one_member_is_scored_without_gathering(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with process_group() as world:
        share = Predictor(run, world, ["dcnv2"]).share("valid")
        gathered = share.gathered()
        monkeypatch.setattr(shares.Share, "gathered", lambda _: pytest.fail("gathered"))
        found = validate(share, "mean_logit")
    assert gathered is not None
    assert found.order == ["dcnv2"]
    expected = roc_auc_score(gathered.labels_N, gathered.logits_NM[:, 0])
    assert found.metrics["dcnv2"].auc == pytest.approx(expected, abs=1e-12)


def test_rows_are_grouped_by_the_ids_of_a_feature(run: Path, prepared: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", str(run), "--by", BY, "--json", str(run / "metrics.json")]) == 0
    printed = capsys.readouterr().out
    assert "GAUC" in printed
    assert f"merged, by {BY}" in " ".join(printed.split())
    values = json.loads((run / "metrics.json").read_text())
    assert values["by"] == BY
    with process_group() as world:
        predictions = Predictor(run, world).predict("test")
    assert predictions is not None
    ids = np.concatenate([pq.read_table(path)[BY].to_numpy() for path in sorted((prepared / "test").glob("*.parquet"))])
    logits, labels = predictions.logits_NM[:, 0], predictions.labels_N
    total, counted = 0.0, 0
    for id_ in np.unique(ids):
        rows = ids == id_
        if len(set(labels[rows])) == 2:
            total += rows.sum() * roc_auc_score(labels[rows], logits[rows])
            counted += rows.sum()
    assert values["metrics"]["dcnv2"]["gauc"] == pytest.approx(total / counted, abs=1e-9)
    segments = values["groups"]["dcnv2"]["segments"]
    sizes = {str(id_): int((ids == id_).sum()) for id_ in np.unique(ids)}
    assert {id_: segment["num_rows"] for id_, segment in segments.items()} == {id_: sizes[id_] for id_ in segments}
    assert min(sizes[id_] for id_ in segments) >= max([0, *(n for id_, n in sizes.items() if id_ not in segments)])


@pytest.mark.parametrize(
    ("by", "changes", "multi_hot", "message"),
    [
        ("C99", {}, "none", "no sparse feature of that name; did you mean C9"),
        ("C1", {"hotness": {"C1": 3}}, "none", "several ids; those with one are C2, C9"),
        ("C1", {}, "uniform", "several ids; no feature here has one"),
        ("C1", {"sparse": {"C1": 2**64}}, "none", "raw"),
    ],
)
def test_rows_that_cannot_be_grouped_are_one_line(by: str, changes: dict, multi_hot: str, message: str) -> None:
    schema = Schema(name="x", dense=(), sparse={"C1": 5, "C2": 5, "C9": 5}, labels=("label",))
    with pytest.raises(InputError, match=message):
        check_groups(by, dataclasses.replace(schema, **changes), multi_hot)
