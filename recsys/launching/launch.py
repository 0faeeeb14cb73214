"""`recsys launch`: a thin front over torchx that fills in places, retries and defaults."""

import inspect
import io
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchx.cli.cmd_log import get_logs
from torchx.runner import Runner, get_runner
from torchx.runner.config import apply, get_config, load_sections
from torchx.schedulers.local_scheduler import SignalException
from torchx.specs import AppDef, AppState, BindMount
from torchx.specs.builders import materialize_appdef
from torchx.util.types import to_dict

from recsys.config import InputError, nearest
from recsys.launching import components
from recsys.launching.config import LaunchConfig, read_shape
from recsys.launching.places import MOUNTED, SHARED, Job, fill

PACKAGES = {"local_docker": "docker", "kubernetes": "kubernetes", "aws_batch": "boto3", "ray": "ray"}
"""What torchx needs besides for a scheduler."""
EXTRAS = {"kubernetes": "kubernetes", "aws_batch": "aws", "ray": "ray"}


def launch(config: LaunchConfig, job: Job) -> int:
    """Send a job to a scheduler, or print what would be sent; returns the exit status.

    Jobs of this machine (local_cwd, local_docker) are waited for, and what they print is shown: 1 where they fail. Of
    others, the handle and the commands that follow it are printed.

    Raises:
        InputError: the scheduler is unknown, not installed, or does not take the job.
    """
    with get_runner() as runner:
        scheduler = _scheduler(config, runner)
        defaults = load_sections("component").get(f"recsys.{config.verb}", {})
        app = _app(config, job, scheduler, defaults)
        if job.verb == "train":
            shape = inspect.signature(components.train).parameters["j"].default
            _check_ranks(config.shape or defaults.get("j", shape), job.config.train.batch_size, app)
        options = _options(config, scheduler, runner)
        with _folder(scheduler, app):
            if config.dryrun:
                print(_sent(runner.dryrun, app, scheduler, options, None))  # noqa: T201  (what a verb is asked for)
                return 0
            _check_client(scheduler)
            for mount in app.roles[0].mounts if scheduler == MOUNTED else ():
                if isinstance(mount, BindMount) and not mount.read_only:
                    Path(mount.src_path).mkdir(parents=True, exist_ok=True)
            handle = _sent(runner.run, app, scheduler, options, config.workspace)
        if scheduler.startswith("local"):
            return _wait(runner, handle)
        print(f"{handle}\ntorchx status {handle}\ntorchx log {handle}\ntorchx cancel {handle}")  # noqa: T201
        return 0


def _scheduler(config: LaunchConfig, runner: Runner) -> str:
    """Name of a scheduler that is known and whose package is there."""
    known = list(runner.scheduler_backends())
    name = config.scheduler or get_config("cli", "run", "scheduler") or "local_cwd"
    if name not in known:
        raise InputError(f"unknown scheduler {name!r}; {nearest(name, known)}")
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
        extra = f"'recsys[{EXTRAS[name]}]'" if name in EXTRAS else package
        raise InputError(f"scheduler {name} needs the package {package}, which is not installed; pip install {extra}")
    return name


def _app(config: LaunchConfig, job: Job, scheduler: str, defaults: Mapping[str, str]) -> AppDef:
    """The component of the verb, filled."""
    component = getattr(components, config.verb)
    known = [name for name in inspect.signature(component).parameters if not name.endswith("_and_options")]
    for name in defaults:
        if name not in known:
            raise InputError(
                f".torchxconfig, [component:recsys.{config.verb}]: unknown name {name!r}; {nearest(name, known)}"
            )
    filled = fill(job, scheduler)
    mounts = [part for mount in config.mounts for part in mount.split(",")] + filled.mounts
    if not config.mounts and filled.mounts and "mounts" in defaults:
        mounts = [*defaults["mounts"].split(","), *mounts]
    given = {
        "j": config.shape,
        "h": config.resource,
        "cpu": config.cpu,
        "gpu": config.gpu,
        "memory_mb": config.memory_mb,
        "image": config.image,
        "mounts": ",".join(mounts),
        "env": ",".join(config.env),
        "max_retries": config.max_retries,
        "rdzv_port": config.rdzv_port,
    }
    flags = [f"--{name}={value}" for name, value in given.items() if value not in (None, "")]
    arguments = filled.arguments
    retries = defaults.get("max_retries", "0") if config.max_retries is None else str(config.max_retries)
    if config.verb == "train" and retries != "0" and not _has(arguments, "resume"):
        arguments = [*arguments, "--resume", "auto"]
    try:
        with redirect_stderr(io.StringIO()) as told:  # argparse tells a whole usage
            app = materialize_appdef(component, [*flags, "--", *arguments], dict(defaults))
    except SystemExit:
        reason = told.getvalue().strip().rpartition("\n")[2].partition("error: ")[2]
        raise InputError(f".torchxconfig, [component:recsys.{config.verb}]: {reason}") from None
    except (KeyError, ValueError) as error:  # an unknown resource or mount, an env without =
        raise InputError(f"launch {config.verb}: {error.args[0]}") from None
    if scheduler in SHARED:
        _add_path(app)
    for name, value in app.roles[0].env.items() if scheduler == "slurm" else ():
        if "," in value:
            raise InputError(
                f"--env {name}={value}: srun splits values at commas; export {name} here instead, since Slurm hands on "
                "the environment of the launch"
            )
    return app


