"""`recsys predict`: files of predictions, of all members, of some, or of as many as a time allows."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.config import InputError
from recsys.data.schema import SPLITS, Schema
from recsys.distributed import World, process_group
from recsys.merge.rules import Merge
from recsys.training.answer import PredictConfig, answer, merge_answers
from recsys.training.predict import Predictor
from recsys.training.predictions import Predictions, load_predictions
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config

MEMBERS = ("dcnv2", "wukong", "dcnv2_2")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group() as world:
        torch.set_num_threads(1)
        yield world


@pytest.fixture(scope="module")
def run(prepared: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of three members."""
    out = tmp_path_factory.mktemp("runs") / "run"
    members = ("dcnv2", "wukong", "dcnv2:name=dcnv2_2,seed=4")
    Trainer(small_config(prepared, out=out, members=members, num_steps=10), world).train()
    return out


def logits(run: Path, world: World) -> np.ndarray:
    predictions = Predictor(run, world, MEMBERS).predict("test")
    assert predictions is not None
    return predictions.logits_NM


def test_some_members_answer_as_they_do_among_all(run: Path, world: World, tmp_path: Path) -> None:
    everyone = Predictor(run, world).predict("valid")
    some = Predictor(run, world, ["dcnv2_2", "dcnv2"]).predict("valid")
    assert everyone is not None
    assert some is not None
    assert some.names == ("dcnv2_2", "dcnv2")
    np.testing.assert_allclose(some.logits_NM, everyone.logits_NM[:, [2, 0]], atol=1e-6)
    found = answer(PredictConfig(run=run, out=tmp_path / "p.parquet", members=("2",)), world)
    assert found is not None
    best = json.loads((run / "merge.json").read_text())["order"][:2]
    assert list(found.metrics) == [*best, "merged"]


def test_a_file_of_predictions_is_read_back(run: Path, world: World, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    found = answer(PredictConfig(run=run, out=path, batch_size=64), world)
    predictions, facts, rows = load_predictions(path)
    expected = logits(run, world)
    np.testing.assert_allclose(predictions.logits_NM, expected, atol=1e-6)
    np.testing.assert_allclose(pq.read_table(path)["merged"].to_numpy(), expected.mean(axis=1), atol=1e-6)
    assert rows.tolist() == list(range(len(expected)))
    assert facts["split"] == "test"
    assert found is not None
    assert found.metrics["merged"].num_rows == len(expected)


def test_a_generous_budget_lets_all_answer_and_a_tight_one_the_best(run: Path, world: World, tmp_path: Path) -> None:
    config = PredictConfig(run=run, out=tmp_path / "p.parquet", budget="30s")
    found = answer(config, world)
    assert found is not None
    assert found.timing is not None
    assert found.timing["share_by_num_members"] == {3: 1.0}
    order = json.loads((run / "merge.json").read_text())["order"]
    predictions, _, _ = load_predictions(config.out)
    assert predictions.names == tuple(order)
    np.testing.assert_allclose(predictions.of(MEMBERS).logits_NM, logits(run, world), atol=1e-6)
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
        ({"members": ("1", "wukong")}, "--members 1 wukong: 1 stands alone, .* members are dcnv2, wukong, dcnv2_2"),
        ({"out": Path("/nowhere/p.parquet")}, "no such folder"),
        ({"out": Path("/tmp")}, r"--out /tmp: is a folder; name a file in it, such as /tmp/predictions\.parquet"),
    ],
)
def test_what_cannot_be_predicted(
    run: Path, world: World, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        answer(PredictConfig(**{"run": run, "out": tmp_path / "p.parquet", **changes}), world)


@pytest.mark.parametrize("budget", ["3", "ms", "0ms", "-1ms", "3 minutes"])
def test_a_budget_that_is_no_time(budget: str) -> None:
    with pytest.raises(ValueError, match="is no time above 0; write 3ms"):
        PredictConfig(run=Path("r"), out=Path("p"), budget=budget)


# Rows of weight 0


@pytest.fixture(scope="module")
def weighted(prepared: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on rows of which every third counts nothing."""
    folder = tmp_path_factory.mktemp("weighted")
    shutil.copytree(prepared, folder / "data")
    dataclasses.replace(Schema.load(prepared), weight="weight").save(folder / "data")
    for split in SPLITS:
        first = 0
        for path in sorted((folder / "data" / split).glob("*.parquet")):
            table = pq.read_table(path)
            weights = (np.arange(first, first + len(table)) % 3).astype(np.float32)
            pq.write_table(table.append_column("weight", pa.array(weights)), path)
            first += len(table)
    Trainer(small_config(folder / "data", out=folder / "run", members=("dcnv2",), num_steps=2), world).train()
    return folder / "run"


@pytest.mark.parametrize("budget", [None, "30s"])
def test_a_rows_number_is_its_place_in_the_files(
    weighted: Path, prepared: Path, world: World, tmp_path: Path, budget: str | None
) -> None:
    config = PredictConfig(run=weighted, out=tmp_path / "p.parquet", budget=budget)
    answer(config, world)
    _check_numbers(config.out, prepared)


def test_rows_are_numbered_alike_on_two_ranks(weighted: Path, prepared: Path, tmp_path: Path) -> None:
    on_ranks(2, _answer, weighted, tmp_path / "p.parquet")
    _check_numbers(tmp_path / "p.parquet", prepared)


def _answer(world: World, run: Path, out: Path) -> None:
    answer(PredictConfig(run=run, out=out), world)


def _check_numbers(path: Path, prepared: Path) -> None:
    tables = [pq.read_table(part) for part in sorted((prepared / "test").glob("*.parquet"))]
    labels = pa.concat_tables(tables)[Schema.load(prepared).labels[0]].to_numpy()
    numbers = np.arange(len(labels))[np.arange(len(labels)) % 3 > 0]
    predictions, _, rows = load_predictions(path)
    assert rows.tolist() == numbers.tolist()
    assert predictions.weights_N.tolist() == (numbers % 3).tolist()
    assert predictions.labels_N.tolist() == labels[numbers].tolist()
