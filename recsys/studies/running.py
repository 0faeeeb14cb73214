"""Running the jobs of a study: each is trained until its last step and predicts both held-out splits, once."""

import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recsys.config import InputError, differences, dump, load_file
from recsys.data.loader import Loader
from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.studies.config import IN_PROCESS, StudyConfig
from recsys.studies.jobs import Job
from recsys.studies.scheduled import train_on
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.config import TrainConfig
from recsys.training.metrics import logloss
from recsys.training.predict import Predictor
from recsys.training.predictions import Predictions, load_predictions
from recsys.training.provenance import data_facts, difference, read_facts
from recsys.training.run import RunFolder
from recsys.training.trainer import Trainer

HELD_OUT = ("valid", "test")
State = Literal["to train", "to predict", "done"]

# Fields of a run's config that change nothing in what it learns.
MAY_DIFFER = {
    "out",
    "data",
    "resume",
    "sinks",
    "checkpoints",
    "profile",
    "train.log_every",
    "train.save_every",
    "train.validate_every",
    "loader.workers",
}


@dataclass(frozen=True)
class Speed:
    """How long a job trained, by its own log: without validation, checkpoints and starts."""

    seconds: float
    rows_per_s: float


def steps_of(recipe: TrainConfig, data: Path) -> int:
    """Steps that every job of a study takes."""
    if recipe.train.num_steps:
        return recipe.train.num_steps
    loader = Loader(data, "train", batch_size=recipe.train.batch_size, config=recipe.loader)
    return recipe.train.num_epochs * loader.steps_per_epoch


def state_of(job: Job, num_steps: int) -> State:
    """What is left to do for a job.

    Raises:
        InputError: its folder holds another run.
    """
    if not (job.folder / "config.json").exists():
        return "to train"
    check_same_run(job)
    if all((job.folder / f"{split}.parquet").exists() for split in HELD_OUT):
        return "done"
    newest = checkpoints.newest(job.folder / "checkpoints")
    return "to predict" if newest and checkpoints.step_of(newest) >= num_steps else "to train"


def check_same_run(job: Job) -> None:
    """Compare the run in a job's folder with the one that the study wants.

    Raises:
        InputError: they differ, naming the first field, or it was trained on other data.
    """
    run = RunFolder(job.folder)
    if run.data.exists() and difference(read_facts(run.data), data_facts(job.config.data)):
        raise InputError(f"{job.folder}: was trained on other data than {job.config.data}; name another --out")
    for name, old, new in differences(dump(load_file(TrainConfig, run.config)), dump(job.config)):
        if name not in MAY_DIFFER:
            raise InputError(
                f"{job.folder}: was run with {name} {old}, the study wants {new}; name another --out, or remove that "
                "folder to train it again"
            )


def run_jobs(config: StudyConfig, jobs: Sequence[Job], num_steps: int) -> None:
    """Train what is not trained, predict what is not predicted.

    Raises:
        InputError: a job failed, or a folder holds another run; all folders are looked at before any is trained.
    """
    states = {job.name: state_of(job, num_steps) for job in jobs}
    left = [job for job in jobs if states[job.name] != "done"]
    if not left:
        return
    _tell(f"study: jobs to do: {len(left)} of {len(jobs)}, steps of each: {num_steps:,}")
    work_left = sum(_work(job) for job in left if states[job.name] == "to train")
    done, started = 0.0, time.perf_counter()
    with process_group() as world:
        if world.size > 1:
            raise InputError("a study runs as one process; let it start jobs of several by --scheduler local_cwd")
        for job in left:
            if states[job.name] == "to train":
                _train(config, job, world)
                done += _work(job)
            predict(job, world)
            gc.collect()  # tables of this job before those of the next
            elapsed = time.perf_counter() - started
            seconds = elapsed / done * (work_left - done) if done else 0.0
            number = jobs.index(job) + 1
            _tell(
                f"study: job {number} of {len(jobs)}, {job.name}: {_summary(job)}, about {seconds / 60:,.1f} min left"
            )


def _train(config: StudyConfig, job: Job, world: World) -> None:
    if config.scheduler == IN_PROCESS:
        Trainer(job.config, world).train()
    else:
        train_on(config, job)


def predict(job: Job, world: World) -> None:
    """Write the predictions that are not there yet, from the newest checkpoint."""
    missing = [split for split in HELD_OUT if not (job.folder / f"{split}.parquet").exists()]
    predictor = Predictor(job.folder, world, data=job.config.data)
    for split in missing:
        predictions = predictor.predict(split)
        assert predictions is not None, "a study is one process"
        predictions.save(job.folder / f"{split}.parquet", predictor.facts(split))


def predictions_of(job: Job, split: str, schema: Schema, manifest: str | None = None) -> Predictions:
    """Read a job's predictions.

    Args:
        job: whose members they are of.
        split: valid or test.
        schema: of the study's data.
        manifest: checksum of that data's manifest; compared where both have one.

    Raises:
        InputError: they are of other members or other data.
    """
    path = job.folder / f"{split}.parquet"
    predictions, facts, _ = load_predictions(path)
    found = (facts.get("schema"), facts.get("split"), predictions.names)
    if found != (schema.hash, split, job.members):
        raise InputError(
            f"{path}: predictions of {', '.join(predictions.names)} on {facts.get('split')} rows of schema "
            f"{facts.get('schema')}; the study wants {', '.join(job.members)} on {split} rows of {schema.hash}; remove "
            "the file to predict again"
        )
    if manifest and facts.get("manifest", manifest) != manifest:
        raise InputError(
            f"{path}: predictions on rows that were prepared otherwise than {job.config.data}; remove the file to "
            "predict again"
        )
    return predictions


def speed_of(job: Job) -> Speed | None:
    """How fast a job trained, from metrics.jsonl; None where nothing is written there."""
    path = job.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seconds, before, rows = 0.0, 0, 0
    for line in lines:
        if line["kind"] == "train" and (line.get("rows_per_s") or 0) > 0:
            window = (line["step"] - before) * job.config.train.batch_size
            before, rows = line["step"], rows + window
            seconds += window / line["rows_per_s"]
    return Speed(seconds, rows / seconds) if seconds else None


def _work(job: Job) -> float:
    """Work of training a job, in a unit of its own: dense FLOPs, and what a row costs a member beside them."""
    return job.cost.flops + 1e6 * len(job.members)


def _summary(job: Job) -> str:
    valid, _, _ = load_predictions(job.folder / "valid.parquet")
    logits, labels, weights = valid.tensors
    loss = logloss(labels.numpy(), logits.mean(dim=1).sigmoid().numpy(), weights.numpy())
    speed = speed_of(job)
    return f"validation logloss {loss:.5f}" + (
        f", {speed.seconds:,.0f} s, {speed.rows_per_s:,.0f} rows/s" if speed else ""
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201  (beside the lines of `progress`)
