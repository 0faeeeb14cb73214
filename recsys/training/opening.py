"""Taking a run folder: for a new run, or to go on from the newest checkpoint of the one in it."""

import sys
from pathlib import Path
from typing import NamedTuple

from recsys.config import InputError, load_file
from recsys.data.schema import Schema
from recsys.distributed import World
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.config import TrainConfig, check_same_job
from recsys.training.provenance import check_labels
from recsys.training.run import RunFolder


class Opened(NamedTuple):
    """Where a run begins."""

    run: RunFolder
    newest: Path | None
    """The checkpoint to go on from; none where the run begins anew."""
    is_validated: bool = True
    """Whether the validation that was due at that checkpoint was finished."""
    is_complete: bool = False
    """Whether there is nothing to do: an attempt before this one ended well, and was not counted so."""


def open_run(config: TrainConfig, schema: Schema, num_steps: int, world: World) -> Opened:
    """Take the run folder, and find the checkpoint to go on from.

    Raises:
        InputError: the folder is taken, or what is in it is of another job or at its end, or labels are all alike.
    """
    check_labels(config.data)
    run = RunFolder.open(config.out, resume=config.resume == "auto")
    if config.resume == "never":
        return Opened(run, None)
    newest = checkpoints.newest(config.checkpoint_folder)
    if newest is None:
        _check_nothing_lost(config, run)
        return Opened(run, None)
    check_same_job(load_file(TrainConfig, newest / "config.json"), config)
    run.check_schema(schema)
    run.check_data(config.data)
    step = checkpoints.step_of(newest)
    # A run that was killed between its last checkpoint and the end of validation only validates.
    is_complete = step == num_steps and run.load_merge(step) is not None
    if step > num_steps or (is_complete and not world.attempt):
        raise InputError(
            f"{config.out}: the run has reached step {step} of {num_steps}; evaluate it, or raise --train.num-epochs "
            "or --train.num-steps"
        )
    return Opened(run, newest, checkpoints.read(newest).metrics is not None, is_complete)


def _check_nothing_lost(config: TrainConfig, run: RunFolder) -> None:
    """Look, before a run is begun anew in the folder of another attempt, whether that got anywhere."""
    if not run.config.exists() or not run.config.stat().st_size:
        return
    elsewhere = run.checkpoints
    if elsewhere != config.checkpoint_folder and checkpoints.newest(elsewhere):
        raise InputError(f"{config.out}: the run's checkpoints are in {elsewhere}; name it by --checkpoints.folder")
    print(  # noqa: T201
        f"recsys: {config.checkpoint_folder}: no whole checkpoint in it; the run begins anew", file=sys.stderr
    )
