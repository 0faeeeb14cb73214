"""Sinks get every record, a resumed run goes on in each, and what is not installed is one line."""

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from recsys.config import InputError
from recsys.training.run import RunFolder
from recsys.training.sinks import SinkConfig, open_sinks

CONFIG = {
    "seed": 3,
    "train": {"batch_size": 10},
    "optimizer": {"tables": "adagrad", "table_lr": 0.1},
    "members": ["dcnv2"],
    "out": "x" * 600,
}
DATA: dict[str, Any] = {"rows": 200, "tail_rows": 0}
TRAIN: dict[str, Any] = {"rows_per_s": 5.0, "loss": {"dcnv2": 0.5}}
MERGED: dict[str, Any] = {
    "auc": 0.75,
    "num_rows": 40,
    "auc_ci": [0.7, 0.8],
    "gauc": None,
    "reliability": [[0.1, 0.2, 3]],
}
VALID: dict[str, Any] = {"merged": MERGED}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def record(folder: Path, config: SinkConfig, first: int, last: int) -> None:
    """Write as a run from step `first` to `last` would, which validates at its end."""
    with open_sinks(folder, first, config) as write:
        write("data", first, DATA)
        for step in range(first + 1, last + 1):
            write("train", step, TRAIN)
        write("valid", last, VALID)
        write("end", last, {"reason": "last step"})


