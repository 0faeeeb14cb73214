"""Whole steps under plans of our search and of TorchRec's planner, measured in turn on the same ranks."""

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, ParameterConstraints, TopologyFactory, TrainerConfig
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recsys.distributed import World
from recsys.progress import progress
from recsys.sharding.cluster import GIB, Cluster, Hardware
from recsys.sharding.constraints import allowed
from recsys.sharding.cost import CostModel
from recsys.sharding.plan import Plan
from recsys.sharding.proposers import plan_of
from recsys.sharding.quote import RESERVE, quote
from recsys.sharding.search import Search
from recsys.sharding.torchrec import TableSharder
from recsys.sharding.workload import TableSpec, Workload
from recsys.studies.shard_cases import Case, Layout, cluster, with_dense
from recsys.studies.shard_config import ShardBenchConfig
from recsys.studies.shard_measure import Bench

WARM_UP = 2
BATCH = 4096
"""Rows of a global batch."""

# Sizes, widths and ids a row as they are mixed in click logs: few large tables, many small ones, some lists of ids.
LIKE_A_LOG = tuple(
    (rows, dim, pooling)
    for rows, dim, pooling in (
        (200_000, 64, 1), (150_000, 64, 1), (100_000, 64, 10), (50_000, 64, 1), (20_000, 64, 5), (10_000, 64, 1),
        (5_000, 64, 1), (2_000, 64, 20), (1_000, 64, 1), (500, 64, 1), (100, 64, 1), (50, 64, 3),
    )
)  # fmt: skip
ONE_HEAVY = ((200_000, 128, 20), (10_000, 16, 1), (5_000, 16, 1), (1_000, 16, 1))
WORKLOADS = {"tables like a click log's": LIKE_A_LOG, "one heavy table": ONE_HEAVY}


def compare(
    config: ShardBenchConfig, hardware: Hardware, layouts: Sequence[Layout], run: Callable[..., Any], simulated: bool
) -> list[dict[str, Any]]:
    """Measure steps of each workload under each maker's plan, on every layout of one node.

    Args:
        config: of the sweep.
        hardware: the fitted profile.
        layouts: ranks.
        run: calls `work(world, *arguments)` on them.
        simulated: whether several nodes are of one machine; these are left out.
    """
    found = []
    for layout in layouts:
        if (simulated and layout.nodes > 1) or layout.ranks == 1:
            continue
        ran = cluster(hardware, layout, simulated)
        for name, sizes in WORKLOADS.items():
            tables = tuple(
                TableSpec(name=f"t{index}", rows=rows, dim=dim, pooling=pooling)
                for index, (rows, dim, pooling) in enumerate(sizes)
            )
            workload = with_dense(tables, BATCH, "rowwise_adagrad")
            plans = _plans(workload, ran, layout)
            steps = run(layout, _measure, workload, plans, config)
            model = CostModel(workload, ran)
            found.append(
                {
                    "workload": name,
                    "ranks": layout.ranks,
                    "plans": {
                        maker: {
                            "measured": statistics.median(steps[maker]),
                            "steps": steps[maker],
                            "predicted": quote(plan, model).step_seconds,
                            "types": dict(Counter(table.sharding_type for table in plan.tables.values())),
                            "plan": plan.dumps(),
                        }
                        for maker, plan in plans.items()
                    },
                }
            )
    return found


def _plans(workload: Workload, ran: Cluster, layout: Layout) -> dict[str, Plan]:
    """Maker to plan; TorchRec's own planner is asked twice: as it is, and with the types that our search has."""
    model = CostModel(workload, ran)
    rules = allowed(workload, ran.hardware, (), ("fused",), ())

    def uniform(sharding_type: str) -> Plan:
        return Case(sharding_type, workload.batch_size, 1, 1, len(workload.tables), layout).plan(workload)

    return {
        "search": Search(model, rules, RESERVE).best(),
        "torchrec": _by_torchrec(workload, ran, None),
        "torchrec, types of search": _by_torchrec(workload, ran, rules[0].types),
        "table_wise": uniform("table_wise"),
        "row_wise": uniform("row_wise"),
    }


def _by_torchrec(workload: Workload, ran: Cluster, types: Sequence[str] | None) -> Plan:
    """What TorchRec's planner chooses by its own prices, told tables, ids a row and ranks, and all else left alone."""
    hardware = ran.hardware
    topology = TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=ran.world_size,
            local_world_size=ran.ranks_per_node,
            **{"ddr_cap_bytes" if hardware.device == "cpu" else "hbm_cap_bytes": int(hardware.memory_gib * GIB)},
        ),
        kernel_config=KernelConfig(compute_device=hardware.device),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=workload.batch_size // ran.world_size,
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVE),
        constraints={
            table.name: ParameterConstraints(
                pooling_factors=[table.pooling], sharding_types=list(types) if types else None
            )
            for table in workload.tables
        },
    )
    with torch.device("meta"):
        module = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=table.name, feature_names=[table.name], num_embeddings=table.rows, embedding_dim=table.dim
                )
                for table in workload.tables
            ]
        )
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # it warns of every data-parallel table
    try:
        words = planner.plan(module, [TableSharder() if types else EmbeddingBagCollectionSharder()])
    finally:
        logging.disable(before)
    return plan_of(words.get_plan_for_module(""), workload, ran)


def _measure(
    world: World, workload: Workload, plans: Mapping[str, Plan], config: ShardBenchConfig
) -> dict[str, list[float]]:
    """Seconds of steps under each plan, the slowest rank's; plans take turns, in another order each time."""
    benches = {maker: Bench(workload, plan, world) for maker, plan in plans.items()}
    found: dict[str, list[float]] = {maker: [] for maker in plans}
    chance = np.random.default_rng(config.seed)
    what = f"plans on {world.size} ranks"
    with progress(what, total=config.repeats, unit="turns", show=world.is_first) as advance:
        for turn in range(-WARM_UP, config.repeats):
            for maker in chance.permutation(list(plans)):
                bench = benches[str(maker)]
                ids = bench.batch()
                seconds = torch.tensor([bench.whole_step(ids)])
                dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
                if turn >= 0:
                    found[str(maker)].append(seconds.item())
            advance(turn >= 0)
    return found
