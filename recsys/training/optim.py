"""Optimizers of tables and of the rest, each under a schedule of its learning rate."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recsys.config import InputError
from recsys.embeddings.config import TABLE_SEPARATOR
from recsys.embeddings.robe import RobeArray
from recsys.members import MemberSpec
from recsys.sharding.native import unfused_tables
from recsys.sharding.torchrec import COUNTING, TableOptimizer, batches_of_tables
from recsys.sharding.workload import OptimizerKind
from recsys.training.dense_optim import DenseKind, dense_optimizer
from recsys.training.schedule import Decay, Schedule
from recsys.training.table_optim import TABLE, RowOptimizer

# What stands before the name of the member whose a parameter is: of its layers, and of what its embeddings have beside
# tables.
MEMBER, EMBEDDING = ".by_name.", ".by_owner."
BEFORE_OWNER = "|".join(map(re.escape, (TABLE, MEMBER, EMBEDDING)))
_OWNER = re.compile(rf"(?:{BEFORE_OWNER})(?P<name>\w+)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizers, learning rates and their schedules."""

    tables: OptimizerKind = "rowwise_adagrad"
    """Of the embedding tables; only rows that a batch looks up are updated. rowwise_adagrad keeps one accumulator a row
    (a D-th of the memory), adagrad one an element, sgd none, adam and lamb two an element, partial_rowwise_adam one an
    element and one a row."""
    table_lr: float = 0.05
    """Learning rate of the tables."""
    table_eps: float = 1e-8
    """Added to the root of the tables' squared gradients."""
    table_betas: tuple[float, float] = (0.9, 0.999)
    """Of adam, partial_rowwise_adam and lamb on tables: what a step keeps of the means of gradients and of squares."""
    dense: DenseKind = "adamw"
    """Of everything else; muon takes the matrices, and adamw what they leave. lamb needs pytorch-optimizer."""
    dense_lr: float = 1e-3
    """Learning rate of everything else."""
    weight_decay: float = 0.0
    """On everything but the tables: decoupled, but for adam, adagrad and sgd, which add it to the gradient."""
    momentum: float = 0.9
    """Of sgd and muon."""
    warmup_steps: int = 0
    """Steps over which both learning rates grow from 0."""
    decay: Decay = "constant"
    """How both learning rates fall after the warm-up: linear, cosine and polynomial to 0 after the last step, step by
    decay_gamma at each of decay_milestones."""
    decay_power: float = 2.0
    """Of polynomial: what is left of the steps, as a share, to this power."""
    decay_milestones: tuple[int, ...] = ()
    """Of step: steps at which the rates fall."""
    decay_gamma: float = 0.1
    """Of step: what they are multiplied by."""
    table_warmup_steps: int | None = None
    """The tables' own warm-up."""
    table_decay: Decay | None = None
    """How the tables' rate falls, where not as the other."""
    clip_norm: float | None = None
    """Scale the gradients of everything but the tables down to this norm, taken over all of them."""
    clip_table_values: float | None = None
    """Cut each element of the gradients of looked-up vectors, before those of one row are summed, to within this; as
    FBGEMM's gradient_clipping does. They are of the mean loss over the batch."""
    ema_decay: float | None = None
    """Keep exponential moving averages of everything but the tables, by this decay a step, and validate with them."""

    def __post_init__(self) -> None:
        if not self.table_eps > 0:
            raise ValueError(f"table_eps {self.table_eps} must be above 0: a row without gradients divides by it")
        for name in ("table_lr", "dense_lr", "weight_decay", "warmup_steps", "table_warmup_steps"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} {value} must be 0 or more")
        for name in ("clip_norm", "clip_table_values"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} must be above 0; leave it out to clip nothing")
        for name in ("momentum", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} {value} must lie in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.table_betas):
            raise ValueError(f"table_betas {self.table_betas} must lie in [0, 1)")
        _ = self.dense_schedule, self.table_schedule

    @property
    def table_optimizer(self) -> TableOptimizer:
        """The tables'."""
        return TableOptimizer(kind=self.tables, lr=self.table_lr, eps=self.table_eps, betas=self.table_betas)

    @property
    def dense_schedule(self) -> Schedule:
        """Of everything but the tables."""
        return self._schedule(self.warmup_steps, self.decay)

    @property
    def table_schedule(self) -> Schedule:
        """Of the tables."""
        warmup_steps = self.warmup_steps if self.table_warmup_steps is None else self.table_warmup_steps
        return self._schedule(warmup_steps, self.table_decay or self.decay)

    def _schedule(self, warmup_steps: int, decay: Decay) -> Schedule:
        stepped = "step" in (self.decay, self.table_decay)
        return Schedule(
            warmup_steps=warmup_steps,
            decay=decay,
            power=self.decay_power,
            # Those are for the other schedule, where only one falls by steps.
            milestones=self.decay_milestones if decay == "step" or not stepped else (),
            gamma=self.decay_gamma,
        )


