"""Kill ranks of a training job at random steps, and compare what it comes to with a job that was left alone.

Runs `recsys train` on two ranks of this machine under torchrun, twice. In the first run nothing happens. In the second,
a rank that is drawn by chance gets SIGKILL at steps drawn by chance; torchrun starts both anew, and they go on from the
newest whole checkpoint. Both runs must give the same losses and validation metrics.

    python benchmarks/survival.py --data data/criteo_kaggle --kills 10
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import tyro

from facts import facts

ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True, kw_only=True)
class SurvivalConfig:
    """What to train, and how often to kill."""

    data: Path
    """Prepared folder."""
    recipe: str = "criteo_kaggle"
    options: str = "--members dcnv2"
    """Further options of `recsys train`, in one word: --options="--members wukong"."""
    num_steps: int = 120
    save_every: int = 5
    """Steps between checkpoints."""
    kills: int = 10
    ranks: int = 2
    seed: int = 0
    """Of the steps and ranks."""
    folder: Path | None = None
    """Where the runs go; a temporary folder if not given."""
    json: Path | None = None
    """Also write the result to this file."""


@dataclass(frozen=True)
class Survival:
    """How a run that was killed compares with one that was not."""

    kills: list[tuple[int, int]]
    """Step and rank of each."""
    seconds: tuple[float, float]
    """Of the run that was left alone, and of the one that was killed."""
    largest_loss_difference: float
    """Over all steps and members."""
    largest_metric_difference: float
    """Over AUC, logloss, NE and calibration of members and merge, at the end."""


def main(config: SurvivalConfig) -> Survival:
    """Run both jobs, and compare them.

    Raises:
        RuntimeError: a job did not end well.
    """
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary)
        rng = random.Random(config.seed)
        first = config.save_every + 1
        steps = sorted(rng.sample(range(first, config.num_steps - 1), config.kills))
        victims = [(step, rng.randrange(config.ranks)) for step in steps]
        seconds = (train(config, folder / "alone", []), train(config, folder / "killed", victims))
        found = Survival(
            victims,
            seconds,
            _difference(*(_losses(folder / name) for name in ("alone", "killed"))),
            _difference(*(_metrics(folder / name) for name in ("alone", "killed"))),
        )
    if config.json:
        whole = asdict(found) | facts(__file__, ("torch", "torchrec"), load)
        config.json.write_text(json.dumps(whole, indent=2) + "\n")
    return found


def train(config: SurvivalConfig, out: Path, victims: list[tuple[int, int]]) -> float:
    """Run one job, and kill those (step, rank) of it; returns its seconds."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.ranks),
        "--max-restarts", str(len(victims)), "--monitor-interval", "0.1", "-m", "recsys.cli", "train", config.recipe,
        "--data", str(config.data), "--out", str(out), "--resume", "auto", *shlex.split(config.options),
        "--train.num-steps", str(config.num_steps), "--train.log-every", "1",
        "--train.save-every", str(config.save_every),
    ]  # fmt: skip
    started = time.perf_counter()
    log = out.with_suffix(".log")
    out.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        job = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
        try:
            for step, rank in victims:
                _kill_at(job, out / "metrics.jsonl", step, rank)
            job.wait()
        finally:
            job.terminate()
    if job.returncode:
        raise RuntimeError(f"torchrun ended with {job.returncode}:\n{log.read_text()[-4000:]}")
    return time.perf_counter() - started


def _kill_at(job: "subprocess.Popen[bytes]", metrics: Path, step: int, rank: int) -> None:
    while job.poll() is None and _last_step(metrics) < step:
        time.sleep(0.005)
    for process in psutil.Process(job.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            process.send_signal(signal.SIGKILL)
            return


def _last_step(metrics: Path) -> int:
    try:
        lines = metrics.read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):  # not there yet, or half a line
        return 0


def _losses(out: Path) -> dict[str, float]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        f"{line['step']} {name}": loss
        for line in records
        if line["kind"] == "train"
        for name, loss in line["loss"].items()
    }


def _metrics(out: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(records) if line["kind"] == "valid")
    names = ("auc", "logloss", "ne", "calibration")
    members = {name: values for name, values in last.items() if isinstance(values, dict) and "auc" in values}
    return {f"{member} {name}": values[name] for member, values in members.items() for name in names}


def _difference(one: dict[str, float], other: dict[str, float]) -> float:
    if one.keys() != other.keys():
        raise RuntimeError(f"the runs tell of other things: {sorted(one.keys() ^ other.keys())[:5]}")
    return max(abs(one[name] - other[name]) for name in one)


if __name__ == "__main__":
    print(json.dumps(asdict(main(tyro.cli(SurvivalConfig))), indent=2))
