"""Optimizers: Adagrad on tables, Adam on the rest, and one learning-rate schedule over both."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.embeddings.config import TABLE_SEPARATOR
from recsys.embeddings.robe import RobeArray
from recsys.members import MemberSpec
from recsys.sharding.torchrec import TableOptimizer

# What stands before a table's name in the name of a parameter, and before that of the member whose it is: of its
# layers, and of what its embeddings have beside tables.
TABLE, MEMBER, EMBEDDING = "embedding_bags.", ".by_name.", ".by_owner."
BEFORE_OWNER = "|".join(map(re.escape, (TABLE, MEMBER, EMBEDDING)))
_OWNER = re.compile(rf"(?:{BEFORE_OWNER})(?P<name>\w+)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Learning rates and their schedule."""

    tables: Literal["rowwise_adagrad", "adagrad"] = "rowwise_adagrad"
    """Adagrad on the embedding tables, with one accumulator a row (a D-th of the memory) or one an element."""
    table_lr: float = 0.05
    """Learning rate of the tables."""
    table_eps: float = 1e-8
    """Added to the root of the tables' accumulated squared gradients."""
    dense_lr: float = 1e-3
    """Adam on everything else."""
    weight_decay: float = 0.0
    """Decoupled (AdamW), on everything but the tables."""
    warmup_steps: int = 0
    """Steps over which both learning rates grow from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How both learning rates fall from the end of the warm-up to 0 after the last step."""

    def __post_init__(self) -> None:
        if not self.table_eps > 0:
            raise ValueError(f"table_eps {self.table_eps} must be above 0: a row without gradients divides by it")
        for name in ("table_lr", "dense_lr", "weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")

    @property
    def table_optimizer(self) -> TableOptimizer:
        """The part that is fused into the tables' backward."""
        return TableOptimizer(kind=self.tables, lr=self.table_lr, eps=self.table_eps)

    def factor(self, step: int, num_steps: int) -> float:
        """What learning rates are multiplied by at `step` of `num_steps`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
        return 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class Optimizer:
    """All optimizers of a sharded model, with one schedule.

    Tables that the plan made data-parallel are not in the fused optimizer; here they get the same Adagrad, so that a
    table is optimized alike under every plan. Arrays of ROBE get Adagrad with an accumulator for each element, for they
    have no rows; a job of one rank on a CPU updates only what a batch touches of them, in the backward.

    Args:
        model: sharded; tables whose members have a rate of their own were given it before (`own_table_lrs`).
        config: kinds, rates and their schedule.
        num_steps: where the schedule ends.
        members: those with rates of their own have them.
    """

    def __init__(
        self, model: DistributedModelParallel, config: OptimizerConfig, num_steps: int, members: Sequence[MemberSpec]
    ) -> None:
        self.config = config
        self.num_steps = num_steps
        own = {spec.name: spec for spec in members}
        parts: list[tuple[str, KeyedOptimizer]] = [("tables", model.fused_optimizer)]
        rest = dict(in_backward_optimizer_filter(model.named_parameters()))
        replicated = {name: rest.pop(name) for name in list(rest) if TABLE in name}
        robes = [module for module in model.modules() if isinstance(module, RobeArray)]
        arrays = {name: rest.pop(name) for name in list(rest) if any(rest[name] is robe.array for robe in robes)}

        def lr_of(name: str, rate: Literal["dense_lr", "table_lr"]) -> float:
            match = _OWNER.search(name)
            spec = own.get(match["name"]) if match else None
            lr: float | None = getattr(spec, rate, None)
            return getattr(config, rate) if lr is None else lr

        dense = _groups(rest, functools.partial(lr_of, rate="dense_lr"))
        adam = torch.optim.AdamW(dense, weight_decay=config.weight_decay, fused=True)
        parts.append(("dense", KeyedOptimizerWrapper(rest, lambda _: adam)))
        if replicated:
            kind = RowWiseAdagrad if config.tables == "rowwise_adagrad" else torch.optim.Adagrad
            groups = _groups(replicated, functools.partial(lr_of, rate="table_lr"))
            adagrad = kind(groups, eps=config.table_eps)
            parts.append(("replicated_tables", KeyedOptimizerWrapper(replicated, lambda _: adagrad)))
        if arrays:
            groups = _groups(arrays, functools.partial(lr_of, rate="table_lr"))
            elementwise = torch.optim.Adagrad(groups, eps=config.table_eps, fused=True)
            parts.append(("arrays", KeyedOptimizerWrapper(arrays, lambda _: elementwise)))
            for robe in robes:
                if dist.get_world_size() == 1 and robe.array.device.type == "cpu":
                    robe.fuse(elementwise)
        self.combined = CombinedOptimizer(parts)
        self._base_lrs = [group["lr"] for group in self.combined.param_groups]
        _make_state(parts[1][1])

    def schedule(self, step: int) -> None:
        """Set the learning rates of `step`."""
        factor = self.config.factor(step, self.num_steps)
        for base, group in zip(self._base_lrs, self.combined.param_groups, strict=True):
            group["lr"] = base * factor


def own_table_lrs(tables: nn.Module, members: Sequence[MemberSpec]) -> None:
    """Give tables of members with a rate of their own that rate; TorchRec reads it when it shards them."""
    own = {spec.name: spec.table_lr for spec in members if spec.table_lr is not None}
    for name, weight in tables.named_parameters():
        lr = own.get(name.partition(TABLE)[2].partition(TABLE_SEPARATOR)[0])
        if lr is not None:
            weight._optimizer_kwargs = [{"learning_rate": lr}]  # type: ignore[attr-defined]


def _groups(params: dict[str, nn.Parameter], lr_of: Callable[[str], float]) -> list[dict[str, Any]]:
    """A group of parameters for each learning rate."""
    by_lr: dict[float, list[nn.Parameter]] = {}
    for name, parameter in params.items():
        by_lr.setdefault(lr_of(name), []).append(parameter)
    return [{"params": group, "lr": lr} for lr, group in by_lr.items()]


def _make_state(adam: KeyedOptimizer) -> None:
    """Make the state that a fresh Adam lacks: loading a checkpoint would skip what is not there and say nothing.

    init_state() makes it by a step on zero gradients, which must neither decay a parameter nor count; `schedule` sets
    the learning rates.
    """
    for group in adam.param_groups:
        group["lr"] = 0.0
    adam.init_state()
    for state in adam.state.values():
        state["step"].zero_()
