"""How long training takes to a validation AUC: seconds and rows, by precision, beside plain PyTorch.

Our trainer runs as `recsys train --train.target-auc` does, its checkpoint at the end included; nn.Embedding and Adam
(baselines/plain.py, fp32) gets the same batches, and validates as often on the same rows. What is learned is a log of
`recsys synth`, whose clicks follow a planted model, unless prepared data are given. Seeds of the members and of the
order of rows change from turn to turn.

    python benchmarks/time_to_auc.py --baseline --json time_to_auc.json
    python benchmarks/time_to_auc.py --data data/criteo_kaggle --target-auc 0.75 --turns 5
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

# As `recsys` does, before torch and polars are imported: threads that spin starve those they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("POLARS_MAX_THREADS", "1")

import torch
import tyro
from rich.console import Console
from rich.table import Table

from baselines import Job
from baselines.plain import Plain, PlainModel
from facts import facts
from harness import Summary, append, result, speedup, summary
from jobs import quieten_libraries
from recsys.backbones import BACKBONES
from recsys.config import InputError, nearest
from recsys.data.loader import Loader
from recsys.data.prepare import PrepareConfig, prepare
from recsys.data.schema import Schema
from recsys.data.synthetic import SynthConfig, synthesize
from recsys.distributed import World, process_group
from recsys.metrics.click import auc
from recsys.recipes import find_recipe
from recsys.recipes.paper import SIZES
from recsys.training.config import TrainConfig
from recsys.training.predictions import MERGED
from recsys.training.sharded import held_out, loader
from recsys.training.sinks import METRICS, SinkConfig, parsed
from recsys.training.trainer import Trainer

PACKAGES = ("torch", "torchrec", "numpy")
PLAIN = "plain_pytorch"
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the time to an AUC."""

    data: Path | None = None
    """Prepared folder; without it, a synthetic log is written and prepared for the run."""
    num_rows: int = 300_000
    """Rows of the synthetic log, of which eight in ten are trained on."""
    target_auc: float = 0.76
    """Validation AUC at which the clock stops."""
    backbone: str = "dcnv2"
    """Any of `recsys backbones`."""
    sizes: Literal["paper", "default"] = "default"
    """Of the backbone: its own defaults, or those of the recipes *_paper, which are larger."""
    precision: tuple[Precision, ...] = ("bf16", "fp32")
    """Of our trainer; several are compared."""
    baseline: bool = False
    """Also train plain PyTorch."""
    batch_size: int = 1024
    """Rows of a batch."""
    validate_every: int = 25
    """Steps between two looks at the validation rows."""
    num_epochs: int = 3
    """After which a run is given up."""
    baseline_table_lr: float = 1e-3
    """Of Adam on the baseline's tables; ours, and all that is not a table, has the rates of the recipe synthetic."""
    turns: int = 3
    """Runs of each case, with a seed each."""
    json: Path | None = None
    """Append results to this file, one line each; `recsys bench compare` compares two such files."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}; {nearest(self.backbone, BACKBONES)}")
        if not self.precision:
            raise ValueError("precision is empty: give at least one value")
        if self.turns < 1:
            raise ValueError(f"turns {self.turns} must be at least 1")

    def training(self, data: Path, out: Path, precision: Precision, seed: int) -> TrainConfig:
        """One run of our trainer: the recipe synthetic at constant rates, which no number of steps decides."""
        recipe = find_recipe("synthetic")
        return replace(
            recipe,
            data=data,
            out=out,
            members=(self.backbone,),
            seed=seed,
            model=replace(recipe.model, precision=precision),
            backbones=SIZES if self.sizes == "paper" else recipe.backbones,
            optimizer=replace(recipe.optimizer, decay="constant"),
            loader=replace(recipe.loader, seed=seed),
            train=replace(
                recipe.train,
                batch_size=self.batch_size,
                num_epochs=self.num_epochs,
                validate_every=self.validate_every,
                target_auc=self.target_auc,
            ),
            sinks=SinkConfig(tensorboard=False),
        )


@dataclass(frozen=True)
class Run:
    """What one run came to."""

    seconds: float
    steps: int
    auc: float
    """Of the last validation."""


def ours(config: TrainConfig, world: World) -> Run:
    """Train as `recsys train` does; what comes before the first step is not timed."""
    trainer = Trainer(config, world)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    found = [record[MERGED]["auc"] for _, record in parsed(config.out / METRICS) if record["kind"] == "valid"]
    return Run(seconds, trainer.step, found[-1])


def plain(config: TrainConfig, table_lr: float, world: World) -> Run:
    """Train plain PyTorch on the same batches, and look at the validation rows at the same steps."""
    rows, valid = loader(config, "train", world), held_out(config, "valid", world)
    job = Job(
        specs=config.specs(),
        schema=Schema.load(config.data),
        table_lr=table_lr,
        dense_lr=config.optimizer.dense_lr,
        device=world.device,
    )
    baseline, loop = Plain(job), config.train
    assert loop.validate_every, "given"
    assert loop.target_auc, "given"
    num_steps, reached = loop.num_epochs * rows.steps_per_epoch, 0.0
    batches = itertools.islice(rows.stream(), num_steps)
    started = time.perf_counter()
    for step in range(1, num_steps + 1):
        baseline.step(batches)
        if step % loop.validate_every == 0 or step == num_steps:
            reached = validated(baseline.models[0], valid, world)
            if reached >= loop.target_auc:
                break
    return Run(time.perf_counter() - started, step, reached)


@torch.no_grad()
def validated(model: PlainModel, valid: Loader, world: World) -> float:
    """AUC on the validation rows."""
    model.eval()
    found = [(model(batch.to(world.device)), batch.labels, batch.weights) for batch in valid.once()]
    model.train()
    logits, labels, weights = (torch.cat([part.cpu() for part in each]).numpy() for each in zip(*found, strict=True))
    return auc(labels, logits, weights)


def main(config: Config) -> list[dict[str, Any]]:
    """Train all cases in turns; show and keep their results."""
    load_at_start = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="benchmark-time-to-auc-") as name, process_group() as world:
        folder = Path(name)
        data = config.data or synthetic(config, folder)
        cases: dict[str, Callable[[int], Run]] = {
            precision: _ours(config, data, folder, precision, world) for precision in config.precision
        }
        if config.baseline:
            cases[PLAIN] = lambda turn: plain(
                config.training(data, folder / "unused", "fp32", turn), config.baseline_table_lr, world
            )
        runs: dict[str, list[Run]] = {case: [] for case in cases}
        for turn, (case, run) in itertools.product(range(config.turns), cases.items()):
            runs[case].append(run(turn))
        origin = facts(__file__, PACKAGES, load_at_start)
        results = [_result(config, case, runs, world, origin) for case in runs]
    Console().print(shown(results))
    if config.json:
        append(config.json, results)
    return results


def _ours(config: Config, data: Path, folder: Path, precision: Precision, world: World) -> Callable[[int], Run]:
    return lambda turn: ours(config.training(data, folder / f"{precision}-{turn}", precision, turn), world)


def synthetic(config: Config, folder: Path) -> Path:
    """Write a log with something to learn in it, and prepare it."""
    log, data = folder / "log.tsv", folder / "data"
    told = synthesize(SynthConfig(out=log, num_rows=config.num_rows))
    if told.bayes_auc < config.target_auc:
        raise InputError(
            f"--target-auc {config.target_auc}: the true probabilities have {told.bayes_auc:.4f}; ask for less"
        )
    prepare(PrepareConfig(format="criteo_kaggle", paths=(log,), out=data))
    return data


def _result(
    config: Config, case: str, runs: Mapping[str, Sequence[Run]], world: World, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """A case's line; ratios are those of the seconds of runs with equal seeds, where all of both got there."""
    mine, target = runs[case], config.target_auc

    def seconds(of: Sequence[Run]) -> list[float]:
        return [run.seconds for run in of]

    ratios: dict[str, Summary] = {}
    arrived = {name: all(run.auc >= target for run in each) for name, each in runs.items()}
    for other in runs:
        if case not in (other, PLAIN) and arrived[case] and arrived[other]:
            ratios[f"ratio_to_{other}"] = speedup(seconds(mine), seconds(runs[other]))
    record = {
        "case": case,
        "data": str(config.data) if config.data else f"synthetic, {config.num_rows} rows",
        "backbone": config.backbone,
        "sizes": config.sizes,
        "target_auc": target,
        "batch_size": config.batch_size,
        "validate_every": config.validate_every,
    }
    metrics = {
        "reached": sum(run.auc >= target for run in mine),
        "turns": len(mine),
        "seconds": summary(seconds(mine)),
        "rows": summary([float(run.steps * config.batch_size) for run in mine]),
        "auc": summary([run.auc for run in mine]),
        "threads": torch.get_num_threads(),
        "device": world.device.type,
    }
    return result("time_to_auc", record, metrics, ratios, origin)


def shown(results: Sequence[Mapping[str, Any]]) -> Table:
    """What a terminal shows."""
    table = Table(title=f"To a validation AUC of {results[0]['config']['target_auc']}, medians", title_justify="left")
    for column in ("case", "reached", "seconds", "from", "to", "rows", "AUC"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for line in results:
        metrics = line["metrics"]
        seconds = metrics["seconds"]
        table.add_row(
            line["config"]["case"],
            f"{metrics['reached']} of {metrics['turns']}",
            *(f"{seconds[key]:.1f}" for key in ("median", "low", "high")),
            f"{metrics['rows']['median']:,.0f}",
            f"{metrics['auc']['median']:.4f}",
        )
    return table


if __name__ == "__main__":
    quieten_libraries()
    try:
        main(tyro.cli(Config))
    except InputError as error:
        print(f"time_to_auc: {error}", file=sys.stderr)
        sys.exit(2)
