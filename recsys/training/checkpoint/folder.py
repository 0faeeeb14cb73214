"""The folder of a run's checkpoints: which are whole, whose they are, and which are kept.

A checkpoint is whole when it holds `complete.json`, which is written last and tells the size of every other file. On a
disk it also has another name until then, so that nobody meets half a one; an object store cannot rename.
"""

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from recsys.config import InputError, write_whole
from recsys.place import is_local
from recsys.training.checkpoint.config import CheckpointConfig

COMPLETE, OWNER = "complete.json", "owner.json"
NAME = re.compile(r"step-(\d+)")
_LEFT = re.compile(r"\.step-\d+\.(partial|before)")


@dataclass(frozen=True)
class Saved:
    """What is known of a whole checkpoint."""

    step: int
    saved_at: float
    """Seconds since 1970."""
    files: dict[str, int]
    """Bytes of each file."""
    metrics: dict[str, dict[str, float]] | None = None
    """Of each member and of the merge on the validation rows at this step, where they were validated."""

    def write(self, path: Path) -> None:
        """Mark the checkpoint at `path` as whole."""
        write_whole(path / COMPLETE, json.dumps(asdict(self), indent=2) + "\n")


def name_of(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("step-"))


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, by rising step."""
    if not folder.exists():
        return []
    paths = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted((path for path in paths if _is_whole(path)), key=step_of)


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step, if there is one."""
    return max(whole(folder), key=step_of, default=None)


def read(path: Path) -> Saved:
    """What is known of a whole checkpoint.

    Raises:
        InputError: its `complete.json` cannot be read.
    """
    try:
        return Saved(**json.loads((path / COMPLETE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path / COMPLETE}: cannot read it ({error}); remove the checkpoint") from None


def complete(partial: Path, path: Path, saved: Saved) -> None:
    """Give a checkpoint of which all is written its mark and its name."""
    files = {file.name: file.stat().st_size for file in partial.iterdir()}
    replace(saved, files=files).write(partial)
    if partial == path:
        return
    before = path.with_name(f".{path.name}.before")
    if path.exists():  # aside, so that one of the two is there whatever happens
        path.rename(before)
    partial.rename(path)
    discard(before)


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return path.with_name(f".{path.name}.partial") if is_local(path) else path


def discard(path: Path) -> None:
    """Remove what is left of a checkpoint that was not finished."""
    if path.exists():
        _remove(path)


def add_metrics(path: Path, metrics: dict[str, dict[str, float]]) -> None:
    """Note how good the members of a whole checkpoint are."""
    replace(read(path), metrics=metrics).write(path)


def prune(folder: Path, config: CheckpointConfig) -> list[Path]:
    """Remove the checkpoints that need not be kept, and say which those were."""
    by_step = {step_of(path): path for path in whole(folder)}
    gone = [by_step[step] for step in superfluous([read(path) for path in by_step.values()], config)]
    for path in gone:
        _remove(path)
    return gone


def superfluous(checkpoints: Sequence[Saved], config: CheckpointConfig) -> list[int]:
    """Steps of the checkpoints that are among neither the newest, the best, nor the first of their hours."""
    if config.keep_last is None:
        return []
    by_step = sorted(checkpoints, key=lambda saved: saved.step)
    kept = {saved.step for saved in by_step[-config.keep_last :]}
    sign = -1 if config.metric == "auc" else 1
    # One without metrics, or where all labels agree, is not among the best: nan is below nothing.
    scores = {
        saved.step: sign * (saved.metrics or {}).get("merged", {}).get(config.metric, float("nan")) for saved in by_step
    }
    ranked = sorted(
        (step for step, score in scores.items() if not math.isnan(score)), key=lambda step: (scores[step], step)
    )
    kept |= set(ranked[: config.keep_best])
    if config.keep_every_hours:
        stretches: dict[int, int] = {}
        for saved in by_step:
            stretch = int((saved.saved_at - by_step[0].saved_at) // (config.keep_every_hours * 3600))
            stretches.setdefault(stretch, saved.step)
        kept |= set(stretches.values())
    return [saved.step for saved in by_step if saved.step not in kept]


@contextmanager
def taken(folder: Path, run: Path, run_id: str) -> Iterator[None]:
    """Hold a run, and a folder for its checkpoints, while it trains.

    Args:
        folder: of the checkpoints.
        run: the run folder, on a disk.
        run_id: what tells the run from others.

    Raises:
        InputError: the folder holds the checkpoints of another run, or another process trains this one.
    """
    with _locked(run):
        owner = folder / OWNER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(owner.read_text()).get("run") if owner.exists() else run_id
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{owner}: cannot tell whose checkpoints these are ({error})") from None
        if found != run_id:
            raise InputError(
                f"{folder}: holds the checkpoints of another run; name another --checkpoints.folder, or they would "
                "remove one another's"
            )
        if not owner.exists():
            write_whole(owner, json.dumps({"run": run_id}) + "\n")
        for path in folder.iterdir():
            if _LEFT.fullmatch(path.name):  # by attempts that were killed while they wrote
                discard(path)
        yield


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Lock a run folder; the system unlocks it when this process is gone, however it goes."""
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InputError(
                f"{run}: {file.read().strip() or 'another process'} trains this run; wait for it, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def _is_whole(path: Path) -> bool:
    """Whether the mark is there, and every file as long as it says: a copy may have ended early."""
    try:
        files: dict[str, Any] = json.loads((path / COMPLETE).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def _remove(path: Path) -> None:
    """Remove a checkpoint, its mark first."""
    (path / COMPLETE).unlink(missing_ok=True)
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.rmdir(recursive=True)  # type: ignore[call-arg]
