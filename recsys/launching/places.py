"""Folders and files of a job, as the nodes of its scheduler find them."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.config import InputError
from recsys.place import is_local

SHARED = ("local_cwd", "slurm")
"""Schedulers whose nodes have this machine's folders, by their absolute paths."""
MOUNTED = "local_docker"
"""The scheduler whose containers run on this machine, and see what they are told to."""

WRITTEN = ("out", "work", "checkpoints.folder", "sinks.mlperf")
"""Options whose places a job writes to; it reads the others."""

_CONFIG_FILES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Job:
    """What follows a verb, read and as it was given."""

    verb: str
    config: Any
    """A config dataclass: of training, of preparation, of a study."""
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Filled:
    """Arguments that mean the same on the scheduler's nodes, and what its containers need for that."""

    arguments: list[str]
    mounts: list[str]
    """Parts of torchx's mounts: type=bind, src=..., dst=..., readonly."""


def fill(job: Job, scheduler: str) -> Filled:
    """Make the places of a job absolute where the scheduler's nodes have them; URLs are left alone.

    Raises:
        InputError: the nodes cannot have them, naming the option.
    """
    arguments = list(job.arguments)
    found = list(_local(job.config, ""))
    at = 1 if job.verb == "study" else 0
    recipe = Path(arguments[at]) if arguments[at].endswith(_CONFIG_FILES) else None
    if scheduler not in (*SHARED, MOUNTED):
        if recipe and not recipe.is_absolute():
            raise _elsewhere(f"the file {recipe}", scheduler, "give")
        for name, path in found:
            if not path.is_absolute():
                raise _elsewhere(f"{_option(name)} {path}", scheduler, "give a URL, or")
        return Filled(arguments, [])
    read: list[Path] = []
    if recipe:
        read.append(recipe.absolute())
        arguments[at] = str(read[0])
    written: list[Path] = []
    for name, path in found:
        if name == "paths":
            _put_raw(arguments, job.config, path)
        else:
            _put(arguments, name, path)
        (written if name in WRITTEN else read).append(path.absolute())
    return Filled(arguments, _mounts(read, written) if scheduler == MOUNTED else [])


def _elsewhere(what: str, scheduler: str, mend: str) -> InputError:
    return InputError(
        f"{what} is relative to this machine's folder, which the nodes of {scheduler} do not have; {mend} the absolute "
        "path that it has there (--mounts)"
    )


def _local(config: Any, prefix: str) -> Iterator[tuple[str, Path]]:
    """Names, as options have them, and values of all fields that are paths of this machine."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _local(value, f"{name}.")
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and is_local(path) and str(path) != "-":  # stdout
                yield name, path


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _put(arguments: list[str], name: str, path: Path) -> None:
    """Make one place of the arguments absolute, wherever it stands in them; one of the recipe's own is added."""
    absolute = str(path.absolute())
    for at, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option.replace("_", "-") == _option(name):
            if value:
                arguments[at] = f"{option}={absolute}"
                return
            # Options of several values have them one after another.
            for later in range(at + 1, len(arguments)):
                if Path(arguments[later]) == path:
                    arguments[later] = absolute
                    return
    arguments += [_option(name), absolute]


def _put_raw(arguments: list[str], config: Any, path: Path) -> None:
    """Make one of the raw files of `prepare` absolute, which no option names."""
    flags = {
        _option(field.name) for field in dataclasses.fields(config) if isinstance(getattr(config, field.name), bool)
    }
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    for at, argument in enumerate(arguments[1:], start=1):
        before = arguments[at - 1].replace("_", "-")
        is_value = before.startswith("--") and "=" not in before and before not in flags
        if Path(argument) == path and not is_value:
            arguments[at] = str(path.absolute())
            return


def _mounts(read: Sequence[Path], written: Sequence[Path]) -> list[str]:
    """Mounts by which a container has folders and files where this machine has them."""
    # What is written may have to be new, so the folder that it goes to is mounted.
    folders = {str(path.parent): "" for path in written}
    folders = {**{str(path): "readonly" for path in read}, **folders}
    parts: list[str] = []
    for folder, mode in folders.items():
        parts += ["type=bind", f"src={folder}", f"dst={folder}", *([mode] if mode else [])]
    return parts
