"""Training a job by a scheduler of torchx, through the component that `torchx run` takes too."""

import io
import json
import shlex
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

from recsys.config import InputError, dump, nearest, write_whole
from recsys.place import is_local
from recsys.studies.config import StudyConfig
from recsys.studies.jobs import Job

POLL_S = 2.0


def train_on(config: StudyConfig, job: Job) -> None:
    """Submit a job and wait for its end.

    The scheduler's nodes read its config from OUT/jobs/NAME.json and write its run folder, so `out` must lie on a disk
    that they share.

    Raises:
        InputError: the scheduler does not take the job, or it fails.
    """
    from torchx.runner import get_runner  # noqa: PLC0415  (slow to import, and few studies need it)
    from torchx.runner.config import apply  # noqa: PLC0415
    from torchx.specs import AppState  # noqa: PLC0415

    file = Path(config.component.partition(":")[0])
    if file.suffix == ".py" and not file.exists():
        raise InputError(f"--component {config.component}: no such file; start the study in the repository's root")
    path = (config.out / "jobs" / f"{job.name}.json").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = job.config.data
    train = replace(job.config, out=job.folder.absolute(), data=data.absolute() if is_local(data) else data)
    write_whole(path, json.dumps(dump(train), indent=2) + "\n")
    arguments = [*shlex.split(config.torchx_args), "--", str(path)]
    with get_runner() as runner:
        known = list(runner.scheduler_backends())
        if config.scheduler not in known:
            raise InputError(
                f"unknown scheduler {config.scheduler!r}; {nearest(config.scheduler, ['in_process', *known])}"
            )
        try:
            options = dict(runner.scheduler_run_opts(config.scheduler).cfg_from_str(config.torchx_cfg))
            apply(scheduler=config.scheduler, cfg=options)
            with redirect_stderr(io.StringIO()) as told:  # argparse tells a whole usage
                handle = runner.run_component(config.component, arguments, config.scheduler, options)
        except SystemExit:
            reason = told.getvalue().strip().rpartition("\n")[2]
            raise InputError(f"--torchx-args {config.torchx_args!r}: {reason}") from None
        except Exception as error:  # what a scheduler and its client may raise has no common base
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"job {job.name}: {config.scheduler} does not take it ({reason})") from None
        try:
            status = runner.wait(handle, wait_interval=POLL_S)
        except BaseException:  # else the job goes on, and the same command starts a second one in its folder
            runner.cancel(handle)
            raise
        if status is None or status.state != AppState.SUCCEEDED:
            state = status.state.name if status else "gone"
            logs = f"; logs: {status.ui_url}" if status and status.ui_url else ""
            raise InputError(f"job {job.name}: {state} on {config.scheduler} ({handle}){logs}")
