"""Runs with quantised tables: on any ranks and plans alike, of merged runs too, and what cannot be is refused."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.cli import main
from recsys.config import InputError
from recsys.data.loader import LoaderConfig
from recsys.distributed import World, process_group
from recsys.embeddings.quantised import QuantisedBags
from recsys.sharding.plan import Plan
from recsys.sharding.tiling import Shard
from recsys.studies.config import MergeConfig
from recsys.studies.merge_runs import merge_runs
from recsys.training import sharded
from recsys.training.answer import PredictConfig, answer
from recsys.training.evaluate import EvaluateConfig, evaluate
from recsys.training.predict import Predictor
from recsys.training.predictions import load_predictions
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config

pytestmark = pytest.mark.filterwarnings("ignore:fbgemm..dense_embedding_codegen_lookup_function")
# Tables of several widths, of which none but the first's fill whole bytes by pairs in int2.
MEMBERS = ("dcnv2", "wukong:embedding_dim=12", "rankmixer:embedding_dim=20,table_dtype=fp16")
INTEGERS = ("int8", "int4", "int2")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group() as world:
        torch.set_num_threads(1)
        yield world


def trained(prepared: Path, out: Path, world: World, **changes: Any) -> Path:
    Trainer(small_config(prepared, out=out, num_steps=10, **changes), world).train()
    return out


@pytest.fixture(scope="module")
def runs(prepared: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Short runs under several plans."""
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, dict[str, Any]] = {
        "table_wise": {"members": MEMBERS},
        "row_wise": {"members": MEMBERS, "sharding": "row_wise"},
        "data_parallel": {"members": MEMBERS[:2], "sharding": "data_parallel"},
        "column_wise": {
            "members": ("dcnv2", "wukong:embedding_dim=16"),
            "sharding": "column_wise",
            "table_optimizer": "adagrad",
        },
        "multi-hot": {
            "members": MEMBERS,
            "loader": LoaderConfig(multi_hot="pareto", multi_hot_sizes=tuple(1 + field % 3 for field in range(26))),
        },
    }
    return {kind: trained(prepared, folder / kind, world, **changes) for kind, changes in kinds.items()}


def logits(run: Path, world: World, dtype: str | None) -> np.ndarray:
    predictor = Predictor(run, world)
    if dtype:
        predictor.quantise(dtype)
    predictions = predictor.predict("valid")
    assert predictions is not None
    return predictions.logits_NM


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "data_parallel", "column_wise", "multi-hot"])
def test_fp32_changes_nothing_and_fewer_bits_change_more(kind: str, runs: dict[str, Path], world: World) -> None:
    before = logits(runs[kind], world, None)
    np.testing.assert_array_equal(logits(runs[kind], world, "fp32"), before)
    errors = [abs(logits(runs[kind], world, dtype) - before).mean() for dtype in ("fp16", *INTEGERS)]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 1e-3
    assert errors[-1] > 4 * errors[1]


def test_metrics_and_bytes_are_told(runs: dict[str, Path], world: World, tmp_path: Path) -> None:
    config = EvaluateConfig(run=runs["table_wise"], tables="int8", json=tmp_path / "m.json")
    found, plain = evaluate(config, world), evaluate(EvaluateConfig(run=config.run), world)
    assert found is not None
    assert plain is not None
    assert plain.tables is None
    assert found.tables is not None
    num_ids = sum(json.loads((config.run / "schema.json").read_text())["sparse"].values())
    assert found.tables.before == num_ids * (4 * 8 + 4 * 12 + 2 * 20)
    expected = num_ids * (8 + 12 + 20 + 3 * 4)
    assert expected <= found.tables.after < expected + 3 * 26 * 128
    for name, metrics in plain.metrics.items():
        assert 0 < abs(found.metrics[name].logloss - metrics.logloss) < 1e-3, name
    values = json.loads((tmp_path / "m.json").read_text())
    assert values["tables"] == dataclasses.asdict(found.tables)
    assert values["metrics"]["merged"]["logloss"] == found.metrics["merged"].logloss


# What is asked of two ranks, in one job: run and dtype.
ASKED = [("table_wise", "int4"), ("row_wise", "int4"), ("multi-hot", "int8"), ("column_wise", "fp16")]


