"""Taking a run folder: for a new run, or to go on from the newest checkpoint of the one in it."""

from pathlib import Path

from recsys.config import InputError, load_file
from recsys.data.schema import Schema
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.config import TrainConfig, check_same_job
from recsys.training.run import RunFolder


def open_run(config: TrainConfig, schema: Schema, num_steps: int) -> tuple[RunFolder, Path | None]:
    """Take the run folder, and find the checkpoint to go on from; a folder without one is begun anew.

    Raises:
        InputError: the folder is taken, or what is in it is of another job or at its end.
    """
    run = RunFolder.open(config.out, resume=config.resume == "auto")
    newest = checkpoints.newest(config.checkpoint_folder) if config.resume == "auto" else None
    if newest is None:
        run.data.unlink(missing_ok=True)  # of an attempt that came to nothing
        return run, None
    check_same_job(load_file(TrainConfig, newest / "config.json"), config)
    run.check_schema(schema)
    run.check_data(config.data)
    step = checkpoints.step_of(newest)
    # A run that was killed between its last checkpoint and the end of validation only validates.
    if step > num_steps or (step == num_steps and run.load_merge(step)):
        raise InputError(
            f"{config.out}: the run has reached step {step} of {num_steps}; evaluate it, or raise --train.num-epochs "
            "or --train.num-steps"
        )
    return run, newest
