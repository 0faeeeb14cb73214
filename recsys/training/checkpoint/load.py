"""Reading checkpoints: all of one, or members out of several."""

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys.config import InputError
from recsys.embeddings.dynamic_resize import load_resized, put_back
from recsys.embeddings.tables import TABLE_SEPARATOR
from recsys.place import is_local
from recsys.training.checkpoint.state import put, state_of
from recsys.training.ema import Ema
from recsys.training.optim import BEFORE_OWNER, Optimizer

# A member's name in that of one of its layers, tables and arrays, or of a table's state (`MEMBER/FEATURE.momentum1`).
_OWNER = re.compile(rf"(?:{BEFORE_OWNER}|^(?=\w+{TABLE_SEPARATOR}))(?P<name>\w+)")


def load(
    path: Path,
    model: DistributedModelParallel,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> int:
    """Load a checkpoint into a model that may be sharded otherwise and over other ranks; returns its step.

    Dynamic tables may have other numbers of rows.

    Args:
        path: of the checkpoint.
        model: to load into.
        optimizer: of the model; without it, the state of optimizers is left where it is.
        extra: tensors that are filled with those of these names; what the checkpoint lacks stays as it is.

    Raises:
        InputError: a file of it cannot be read.
    """
    known = names_in(path)
    extra = {name: value for name, value in (extra or {}).items() if f"extra.{name}" in known}
    state = state_of(model, optimizer, extra=extra)
    loaded = load_resized(known, lambda part: read_into(part, path), state, model)
    read_into(state, path)
    put_back(state, loaded)
    return put(state, model, optimizer)


def load_members(
    sources: Sequence[tuple[Path, Mapping[str, str]]], model: DistributedModelParallel, optimizer: Optimizer
) -> int:
    """Load members from checkpoints of several runs, with their optimizers' state; returns the highest of their steps.

    Args:
        sources: checkpoints, and for each of its members that is wanted, the name here to the name there.
        model: holds all of them; each has tables of its own.
        optimizer: of the model.
    """
    state, steps = state_of(model, optimizer), []
    for path, names in sources:
        part: dict[str, Any] = {"model": {}, "optimizer": {"state": {}}, "step": torch.tensor(0)}
        for here, there in names.items():
            part["model"] |= _renamed(state["model"], here, there)
            of_member = _renamed(state["optimizer"]["state"], here, there)
            part["optimizer"]["state"] |= {key: _renamed(values, here, there) for key, values in of_member.items()}
        read_into(part, path)
        steps.append(int(part["step"]))
    put(state, model, optimizer)
    return max(steps)


def load_averages(path: Path, averages: Ema, here: str = "", there: str = "") -> None:
    """Load averages of a member's parameters, or of all; those that the checkpoint lacks stay as they are.

    Args:
        path: of the checkpoint.
        averages: to fill.
        here: the member; all where left out.
        there: its name in the checkpoint.
    """
    values = averages.state()
    if here:
        values = {name: value for name, value in values.items() if _owner(name) == here}
    named = {f"extra.ema.{_rename(name, there) if here else name}": value for name, value in values.items()}
    known = names_in(path)
    if part := {name: value for name, value in named.items() if name in known}:
        read_into(part, path)


class CheckedReader(FileSystemReader):
    """Reads tensors that are as torch.save wrote them: it notes checksums, which torch.load does not look at."""

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        part = io.BytesIO(super()._slice_file(file, sinfo).read())
        if zipfile.is_zipfile(part):
            with zipfile.ZipFile(part) as archive:
                if archive.testzip() is not None:
                    raise ValueError(f"{sinfo.relative_path} has changed since it was written")
        part.seek(0)
        return part


class CheckedFsspecReader(CheckedReader, FsspecReader):
    """The same on an object store."""


def reader(path: Path) -> FileSystemReader:
    """What reads a checkpoint on a disk or an object store."""
    return CheckedReader(str(path)) if is_local(path) else CheckedFsspecReader(str(path))


def names_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, with their shapes.

    Raises:
        InputError: its list of them is damaged.
    """
    try:
        entries = reader(path).read_metadata().state_dict_metadata
    except Exception as error:  # unpickling what is damaged raises anything
        raise InputError(f"{path}: cannot read what is in the checkpoint ({error}); remove it") from None
    return {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}


def read_into(state: dict[str, Any], path: Path) -> None:
    """Fill the tensors of a nested state.

    Raises:
        InputError: a file of the checkpoint cannot be read, or it lacks a tensor or has one of another shape.
    """
    try:
        dcp.load(state, storage_reader=reader(path))
    except CheckpointException as failure:
        rank, (cause, _) = next(iter(failure.failures.items()))
        what = " ".join(str(cause).split())[:300]
        error = InputError(f"{path}: rank {rank} cannot load it ({what}); is it of another model, or damaged?")
        error.on_all_ranks = True
        raise error from None


def _renamed(values: Mapping[str, Any], here: str, there: str) -> dict[str, Any]:
    """Take what is of the member `here`, or of no member, under the names that it has for the member `there`."""
    return {_rename(key, there): value for key, value in values.items() if _owner(key) in (None, here)}


def _owner(key: str) -> str | None:
    match = _OWNER.search(key)
    return match["name"] if match else None


def _rename(key: str, there: str) -> str:
    """The same under another member's name, where it is a member's."""
    match = _OWNER.search(key)
    return f"{key[: match.start('name')]}{there}{key[match.end('name') :]}" if match else key
