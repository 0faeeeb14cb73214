"""Sinks: where a run's records go. `metrics.jsonl` always, TensorBoard unless it is turned off, others on demand.

A record is a kind (data, train, valid, end ...), a step and values, which may be nested; `metrics.jsonl` has them as
they are, with null for NaN and infinity, the others take the numbers, under names such as `valid/merged/auc`.
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recsys.config import InputError, write_whole
from recsys.training.mlperf import mlperf_lines

Write = Callable[[str, int, Mapping[str, Any]], None]
"""`write(kind, step, values)`."""

METRICS = "metrics.jsonl"
IDS = "sinks.json"
"""Of a run folder: by which ids W&B and MLflow know the run, so that a resumed one goes on in the same place."""
BATCH = 100
"""Parameters that MLflow takes at once."""
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_INIT_TIMEOUT": "10",
    "WANDB_FINISH_TIMEOUT": "60",
}
"""With tracking servers, in tries and seconds, since the job waits for them. The environment may say otherwise."""
LONGEST = 500
"""Letters of a parameter's value that MLflow keeps."""


@dataclass(frozen=True, kw_only=True)
class SinkConfig:
    """Where records go beside metrics.jsonl; rank 0 alone writes."""

    tensorboard: bool = True
    """TensorBoard's events, in the run folder."""
    wandb: str | None = None
    """Project on Weights & Biases (the extra `wandb`); the key is that of `wandb login` or WANDB_API_KEY."""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """offline keeps everything in the run folder, for `wandb sync`."""
    mlflow: str | None = None
    """Tracking store of MLflow (the extra `mlflow`): a server's URL, or a folder."""
    mlflow_experiment: str = "recsys"
    """Experiment that the run belongs to."""
    mlperf: Path | None = None
    """File that MLPerf's log lines are appended to; - is stdout."""
    mlperf_facts: tuple[str, ...] = ()
    """KEY=VALUE of lines that this run cannot know, such as submission_org=ACME; numbers, true and false are such."""

    def __post_init__(self) -> None:
        for name in ("wandb", "mlflow", "mlflow_experiment"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; name one, or leave it out")
        for fact in self.mlperf_facts:
            if not fact.partition("=")[1]:
                raise ValueError(f"mlperf_facts {fact!r} is not KEY=VALUE, such as submission_org=ACME")

    def check(self) -> None:
        """Look, before the work, whether all that is asked for is there.

        Raises:
            InputError: a package is missing, naming the extra that brings it, or the folder of MLPerf's file.
        """
        for name, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
            if getattr(self, name) is not None and importlib.util.find_spec(package) is None:
                raise InputError(f"--sinks.{name}: package {package} is not installed; pip install 'recsys[{name}]'")
        if self.mlperf is not None and not self.mlperf.absolute().parent.is_dir():
            raise InputError(f"--sinks.mlperf {self.mlperf}: no such folder to write it to; make it")
        if self.mlperf is not None and self.mlperf.is_dir():
            raise InputError(f"--sinks.mlperf {self.mlperf}: is a folder; name a file in it")


@contextmanager
def open_sinks(folder: Path, step: int, config: SinkConfig) -> Iterator[Write]:
    """Yield `write(kind, step, values)`, which hands a record to every sink; called on rank 0.

    What an earlier attempt wrote past `step`, from where this one goes on, is dropped from metrics.jsonl and hidden in
    TensorBoard; W&B and MLflow keep it beside what is written anew. One of these two that fails on the way is told in a
    line and left out from there on, since a run does not depend on it.

    Raises:
        InputError: a sink that cannot be opened, or lines of metrics.jsonl that are no records.
    """
    config.check()
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)  # read where the packages are imported
    with ExitStack() as stack:
        writes = [stack.enter_context(sink) for sink in _chosen(folder, step, config)]

        def write(kind: str, step: int, values: Mapping[str, Any]) -> None:
            for each in writes:
                each(kind, step, values)

        yield write


def _chosen(folder: Path, step: int, config: SinkConfig) -> Iterator[AbstractContextManager[Write]]:
    yield _jsonl(folder, step)
    if config.tensorboard:
        yield _tensorboard(folder, step)
    if config.wandb is not None:
        yield _wandb(folder, config.wandb, config.wandb_mode)
    if config.mlflow is not None:
        yield _mlflow(folder, config.mlflow, config.mlflow_experiment)
    if config.mlperf is not None:
        yield mlperf_lines(config.mlperf, run_config(folder), config.mlperf_facts, step)


