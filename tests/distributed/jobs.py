"""Small training jobs, in this process or on several gloo ranks, and what they leave behind."""

import dataclasses
import io
import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from recsys.backbones.dcnv2 import DCNv2Config
from recsys.backbones.rankmixer import RankMixerConfig
from recsys.backbones.wukong import WukongConfig
from recsys.cli import main
from recsys.distributed import World, mean_over_ranks, process_group
from recsys.members import BackboneConfigs, ModelConfig
from recsys.sharding.config import ShardingConfig
from recsys.training.config import LoopConfig, TrainConfig
from recsys.training.optim import OptimizerConfig
from recsys.training.trainer import Trainer

NUM_STEPS = 20


@dataclass(frozen=True)
class Outcome:
    """What a job computed, seen from rank 0."""

    losses_SM: np.ndarray
    """Mean loss over all ranks of each member at each step."""
    logits_NM: np.ndarray
    """Logits of the validation rows after the last step."""
    sharding_types: set[str]


def small_config(data: Path, **changes: Any) -> TrainConfig:
    """A config that trains in seconds; `changes` may name fields of any part of it."""
    values: dict[str, Any] = {
        "data": data,
        "out": data / "unused",
        "backbones": BackboneConfigs(
            dcnv2=DCNv2Config(num_cross_layers=2, hidden=(16,)),
            wukong=WukongConfig(num_layers=1, num_fm=4, num_linear=4, fm_rank=4, hidden=(16,)),
            rankmixer=RankMixerConfig(num_tokens=4, token_dim=16, num_layers=1, expansion=2),
        ),
    }
    parts = {"model": ModelConfig, "optimizer": OptimizerConfig, "train": LoopConfig, "sharding": ShardingConfig}
    if "sharding" in changes:
        changes["types"] = (changes.pop("sharding"),)
    defaults: dict[str, dict[str, Any]] = {
        "model": {"embedding_dim": 8, "dense_hidden": (8,), "init_scale": 0.1},
        "optimizer": {"table_lr": 0.1, "dense_lr": 0.01},
        "train": {"batch_size": 128, "num_steps": NUM_STEPS},
        "sharding": {"types": ("table_wise",)},
    }
    for name, kind in parts.items():
        own = {field.name for field in dataclasses.fields(kind)}
        mine = {key: changes.pop(key) for key in list(changes) if key in own and key != "tables"}
        values[name] = kind(**{**defaults[name], **mine})
    if "table_optimizer" in changes:
        values["optimizer"] = dataclasses.replace(values["optimizer"], tables=changes.pop("table_optimizer"))
    return TrainConfig(**{**values, **changes})


def train(config: TrainConfig, world: World) -> Outcome | None:
    """Train without a run folder; rank 0 gets the outcome."""
    trainer = Trainer(config, world)
    batches = islice(trainer.loader.stream(), trainer.num_steps)
    losses = [mean_over_ranks(trainer.train_step(batches).losses_M) for _ in range(trainer.num_steps)]
    predictions = trainer.predict(trainer.valid_loader)
    if predictions is None:
        return None
    types = {table.sharding_type for table in trainer.plan.tables.values()}
    return Outcome(torch.stack(losses).numpy(), predictions.logits_NM, types)


def train_here(configs: Sequence[TrainConfig]) -> list[Outcome]:
    """Train one config after another in this process, a job of one rank."""
    with process_group() as world:
        torch.set_num_threads(1)
        outcomes = [train(config, world) for config in configs]
    return [outcome for outcome in outcomes if outcome is not None]


def train_on_ranks(
    world_size: int, configs: Sequence[TrainConfig], folder: Path, *, ranks_per_node: int | None = None
) -> list[Outcome]:
    """Train one config after another on `world_size` gloo ranks, in nodes of `ranks_per_node`, or one node."""
    on_ranks(world_size, _train_all, list(configs), folder / "outcomes.pt", ranks_per_node=ranks_per_node)
    return torch.load(folder / "outcomes.pt", weights_only=False)


def _train_all(world: World, configs: list[TrainConfig], path: Path) -> None:
    outcomes = [train(config, world) for config in configs]
    if world.is_first:
        torch.save(outcomes, path)


def on_ranks(world_size: int, work: Callable[..., None], *arguments: Any, ranks_per_node: int | None = None) -> None:
    """Call `work(world, *arguments)` on gloo ranks, each a process of its own; `work` is a module's function.

    Nodes of `ranks_per_node` are simulated: this machine plays all of them.
    """
    local_size = ranks_per_node or world_size
    mp.start_processes(
        _rank, args=(world_size, local_size, free_port(), work, arguments), nprocs=world_size, start_method="spawn"
    )


def _rank(
    rank: int, world_size: int, local_size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    _launched(rank, world_size, local_size, port)
    with process_group() as world:
        work(world, *arguments)


def _launched(rank: int, world_size: int, local_size: int, port: int) -> None:
    """Set what torchrun would."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank % local_size,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")


def cli_on_ranks(world_size: int, commands: Sequence[Sequence[str]], folder: Path) -> list[list[tuple[int, str]]]:
    """Run `recsys` on gloo ranks, one command after another; for each, exit status and stderr of every rank."""
    ports = [free_port() for _ in commands]
    mp.start_processes(_cli, args=(world_size, ports, commands, folder), nprocs=world_size, start_method="spawn")
    by_rank = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(world_size)]
    return [[(status, told) for status, told in command] for command in zip(*by_rank, strict=True)]


def _cli(rank: int, world_size: int, ports: list[int], commands: Sequence[Sequence[str]], folder: Path) -> None:
    found = []
    for port, command in zip(ports, commands, strict=True):
        _launched(rank, world_size, world_size, port)
        with redirect_stderr(io.StringIO()) as told:
            status = main(command)
        found.append((status, told.getvalue()))
    (folder / f"told-{rank}.json").write_text(json.dumps(found))


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