@pytest.fixture(scope="module")
def two_ranks(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two ranks predict."""
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, _predict, runs, folder)
    return folder


def _predict(world: World, runs: dict[str, Path], folder: Path) -> None:
    monkeypatch, make_plan = pytest.MonkeyPatch(), sharded.make_plan

    def split(*arguments: Any) -> Plan:
        """What the planner says, with the columns of all tables cut in two, which it need not do."""
        plan = make_plan(*arguments)
        for table in plan.tables.values():
            assert table.sharding_type == "column_wise"
        halves = {
            name: dataclasses.replace(table, shards=_halves(*table.shards)) for name, table in plan.tables.items()
        }
        return dataclasses.replace(plan, tables=halves)

    for kind, dtype in ASKED:
        monkeypatch.setattr(sharded, "make_plan", split if kind == "column_wise" else make_plan)
        config = PredictConfig(run=runs[kind], out=folder / f"{kind}.parquet", tables=dtype, batch_size=1024)
        found = answer(config, world)
        if found:
            assert found.tables is not None
            (folder / f"{kind}.bytes").write_text(str(found.tables.before))
    try:
        answer(PredictConfig(run=runs["column_wise"], out=folder / "none.parquet", tables="int8"), world)
    except InputError as error:
        (folder / f"refused{world.rank}").write_text(str(error))


def _halves(first: Shard, *others: Shard) -> tuple[Shard, Shard]:
    width = sum(shard.columns for shard in (first, *others)) // 2
    half = first._replace(rank=0, column=0, columns=width)
    return half, half._replace(rank=1, column=width)


@pytest.mark.parametrize(("kind", "dtype"), ASKED)
def test_two_ranks_predict_as_one(
    kind: str, dtype: str, two_ranks: Path, runs: dict[str, Path], world: World, tmp_path: Path
) -> None:
    config = PredictConfig(run=runs[kind], out=tmp_path / "one.parquet", tables=dtype, batch_size=1024)
    found = answer(config, world)
    assert found is not None
    assert found.tables is not None
    assert int((two_ranks / f"{kind}.bytes").read_text()) == found.tables.before, "bytes of both ranks"
    one, two = (load_predictions(path)[0] for path in (config.out, two_ranks / f"{kind}.parquet"))
    np.testing.assert_allclose(two.logits_NM, one.logits_NM, atol=1e-5, rtol=0)


def test_scales_of_parts_of_rows_are_refused(two_ranks: Path) -> None:
    for rank in range(2):
        told = (two_ranks / f"refused{rank}").read_text()
        assert told.startswith("--tables int8: columns of table dcnv2/C1 are on several ranks")
        assert told.endswith("ask on one process")


def test_a_merged_run_is_quantised_as_its_members(
    runs: dict[str, Path], prepared: Path, world: World, tmp_path: Path
) -> None:
    other = trained(prepared, tmp_path / "other", world, members=("dcnv2:seed=3,embedding_dim=16",))
    merge_runs(MergeConfig(sources=(runs["table_wise"], other), out=tmp_path / "both"), world)
    expected = np.concatenate([logits(run, world, "int4") for run in (runs["table_wise"], other)], axis=1)
    np.testing.assert_allclose(logits(tmp_path / "both", world, "int4"), expected, atol=1e-6)


def test_a_merge_is_fitted_on_members_as_they_were_trained(prepared: Path, world: World, tmp_path: Path) -> None:
    run = trained(prepared, tmp_path / "run", world, members=MEMBERS, merge="weighted")
    merge = json.loads((run / "merge.json").read_text())
    (run / "merge.json").unlink()
    evaluate(EvaluateConfig(run=run, tables="int2"), world)
    found = json.loads((run / "merge.json").read_text())
    np.testing.assert_allclose(found["weights"], merge["weights"], atol=1e-6)


def test_answers_within_a_budget_count_the_bytes_of_all_members(
    runs: dict[str, Path], world: World, tmp_path: Path
) -> None:
    config = PredictConfig(run=runs["table_wise"], out=tmp_path / "p.parquet", tables="int8")
    all_at_once = answer(config, world)
    in_turn = answer(dataclasses.replace(config, budget="30s", out=tmp_path / "b.parquet"), world)
    assert all_at_once is not None
    assert in_turn is not None
    assert in_turn.tables == all_at_once.tables
    one, facts, _ = load_predictions(config.out)
    other, _, _ = load_predictions(tmp_path / "b.parquet")
    assert facts["tables"] == "int8"
    np.testing.assert_allclose(one.logits_NM, other.of(one.names).logits_NM, atol=1e-5)
    with pytest.raises(ValueError, match="tables 'int9' cannot be: did you mean int8"):
        dataclasses.replace(config, tables="int9")


def test_what_was_trained_is_given_back(runs: dict[str, Path], world: World) -> None:
    predictor = Predictor(runs["table_wise"], world)
    before = [
        shard.tensor.untyped_storage()
        for name, value in predictor.task.state_dict().items()
        if "embedding_bags" in name
        for shard in value.local_shards()
    ]
    assert len(before) == 3 * 26
    assert all(storage.nbytes() for storage in before)
    predictor.quantise("int8")
    assert not any(storage.nbytes() for storage in before)
    assert not [name for name in predictor.task.state_dict() if "embedding_bags" in name]
    assert predictor.predict("valid") is not None
    collection = predictor.task.module.model.embedding.by_kind["tables"].tables
    kernels = [kernel for lookup in collection._lookups for kernel in lookup._emb_modules]
    assert kernels
    assert all(isinstance(kernel, QuantisedBags) for kernel in kernels)


def test_the_command_line(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["table_wise"], run)
    for arguments in (["evaluate", str(run)], ["predict", str(run), "--out", str(tmp_path / "p.parquet")]):
        assert main([*arguments, "--tables", "int3"]) == 2
        told = capsys.readouterr().err
        assert "tables 'int3' cannot be: did you mean int8 or int4 or int2?" in told
        assert told.count("\n") == 1


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_the_command_line_tells_of_bytes(
    verb: str,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # This process is in a job already; the command would begin one.
    monkeypatch.setattr("recsys.distributed.process_group", _job_of_now)
    options = ["--out", str(tmp_path / "p.parquet")] if verb == "predict" else []
    assert main([verb, str(runs["table_wise"]), "--tables", "int4", *options]) == 0
    told = capsys.readouterr().out
    assert "merged" in told
    assert " bytes as trained, " in told
    assert " as int4 (" in told


def _job_of_now() -> Any:
    import contextlib

    return contextlib.nullcontext(World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu")))