def lines(folder: Path) -> list[tuple[str, int]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"]) for line in read]


def test_records_are_lines_as_they_are_and_numbers_on_the_board(folder: Path) -> None:
    record(folder, SinkConfig(), 0, 2)
    assert lines(folder) == [("data", 0), ("train", 1), ("train", 2), ("valid", 2), ("end", 2)]
    *_, valid, _ = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert valid == {"kind": "valid", "step": 2, **VALID}
    events: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    names = {"data/rows", "data/tail_rows", "train/rows_per_s", "train/loss/dcnv2", "valid/merged/auc"}
    assert set(board.Tags()["scalars"]) == names | {"valid/merged/num_rows"}
    assert [event.step for event in board.Scalars("train/loss/dcnv2")] == [1, 2]


def test_a_resumed_run_drops_what_was_past_its_step(folder: Path) -> None:
    record(folder, SinkConfig(), 0, 5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    record(folder, SinkConfig(), 2, 3)
    before = [("data", 0), ("train", 1), ("train", 2)]
    assert lines(folder) == [*before, ("data", 2), ("train", 3), ("valid", 3), ("end", 3)]


def test_a_line_that_is_no_record_is_told_to_a_resumed_run(folder: Path) -> None:
    record(folder, SinkConfig(tensorboard=False), 0, 2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\0\0\0\n")
    with pytest.raises(InputError, match=rf"^{folder}/metrics.jsonl, line 6: not a record of a run; remove the line$"):
        record(folder, SinkConfig(tensorboard=False), 2, 3)


def test_json_has_null_for_what_is_no_number(folder: Path) -> None:
    with open_sinks(folder, 0, SinkConfig(tensorboard=False)) as write:
        write("train", 1, {"loss": {"dcnv2": math.nan}, "ci": [math.inf, 0.5], "pair": (-math.inf, 1), "rows": 3})
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=pytest.fail)
    assert read == {
        "kind": "train", "step": 1, "loss": {"dcnv2": None}, "ci": [None, 0.5], "pair": [None, 1], "rows": 3
    }  # fmt: skip


def test_the_board_can_be_left_out(folder: Path) -> None:
    record(folder, SinkConfig(tensorboard=False), 0, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "metrics.jsonl"]


def test_other_ranks_write_nothing(folder: Path) -> None:
    with RunFolder(folder).writer(0, is_first=False) as write:
        write("train", 1, TRAIN)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def mlperf(path: Path) -> list[dict[str, Any]]:
    prefix = ":::MLLOG "
    read = path.read_text().splitlines()
    assert all(line.startswith(prefix) for line in read)
    return [json.loads(line.removeprefix(prefix)) for line in read]


def test_mlperf_lines_follow_the_run(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlperf.log"
    record(folder, SinkConfig(mlperf=path, mlperf_facts=("submission_org=ACME",)), 0, 45)
    events = mlperf(path)
    assert all(set(event) == {"namespace", "time_ms", "event_type", "key", "value", "metadata"} for event in events)
    keys = [event["key"] for event in events]
    opening = ["init_start", "submission_benchmark", "submission_org", "seed", "global_batch_size", "opt_name"]
    assert keys[:6] == opening
    # 200 rows are 20 steps of 10: two epochs and a quarter.
    epochs = ["epoch_start", "epoch_stop", "epoch_start", "epoch_stop", "epoch_start"]
    after = ["run_start", "train_samples", *epochs, "eval_samples", "eval_accuracy", "epoch_stop", "run_stop"]
    assert keys[7:] == ["init_stop", *after]
    values = {event["key"]: event["value"] for event in events}
    assert values["submission_org"] == "ACME"
    assert (values["submission_benchmark"], values["global_batch_size"]) == ("dlrm_dcnv2", 10)
    assert (values["train_samples"], values["eval_samples"], values["eval_accuracy"]) == (200, 40, 0.75)
    accuracy = next(event for event in events if event["key"] == "eval_accuracy")
    assert accuracy["metadata"] == {"epoch_num": 2.25, "samples_count": 450}
    stops = [event["metadata"] for event in events if event["key"] == "epoch_stop"]
    assert [(stop["epoch_num"], stop["samples_count"]) for stop in stops] == [(1, 200), (2, 400), (3, 450)]
    assert events[-1]["metadata"]["status"] == "success"
    times = [event["time_ms"] for event in events]
    assert times == sorted(times)


def test_facts_for_mlperf_are_numbers_where_they_are_such(folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "submission_org": ("ACME=1", "ACME=1"),
        "number_of_nodes": ("8", 8),
        "opt_base_learning_rate_end": (" -5e-3", -0.005),
        "cache_clear": ("true", True),
        "late": ("1e999", "1e999"),
        "best": ("NaN", "NaN"),
        "rev": ("007", "007"),
        "id": ('"8"', '"8"'),
        "sizes": ("[1]", "[1]"),
        "none": ("null", "null"),
        "empty": ("", ""),
        "long": ("9" * 400, int("9" * 400)),
        "longer": ("9" * 5000, "9" * 5000),
    }
    facts = tuple(f"{key}={text}" for key, (text, _) in given.items())
    record(folder, SinkConfig(mlperf=tmp_path / "log", mlperf_facts=facts, tensorboard=False), 0, 1)
    found = {event["key"]: event["value"] for event in mlperf(tmp_path / "log")}
    expected = {key: value for key, (_, value) in given.items()}
    assert {key: found[key] for key in given} == expected
    assert {key: type(found[key]) for key in given} == {key: type(value) for key, value in expected.items()}


def test_mlperf_has_no_empty_epoch(folder: Path, tmp_path: Path) -> None:
    record(folder, SinkConfig(mlperf=tmp_path / "log", tensorboard=False), 0, 20)
    assert [event["key"] for event in mlperf(tmp_path / "log")].count("epoch_start") == 1


def test_mlperf_tells_of_a_run_that_failed(folder: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        open_sinks(folder, 0, SinkConfig(mlperf=tmp_path / "log", tensorboard=False)),
    ):
        raise RuntimeError
    assert mlperf(tmp_path / "log")[-1]["metadata"]["status"] == "aborted"


@pytest.mark.parametrize(
    ("target", "reason", "status"),
    [
        (0.75, "AUC 0.75 has reached --train.target-auc 0.75", "success"),
        (0.8, "last step", "aborted"),
        (0.8, "NE has not been below", "aborted"),
        (None, "last step", "success"),
        (None, "NE has not been below", "aborted"),
    ],
)
def test_mlperf_has_success_where_the_target_is_reached(
    folder: Path, tmp_path: Path, target: float | None, reason: str, status: str
) -> None:
    (folder / "config.json").write_text(json.dumps({"train": {"batch_size": 10, "target_auc": target}}))
    config = SinkConfig(mlperf=tmp_path / "log", tensorboard=False)
    with open_sinks(folder, 0, config) as write:
        write("data", 0, DATA)
        write("valid", 2, VALID)
        write("end", 2, {"reason": reason})
    assert mlperf(tmp_path / "log")[-1]["metadata"]["status"] == status


def test_a_file_of_mlperf_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--sinks.mlperf \S+/none/log: no such folder"):
        SinkConfig(mlperf=tmp_path / "none" / "log").check()
    with pytest.raises(InputError, match=r"^--sinks.mlperf \S+: is a folder"):
        SinkConfig(mlperf=tmp_path).check()
    SinkConfig(mlperf=Path("-")).check()


def test_mlperf_lines_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(folder, SinkConfig(mlperf=Path("-"), tensorboard=False), 0, 1)
    assert capsys.readouterr().out.startswith(":::MLLOG {")


def mlflow_run(store: Path) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=str(store))
    experiment = client.get_experiment_by_name("clicks")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_mlflow_has_config_and_records_and_a_resumed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    store = tmp_path / "store"
    config = SinkConfig(tensorboard=False, mlflow=str(store), mlflow_experiment="clicks")
    record(folder, config, 0, 2)
    record(folder, config, 2, 3)
    client, run = mlflow_run(store)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["optimizer.table_lr"] == "0.1"
    assert len(run.data.params["out"]) == 500
    history = client.get_metric_history(run.info.run_id, "train/loss/dcnv2")
    assert [metric.step for metric in history] == [1, 2, 3]
    assert run.data.metrics["valid/merged/auc"] == 0.75


def test_mlflow_tells_of_a_run_that_failed(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = SinkConfig(tensorboard=False, mlflow=str(tmp_path / "store"), mlflow_experiment="clicks")

    def fail() -> None:
        with open_sinks(folder, 0, config) as write:
            write("train", 1, {"loss": math.nan})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert mlflow_run(tmp_path / "store")[1].info.status == "FAILED"


def test_wandb_offline_keeps_the_run_in_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[Mapping[str, float]] = []
    log = wandb.Run.log

    def kept_log(run: Any, values: Mapping[str, float]) -> None:
        logged.append(values)
        log(run, values)

    monkeypatch.setattr(wandb.Run, "log", kept_log)
    config = SinkConfig(tensorboard=False, wandb="clicks", wandb_mode="offline")
    record(folder, config, 0, 2)
    known = json.loads((folder / "sinks.json").read_text())["wandb"]
    record(folder, config, 2, 3)
    assert json.loads((folder / "sinks.json").read_text())["wandb"] == known
    kept = list(folder.glob(f"wandb/offline-run-*-{known}/run-{known}.wandb"))
    assert kept
    assert kept[0].stat().st_size > 0
    assert [values["step"] for values in logged] == [0, 1, 2, 2, 2, 3, 3]
    assert logged[-1] == {"valid/merged/auc": 0.75, "valid/merged/num_rows": 40, "step": 3}


@pytest.mark.parametrize("fails", ["write", "end"])
@pytest.mark.parametrize("sink", ["wandb", "mlflow"])
def test_a_tracking_server_that_goes_away_is_told_once_and_the_run_goes_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sink: str,
    fails: str,
) -> None:
    pytest.importorskip(sink)
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked: list[str] = []

    def gone(*_: Any, **__: Any) -> None:
        asked.append(sink)
        raise ConnectionError("the server\nis gone")

    names = {
        "wandb": ("wandb.Run", "log", "finish"),
        "mlflow": ("mlflow.tracking.MlflowClient", "log_batch", "set_terminated"),
    }
    owner, write, end = names[sink]
    monkeypatch.setattr(f"{owner}.{write if fails == 'write' else end}", gone)
    if sink == "mlflow":
        monkeypatch.setattr("recsys.training.sinks._leaves", lambda _: iter(()))  # else the first is at the start
    options = {"wandb": {"wandb": "clicks", "wandb_mode": "offline"}, "mlflow": {"mlflow": str(tmp_path / "store")}}
    record(folder, SinkConfig(tensorboard=False, **options[sink]), 0, 3)  # type: ignore[arg-type]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recsys: ")]
    assert told == [f"recsys: --sinks.{sink} is off from here on (the server is gone)"]
    assert asked == [sink]
    assert len(lines(folder)) == 6


def test_a_server_of_mlflow_that_is_not_there_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"^--sinks.mlflow http://127.0.0.1:9: [^\n]+$"):
        record(folder, SinkConfig(tensorboard=False, mlflow="http://127.0.0.1:9"), 0, 1)


@pytest.mark.parametrize(
    ("name", "config"), [("wandb", SinkConfig(wandb="clicks")), ("mlflow", SinkConfig(mlflow="store"))]
)
def test_a_package_that_is_missing_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: SinkConfig
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else find(module))
    with pytest.raises(InputError, match=rf"--sinks.{name}: package {name} is not installed; .*recsys\[{name}\]"):
        record(folder, config, 0, 1)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_store_that_mlflow_does_not_know_is_one_line(folder: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(InputError, match=r"^--sinks.mlflow nowhere://x: [^\n]+$"):
        record(folder, SinkConfig(tensorboard=False, mlflow="nowhere://x"), 0, 1)


@pytest.mark.parametrize("values", [{"wandb": ""}, {"mlflow": ""}, {"mlperf_facts": ("ACME",)}])
def test_values_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SinkConfig(**values)
