"""What a checkpoint holds, under names that depend on neither the number of ranks nor the plan.

Model and optimizers are TorchRec's state dictionaries. A table's optimizer state stands in one part of them when the
update is fused into the backward, and in another when it is not, as for data-parallel tables; here it has one name.
Members' random streams are functions of seed, rank and step, and the loader's position one of the step, so neither has
a state of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys.training.optim import Optimizer

FUSED, UNFUSED = "tables.", "unfused_tables."


def state_of(
    model: DistributedModelParallel,
    optimizer: Optimizer | None = None,
    step: int = 0,
    extra: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Tensors to save, or to load into.

    Args:
        model: sharded.
        optimizer: of the model; where left out, its state is too.
        step: of training.
        extra: what else the run needs to go on, equal on all ranks.
    """
    # A plain int beside TorchRec's state saves well and does not load on more than one rank; a tensor does.
    state = {"model": model.state_dict(), "step": torch.tensor(step)}
    if optimizer is not None:
        states = optimizer.combined.state_dict()["state"]
        state["optimizer"] = {"state": {_common(key): values for key, values in states.items()}}
    if extra:
        state["extra"] = dict(extra)
    return state


def put(state: Mapping[str, Any], model: DistributedModelParallel, optimizer: Optimizer | None = None) -> int:
    """Give a loaded state to the model and its optimizers; returns the step."""
    model.load_state_dict(state["model"])
    if optimizer is not None:
        loaded = state["optimizer"]["state"]
        keys = optimizer.combined.state_dict()["state"]
        optimizer.combined.load_state_dict({"state": {key: loaded[_common(key)] for key in keys}})
    return int(state["step"])


def _common(key: str) -> str:
    return FUSED + key.removeprefix(UNFUSED) if key.startswith(UNFUSED) else key
