"""A run's task, sharded over the ranks of a job, and the loaders that go with it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys.data.loader import Loader
from recsys.data.schema import Schema
from recsys.distributed import World, on_every
from recsys.embeddings.sharding import TableSharder, allowed_types, describe_plan, make_plan
from recsys.members import MemberSpec
from recsys.model import RecModel
from recsys.tasks.click import ClickTask
from recsys.training.config import TrainConfig
from recsys.training.optim import own_table_lrs


class Sharded(NamedTuple):
    """A task whose tables lie on the ranks that the plan says, without values yet."""

    task: DistributedModelParallel
    model: RecModel
    plan: dict[str, dict[str, Any]]


def shard(
    config: TrainConfig, schema: Schema, members: Sequence[MemberSpec], local_batch_size: int, world: World
) -> Sharded:
    """Build the task of some or all members of a run, and shard it.

    Raises:
        InputError: a width that cannot work, or no plan that fits.
    """
    torch.manual_seed(config.seed)
    optimizer = config.optimizer.table_optimizer
    model = RecModel(schema, members)
    model.choose(local_batch_size, world.device)
    own_table_lrs(model.embedding, members)
    sharder = TableSharder(fused_params=optimizer.fused_params)
    task = ClickTask(model, config.loss)
    plan = make_plan(
        task,
        sharder,
        allowed=allowed_types(config.train.sharding, optimizer, world.device),
        local_batch_size=local_batch_size,
        device=world.device,
        local_world_size=world.local_size,
    )
    # On one rank there are no gradients to average, and members lie on the device already (`choose`).
    sharded = DistributedModelParallel(
        task, device=world.device, plan=plan, sharders=[sharder], init_data_parallel=world.size > 1
    )
    return Sharded(sharded, model, describe_plan(plan))


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
