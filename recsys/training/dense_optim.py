"""Optimizers of what is not a table: torch's, and LAMB of pytorch-optimizer."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from recsys.config import InputError

DenseKind = Literal["adam", "adamw", "adagrad", "sgd", "lamb", "muon"]


def dense_optimizer(
    kind: DenseKind,
    params: Mapping[str, nn.Parameter],
    lr_of: Callable[[str], float],
    *,
    weight_decay: float,
    momentum: float,
) -> KeyedOptimizer:
    """Make an optimizer whose state is there, so that it can be loaded.

    muon orthogonalises the updates of matrices (torch.optim.Muon, scaled so that AdamW's learning rates suit it);
    vectors, rows of one output and stacks of matrices get AdamW.

    Args:
        kind: of it.
        params: what to update, by name.
        lr_of: name to learning rate.
        weight_decay: decoupled, but for adam, adagrad and sgd, which add it to the gradient.
        momentum: of sgd and muon.

    Raises:
        InputError: its library is not installed.
    """
    if kind == "muon":
        matrices = {name: param for name, param in params.items() if param.dim() == 2 and min(param.shape) > 1}
        rest = {name: param for name, param in params.items() if name not in matrices}
        parts = [("muon", matrices), ("adamw", rest)]
    else:
        parts = [(kind, dict(params))]
    made: list[tuple[str, KeyedOptimizer]] = []
    for name, part in parts:
        if not part:
            continue
        optimizer = _make(name, _groups(part, lr_of), weight_decay, momentum)
        keyed = KeyedOptimizerWrapper(part, lambda _, optimizer=optimizer: optimizer)
        _make_state(keyed)
        made.append(("", keyed))
    return made[0][1] if len(made) == 1 else CombinedOptimizer(made)


def _make(kind: str, groups: list[dict[str, Any]], weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(groups, weight_decay=weight_decay, fused=True)
    if kind == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    if kind == "adagrad":
        return torch.optim.Adagrad(groups, weight_decay=weight_decay, foreach=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)
    if kind == "muon":
        return torch.optim.Muon(groups, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    try:
        from pytorch_optimizer import Lamb  # noqa: PLC0415  (an extra)
    except ImportError:
        raise InputError(
            "--optimizer.dense lamb: pytorch-optimizer is not installed; pip install 'recsys[optimizers]', or use adamw"
        ) from None
    lamb: torch.optim.Optimizer = Lamb(groups, weight_decay=weight_decay)
    return lamb


def _groups(params: Mapping[str, nn.Parameter], lr_of: Callable[[str], float]) -> list[dict[str, Any]]:
    """A group of parameters for each learning rate."""
    by_lr: dict[float, list[nn.Parameter]] = {}
    for name, parameter in params.items():
        by_lr.setdefault(lr_of(name), []).append(parameter)
    return [{"params": group, "lr": lr} for lr, group in by_lr.items()]


def _make_state(optimizer: KeyedOptimizer) -> None:
    """Make the state that a fresh optimizer lacks: loading a checkpoint would skip what is not there and say nothing.

    init_state() makes it by a step on zero gradients, which must neither change a parameter nor count, nor leave a
    parameter's decay in what is kept of gradients.
    """
    own = [{name: group[name] for name in ("lr", "weight_decay")} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    optimizer.init_state()
    for group, before in zip(optimizer.param_groups, own, strict=True):
        group.update(before)
        if "step" in group:
            group["step"] = 0
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
