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

# What "auto" lets the planner choose from. Not data_parallel: its tables have dense gradients, which cost 3 to 4 times
# the step on a CPU, and are updated by another optimizer.
AUTO = ["table_wise", "column_wise", "row_wise"]
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
    """Row-wise Adagrad, fused into the backward pass of the tables."""

    lr: float
    eps: float = 1e-8


class TableSharder(EmbeddingBagCollectionSharder):
    """Offers every sharding type on every device; TorchRec hides the row-wise ones on a CPU, where they work."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All types."""
        return ALL_TYPES


def table_sharder(optimizer: TableOptimizer) -> TableSharder:
    """Build the sharder whose tables are updated in backward by `optimizer`."""
    return TableSharder(
        fused_params={
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": optimizer.lr,
            "eps": optimizer.eps,
        }
    )


def make_plan(
    module: nn.Module,
    sharder: TableSharder,
    *,
    sharding: ShardingType,
    local_batch_size: int,
    device: torch.device,
    local_world_size: int,
) -> ShardingPlan:
    """Plan all tables under `module` on rank 0 and give the same plan to all ranks.

    Raises:
        InputError: on every rank, when no plan satisfies the constraints.
    """
    allowed = AUTO if sharding == "auto" else [sharding]
    constraints = {
        config.name: ParameterConstraints(
            sharding_types=allowed,
            min_partition=max(MIN_COLUMNS, config.embedding_dim // dist.get_world_size() // 4 * 4),
            pooling_factors=[1.0],
        )
        for part in module.modules()
        if isinstance(part, EmbeddingBagCollection)
        for config in part.embedding_bag_configs()
    }
    topology = TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=dist.get_world_size(), local_world_size=local_world_size),
        kernel_config=KernelConfig(compute_device=device.type),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=local_batch_size,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        constraints=constraints,
    )

    def plan() -> ShardingPlan:
        try:
            return planner.plan(module, [sharder])
        except PlannerError as error:
            why = " ".join(str(error).split())[:400]
            raise InputError(f"no sharding plan with --train.sharding {sharding}: {why}") from None

    return on_first(plan)


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