class Optimizer:
    """All optimizers of a sharded model, each under its schedule.

    Its parts: `tables`, fused into their backward; `unfused_tables`, data-parallel or under the kernel dense, which are
    updated by the same formulas, so that a table is optimized alike under every plan; `dense`; and `arrays` of ROBE,
    whose elements count as rows of one, since they have no others. A job of one rank on a CPU with Adagrad updates only
    what a batch touches of an array, in the backward.

    Args:
        model: sharded; tables whose members have a rate of their own were given it before (`own_table_lrs`).
        config: kinds, rates and their schedules.
        num_steps: where the schedules end.
        members: those with rates of their own have them.

    Raises:
        InputError: a kind that arrays cannot have, or that needs a library that is not there.

    Attributes:
        combined: of all parts.
        dense: the parameters that are in no table or array, by name.
        factor: what both learning rates are multiplied by beside their schedules.
    """

    def __init__(
        self, model: DistributedModelParallel, config: OptimizerConfig, num_steps: int, members: Sequence[MemberSpec]
    ) -> None:
        self.config, self.num_steps, self.factor = config, num_steps, 1.0
        own = {spec.name: spec for spec in members}
        robes = [module for module in model.modules() if isinstance(module, RobeArray)]
        self.dense = dense_parameters(model)
        others = dict(in_backward_optimizer_filter(model.named_parameters()))
        unfused = {name: param for name, param in others.items() if TABLE in name}
        arrays = {name: param for name, param in others.items() if name not in unfused and name not in self.dense}

        def lr_of(name: str, rate: Literal["dense_lr", "table_lr"]) -> float:
            match = _OWNER.search(name)
            spec = own.get(match["name"]) if match else None
            lr: float | None = getattr(spec, rate, None)
            return getattr(config, rate) if lr is None else lr

        dense_lr, table_lr = functools.partial(lr_of, rate="dense_lr"), functools.partial(lr_of, rate="table_lr")
        parts: list[tuple[str, KeyedOptimizer]] = [("tables", model.fused_optimizer)]
        parts.append(
            (
                "dense",
                dense_optimizer(
                    config.dense, self.dense, dense_lr, weight_decay=config.weight_decay, momentum=config.momentum
                ),
            )
        )
        if unfused:
            unfused_tables = _unfused(model, unfused, config.table_optimizer, table_lr)
            if unfused_tables.params:
                parts.append(("unfused_tables", unfused_tables))
        if arrays:
            parts.append(("arrays", _arrays(arrays, robes, config.table_optimizer, table_lr)))
        self.combined = CombinedOptimizer(parts)
        self._base_lrs = [group["lr"] for group in self.combined.param_groups]
        self._schedules = [
            config.dense_schedule if name == "dense" else config.table_schedule
            for name, part in parts
            for _ in part.param_groups
        ]
        self._by_row = [part for _, part in parts if isinstance(part, RowOptimizer)]
        counts = config.tables in COUNTING
        self._fused = list(batches_of_tables(model)) if counts else []

    def schedule(self, step: int) -> None:
        """Set the learning rates of `step`, and how many updates there were before it."""
        for group, base, schedule in zip(self.combined.param_groups, self._base_lrs, self._schedules, strict=True):
            group["lr"] = base * self.factor * schedule.factor(step, self.num_steps)
            if "step" in group:  # of libraries that count in the group, which is not saved
                group["step"] = step
        for part in self._by_row:
            part.count = step
        for tables in self._fused:
            tables.iter.fill_(step)
            tables.iter_cpu.fill_(step)

    @property
    def table_state(self) -> Mapping[str, Any]:
        """State of all tables, by parameter: fused, sharded or replicated."""
        state: Mapping[str, Any] = self.combined.state_dict()["state"]
        return {key: values for key, values in state.items() if TABLE in key}


def dense_parameters(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """The parameters of a sharded model that are in no table or array, by name."""
    arrays = {id(module.array) for module in model.modules() if isinstance(module, RobeArray)}
    params = in_backward_optimizer_filter(model.named_parameters())
    return {name: param for name, param in params if TABLE not in name and id(param) not in arrays}


def _unfused(
    model: DistributedModelParallel, params: dict[str, nn.Parameter], optimizer: TableOptimizer, lr_of: Any
) -> RowOptimizer:
    """Of the tables that are data-parallel, and of what lies here of those under the kernel dense."""
    values = model.state_dict()
    sharded = {name: values[name] for name in params if isinstance(values[name], ShardedTensor)}
    here = {name: param for name, param in params.items() if name not in sharded or sharded[name].local_shards()}
    return RowOptimizer(here, optimizer, {name: lr_of(name) for name in here}, sharded, list(unfused_tables(model)))


def _arrays(
    arrays: dict[str, nn.Parameter], robes: Sequence[RobeArray], optimizer: TableOptimizer, lr_of: Any
) -> KeyedOptimizer:
    if optimizer.kind == "lamb":
        raise InputError(
            "--optimizer.tables lamb: arrays of robe have no rows to take norms of; use adam, or another --embeddings"
        )
    if optimizer.kind not in ("adagrad", "rowwise_adagrad"):
        return RowOptimizer(arrays, optimizer, {name: lr_of(name) for name in arrays})
    by_lr: dict[float, list[nn.Parameter]] = {}
    for name, array in arrays.items():
        by_lr.setdefault(lr_of(name), []).append(array)
    groups = [{"params": group, "lr": lr} for lr, group in by_lr.items()]
    adagrad = torch.optim.Adagrad(groups, eps=optimizer.eps, fused=True)
    for robe in robes:
        if dist.get_world_size() == 1 and robe.array.device.type == "cpu":
            robe.fuse(adagrad)
    return KeyedOptimizerWrapper(arrays, lambda _: adagrad)


def own_table_lrs(tables: nn.Module, members: Sequence[MemberSpec]) -> None:
    """Give tables of members with a rate of their own that rate; TorchRec reads it when it shards them."""
    own = {spec.name: spec.table_lr for spec in members if spec.table_lr is not None}
    for name, weight in tables.named_parameters():
        lr = own.get(name.partition(TABLE)[2].partition(TABLE_SEPARATOR)[0])
        if lr is not None:
            weight._optimizer_kwargs = [{"learning_rate": lr}]  # type: ignore[attr-defined]
