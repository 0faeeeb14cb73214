"""TorchRec's own proposers, with our prices: to compare with our search, or to plan as TorchRec would."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner
from torchrec.distributed.planner.proposers import (
    DynamicProgrammingProposer,
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    Perf,
    PerfModel,
    PlannerError,
    Proposer,
    ShardEstimator,
    ShardingOption,
    Storage,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recsys.config import InputError
from recsys.sharding.cluster import PHASES, Cluster
from recsys.sharding.constraints import Allowed
from recsys.sharding.cost import CostModel, Tables
from recsys.sharding.patience import COLUMN_PARTS, bins_a_rank, check_patience
from recsys.sharding.plan import KERNELS, TYPES, Plan, TablePlan
from recsys.sharding.tiling import MIN_COLUMNS, Shard
from recsys.sharding.torchrec import TableSharder
from recsys.sharding.workload import Workload


def propose(model: CostModel, rules: Sequence[Allowed], reserve: float, proposer: str, minutes: float = 10.0) -> Plan:
    """Plan as one of TorchRec's proposers would, on a cluster that exists on paper alone.

    Args:
        model: prices shards, and rates plans.
        rules: what each table may have, in the workload's order.
        reserve: share of device memory that stays free.
        proposer: greedy, uniform, grid_search, dynamic_programming or memory_balanced.
        minutes: that it may take, by estimate.

    Raises:
        InputError: it would take longer, or finds no plan that fits.
    """
    if any("dense" in rule.kernels for rule in rules):
        raise InputError(
            f"--sharding.proposer {proposer}: TorchRec plans the kernel dense, which {model.workload.optimizer} takes "
            "here, for data_parallel tables alone; use --sharding.proposer search"
        )
    check_patience(model, rules, proposer, minutes)
    with _quiet(), torch.device("meta"):
        planner = _planner(model, rules, reserve, proposer)
        module = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=table.name, feature_names=[table.name], num_embeddings=table.rows, embedding_dim=table.dim
                )
                for table in model.workload.tables
            ]
        )
        try:
            words = planner.plan(module, [_AnyKernel()]).get_plan_for_module("")
        except PlannerError:
            raise InputError(
                f"nothing fits: none of the plans that TorchRec's {proposer} proposed has room on "
                f"{model.cluster.name}; use --sharding.proposer search, or allow more --sharding.types or "
                "--sharding.kernels"
            ) from None
    assert words is not None, "the collection is the whole module"
    plan = plan_of(words, model.workload, model.group, model.replicas)
    plan.check(f"TorchRec's {proposer}")
    return plan


def plan_of(words: Mapping[str, ParameterSharding], workload: Workload, group: Cluster, replicas: int = 1) -> Plan:
    """What TorchRec planned for the tables of a workload on a group of ranks, in our words."""
    return Plan(
        tables={table.name: _table_plan(words[table.name]) for table in workload.tables},
        shapes={table.name: (table.rows, table.dim) for table in workload.tables},
        world_size=group.world_size,
        ranks_per_node=group.ranks_per_node,
        replicas=replicas,
    )


def _table_plan(words: ParameterSharding) -> TablePlan:
    if words.sharding_spec is None:
        return TablePlan(words.sharding_type, words.compute_kernel, ())
    return TablePlan(
        words.sharding_type,
        words.compute_kernel,
        tuple(
            Shard(int(rank), *map(int, shard.shard_offsets), *map(int, shard.shard_sizes))
            for rank, shard in zip(words.ranks, words.sharding_spec.shards, strict=True)
        ),
    )


def _planner(model: CostModel, rules: Sequence[Allowed], reserve: float, proposer: str) -> EmbeddingShardingPlanner:
    world = model.group.world_size
    room = model.capacity(reserve) - model.every_rank().bytes.sum(axis=1)[0]
    device, host, ssd = (math.floor(max(size, 0)) for size in room)
    # A CPU's memory is told as a device's too, since proposers look at nothing else.
    topology = TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=world,
            local_world_size=model.group.ranks_per_node,
            hbm_cap_bytes=device,
            ddr_cap_bytes=host,
            ssd_cap_bytes=ssd,
        ),
        kernel_config=KernelConfig(compute_device="cuda"),
    )
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=list(rule.types),
            compute_kernels=[*rule.kernels, "dense"],
            min_partition=max(MIN_COLUMNS, table.dim // COLUMN_PARTS),
        )
        for table, rule in zip(model.workload.tables, rules, strict=True)
    }
    prices = _Prices(model)
    batch_size = max(1, model.workload.batch_size // model.cluster.world_size)
    makers: Mapping[str, Callable[[], Proposer]] = {
        "greedy": GreedyProposer,
        "memory_balanced": GreedyProposer,
        "uniform": UniformProposer,
        "grid_search": GridSearchProposer,
        "dynamic_programming": lambda: DynamicProgrammingProposer(bins_a_rank(world)),
    }
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=_InOrder(topology, batch_size, constraints, prices),
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        proposer=makers[proposer](),
        partitioner=MemoryBalancedPartitioner() if proposer == "memory_balanced" else GreedyPerfPartitioner(),
        performance_model=_Rating(prices),
        stats=[],
        constraints=constraints,
        debug=False,
    )


class _AnyKernel(TableSharder):
    """Offers every kernel: that of data-parallel tables, and those of the others."""

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["dense"] if sharding_type == "data_parallel" else [name for name in KERNELS if name != "dense"]


class _InOrder(EmbeddingEnumerator):
    """Gives options in an order that does not depend on how Python hashes words in this process."""

    def enumerate(self, module: nn.Module, sharders: list) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        table = {name: index for index, name in enumerate(dict.fromkeys(option.name for option in options))}
        options.sort(
            key=lambda option: (
                table[option.name],
                TYPES.index(option.sharding_type),
                KERNELS.index(option.compute_kernel),
            )
        )
        return options


@dataclass(eq=False)
class _ShardPerf(Perf):
    """What a shard takes, in milliseconds, and where its seconds by phase stand."""

    at: int = 0


class _Prices(ShardEstimator):
    """Prices shards by our model.

    Attributes:
        rest, node, network: seconds by phase [shards, phases], see `Cost`.
    """

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self.tables = {table.name: table for table in model.workload.tables}
        self.rest, self.node, self.network = (np.zeros((0, len(PHASES))) for _ in range(3))

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: object = None) -> None:
        groups: dict[tuple[str, str], list[ShardingOption]] = {}
        for option in sharding_options:
            groups.setdefault((option.sharding_type, option.compute_kernel), []).append(option)
        for (sharding_type, kernel), options in groups.items():
            shards = [shard for option in options for shard in option.shards]
            tables = Tables.of([self.tables[option.name] for option in options])
            of = np.repeat(np.arange(len(options)), [option.num_shards for option in options])
            rows, columns = np.array([shard.size for shard in shards], dtype=np.float64).T
            cost = self.model.shards(sharding_type, kernel, tables[of], rows, columns)
            at = len(self.rest)
            for name in ("rest", "node", "network"):
                setattr(self, name, np.concatenate([getattr(self, name), getattr(cost, name)]))
            milliseconds, held = (cost.seconds * 1e3).tolist(), np.ceil(cost.bytes.sum(axis=1)).astype(int).tolist()
            for index, shard in enumerate(shards):
                phases = dict(zip(PHASES, milliseconds[index], strict=True))
                shard.perf = _ShardPerf(
                    fwd_compute=phases["lookup"],
                    fwd_comms=phases["input_dist"] + phases["output_dist"],
                    bwd_compute=phases["update"],
                    bwd_comms=phases["gradient_dist"] + phases["all_reduce"],
                    at=at + index,
                )
                shard.storage = Storage(*held[index])


class _Rating(PerfModel):
    """Rates a plan by the milliseconds of a step, as a quote does."""

    def __init__(self, prices: _Prices) -> None:
        self.prices = prices
        self.every = prices.model.every_rank()

    def rate(self, plan: list[ShardingOption]) -> float:
        prices, every = self.prices, self.every
        shards = [shard for option in plan for shard in option.shards]
        ranks, at = np.array([shard.rank for shard in shards]), np.array([shard.perf.at for shard in shards])
        rest, node, network = (np.zeros((prices.model.group.world_size, len(PHASES))) for _ in range(3))
        for total, part in ((rest, prices.rest), (node, prices.node), (network, prices.network)):
            np.add.at(total, ranks, part[at])
        calls = prices.model.calls({option.sharding_type for option in plan})
        links = np.maximum(node + every.node, network + every.network)
        seconds = prices.model.group.shared(rest + every.rest + calls + links)
        return float(seconds.max(axis=0).sum() * 1e3)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep TorchRec's log to itself: it warns of every data-parallel table, and so sets up the root logger."""
    root, handler, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)
