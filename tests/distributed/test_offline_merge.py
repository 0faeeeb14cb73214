"""Runs that are merged after training are the run that one job would have made."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import InputError, dump, load_file
from recsys.data.loader import LoaderConfig
from recsys.distributed import World, process_group
from recsys.members import ModelConfig
from recsys.sharding.plan import Plan
from recsys.studies.merge_runs import MergeConfig, merge_runs
from recsys.training.config import TrainConfig
from recsys.training.evaluate import EvaluateConfig, evaluate
from recsys.training.predict import Predictor
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
    values = {"log_every": 1, "num_steps": STEPS, "embedding_dropout": 0.1, "ema_decay": 0.9, **changes}
    return small_config(data, out=out, members=members, **values)


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
    for name, metrics in together.metrics.items():
        assert merged.metrics[name].logloss == pytest.approx(metrics.logloss, abs=1e-6)
    specs = load_file(TrainConfig, runs / "merged" / "config.json").specs()
    assert [(spec.name, spec.seed) for spec in specs] == [("dcnv2", 0), ("wukong", 0), ("dcnv2_2", 4)]


def test_a_merged_run_goes_on_like_the_run_of_one_job(runs: Path, world: World, tmp_path: Path) -> None:
    for name in ("merged", "together"):
        config = load_file(TrainConfig, runs / name / "config.json")
        loop = dataclasses.replace(config.train, num_steps=MORE_STEPS)
        Trainer(dataclasses.replace(config, out=runs / name, resume="auto", train=loop), world).train()
    merged, together = losses(runs / "merged"), losses(runs / "together")
    assert sorted(merged) == list(range(STEPS + 1, MORE_STEPS + 1))
    for step, expected in merged.items():
        assert together[step] == pytest.approx(expected, abs=1e-5)


def test_runs_merge_on_two_ranks(runs: Path, world: World) -> None:
    on_ranks(2, _merge, runs)
    one, two = (Plan.load(runs / name / "plan.json").tables for name in ("merged", "merged_on_two"))
    assert one.keys() == two.keys()
    assert {rank for table in two.values() for rank in table.ranks} == {0, 1}
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
    for name in ("config.json", "schema.json", "data.json", "plan.json"):
        (changed / name).write_bytes((runs / "b" / name).read_bytes())
    refused("no checkpoint in it", runs / "a", changed)
    facts = json.loads((changed / "data.json").read_text())
    (changed / "data.json").write_text(json.dumps(facts | {"seed": 77}))
    refused("was trained on other data than .*: seed 77 instead of", runs / "a", changed)
    config = load_file(TrainConfig, changed / "config.json")
    for changes, message in (
        ({"model": ModelConfig(precision="bf16")}, "precision bf16"),
        ({"loss": "joint", "members": ("fnn", "deepfm")}, "its members were trained by one joint loss"),
        ({"optimizer": dataclasses.replace(config.optimizer, tables="adagrad")}, "optimizer.tables adagrad"),
        ({"loader": LoaderConfig(multi_hot="uniform")}, "has loader.multi_hot uniform, .* has none"),
    ):
        (changed / "data.json").write_bytes((runs / "b" / "data.json").read_bytes())
        other = dataclasses.replace(config, **changes)
        (changed / "config.json").write_text(json.dumps(dump(other)))
        refused(message, runs / "a", changed)
    (changed / "data.json").write_text("{")
    refused(r"data\.json: cannot read which data", runs / "a", changed)
    with pytest.raises(InputError, match="--fit-on is for files of predictions; runs are fitted on their own"):
        merge_runs(MergeConfig(sources=(runs / "a", runs / "b"), out=tmp_path / "out", fit_on=(tmp_path,)), world)
    (tmp_path / "file").touch()
    refused("cannot make its folder", runs / "a", runs / "b", out=tmp_path / "file" / "out")
    schema = json.loads((changed / "schema.json").read_text())
    schema["sparse"]["C3"] += 1
    (changed / "schema.json").write_text(json.dumps(schema))
    refused("feature C3 has", runs / "a", changed)


def test_runs_of_data_that_moved_are_merged_on_the_same_data(
    runs: Path, prepared: Path, world: World, tmp_path: Path
) -> None:
    moved = [copied(runs / name, tmp_path / name, data=tmp_path / "gone") for name in ("a", "b")]
    config = MergeConfig(sources=tuple(moved), out=tmp_path / "out")
    with pytest.raises(
        InputError, match=r"gone: no such folder, and .*a was trained on it; name where it is .* --data"
    ):
        merge_runs(config, world)
    here = tmp_path / "here"
    shutil.copytree(prepared, here)
    manifest = json.loads((here / "manifest.json").read_text())
    for changes, message in (({"seed": 77}, "seed 77 instead of"), ({"paths": []}, "manifest_sha256 .* instead of")):
        other = manifest | {"config": manifest["config"] | changes}
        (here / "manifest.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=rf"here is not the data that .*a was trained on: {message}"):
            merge_runs(dataclasses.replace(config, data=here), world)
    shutil.copy(prepared / "manifest.json", here)
    assert merge_runs(dataclasses.replace(config, data=here), world) is not None
    assert load_file(TrainConfig, tmp_path / "out" / "config.json").data == here
    expected = [valid_logits(runs / name, world) for name in ("a", "b")]
    np.testing.assert_allclose(valid_logits(tmp_path / "out", world), np.concatenate(expected, axis=1), atol=1e-6)


def copied(run: Path, to: Path, **changes: Any) -> Path:
    """A copy of a run whose config says otherwise."""
    shutil.copytree(run, to)
    config = dataclasses.replace(load_file(TrainConfig, to / "config.json"), **changes)
    (to / "config.json").write_text(json.dumps(dump(config)))
    return to


def test_what_a_merged_run_goes_on_with_is_told(
    runs: Path, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_file(TrainConfig, runs / "b" / "config.json")
    optimizer = dataclasses.replace(config.optimizer, weight_decay=0.5, decay="cosine")
    loop = dataclasses.replace(config.train, num_steps=None, num_epochs=3)
    other = copied(runs / "b", tmp_path / "other", optimizer=optimizer, train=loop)
    later = copied(runs / "a", tmp_path / "later", seed=4000, train=dataclasses.replace(config.train, num_steps=12))
    checkpoints = later / "checkpoints"
    (checkpoints / f"step-{STEPS:08d}").rename(checkpoints / "step-00000011")
    capfd.readouterr()
    merge_runs(MergeConfig(sources=(runs / "a", runs / "b"), out=tmp_path / "same"), world)
    assert capfd.readouterr().err == ""
    merge_runs(MergeConfig(sources=(runs / "a", other, later), out=tmp_path / "out"), world)
    num_steps = 3 * (json.loads((runs / "a" / "data.json").read_text())["rows"]["train"] // 128)
    assert capfd.readouterr().err.splitlines() == [
        f"{other}: on --resume auto, num_epochs 3, num_steps None, weight_decay 0.5, decay cosine become "
        f"{runs / 'a'}'s 1, 10, 0.0, constant",
        f"{later}: on --resume auto, num_steps 12 become {runs / 'a'}'s 10",
        f"{runs / 'a'} at step 10; {other} at step 10 of {num_steps}, unfinished; {later} at step 11 of 12, "
        "unfinished; the merged run goes on from step 11",
    ]


@pytest.fixture(scope="module")
def expanded(prepared: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of short runs whose loader adds ids, and one of which leaves its tables as they began."""
    folder = tmp_path_factory.mktemp("expanded")
    loader = LoaderConfig(multi_hot="uniform", multi_hot_sizes=(2,) * 26, seed=3)
    for name, seed, changes in (("a", 0, {}), ("b", 5, {"table_lr": 0.0, "loss": "joint"})):
        config = job(prepared, folder / name, "dcnv2", seed=seed, loader=loader, **changes)
        Trainer(dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=3)), world).train()
    return folder