def run_config(folder: Path) -> dict[str, Any]:
    """The config of the run in a folder as plain values; none where it is not written."""
    path = folder / "config.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def whole_lines(path: Path) -> list[str]:
    """Lines of a file that end; a writer that was killed may have left half a one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names, joined by slashes, and values of all single numbers in a record."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def finite(values: Any) -> Any:
    """Plain values with None for NaN and infinity, which JSON has no word for."""
    if isinstance(values, Mapping):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def parsed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines of metrics.jsonl, and the record that each holds.

    Raises:
        InputError: a line holds none.
    """
    for number, line in enumerate(whole_lines(path), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"kind", "step"} <= set(record):
            raise InputError(f"{path}, line {number}: not a record of a run; remove the line")
        yield line, record


@contextmanager
def _jsonl(folder: Path, step: int) -> Iterator[Write]:
    path = folder / METRICS
    kept = [line for line, record in parsed(path) if record["step"] <= step]
    write_whole(path, "".join(kept))
    with path.open("a") as file:

        def write(kind: str, step: int, values: Mapping[str, Any]) -> None:
            file.write(json.dumps({"kind": kind, "step": step, **finite(values)}) + "\n")
            file.flush()

        yield write


@contextmanager
def _tensorboard(folder: Path, step: int) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (slow to import)

    with SummaryWriter(folder / "tensorboard", purge_step=step + 1) as board:

        def write(kind: str, step: int, values: Mapping[str, Any]) -> None:
            for name, value in numbers(values):
                board.add_scalar(f"{kind}/{name}", value, step)

        yield write


@contextmanager
def _wandb(folder: Path, project: str, mode: Literal["online", "offline", "disabled"]) -> Iterator[Write]:
    import wandb  # noqa: PLC0415  (an extra)

    # What goes to the terminal stays there.
    settings = wandb.Settings(console="off")
    known: dict[str, Any] = {"id": _known_as(folder, "wandb"), "name": folder.name, "config": run_config(folder)}
    try:
        run = wandb.init(project=project, mode=mode, dir=str(folder), resume="allow", settings=settings, **known)
    except wandb.Error as error:
        raise InputError(f"--sinks.wandb {project}: {_one_line(error)}") from None
    _remember(folder, "wandb", run.id)
    # A resumed run may write a step twice, which W&B's own step forbids.
    run.define_metric("*", step_metric="step")
    attempt = _Attempts("wandb")

    def write(kind: str, step: int, values: Mapping[str, Any]) -> None:
        if found := {f"{kind}/{name}": value for name, value in numbers(values)}:
            attempt(run.log, found | {"step": step})

    exit_code = 1
    try:
        yield write
        exit_code = 0
    finally:
        attempt(run.finish, exit_code)


@contextmanager
def _mlflow(folder: Path, store: str, experiment: str) -> Iterator[Write]:
    if "://" not in store:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow takes a folder only when told so
    from mlflow.entities import Metric, Param  # noqa: PLC0415  (an extra)
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    try:
        client = MlflowClient(tracking_uri=store)
        run_id = _known_as(folder, "mlflow")
        if run_id is None:
            known = client.get_experiment_by_name(experiment)
            experiment_id = known.experiment_id if known else client.create_experiment(experiment)
            run_id = str(client.create_run(experiment_id, run_name=folder.name).info.run_id)
            _remember(folder, "mlflow", run_id)
            params = [Param(name, str(value)[:LONGEST]) for name, value in _leaves(run_config(folder))]
            for begin in range(0, len(params), BATCH):
                client.log_batch(run_id, params=params[begin : begin + BATCH])
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        raise InputError(f"--sinks.mlflow {store}: {_one_line(error)}") from None

    attempt = _Attempts("mlflow")

    def write(kind: str, step: int, values: Mapping[str, Any]) -> None:
        at = int(time.time() * 1e3)
        if found := [Metric(f"{kind}/{name}", value, at, step) for name, value in numbers(values)]:
            attempt(client.log_batch, run_id, found)

    status = "FAILED"
    try:
        yield write
        status = "FINISHED"
    finally:
        attempt(client.set_terminated, run_id, status)


class _Attempts:
    """What is asked of a tracking server, until it fails for the first time: then the run goes on without it."""

    def __init__(self, sink: str) -> None:
        self._sink, self._failed = sink, False

    def __call__(self, ask: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            ask(*arguments)
        except Exception as error:  # what a client and its network raise has no common base
            self._failed = True
            line = f"recsys: --sinks.{self._sink} is off from here on ({_one_line(error)})"
            print(line, file=sys.stderr, flush=True)  # noqa: T201  (beside the lines of `progress`)


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, values


def _known_as(folder: Path, sink: str) -> str | None:
    path = folder / IDS
    return json.loads(path.read_text()).get(sink) if path.exists() else None


def _remember(folder: Path, sink: str, run_id: str) -> None:
    path = folder / IDS
    known = json.loads(path.read_text()) if path.exists() else {}
    write_whole(path, json.dumps(known | {sink: run_id}) + "\n")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
