"""Checkpoints: torch.distributed.checkpoint, and a name that stands for a whole one."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys.embeddings.dynamic_resize import load_resized, put_back
from recsys.embeddings.tables import TABLE_SEPARATOR
from recsys.training.chunks import in_chunks
from recsys.training.optim import BEFORE_OWNER, Optimizer

NAME = re.compile(r"step-(\d+)")
# A member's name in that of one of its layers, tables and arrays, or of a table's state (`MEMBER/FEATURE.momentum1`).
_OWNER = re.compile(rf"(?:{BEFORE_OWNER}|^(?=\w+{TABLE_SEPARATOR}))(?P<name>\w+)")


def save(folder: Path, step: int, model: DistributedModelParallel, optimizer: Optimizer, files: Sequence[Path]) -> Path:
    """Write model, optimizers, step and copies of `files` as `folder/step-N` from all ranks.

    The name appears when all of it is there. Ranks on several machines need `folder` on a disk that they share.
    """
    path = folder / f"step-{step:08d}"
    partial = folder / f".{path.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dcp.save(in_chunks(_state(model, optimizer, step)), checkpoint_id=str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        for file in files:
            shutil.copy(file, partial / file.name)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    dist.barrier()
    return path


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, if there is one."""
    return max((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of, default=None)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("step-"))


def load(path: Path, model: DistributedModelParallel, optimizer: Optimizer | None = None) -> int:
    """Load a checkpoint into a model that may be sharded otherwise and over other ranks; returns its step.

    Dynamic tables may have other numbers of rows.

    Without `optimizer`, the state of optimizers is left where it is.
    """
    state = _state(model, optimizer, 0)
    loaded = load_resized(path, state, model)
    dcp.load(state, checkpoint_id=str(path))
    put_back(state, loaded)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.combined.load_state_dict(state["optimizer"])
    return int(state["step"])


def load_members(
    sources: Sequence[tuple[Path, Mapping[str, str]]], model: DistributedModelParallel, optimizer: Optimizer
) -> int:
    """Load members from checkpoints of several runs, with their optimizers' state; returns the highest of their steps.

    Args:
        sources: checkpoints, and for each of its members that is wanted, the name here to the name there.
        model: holds all of them; each has tables of its own.
        optimizer: of the model.
    """
    state, steps = _state(model, optimizer, 0), []
    for path, names in sources:
        part: dict[str, Any] = {"model": {}, "optimizer": {"state": {}}, "step": torch.tensor(0)}
        for here, there in names.items():
            part["model"] |= _renamed(state["model"], here, there)
            of_member = _renamed(state["optimizer"]["state"], here, there)
            part["optimizer"]["state"] |= {key: _renamed(values, here, there) for key, values in of_member.items()}
        dcp.load(part, checkpoint_id=str(path))
        steps.append(int(part["step"]))
    model.load_state_dict(state["model"])
    optimizer.combined.load_state_dict(state["optimizer"])
    return max(steps)


def _renamed(values: Mapping[str, Any], here: str, there: str) -> dict[str, Any]:
    """Take what is of the member `here`, or of no member, under the names that it has for the member `there`."""
    found = {}
    for key, value in values.items():
        match = _OWNER.search(key)
        if match is None or match["name"] == here:
            found[key if match is None else f"{key[: match.start('name')]}{there}{key[match.end('name') :]}"] = value
    return found


def _state(model: DistributedModelParallel, optimizer: Optimizer | None, step: int) -> dict:
    # A plain int beside TorchRec's state saves well and does not load on more than one rank; a tensor does.
    state = {"model": model.state_dict(), "step": torch.tensor(step)}
    if optimizer is not None:
        state["optimizer"] = optimizer.combined.state_dict()
    return state
