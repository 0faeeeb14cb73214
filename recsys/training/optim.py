"""Optimizers: Adagrad on tables, Adam on the rest, and one learning-rate schedule over both."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.embeddings.sharding import TableOptimizer


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
    """

    def __init__(self, model: DistributedModelParallel, config: OptimizerConfig, num_steps: int) -> None:
        self.config = config
        self.num_steps = num_steps
        parts: list[tuple[str, KeyedOptimizer]] = [("tables", model.fused_optimizer)]
        rest = dict(in_backward_optimizer_filter(model.named_parameters()))
        replicated = {name: rest.pop(name) for name in list(rest) if ".embedding_bags." in name}
        parts.append(
            ("dense", _keyed(rest, torch.optim.AdamW, lr=config.dense_lr, weight_decay=config.weight_decay, fused=True))
        )
        if replicated:
            kind = RowWiseAdagrad if config.tables == "rowwise_adagrad" else torch.optim.Adagrad
            parts.append(("replicated_tables", _keyed(replicated, kind, lr=config.table_lr, eps=config.table_eps)))
        self.combined = CombinedOptimizer(parts)
        self._base_lrs = [
            config.dense_lr if name == "dense" else config.table_lr for name, part in parts for _ in part.param_groups
        ]

    def schedule(self, step: int) -> None:
        """Set the learning rates of `step`."""
        factor = self.config.factor(step, self.num_steps)
        for base, group in zip(self._base_lrs, self.combined.param_groups, strict=True):
            group["lr"] = base * factor


def _keyed(params: dict[str, nn.Parameter], kind: type[torch.optim.Optimizer], **options: Any) -> KeyedOptimizer:
    optimizer = KeyedOptimizerWrapper(params, lambda p: kind(p, **options))
    if kind is torch.optim.AdamW:
        # A fresh Adam has no state, and loading a checkpoint would skip it and say nothing. init_state() makes it by a
        # step on zero gradients, which must neither decay a parameter nor count; `schedule` sets the learning rate.
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.init_state()
        for state in optimizer.state.values():
            state["step"].zero_()
    return optimizer
