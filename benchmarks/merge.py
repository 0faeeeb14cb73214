"""What M members in one job cost beside M jobs of one: CPU and wall time of a step in training and in inference.

All jobs stand in one process and take turns, so that the ratios hold on a machine whose cores are shared. A step is
the Trainer's own, on batches that were loaded before; what loading a batch costs is measured apart, in turn with the
steps, and added to every job once. Phases are told apart by hooks, in the same steps.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from facts import REPOSITORY, facts
from phases import CLOCKS, PHASES, Job, by_clock, now, spread
from recsys.backbones import BACKBONES
from recsys.data.loader import Loader
from recsys.distributed import World, process_group
from recsys.members import ModelConfig

HETEROGENEOUS = ("dcnv2", "wukong", "rankmixer", "fnn", "deepfm", "ipnn", "dcn", "finalmlp")
LOADED_BATCHES, WARM_UP_STEPS, MULTIPLIED = 64, 3, 1024


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure members in one job against jobs of one."""

    json: Path
    """File for the result."""
    data: Path | None = None
    """Prepared folder; made by `recsys synth` and `prepare` when not given."""
    rows: int = 150_000
    """Rows of the log to make."""
    members: tuple[int, ...] = (1, 2, 4, 8)
    """Members in one job."""
    backbone: str = "dcnv2"
    """Of the homogeneous jobs; the others take the first of dcnv2 wukong rankmixer fnn deepfm ipnn dcn finalmlp."""
    batch_sizes: tuple[int, ...] = (64, 1024, 4096)
    """Rows of a batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the members."""
    batched: Literal["auto", "on", "off"] = "auto"
    """Whether members of one backbone are computed as one."""
    rounds: int = 7
    """Turns of every job."""
    seconds: float = 0.3
    """A job's turn takes at least so long, and two steps."""
    threads: int = 1
    """Of torch."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES or not all(1 <= count <= len(HETEROGENEOUS) for count in self.members):
            raise ValueError(
                f"--backbone {self.backbone}, --members {self.members}: a known one, and counts from 1 to 8"
            )


def measure(batch_size: int, config: Config, data: Path, world: World) -> dict[str, Any]:
    """Let all jobs of one batch size take turns."""
    together = list(
        dict.fromkeys(
            names for count in config.members for names in ((config.backbone,) * count, HETEROGENEOUS[:count])
        )
    )
    alone = list(dict.fromkeys((name,) for names in together for name in names))
    model = ModelConfig(precision=config.precision, batched=config.batched)
    jobs = {names: Job(names, batch_size, model, data, world) for names in dict.fromkeys(alone + together)}
    train = Loader(data, "train", batch_size=batch_size)
    valid = Loader(data, "valid", batch_size=batch_size, shuffle=False, tail="pad")
    loading: dict[str, list[list[float]]] = {}
    products: list[float] = []
    for kind, loader in (("training", train), ("inference", valid)):
        batches = list(itertools.islice(loader.epoch(0), LOADED_BATCHES))
        loading[kind] = []
        steps = {names: job.stepper(kind, itertools.cycle(batches)) for names, job in jobs.items()}
        for step in steps.values():
            for _ in range(WARM_UP_STEPS):
                step()
        for turn in range(config.rounds):
            loading[kind].append(_loading_ms(loader, turn))
            products.append(_product_gflops())
            for names, job in jobs.items():
                job.turn(kind, steps[names], config.seconds)
    return {
        "batch_size": batch_size,
        "product_gflops": statistics.median(products),
        "loading_ms": {kind: by_clock(turns) for kind, turns in loading.items()},
        **{
            kind: {"+".join(names): job.costs(kind) for names, job in jobs.items()}
            for kind in ("training", "inference")
        },
        "ratios": [
            {"kind": kind, "members": list(names)} | _ratios(kind, names, jobs, loading[kind])
            for kind in ("training", "inference")
            for names in together
            if len(names) > 1
        ],
    }


def _ratios(
    kind: str, names: tuple[str, ...], jobs: dict[tuple[str, ...], Job], loading: list[list[float]]
) -> dict[str, dict[str, float]]:
    """Cost of a job over the sum of its members' own jobs, turn by turn."""

    def totals(members: tuple[str, ...], clock: int) -> list[float]:
        turns = zip(jobs[members].totals(kind), loading, strict=True)
        return [step[clock] + load[clock] for step, load in turns]

    ratios = {}
    for clock, name in enumerate(CLOCKS):
        alone = [totals((member,), clock) for member in names]
        ratios[name] = spread(
            [one / sum(each) for one, each in zip(totals(names, clock), zip(*alone, strict=True), strict=True)]
        )
    return ratios


def _loading_ms(loader: Loader, epoch: int) -> list[float]:
    """Wall and CPU milliseconds of loading a batch; the next ones are loaded ahead, so only a whole epoch tells."""
    before, batches = now(), sum(1 for _ in loader.epoch(epoch))
    return [1e3 * (after - then) / batches for after, then in zip(now(), before, strict=True)]


def _product_gflops() -> float:
    """What this machine reaches in a large matrix product, now."""
    x = torch.ones(MULTIPLIED, MULTIPLIED)
    x @ x
    before = now()
    x @ x
    return 2e-9 * MULTIPLIED**3 / (now()[1] - before[1])


def make_data(folder: Path, rows: int) -> Path:
    """Make and prepare a log."""
    log, data = folder / "log.tsv.gz", folder / "data"
    for command in (["synth", "--num-rows", str(rows)], ["prepare", "criteo_kaggle", str(log)]):
        out = log if command[0] == "synth" else data
        subprocess.run([sys.executable, "-m", "recsys", *command, "--out", str(out)], cwd=REPOSITORY, check=True)
    return data


def main(config: Config) -> dict[str, Any]:
    """Measure all batch sizes."""
    load = os.getloadavg()
    made = None if config.data else Path(tempfile.mkdtemp(prefix="benchmark-merge-"))
    try:
        data = config.data or make_data(made, config.rows)  # type: ignore[arg-type]
        with process_group() as world:
            torch.set_num_threads(config.threads)
            results = [measure(batch_size, config, data, world) for batch_size in config.batch_sizes]
    finally:
        if made:
            shutil.rmtree(made)
    return {
        "results": results,
        **facts(__file__, ("torch", "torchrec", "numpy"), load),
        "config": asdict(config) | {"json": str(config.json), "data": str(config.data) if config.data else None},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Ratios, and what explains them."""
    lines = [f"{'batch':>6} {'':<10}{'CPU ratio':>22}{'wall':>7}  members"]
    for result in results:
        for row in result["ratios"]:
            cpu, names = row["cpu"], row["members"]
            shown = f"{cpu['median']:.2f} ({cpu['low']:.2f} to {cpu['high']:.2f})"
            who = f"{names[0]}*{len(names)}" if len(set(names)) == 1 else " ".join(names)
            lines.append(f"{result['batch_size']:>6} {row['kind']:<10}{shown:>22}{row['wall']['median']:>7.2f}  {who}")
    lines.append(f"{'batch':>6} {'training, CPU ms':<10}: {', '.join(PHASES)}; GFLOP/s of the dense phases")
    for result in results:
        for name, costs in result["training"].items():
            phases = " ".join(f"{costs['phases'][phase]['cpu']:>8.2f}" for phase in PHASES)
            lines.append(
                f"{result['batch_size']:>6} {costs['cpu']['median']:>8.2f}: {phases}; {costs['gflops']:>5.0f}  {name}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    config = tyro.cli(Config)
    result = main(config)
    config.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["results"]))
