"""Checkpoints: torch.distributed.checkpoint, and a name that stands for a whole one."""

import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys.training.optim import Optimizer

NAME = re.compile(r"step-(\d+)")


def save(folder: Path, step: int, model: DistributedModelParallel, optimizer: Optimizer, config: Path) -> Path:
    """Write model, optimizers, step and a copy of the file `config` as `folder/step-N` from all ranks.

    The name appears when all of it is there. Ranks on several machines need `folder` on a disk that they share.
    """
    path = folder / f"step-{step:08d}"
    partial = folder / f".{path.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dcp.save(_state(model, optimizer, step), checkpoint_id=str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copy(config, partial / "config.json")
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

    Without `optimizer`, the state of optimizers is left where it is.
    """
    state = _state(model, optimizer, 0)
    dcp.load(state, checkpoint_id=str(path))
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.combined.load_state_dict(state["optimizer"])
    return int(state["step"])


def _state(model: DistributedModelParallel, optimizer: Optimizer | None, step: int) -> dict:
    # A plain int beside TorchRec's state saves well and does not load on more than one rank; a tensor does.
    state = {"model": model.state_dict(), "step": torch.tensor(step)}
    if optimizer is not None:
        state["optimizer"] = optimizer.combined.state_dict()
    return state
