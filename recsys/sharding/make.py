"""Make a plan: read it, or look for one within what is allowed."""

from collections.abc import Callable
from typing import Any

from recsys.config import InputError
from recsys.sharding.cluster import Cluster
from recsys.sharding.config import ShardingConfig
from recsys.sharding.constraints import allowed, check_possible
from recsys.sharding.cost import CostModel
from recsys.sharding.plan import Plan
from recsys.sharding.search import Search
from recsys.sharding.workload import ELEMENT_BYTES, Workload


def cost_model(workload: Workload, cluster: Cluster, config: ShardingConfig) -> CostModel:
    """What prices shards under these settings.

    Raises:
        InputError: the ranks cannot be divided into that many replicas.
    """
    return CostModel(
        workload,
        cluster,
        replicas=config.replicas,
        comm_bytes=(ELEMENT_BYTES[config.comms], ELEMENT_BYTES[config.gradient_comms]),
        sync_every=config.sync_every,
    )


def make_plan(model: CostModel, config: ShardingConfig, advance: Callable[..., Any] = lambda *_: None) -> Plan:
    """Read the plan that the config names, or find the best.

    Args:
        model: prices shards.
        config: bounds.
        advance: told of progress, from 0 to 1 in all.

    Raises:
        InputError: bounds that cannot be, a plan of other tables or ranks, or nothing that fits.
    """
    workload, cluster = model.workload, model.cluster
    if not workload.tables:  # all embeddings are of kinds that every rank holds whole
        return Plan({}, {}, model.group.world_size, model.group.ranks_per_node, config.replicas)
    if config.plan is not None:
        plan = Plan.load(config.plan)
        plan.check_fits(workload.tables, str(config.plan))
        plan.check_world(cluster.world_size, cluster.ranks_per_node, str(config.plan))
        if plan.replicas != config.replicas:
            raise InputError(
                f"{config.plan}: planned for {plan.replicas} replicas, --sharding.replicas is {config.replicas}"
            )
        for name, table in plan.tables.items():
            where = f"{config.plan}: table {name}"
            check_possible([table.sharding_type], [table.kernel], workload.optimizer, cluster.hardware, where)
        return plan
    rules = allowed(workload, cluster.hardware, config.types, config.kernels, config.constraints)
    if config.proposer == "search":
        return Search(model, rules, config.reserve).best(advance)
    # TorchRec takes seconds to import, and few need its proposers.
    from recsys.sharding.proposers import propose  # noqa: PLC0415

    return propose(model, rules, config.reserve, config.proposer, config.proposer_minutes)
