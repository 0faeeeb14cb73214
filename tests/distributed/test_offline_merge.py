"""Runs that are merged after training are the run that one job would have made; files of predictions merge too."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.config import InputError, dump, load_file
from recsys.distributed import World, process_group
from recsys.members import ModelConfig
from recsys.merge.rules import Merge
from recsys.studies.merge_files import merge_files
from recsys.studies.merge_runs import MergeConfig, merge_runs
from recsys.training.answer import PredictConfig, answer, merge_answers
from recsys.training.config import TrainConfig
from recsys.training.evaluate import EvaluateConfig, evaluate
from recsys.training.predict import Predictor
from recsys.training.predictions import Predictions, load_predictions
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config

STEPS, MORE_STEPS = 10, 20
MEMBERS = ("dcnv2", "wukong", "dcnv2_2")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group() as world:
        torch.set_num_threads(1)
        yield world


def job(data: Path, out: Path, *members: str, **changes: Any) -> TrainConfig:
    # The schedule looks ahead: a run that goes on to step 20 has it from the first step on.
    return small_config(data, out=out, members=members, log_every=1, num_steps=STEPS, embedding_dropout=0.1, **changes)


@pytest.fixture(scope="module")
def runs(prepared: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two runs, of both in one job, and of both merged."""
    folder = tmp_path_factory.mktemp("runs")
    own = "dcnv2:name=dcnv2_2,seed=4,dense_lr=0.02,table_lr=0.05,num_cross_layers=1"
    Trainer(job(prepared, folder / "a", "dcnv2"), world).train()
    backbones = dataclasses.replace(
        small_config(prepared).backbones,
        dcnv2=dataclasses.replace(small_config(prepared).backbones.dcnv2, num_cross_layers=1),
    )
    other = {"dense_lr": 0.02, "table_lr": 0.05, "backbones": backbones}
    Trainer(job(prepared, folder / "b", "wukong:dense_lr=0.01,table_lr=0.1", "dcnv2:seed=4", **other), world).train()
    Trainer(job(prepared, folder / "together", "dcnv2", "wukong", own), world).train()
    merge_runs(MergeConfig(sources=(folder / "a", folder / "b"), out=folder / "merged"), world)
    return folder


