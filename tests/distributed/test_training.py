"""Runs: resumed equals uninterrupted, on as many ranks as there are; evaluated equals trained."""

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
from sklearn.metrics import log_loss, roc_auc_score

from recsys.config import InputError, load_file
from recsys.data.loader import LoaderConfig
from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.merge.rules import Merge
from recsys.place import place
from recsys.sharding.plan import Plan
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.config import TrainConfig
from recsys.training.evaluate import BAYES_OPTIMAL, EvaluateConfig, evaluate
from recsys.training.predict import Predictor
from recsys.training.predictions import member_metrics
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config

MEMBERS = ("dcnv2", "rankmixer")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group() as world:
        torch.set_num_threads(1)
        yield world


def steps(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory, world: World) -> TrainConfig:
    """A run of 20 steps that logs and validates on the way, with dropout."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    config = small_config(
        prepared, out=out, members=MEMBERS, embedding_dropout=0.2, log_every=1, validate_every=10, save_every=10,
        ema_decay=0.9,
    )  # fmt: skip
    Trainer(config, world).train()
    return config


def test_a_run_folder_holds_what_describes_the_run(run: TrainConfig) -> None:
    assert load_file(TrainConfig, run.out / "config.json") == run
    assert (run.out / "schema.json").read_bytes() == (run.data / "schema.json").read_bytes()
    plan = Plan.load(run.out / "plan.json")
    assert set(plan.tables) == {f"{member}/C{i}" for member in MEMBERS for i in range(1, 27)}
    assert Plan.load(run.out / "checkpoints" / "step-00000020" / "plan.json") == plan
    assert [line["step"] for line in steps(run.out, "train")] == list(range(1, 21))
    assert [line["step"] for line in steps(run.out, "valid")] == [10, 20]
    assert set(steps(run.out, "valid")[0]) == {"kind", "step", *MEMBERS, "merged"}
    assert any((run.out / "tensorboard").iterdir())
    assert sorted(path.name for path in (run.out / "checkpoints").glob("step-*")) == ["step-00000010", "step-00000020"]


def test_validation_on_the_way_does_not_change_training(run: TrainConfig, world: World, tmp_path: Path) -> None:
    train = dataclasses.replace(run.train, validate_every=None, save_every=None)
    Trainer(dataclasses.replace(run, out=tmp_path / "run", train=train), world).train()
    expected = [list(line["loss"].values()) for line in steps(run.out, "train")]
    found = [list(line["loss"].values()) for line in steps(tmp_path / "run", "train")]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_resumed_equals_uninterrupted(run: TrainConfig, world: World, tmp_path: Path) -> None:
    half = dataclasses.replace(
        run, out=tmp_path / "run", train=dataclasses.replace(run.train, num_steps=10, validate_every=None)
    )
    Trainer(half, world).train()
    Trainer(dataclasses.replace(run, out=half.out, resume="auto"), world).train()
    expected = [list(line["loss"].values()) for line in steps(run.out, "train")]
    found = [list(line["loss"].values()) for line in steps(half.out, "train")]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_checkpoint_of_two_ranks_goes_on_on_one(prepared: Path, world: World, tmp_path: Path) -> None:
    whole = small_config(prepared, out=tmp_path / "whole", members=MEMBERS, log_every=1, sharding="table_wise")
    half = dataclasses.replace(whole, out=tmp_path / "half", train=dataclasses.replace(whole.train, num_steps=10))
    on_ranks(2, _train, half)
    Trainer(dataclasses.replace(whole, out=half.out, resume="auto"), world).train()
    Trainer(whole, world).train()
    expected = [list(line["loss"].values()) for line in steps(whole.out, "train")]
    found = [list(line["loss"].values()) for line in steps(half.out, "train")]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _train(world: World, config: TrainConfig) -> None:
    Trainer(config, world).train()


def test_evaluate_gives_what_training_reported(run: TrainConfig, world: World, tmp_path: Path) -> None:
    found = evaluate(EvaluateConfig(run=run.out, split="valid", json=tmp_path / "metrics.json"), world)
    assert found is not None
    metrics = found.metrics
    reported = steps(run.out, "valid")[-1]
    for name in (*MEMBERS, "merged"):
        assert metrics[name].auc == pytest.approx(reported[name]["auc"], abs=1e-6)
        assert metrics[name].logloss == pytest.approx(reported[name]["logloss"], abs=1e-6)
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["merged"]["auc"] == metrics["merged"].auc


def test_evaluate_sets_the_best_possible_beside_the_members(
    run: TrainConfig, world: World, synthetic_log: Path
) -> None:
    truth = synthetic_log.with_name(f"{synthetic_log.name}.truth.parquet")
    found = evaluate(EvaluateConfig(run=run.out, truth=truth), world)
    assert found is not None
    metrics = found.metrics
    best = metrics.pop(BAYES_OPTIMAL)
    assert all(best.auc > member.auc and best.logloss < member.logloss for member in metrics.values())
    assert best.num_rows == metrics["merged"].num_rows


def test_truth_of_another_log_is_refused(run: TrainConfig, world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a truth file"):
        evaluate(EvaluateConfig(run=run.out, truth=tmp_path / "none.parquet"), world)


def test_a_merge_of_another_step_is_fitted_anew(run: TrainConfig, world: World, tmp_path: Path) -> None:
    config = dataclasses.replace(run, out=tmp_path / "run", merge="weighted", resume="never")
    Trainer(config, world).train()
    merge = tmp_path / "run" / "merge.json"
    expected = json.loads(merge.read_text())
    assert expected["step"] == 20
    merge.write_text(json.dumps(expected | {"step": 7, "weights": [1.0, 0.0]}))
    with pytest.raises(InputError, match=r"weighted was not fitted at step 20; `recsys evaluate"):
        Predictor(config.out, world, ["rankmixer"]).merge()
    evaluate(EvaluateConfig(run=config.out), world)
    refitted = json.loads(merge.read_text())
    assert refitted["step"] == 20
    assert refitted["order"] == expected["order"]
    assert refitted["weights"] == pytest.approx(expected["weights"], abs=1e-4)
    merge.write_text("[]")
    with pytest.raises(InputError, match=r"merge\.json: not a merge"):
        Predictor(config.out, world).merge()


def test_a_run_that_was_killed_before_it_validated_does_so_when_it_goes_on(
    run: TrainConfig, world: World, tmp_path: Path
) -> None:
    shutil.copytree(run.out, tmp_path / "run")
    (tmp_path / "run" / "merge.json").unlink()
    lines = [line for line in (run.out / "metrics.jsonl").read_text().splitlines() if '"valid", "step": 20' not in line]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    again = dataclasses.replace(run, out=tmp_path / "run", resume="auto")
    metrics = Trainer(again, world).train()
    assert metrics is not None
    assert metrics["merged"].logloss == pytest.approx(steps(run.out, "valid")[-1]["merged"]["logloss"], abs=1e-6)
    assert [line["step"] for line in steps(tmp_path / "run", "valid")] == [10, 20]
    with pytest.raises(InputError, match="has reached step 20 of 20"):
        Trainer(again, world).train()


def test_a_run_does_not_go_on_with_other_data(run: TrainConfig, world: World, tmp_path: Path) -> None:
    shutil.copytree(run.out, tmp_path / "run")
    shutil.copytree(run.data, tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["config"]["seed"] = 77
    manifest.write_text(json.dumps(values))
    before = (tmp_path / "run" / "data.json").read_bytes()
    loop = dataclasses.replace(run.train, num_steps=21)
    again = dataclasses.replace(run, out=tmp_path / "run", data=tmp_path / "data", resume="auto", train=loop)
    with pytest.raises(InputError, match=r"is not the data that the run .* was trained on: seed 77 instead of 2021"):
        Trainer(again, world).train()
    assert (tmp_path / "run" / "data.json").read_bytes() == before
    shutil.copy(run.data / "manifest.json", manifest)  # the same data elsewhere
    assert Trainer(again, world).train() is not None


def test_a_folder_that_holds_a_run_is_not_overwritten(run: TrainConfig, world: World) -> None:
    before = (run.out / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        Trainer(run, world).train()
    assert (run.out / "metrics.jsonl").read_bytes() == before


def test_resume_starts_where_there_is_nothing_to_go_on_from(prepared: Path, world: World, tmp_path: Path) -> None:
    config = small_config(prepared, out=tmp_path / "run", members=("dcnv2",), num_steps=2, resume="auto")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()  # an attempt that died before its first checkpoint
    Trainer(config, world).train()
    assert checkpoints.newest(config.out / "checkpoints") == config.out / "checkpoints" / "step-00000002"
    assert load_file(TrainConfig, config.out / "config.json").resume == "never"


def test_what_an_attempt_wrote_past_its_checkpoint_is_dropped(run: TrainConfig, world: World, tmp_path: Path) -> None:
    shutil.copytree(run.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    Trainer(dataclasses.replace(run, out=tmp_path / "run", resume="auto"), world).train()
    assert [line["step"] for line in steps(tmp_path / "run", "train")] == list(range(1, 21))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ("dcnv2",)}, "cannot go on with members"),
        ({"seed": 7}, "cannot go on with seed 7, the run has 0"),
        ({"train": {"batch_size": 64, "num_steps": 99}}, "cannot go on with train.batch_size 64, the run has 128"),
        ({}, "has reached step 20 of 20"),
    ],
)
def test_another_job_does_not_go_on_with_a_run(
    run: TrainConfig, world: World, changes: dict[str, Any], message: str
) -> None:
    train = dataclasses.replace(run.train, **changes.pop("train", {}))
    with pytest.raises(InputError, match=message):
        Trainer(dataclasses.replace(run, resume="auto", train=train, **changes), world).train()


def test_a_loss_that_is_no_number_stops_the_run(prepared: Path, world: World, tmp_path: Path) -> None:
    config = small_config(prepared, out=tmp_path / "run", members=MEMBERS, dense_lr=1e30, log_every=1)
    with pytest.raises(InputError, match=r"the loss of member \w+ is nan at step \d+; lower --optimizer.dense-lr"):
        Trainer(config, world).train()
    assert not list((tmp_path / "run").glob("checkpoints/*step*"))


def test_a_model_that_an_update_has_ruined_is_not_saved(prepared: Path, world: World, tmp_path: Path) -> None:
    config = small_config(prepared, out=tmp_path / "run", members=("dcnv2",), dense_lr=3e38, save_every=1)
    with pytest.raises(InputError, match=r"parameter \S+ is no number after step 1; begin a new run with a lower"):
        Trainer(config, world).train()
    assert not list((tmp_path / "run").glob("checkpoints/*step*"))


def test_held_out_rows_are_looked_for_before_the_first_step(prepared: Path, world: World, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "valid")
    with pytest.raises(InputError, match="no Parquet file"):
        Trainer(small_config(tmp_path / "data"), world)


def test_what_one_rank_lacks_all_report(prepared: Path, tmp_path: Path) -> None:
    on_ranks(2, _train_with_data_on_rank_0, prepared, tmp_path)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == [f"rank 1: {NO_DATA}"] * 2


NO_DATA = "no such folder; `recsys prepare FORMAT FILE --out DIR` makes it"


def _train_with_data_on_rank_0(world: World, prepared: Path, tmp_path: Path) -> None:
    data = prepared if world.is_first else tmp_path / "none"
    try:
        Trainer(small_config(data), world)
    except InputError as error:
        text = str(error).replace(f"{tmp_path / 'none'}: ", "").replace(f"{tmp_path / 'none'}", "DIR")
        (tmp_path / f"rank{world.rank}").write_text(text)


def test_dense_layers_start_like_plain_adamw(prepared: Path, world: World) -> None:
    config = small_config(prepared, members=("dcnv2",), dense_lr=0.01, weight_decay=0.1)
    trainer, plain = Trainer(config, world), Trainer(config, world)
    dense = {name: p for name, p in plain.task.named_parameters() if ".embedding_bags." not in name}
    adamw = torch.optim.AdamW(dense.values(), lr=0.01, weight_decay=0.1, fused=False)
    ours, theirs = trainer.loader.stream(), plain.loader.stream()
    for _ in range(3):
        trainer.train_step(ours)
        adamw.zero_grad()
        plain.optimizer.combined.zero_grad()
        plain.task(next(theirs))[0].backward()
        plain.optimizer.schedule(0)
        plain.task.fused_optimizer.step()
        adamw.step()
    found = dict(trainer.task.named_parameters())
    for name, expected in dense.items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def test_evaluate_needs_a_run_with_a_checkpoint(run: TrainConfig, world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        evaluate(EvaluateConfig(run=tmp_path), world)
    (tmp_path / "config.json").write_bytes((run.out / "config.json").read_bytes())
    (tmp_path / "schema.json").write_bytes((run.out / "schema.json").read_bytes())
    (tmp_path / "checkpoints" / ".step-00000010.partial").mkdir(parents=True)
    with pytest.raises(InputError, match="no checkpoint"):
        evaluate(EvaluateConfig(run=tmp_path), world)


def test_data_of_another_schema_is_refused(run: TrainConfig, world: World, tmp_path: Path) -> None:
    schema = json.loads((run.data / "schema.json").read_text())
    schema["sparse"]["C3"] += 1
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(InputError, match="feature C3 has"):
        evaluate(EvaluateConfig(run=run.out, data=tmp_path), world)


def test_column_wise_under_rowwise_adagrad_is_refused(prepared: Path, world: World) -> None:
    with pytest.raises(InputError, match=r"--optimizer\.tables adagrad"):
        Trainer(small_config(prepared, sharding="column_wise"), world)


def test_shared_tables_and_joint_loss_train(prepared: Path, world: World, tmp_path: Path) -> None:
    config = small_config(prepared, out=tmp_path / "run", members=MEMBERS, loss="joint", log_every=1, num_steps=60)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, tables="shared"))
    Trainer(config, world).train()
    assert set(Plan.load(config.out / "plan.json").tables) == {f"shared/C{i}" for i in range(1, 27)}
    losses = [sum(line["loss"].values()) for line in steps(config.out, "train")]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.04


def test_bf16_stays_close_to_fp32(prepared: Path, world: World, tmp_path: Path) -> None:
    logits = []
    for precision in ("fp32", "bf16"):
        trainer = Trainer(small_config(prepared, members=MEMBERS, precision=precision), world)
        batches = trainer.loader.stream()
        for _ in range(10):
            trainer.train_step(batches)
        predictions = trainer.predict(trainer.valid_loader)
        assert predictions is not None
        logits.append(predictions.logits_NM)
    assert 0 < abs(logits[0] - logits[1]).mean() < 0.02


def test_a_run_tells_how_many_rows_an_epoch_leaves_out(run: TrainConfig) -> None:
    (line,) = steps(run.out, "data")
    assert line["rows"] % run.train.batch_size == line["tail_rows"]
    assert line["tail_share"] == line["tail_rows"] / line["rows"]


def test_a_run_goes_on_with_other_workers_but_not_in_another_order(
    run: TrainConfig, world: World, tmp_path: Path
) -> None:
    shutil.copytree(run.out, tmp_path / "run")
    train = dataclasses.replace(run.train, num_steps=21)
    changed = dataclasses.replace(run, out=tmp_path / "run", resume="auto", train=train)
    with pytest.raises(InputError, match="cannot go on with loader"):
        Trainer(dataclasses.replace(changed, loader=LoaderConfig(slots=8)), world).train()
    Trainer(dataclasses.replace(changed, loader=LoaderConfig(workers=3)), world).train()
    assert [line["step"] for line in steps(changed.out, "train")] == list(range(1, 22))


def test_data_of_an_object_store_trains_alike(run: TrainConfig, world: World, tmp_path: Path) -> None:
    store = place("memory://trains-alike/data")
    for path in (path for path in run.data.rglob("*") if path.is_file()):
        copy = store / path.relative_to(run.data).as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    config = dataclasses.replace(run, data=store, out=tmp_path / "run")
    Trainer(config, world).train()
    assert steps(config.out, "train")[-1]["loss"] == steps(run.out, "train")[-1]["loss"]
    assert load_file(TrainConfig, config.out / "config.json") == config
    found = evaluate(EvaluateConfig(run=config.out, data=store, split="valid"), world)
    assert found == evaluate(EvaluateConfig(run=run.out, split="valid"), world)


def test_metrics_count_rows_by_their_weights(prepared: Path, world: World, tmp_path: Path) -> None:
    for path in prepared.glob("*/*.parquet"):
        table = pq.read_table(path)
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        if "label" in table.column_names:
            weights = pa.array(np.arange(len(table)) % 5 + 0.5, pa.float32())
            pq.write_table(table.append_column("importance", weights), tmp_path / path.parent.name / path.name)
    dataclasses.replace(Schema.load(prepared), weight="importance").save(tmp_path)
    trainer = Trainer(small_config(tmp_path, members=("dcnv2",)), world)
    predictions = trainer.predict(trainer.valid_loader)
    assert predictions is not None
    labels, weights = predictions.labels_N, predictions.weights_N
    assert len(weights) == trainer.valid_loader.num_rows
    assert set(weights) == {0.5, 1.5, 2.5, 3.5, 4.5}
    probabilities = 1 / (1 + np.exp(-predictions.logits_NM[:, 0].astype(np.float64)))
    metrics = member_metrics(predictions, Merge(rule="mean_logit"))["dcnv2"]
    assert metrics.logloss == pytest.approx(log_loss(labels, probabilities, sample_weight=weights), rel=1e-9)
    assert metrics.auc == pytest.approx(roc_auc_score(labels, probabilities, sample_weight=weights), abs=1e-9)


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for name in ("step-00000009", "step-00000100", ".step-00000200.partial", "step-x"):
        (tmp_path / name).mkdir()
        checkpoints.Saved(step=1, saved_at=0, files={}).write(tmp_path / name)
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000100"
    assert checkpoints.newest(tmp_path / "none") is None
