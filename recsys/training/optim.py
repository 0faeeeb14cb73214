"""Optimizers: Adagrad on tables, Adam on the rest, and one learning-rate schedule over both."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.embeddings.tables import TABLE_SEPARATOR
from recsys.members import MemberSpec
from recsys.sharding.torchrec import TableOptimizer

# What stands before a table's and a member's name in the name of a parameter.
TABLE, MEMBER = "embedding_bags.", ".by_name."


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
    table is optimized alike under every plan.

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

        def dense_lr(name: str) -> float:
            spec = own.get(name.partition(MEMBER)[2].partition(".")[0])
            return config.dense_lr if spec is None or spec.dense_lr is None else spec.dense_lr

        def table_lr(name: str) -> float:
            spec = own.get(name.partition(TABLE)[2].partition(TABLE_SEPARATOR)[0])
            return config.table_lr if spec is None or spec.table_lr is None else spec.table_lr

        parts.append(("dense", _keyed(rest, dense_lr, torch.optim.AdamW, weight_decay=config.weight_decay, fused=True)))
        if replicated:
            kind = RowWiseAdagrad if config.tables == "rowwise_adagrad" else torch.optim.Adagrad
            parts.append(("replicated_tables", _keyed(replicated, table_lr, kind, eps=config.table_eps)))
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


def _keyed(
    params: dict[str, nn.Parameter],
    lr_of: Callable[[str], float],
    kind: type[torch.optim.Optimizer],
    **options: Any,
) -> KeyedOptimizer:
    """One optimizer, with a group of parameters for each learning rate."""
    by_lr: dict[float, list[nn.Parameter]] = {}
    for name, parameter in params.items():
        by_lr.setdefault(lr_of(name), []).append(parameter)
    groups = [{"params": group, "lr": lr} for lr, group in by_lr.items()]
    return KeyedOptimizerWrapper(params, lambda _: kind(groups, **options))


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