def test_members_answer_as_in_their_own_runs(runs: Path, expanded: Path, world: World) -> None:
    for folder in (runs, expanded):
        merge_runs(MergeConfig(sources=(folder / "a", folder / "b"), out=folder / "of_two"), world)
        expected = [valid_logits(folder / name, world) for name in ("a", "b")]
        np.testing.assert_allclose(valid_logits(folder / "of_two", world), np.concatenate(expected, axis=1), atol=1e-6)
    config = load_file(TrainConfig, expanded / "of_two" / "config.json")
    # One member's joint loss is its own, so the run joins others, and its tables stay as they are when all go on.
    assert config.loss == "independent"
    assert [spec.table_lr for spec in config.specs()] == [None, 0.0]


def valid_logits(run: Path, world: World) -> np.ndarray:
    predictions = Predictor(run, world).predict("valid")
    assert predictions is not None
    return predictions.logits_NM


def test_runs_that_saw_other_ids_are_refused(expanded: Path, world: World, tmp_path: Path) -> None:
    loader = load_file(TrainConfig, expanded / "b" / "config.json").loader
    for changes, message in (
        ({"seed": 4}, "loader.seed 4, .* has 3"),
        ({"multi_hot": "pareto"}, "loader.multi_hot pareto, .* has uniform"),
        ({"multi_hot_sizes": (3,) * 26}, "loader.multi_hot_sizes"),
    ):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        other = copied(expanded / "b", tmp_path / "b", loader=dataclasses.replace(loader, **changes))
        with pytest.raises(InputError, match=message):
            merge_runs(MergeConfig(sources=(expanded / "a", other), out=tmp_path / "out"), world)