def losses(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def logits(run: Path, world: World) -> np.ndarray:
    predictions = Predictor(run, world).predict("test")
    assert predictions is not None
    assert predictions.names == MEMBERS
    return predictions.logits_NM


def test_a_merged_run_is_the_run_of_one_job(runs: Path, world: World) -> None:
    np.testing.assert_allclose(logits(runs / "merged", world), logits(runs / "together", world), atol=1e-5)
    merged, together = (evaluate(EvaluateConfig(run=runs / name), world) for name in ("merged", "together"))
    assert merged is not None
    assert together is not None
    for name, metrics in together.items():
        assert merged[name].logloss == pytest.approx(metrics.logloss, abs=1e-6)
    specs = load_file(TrainConfig, runs / "merged" / "config.json").specs()
    assert [(spec.name, spec.seed) for spec in specs] == [("dcnv2", 0), ("wukong", 0), ("dcnv2_2", 4)]


def test_a_merged_run_goes_on_like_the_run_of_one_job(runs: Path, world: World, tmp_path: Path) -> None:
    for name in ("merged", "together"):
        config = load_file(TrainConfig, runs / name / "config.json")
        loop = dataclasses.replace(config.train, num_steps=MORE_STEPS)
        Trainer(dataclasses.replace(config, out=runs / name, resume=True, train=loop), world).train()
    merged, together = losses(runs / "merged"), losses(runs / "together")
    assert sorted(merged) == list(range(STEPS + 1, MORE_STEPS + 1))
    for step, expected in merged.items():
        assert together[step] == pytest.approx(expected, abs=1e-5)


def test_runs_merge_on_two_ranks(runs: Path, world: World) -> None:
    on_ranks(2, _merge, runs)
    one, two = (json.loads((runs / name / "plan.json").read_text()) for name in ("merged", "merged_on_two"))
    assert one.keys() == two.keys()
    assert {rank for table in two.values() for rank in table["ranks"]} == {0, 1}
    predictions = Predictor(runs / "merged_on_two", world).predict("test")
    assert predictions is not None
    expected = [Predictor(runs / name, world).predict("test") for name in ("a", "b")]
    columns = [part.logits_NM for part in expected if part]
    np.testing.assert_allclose(predictions.logits_NM, np.concatenate(columns, axis=1), atol=1e-5)


def _merge(world: World, runs: Path) -> None:
    merge_runs(MergeConfig(sources=(runs / "a", runs / "b"), out=runs / "merged_on_two"), world)


def test_runs_that_cannot_be_one_are_refused(runs: Path, prepared: Path, world: World, tmp_path: Path) -> None:
    def refused(message: str, *sources: Path, out: Path = tmp_path / "out") -> None:
        with pytest.raises(InputError, match=message):
            merge_runs(MergeConfig(sources=sources, out=out), world)
        assert not (tmp_path / "out").exists()

    refused("no run named")
    refused("no run folder", runs / "a", tmp_path)
    refused("exists already", runs / "a", runs / "b", out=runs / "merged")
    refused("same backbone, seed 0 and settings, so merging them gains nothing", runs / "a", runs / "together")
    config = job(prepared, tmp_path / "shared", "dcnv2", seed=9)
    shared = dataclasses.replace(config, model=dataclasses.replace(config.model, tables="shared"))
    Trainer(shared, world).train()
    refused("its members share tables", runs / "a", tmp_path / "shared")
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("config.json", "schema.json", "data.json"):
        (changed / name).write_bytes((runs / "b" / name).read_bytes())
    refused("no checkpoint in it", runs / "a", changed)
    facts = json.loads((changed / "data.json").read_text())
    (changed / "data.json").write_text(json.dumps(facts | {"seed": 77}))
    refused("was trained on other data than .*: seed 77 instead of", runs / "a", changed)
    config = load_file(TrainConfig, changed / "config.json")
    for changes, message in (
        ({"model": ModelConfig(precision="bf16")}, "precision bf16"),
        ({"loss": "joint"}, "has loss joint"),
        ({"optimizer": dataclasses.replace(config.optimizer, tables="adagrad")}, "optimizer.tables adagrad"),
    ):
        (changed / "data.json").write_bytes((runs / "b" / "data.json").read_bytes())
        other = dataclasses.replace(config, **changes)
        (changed / "config.json").write_text(json.dumps(dump(other)))
        refused(message, runs / "a", changed)
    schema = json.loads((changed / "schema.json").read_text())
    schema["sparse"]["C3"] += 1
    (changed / "schema.json").write_text(json.dumps(schema))
    refused("feature C3 has", runs / "a", changed)


# Some members, or a time


def test_some_members_answer_as_they_do_among_all(runs: Path, world: World, tmp_path: Path) -> None:
    everyone = Predictor(runs / "merged", world).predict("valid")
    some = Predictor(runs / "merged", world, ["dcnv2_2", "dcnv2"]).predict("valid")
    assert everyone is not None
    assert some is not None
    assert some.names == ("dcnv2_2", "dcnv2")
    np.testing.assert_allclose(some.logits_NM, everyone.logits_NM[:, [2, 0]], atol=1e-6)
    found = answer(PredictConfig(run=runs / "merged", out=tmp_path / "p.parquet", members=("2",)), world)
    assert found is not None
    best = json.loads((runs / "merged" / "merge.json").read_text())["order"][:2]
    assert list(found.metrics) == [*best, "merged"]


def test_a_file_of_predictions_is_read_back(runs: Path, world: World, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    found = answer(PredictConfig(run=runs / "merged", out=path, batch_size=64), world)
    predictions, facts, rows = load_predictions(path)
    expected = logits(runs / "merged", world)
    np.testing.assert_allclose(predictions.logits_NM, expected, atol=1e-6)
    np.testing.assert_allclose(pq.read_table(path)["merged"].to_numpy(), expected.mean(axis=1), atol=1e-6)
    assert rows.tolist() == list(range(len(expected)))
    assert facts["split"] == "test"
    assert found is not None
    assert found.metrics["merged"].num_rows == len(expected)


def test_a_generous_budget_lets_all_answer_and_a_tight_one_the_best(runs: Path, world: World, tmp_path: Path) -> None:
    config = PredictConfig(run=runs / "merged", out=tmp_path / "p.parquet", budget="30s")
    found = answer(config, world)
    assert found is not None
    assert found.timing is not None
    assert found.timing["share_by_num_members"] == {3: 1.0}
    order = json.loads((runs / "merged" / "merge.json").read_text())["order"]
    predictions, _, _ = load_predictions(config.out)
    assert predictions.names == tuple(order)
    np.testing.assert_allclose(predictions.of(MEMBERS).logits_NM, logits(runs / "merged", world), atol=1e-6)
    with pytest.raises(InputError, match=rf"budget 0.001ms: no member would answer, for {order[0]} takes .* raise"):
        answer(dataclasses.replace(config, budget="1us"), world)


def test_each_row_is_merged_by_those_who_answered_it() -> None:
    nan = float("nan")
    given = np.array([[1.0, 3.0, 8.0], [1.0, nan, 5.0], [2.0, nan, nan]], dtype=np.float32)
    predictions = Predictions(("a", "b", "c"), given, np.zeros(3), np.ones(3))
    assert merge_answers(predictions, Merge(rule="mean_logit")).tolist() == [4.0, 3.0, 2.0]
    weighted = Merge(rule="weighted", weights=(0.5, 0.25, 0.25))
    np.testing.assert_allclose(merge_answers(predictions, weighted), [3.25, 0.5 / 0.75 + 5 * 0.25 / 0.75, 2.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ("wukon",)}, "has no member 'wukon'; did you mean wukong"),
        ({"members": ("wukong", "wukong")}, "a member is named twice"),
        ({"members": ("0",)}, "--members 0: the run has 3 members; name 1 to 3"),
        ({"members": ("4",)}, "--members 4: the run has 3 members"),
        ({"out": Path("/nowhere/p.parquet")}, "no such folder"),
    ],
)
def test_what_cannot_be_predicted(
    runs: Path, world: World, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        answer(PredictConfig(**{"run": runs / "merged", "out": tmp_path / "p.parquet", **changes}), world)


@pytest.mark.parametrize("budget", ["3", "ms", "0ms", "-1ms", "3 minutes"])
def test_a_budget_that_is_no_time(budget: str) -> None:
    with pytest.raises(ValueError, match="is no time above 0; write 3ms"):
        PredictConfig(run=Path("r"), out=Path("p"), budget=budget)


# Files


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_files_of_other_frameworks_merge_by_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    first, second = rng.normal(labels, 1), rng.normal(labels, 2)
    order = rng.permutation(200)
    one = write(tmp_path / "one.parquet", row=np.arange(200), label=labels, ours=first)
    two = write(tmp_path / "two.parquet", row=order, label=labels[order].astype(float), ours=second[order])
    metrics = merge_files(MergeConfig(sources=(one, two), out=tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["row", "label", "weight", "ours", "two_ours", "merged"]
    np.testing.assert_allclose(table["merged"].to_numpy(), (first + second) / 2, atol=1e-5)
    assert set(metrics) == {"ours", "two_ours", "merged"}
    fitted = MergeConfig(sources=(one, two), out=tmp_path / "w.parquet", rule="weighted", fit_on=(one, two))
    # Fitted on the very rows that it is scored on: at most the plain mean.
    assert merge_files(fitted)["merged"].logloss <= metrics["merged"].logloss


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows, labels, logit = np.arange(4), np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    good = write(tmp_path / "good.parquet", row=rows, label=labels, m=logit)

    def refused(message: str, rule: str | None = None, **columns: Any) -> None:
        bad = write(tmp_path / "bad.parquet", **columns)
        with pytest.raises(InputError, match=message):
            merge_files(MergeConfig(sources=(good, bad), out=tmp_path / "out.parquet", rule=rule))
        assert not (tmp_path / "out.parquet").exists()

    refused("bad.parquet: no column 'row'", label=labels, m=logit)
    refused("bad.parquet: no column 'label'", row=rows, m=logit)
    refused("no column of logits beside row, label", row=rows, label=labels)
    refused("row 3 is missing there", row=rows[:3], label=labels[:3], m=logit[:3])
    refused("row 4 is there alone", row=np.arange(5), label=np.append(labels, 0), m=np.append(logit, 0))
    refused("row 1: label 0, in .*good.parquet 1", row=rows, label=np.zeros(4), m=logit)
    refused("column 'label', row 2: 0.5 is neither 0 nor 1", row=rows, label=labels / 2, m=logit)
    refused("column 'row' does not give every row", row=np.zeros(4), label=labels, m=logit)
    refused("column 'm', row 3: no finite number", row=rows, label=labels, m=np.where(rows == 2, np.nan, logit))
    refused("column 'm' is string, not numbers", row=rows, label=labels, m=["a", "b", "c", "d"])
    refused("--rule stacked is fitted; give validation rows", rule="stacked", row=rows, label=labels, m=logit)
    (tmp_path / "bad.parquet").write_text("row,label,m")
    with pytest.raises(InputError, match=r"bad\.parquet: cannot read it as Parquet"):
        load_predictions(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="unknown merge rule 'mean'; did you mean"):
        MergeConfig(sources=(good,), out=tmp_path / "out", rule="mean")
