"""What saving a checkpoint costs a training job: seconds that the loop waits, and steps that are slower meanwhile.

Trains without saving, then while checkpoints are written from a copy, then while the loop waits for each; in turns, so
that a busy machine is as busy for all of them.

    python benchmarks/checkpoint.py --data data/criteo_kaggle --embedding-dim 256
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from facts import facts
from recsys.data.batch import Batch
from recsys.distributed import World, process_group
from recsys.recipes import find_recipe
from recsys.training.checkpoint.chunks import in_chunks
from recsys.training.checkpoint.config import CheckpointConfig
from recsys.training.checkpoint.saver import Saver
from recsys.training.checkpoint.staging import Stager, local_bytes
from recsys.training.trainer import Trainer

Kind = Literal["async", "sync"]


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmark:
    """What is trained and saved."""

    data: Path
    """Prepared folder."""
    recipe: str = "criteo_kaggle"
    members: tuple[str, ...] = ("fnn",)
    embedding_dim: int = 64
    """Makes the tables, and so the checkpoint, large or small."""
    batch_size: int = 1024
    quiet_steps: int = 30
    """Steps between two saves."""
    turns: int = 5
    json: Path | None = None
    """Also write the result to this file."""


@dataclass(frozen=True)
class Cost:
    """Of checkpoints of one kind; medians over the turns."""

    megabytes: float
    """Of this rank's part."""
    step_ms: float
    """Of a step while nothing is saved."""
    call_ms: float
    """How long the loop waits for `save`."""
    staging_ms: float
    """Of copying alone, in this run; the floor is a memory copy."""
    copy_floor_ms: float
    """Of copying as many bytes in one piece."""
    first_step_ms: float
    """Of the first step after the call."""
    meanwhile_ms: float
    """Of a step while a checkpoint is written."""
    writing_ms: float
    """From the call to the whole checkpoint."""


def main(config: CheckpointBenchmark) -> dict[str, Cost]:
    """Measure both kinds."""
    recipe, load = find_recipe(config.recipe), os.getloadavg()
    with process_group() as world, tempfile.TemporaryDirectory() as folder:
        run = replace(
            recipe,
            data=config.data,
            members=config.members,
            model=replace(recipe.model, embedding_dim=config.embedding_dim),
            train=replace(recipe.train, batch_size=config.batch_size, num_steps=10**6),
        )
        trainer = Trainer(run, world)
        batches = trainer.loader.stream()
        for _ in range(5):
            trainer.train_step(batches)
        found: dict[Kind, list[Cost]] = {"async": [], "sync": []}
        for turn in range(config.turns):
            for kind, costs in found.items():
                costs.append(_save(trainer, batches, Path(folder) / f"{kind}-{turn}", kind, config, world))
        medians: dict[str, Cost] = {
            kind: Cost(**{name: statistics.median(asdict(cost)[name] for cost in costs) for name in asdict(costs[0])})
            for kind, costs in found.items()
        }
    if config.json:
        whole = {kind: asdict(cost) for kind, cost in medians.items()}
        whole |= facts(__file__, ("torch", "torchrec"), load)
        config.json.write_text(json.dumps(whole, indent=2) + "\n")
    return medians


def _save(
    trainer: Trainer, batches: Iterator[Batch], folder: Path, kind: Kind, config: CheckpointBenchmark, world: World
) -> Cost:
    def step() -> float:
        started = time.perf_counter()
        trainer.train_step(batches)
        return (time.perf_counter() - started) * 1e3

    quiet = [step() for _ in range(config.quiet_steps)]
    state = in_chunks(trainer.state())
    num_bytes = local_bytes(state)
    started = time.perf_counter()
    staged = Stager().stage(state)
    staging_ms = (time.perf_counter() - started) * 1e3
    del staged
    flat = torch.ones(num_bytes, dtype=torch.uint8)
    started = time.perf_counter()
    flat.clone()
    copy_ms = (time.perf_counter() - started) * 1e3
    del flat
    saver = Saver(folder, CheckpointConfig(write=kind, keep_last=1, keep_best=0), world)
    started = time.perf_counter()
    saver.save(trainer.step, trainer.state(), [])
    call_ms = (time.perf_counter() - started) * 1e3
    first_ms = step()
    meanwhile = [first_ms]
    while saver.is_writing:
        meanwhile.append(step())
    writing_ms = (time.perf_counter() - started) * 1e3 if kind == "async" else call_ms
    saver.close()
    return Cost(
        num_bytes / 1e6,
        statistics.median(quiet),
        call_ms,
        staging_ms,
        copy_ms,
        first_ms,
        statistics.median(meanwhile),
        writing_ms,
    )


if __name__ == "__main__":
    print(json.dumps({kind: asdict(cost) for kind, cost in main(tyro.cli(CheckpointBenchmark)).items()}, indent=2))
