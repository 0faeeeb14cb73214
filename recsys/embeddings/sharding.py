"""Sharding: where each table lives, as a plan that is made on rank 0 and shared."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, PlannerError, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recsys.config import InputError
from recsys.distributed import on_first

ShardingType = Literal["auto", "table_wise", "column_wise", "row_wise", "table_row_wise", "data_parallel"]

ALL_TYPES = [
    "data_parallel",
    "table_wise",
    "column_wise",
    "table_column_wise",
    "row_wise",
    "table_row_wise",
    "grid_shard",
]
MIN_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class TableOptimizer:
    """Adagrad that is fused into the backward pass of the tables, with one accumulator a row or one an element."""

    kind: Literal["rowwise_adagrad", "adagrad"]
    lr: float
    eps: float

    @property
    def fused_params(self) -> dict[str, Any]:
        """FBGEMM's words for it."""
        kinds = {"rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "adagrad": EmbOptimType.EXACT_ADAGRAD}
        return {"optimizer": kinds[self.kind], "learning_rate": self.lr, "eps": self.eps}


class TableSharder(EmbeddingBagCollectionSharder):
    """Offers every sharding type on every device; TorchRec hides the row-wise ones on a CPU, where they work."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All types."""
        return ALL_TYPES


def allowed_types(sharding: ShardingType, optimizer: TableOptimizer, device: torch.device) -> list[list[str]]:
    """What the planner may choose from: sets of sharding types, to be tried in turn until one gives a plan.

    Never column-wise under row-wise Adagrad: each column shard would keep an accumulator of its own, so what a model
    learns would depend on the plan. "auto" leaves out data_parallel, whose dense gradients cost 3 to 4 times the step
    on a CPU. There it prefers table-wise, the fastest by measurement; the planner's ratings are those of GPUs.

    Raises:
        InputError: column-wise sharding was asked for with row-wise Adagrad.
    """
    if sharding == "column_wise" and optimizer.kind == "rowwise_adagrad":
        raise InputError(
            "--train.sharding column_wise would give each column shard an accumulator of its own under row-wise "
            "Adagrad, so the result would depend on the plan; use --optimizer.tables adagrad, or another sharding"
        )
    if sharding != "auto":
        return [[sharding]]
    if device.type == "cpu":
        return [["table_wise"], ["table_wise", "row_wise"]]
    return [["table_wise", "row_wise", *(["column_wise"] if optimizer.kind == "adagrad" else [])]]


def make_plan(
    module: nn.Module,
    sharder: TableSharder,
    *,
    allowed: list[list[str]],
    local_batch_size: int,
    device: torch.device,
    local_world_size: int,
) -> ShardingPlan:
    """Plan all tables under `module` on rank 0 and give the same plan to all ranks.

    Raises:
        InputError: on every rank, when no plan fits.
    """
    topology = TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=dist.get_world_size(), local_world_size=local_world_size),
        kernel_config=KernelConfig(compute_device=device.type),
    )
    tables = [
        config
        for part in module.modules()
        if isinstance(part, EmbeddingBagCollection)
        for config in part.embedding_bag_configs()
    ]

    def plan() -> ShardingPlan:
        why = ""
        for types in allowed:
            planner = EmbeddingShardingPlanner(
                topology=topology,
                batch_size=local_batch_size,
                storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
                constraints={table.name: _constraints(table.embedding_dim, types) for table in tables},
            )
            try:
                return planner.plan(module, [sharder])
            except PlannerError as error:
                why = " ".join(str(error).split())[:400]
        raise InputError(f"no sharding plan among {', '.join(allowed[-1])}: {why}")

    return on_first(plan)


def _constraints(dim: int, types: list[str]) -> ParameterConstraints:
    # Without min_partition, tables of up to 128 columns are not split by column at all.
    columns = max(MIN_COLUMNS, dim // dist.get_world_size() // MIN_COLUMNS * MIN_COLUMNS)
    return ParameterConstraints(sharding_types=types, min_partition=columns, pooling_factors=[1.0])


def describe_plan(plan: ShardingPlan) -> dict[str, dict[str, Any]]:
    """A plan as plain values: table to sharding type, kernel and ranks."""
    return {
        table: {
            "sharding_type": parameter.sharding_type,
            "compute_kernel": parameter.compute_kernel,
            "ranks": list(parameter.ranks or []),
        }
        for module_plan in plan.plan.values()
        for table, parameter in module_plan.items()
    }
