"""A run's task, sharded over the ranks of a job, and the loaders that go with it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection

from recsys.data.loader import Loader
from recsys.data.schema import Schema
from recsys.distributed import World, on_every, on_first
from recsys.embeddings.dynamic_rows import check_caches
from recsys.embeddings.precision import check_precision, check_replicated, fused_params
from recsys.members import MemberSpec
from recsys.model import RecModel
from recsys.sharding.here import cluster_here
from recsys.sharding.make import cost_model, make_plan
from recsys.sharding.native import use_native
from recsys.sharding.plan import Plan
from recsys.sharding.torchrec import TableSharder, check_device, check_kernels, comm_codecs, mend_empty, sharding_plan
from recsys.sharding.workload import Workload
from recsys.tasks.click import ClickTask
from recsys.training.config import TrainConfig
from recsys.training.optim import own_table_lrs
from recsys.training.workload import workload


class Sharded(NamedTuple):
    """A task whose tables lie on the ranks that the plan says, without values yet."""

    task: DistributedModelParallel
    model: RecModel
    plan: Plan


def shard(
    config: TrainConfig, schema: Schema, members: Sequence[MemberSpec], local_batch_size: int, world: World
) -> Sharded:
    """Build the task of some or all members of a run, and shard it.

    Raises:
        InputError: a width that cannot work, or no plan that fits.
    """
    torch.manual_seed(config.seed)
    optimizer = config.optimizer.table_optimizer
    embeddings = [spec.model for spec in members]
    check_precision(embeddings, world.device)
    model = RecModel(schema, members)
    model.choose(local_batch_size, world.device)
    own_table_lrs(model.embedding, members)
    plan = on_first(lambda: _plan(config, workload(config, schema, model), world))
    check_replicated({name: table.sharding_type for name, table in plan.tables.items()}, model.embedding.owners)
    check_caches({name: table.kernel for name, table in plan.tables.items()}, model.embedding.owners)
    fused = fused_params(optimizer.fused_params, embeddings, world.device)
    if config.train.pipeline == "prefetch":
        fused["prefetch_pipeline"] = True
    sharder = TableSharder(
        fused_params=fused,
        qcomm_codecs_registry=comm_codecs(config.sharding, world.device),
    )
    task = _distribute(ClickTask(model, config.loss), plan, sharder, world)
    if plan.replicas == 1:
        use_native(task, _fields_dtype(config, model, plan, world), optimizer.kind)
    return Sharded(task, model, plan)


def _plan(config: TrainConfig, work: Workload, world: World) -> Plan:
    check_device(config.sharding, world.device)
    cluster = cluster_here(config.sharding.hardware, world.device, world.size, world.local_size)
    return check_kernels(make_plan(cost_model(work, cluster, config.sharding), config.sharding), world.device)


def _distribute(task: ClickTask, plan: Plan, sharder: TableSharder, world: World) -> DistributedModelParallel:
    words = sharding_plan(plan, task, world.device)
    if plan.replicas > 1:
        return DMPCollection(
            task,
            device=world.device,
            plan=words,
            world_size=world.size,
            sharding_group_size=plan.world_size,
            global_pg=dist.GroupMember.WORLD,
            node_group_size=plan.ranks_per_node,
            sharders=[sharder],
            use_inter_host_allreduce=world.size > world.local_size,
        )
    # On one rank there are no gradients to average, and members lie on the device already (`choose`).
    sharded = DistributedModelParallel(
        task, device=world.device, plan=words, sharders=[sharder], init_data_parallel=world.size > 1
    )
    mend_empty(sharded)
    return sharded


def _fields_dtype(config: TrainConfig, model: RecModel, plan: Plan, world: World) -> torch.dtype:
    """What tables give: bf16 where members cast to it at once: two casts less, half the bytes between ranks, same bits.

    So nothing may be computed before that cast: no partial sums of rows that several ranks have, no other kinds of
    embeddings, no cut gradients, and no division of gradients by ranks that rounds.
    """
    whole = {table.sharding_type for table in plan.tables.values()} <= {"table_wise", "column_wise"}
    as_it_is = config.sharding.comms == config.sharding.gradient_comms == "fp32"
    exact = world.size == 1 or (whole and as_it_is and world.size.bit_count() == 1)
    plain = all(owner.config.embeddings == "tables" for owner in model.embedding.owners.values())
    cut = config.optimizer.clip_table_values is not None
    return torch.bfloat16 if model.members.precision == "bf16" and exact and plain and not cut else torch.float32


def held_out(config: TrainConfig, split: str, world: World) -> Loader:
    """Every row of a split once; ranks hold one stretch of it each, so that all of them in turn give its order."""
    return on_every(lambda: loader(config, split, world))


def loader(config: TrainConfig, split: str, world: World) -> Loader:
    """Make the loader of this rank's part of a split: training rows are shuffled, the others keep their order."""
    return Loader(
        config.data,
        split,
        batch_size=config.train.batch_size,
        rank=world.rank,
        world_size=world.size,
        config=config.loader,
        shuffle=split == "train",
        tail="drop" if split == "train" else "pad",
    )
