"""The working folder of a preparation: one process, one set of settings, kept until its data have their name."""

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from recsys.config import InputError, write_whole
from recsys.data.settings import PrepareConfig


@contextmanager
def working_in(folder: Path, config: PrepareConfig) -> Iterator[None]:
    """Make the working folder, or take up one with the same settings; nobody else may work in it meanwhile."""
    remove_if_done(folder)
    try:
        for name in ("data", "work"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{config.out}: cannot make it ({error.strerror})") from None
    with (folder / "work" / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process prepares in it; wait for it, or name another --out") from None
        _check_same_settings(folder, config)
        try:
            yield
        except (OSError, pl.exceptions.ComputeError) as error:
            full = (errno.ENOSPC, errno.EDQUOT)
            by_polars = any(f"(os error {code})" in str(error) for code in full)  # which says it in its text alone
            if getattr(error, "errno", None) not in full and not by_polars:
                raise
            raise InputError(
                f"{folder}: no space is left on its disk; make room and run the same command, which goes on from here"
            ) from None


def remove_if_done(folder: Path) -> None:
    """Remove a working folder whose data got their name before the job was killed."""
    if (folder / "work").exists() and not (folder / "data").exists():
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a working folder; under another name first, so that nobody takes up half of one."""
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def _check_same_settings(folder: Path, config: PrepareConfig) -> None:
    path = folder / "work" / "settings.json"
    wanted = config.determining
    begun = json.loads(path.read_text()) if path.exists() else wanted
    for name, value in wanted.items():
        # More malformed rows may be tolerated at a second try: nothing that stands changes by it.
        if name != "max_malformed" and begun.get(name) != value:
            raise InputError(
                f"{folder}: an unfinished preparation with {name} {begun.get(name)} instead of {value}; finish it with "
                f"its own settings, or delete that folder"
            )
    write_whole(path, json.dumps(wanted))