def _check_ranks(shape: str, batch_size: int, app: AppDef) -> None:
    """See that ranks have a GPU each, where there are any, and can share a batch when all nodes are there."""
    try:
        nodes, ranks = read_shape(shape)
    except ValueError as error:
        raise InputError(str(error)) from None
    gpus = app.roles[0].resource.gpu
    if 0 < gpus < ranks:
        raise InputError(f"-j {shape}: {ranks} ranks on nodes of {gpus} GPUs; a rank needs one of its own")
    world = nodes[-1] * ranks
    if batch_size % world:
        raise InputError(
            f"-j {shape}: --train.batch-size {batch_size} cannot be shared by {world} ranks equally; "
            f"{max(round(batch_size / world), 1) * world} can"
        )


def _has(arguments: Sequence[str], option: str) -> bool:
    return any(argument.partition("=")[0] in (f"--{option}", f"--no-{option}") for argument in arguments)


def _add_path(app: AppDef) -> None:
    """Put this environment on PATH where it was not activated: schedulers start `torchrun` and `python` by name."""
    beside = Path(sys.executable).parent
    if shutil.which("torchrun") is None and (beside / "torchrun").exists():
        for role in app.roles:
            role.env.setdefault("PATH", os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)]))


def _options(config: LaunchConfig, scheduler: str, runner: Runner) -> dict[str, Any]:
    """The scheduler's own options: those given, then those of .torchxconfig."""
    known = runner.scheduler_run_opts(scheduler)
    names = [name for name, _ in known]
    options: dict[str, Any] = {}
    for pairs in config.cfg:
        for name in to_dict(pairs):
            if name not in names:
                raise InputError(f"--cfg {pairs}: {scheduler} has no option {name!r}; {nearest(name, names)}")
        options |= known.cfg_from_str(pairs)
    apply(scheduler=scheduler, cfg=options)
    missing = [name for name, option in known if option.is_required and options.get(name) is None]
    if missing:
        raise InputError(f"{scheduler} needs --cfg {missing[0]}=..., or {missing[0]} in .torchxconfig")
    return options


@contextmanager
def _folder(scheduler: str, app: AppDef) -> Iterator[None]:
    """Give ray the folder that torchx puts its driver in and sends: an empty one, since the cluster has recsys."""
    if scheduler != "ray":
        yield
        return
    folder = tempfile.mkdtemp(prefix="recsys-")
    app.roles[0].image = folder
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # torchx removes it too, once the job is sent


def _check_client(scheduler: str) -> None:
    if scheduler == "slurm" and shutil.which("sbatch") is None:
        raise InputError("scheduler slurm: sbatch is not on PATH; launch from a node that has it, or add --dryrun")


def _sent(send: Any, app: AppDef, scheduler: str, options: dict[str, Any], workspace: str | None) -> Any:
    """What the runner's `send` answers."""
    try:
        return send(app, scheduler, options, workspace=workspace)
    except Exception as error:  # what a scheduler and its client may raise has no common base
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{scheduler} does not take the job ({reason})") from None


def _wait(runner: Runner, handle: str) -> int:
    """Show what a job prints until it ends."""
    log = threading.Thread(target=get_logs, args=(sys.stderr, handle, None, True, runner), daemon=True)
    try:
        print(handle, flush=True)  # noqa: T201
        log.start()
        status = runner.wait(handle, wait_interval=1)
    except SignalException as stop:  # what torchx makes of SIGTERM and of Ctrl-C
        runner.cancel(handle)
        if log.ident:
            log.join()
        return 128 + stop.sigval
    except BaseException:  # else the job goes on without its owner
        runner.cancel(handle)
        raise
    log.join()
    state = status.state if status else AppState.UNKNOWN
    if state != AppState.SUCCEEDED:
        print(f"recsys: {handle} {state.name}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
