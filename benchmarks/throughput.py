"""Rows a second that training reaches, end to end: Parquet to updated weights, beside its floor and what others use.

Our trainer, the matrix products that its backbone cannot do without (the floor), and plainly written baselines take
turns in one run on the same synthetic data. Several values of one option make a sweep, whose cases take turns as well.

    python benchmarks/throughput.py --backbone dcnv2 --baselines --json throughput.json
    python benchmarks/throughput.py --batch-size 1024 2048 4096 8192 --plot batch.png
    python benchmarks/throughput.py --ranks 1 2
    python benchmarks/throughput.py --gate benchmarks/gate.json
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

# As `recsys` does, before torch is imported: threads that wait for one another soon sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import tyro
from rich.console import Console

from display import TO_FIRST, plot, tables
from facts import facts
from harness import Gate, Runner, Summary, Turns, append, measure, rates, result, speedup, summary
from jobs import BASELINES, FLOOR, OURS, Job, Jobs, quieten_libraries
from recsys.config import InputError, dump, load, load_file
from recsys.members import ModelConfig
from recsys.training.optim import OptimizerConfig
from workload import Setting, make_data

AXES = ("batch_size", "dim", "pooling", "members", "rows_per_table", "ranks")
PACKAGES = ("torch", "torchrec", "numpy")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure training throughput."""

    backbone: str = "dcnv2"
    """Any of `recsys backbones`."""
    sizes: Literal["paper", "default"] = "paper"
    """Of the backbone: those of the recipes *_paper, or its own defaults, which are smaller."""
    baselines: bool = False
    """Also train plain PyTorch (nn.Embedding and Adam; sparse nn.EmbeddingBag and Adagrad), and TorchRec out of the
    box."""
    batch_size: tuple[int, ...] = (8192,)
    """Rows of a global batch. This and the five below: several values of one of them make a sweep."""
    dim: tuple[int, ...] = (16,)
    """Columns of a table."""
    pooling: tuple[int, ...] = (1,)
    """Ids a row and field."""
    members: tuple[int, ...] = (1,)
    """Seeds of the backbone side by side."""
    rows_per_table: tuple[int, ...] = (25_000,)
    """Ids of a field."""
    ranks: tuple[int, ...] = (1,)
    """Processes under torchrun, among which this machine's cores are shared."""
    fields: int = 39
    """Sparse fields."""
    zipf: float | None = None
    """Exponent of the ids' power law; uniform ids without."""
    model: ModelConfig = field(default_factory=lambda: Setting().model)
    """Of our trainer; its dimension is --dim."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of our trainer; baselines take its rates."""
    timing: Annotated[Turns, tyro.conf.OmitArgPrefixes] = field(default_factory=Turns)
    device: Literal["auto", "cpu"] = "auto"
    """auto takes CUDA where it is."""
    json: Path | None = None
    """Append results to this file, one line each; `recsys bench compare` compares two such files."""
    plot: Path | None = None
    """Draw a sweep to this PNG."""
    gate: Path | None = None
    """Measure what this file describes, and exit with 1 where a ratio is below what it asks for."""

    def __post_init__(self) -> None:
        several = [axis for axis in AXES if len(getattr(self, axis)) > 1]
        for axis in AXES:
            if not getattr(self, axis):
                raise ValueError(f"{axis} is empty: give at least one value")
        if len(several) > 1:
            raise ValueError(f"{' and '.join(several)} have several values each; sweep one, and give the others one")
        if self.plot and not several:
            raise ValueError(f"plot {self.plot}: there is nothing to draw; give several values of one of {AXES}")
        if self.gate and several:
            raise ValueError(f"gate {self.gate} says what is measured; leave out several values of {several[0]}")
        if self.baselines and max(self.ranks) > 1:
            raise ValueError("baselines train on one rank; leave them out, or use ranks 1")
        if self.baselines and (self.model.tables, self.model.embeddings) != ("private", "tables"):
            raise ValueError(
                "baselines have private whole tables; leave them out, or use model.tables private and "
                "model.embeddings tables"
            )
        self.settings()

    @property
    def axis(self) -> str | None:
        """What is swept."""
        return next((axis for axis in AXES if len(getattr(self, axis)) > 1), None)

    def settings(self) -> list[Setting]:
        """One a value of what is swept."""
        first: dict[str, Any] = {axis: getattr(self, axis)[0] for axis in AXES}
        same = ("backbone", "sizes", "fields", "zipf", "model", "optimizer")
        setting = Setting(**first, **{name: getattr(self, name) for name in same})
        axis = self.axis
        return [replace(setting, **{axis: value}) for value in getattr(self, axis)] if axis else [setting]


def main(config: Config) -> int:
    """Measure all settings, show and keep their results; returns the exit status: 1 where the gate is shut.

    Raises:
        InputError: the gate's file does not describe a setting, turns and ratios; a width that cannot work.
    """
    if config.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings, baselines, turns = config.settings(), tuple(BASELINES) if config.baselines else (), config.timing
    gate = load_file(Gate, config.gate) if config.gate else None
    if gate:
        settings = [load(Setting, _over(dump(Setting()), gate.setting), f"{config.gate}: setting")]
        turns = load(Turns, _over(dump(Turns()), gate.turns), f"{config.gate}: turns")
        baselines = tuple(name for name in BASELINES if f"ratio_to_{name}" in gate.least)
    results = measured(settings, baselines, turns, config.axis)
    for table in tables(results, config.axis):
        Console().print(table)
    if config.json:
        append(config.json, results)
    if config.plot and config.axis:
        plot(results, config.axis, config.plot)
    failures = gate.failures(results[0]["ratios"]) if gate else []
    for failure in failures:
        print(f"{config.gate}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def measured(
    settings: list[Setting], baselines: tuple[str, ...], turns: Turns, axis: str | None
) -> list[dict[str, Any]]:
    """Results of some settings along an axis, of which each but the first is also compared with the first."""
    load_at_start = os.getloadavg()
    parent = Path(tempfile.mkdtemp(prefix="benchmark-throughput-"))
    try:
        with Jobs() as jobs:
            ranked = any(setting.ranks > 1 for setting in settings)
            started = [jobs.start(s, make_data(s, parent), baselines, ranked=ranked) for s in settings]
            runners: dict[str, Runner] = {
                f"{number} {name}": run for number, job in enumerate(started) for name, run in job.cases().items()
            }
            seconds = measure(runners, turns)
            by_job: list[dict[str, list[float]]] = [{} for _ in started]
            for key, values in seconds.items():
                number, name = key.split(" ")
                by_job[int(number)][name] = values
            origin = facts(__file__, PACKAGES, load_at_start)
            results = []
            for setting, job, by_case in zip(settings, started, by_job, strict=True):
                against = to_first(settings, by_job[0][OURS], setting, by_case[OURS], axis) if axis else {}
                results.append(_result(setting, job, by_case, against, origin))
            return results
    finally:
        shutil.rmtree(parent)


def to_first(
    settings: list[Setting], theirs: list[float], setting: Setting, ours: list[float], axis: str
) -> dict[str, Summary]:
    """Rows a second as a multiple of the first setting's, whose value is in the name: another sweep has another."""
    first = settings[0]
    if setting is first:
        return {}
    by_row = [seconds / setting.batch_size for seconds in ours], [seconds / first.batch_size for seconds in theirs]
    return {f"{TO_FIRST}{axis}_{getattr(first, axis)}": speedup(*by_row)}


def _result(
    setting: Setting,
    job: Job,
    seconds: Mapping[str, list[float]],
    against: dict[str, Summary],
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    rows, ours, report = setting.batch_size, seconds[OURS], job.report()
    step_ms = {name: summary([1e3 * turn for turn in turns]) for name, turns in seconds.items()}
    rows_per_s = {name: rates(rows, turns) for name, turns in seconds.items()}
    # FLOPs are a rank's, and so are the ceilings.
    flops_per_s = rates(report["flops"], ours)
    ratios = {"floor_share": speedup(ours, seconds[FLOOR])}
    ratios |= {f"ratio_to_{name}": speedup(ours, seconds[name]) for name in BASELINES if name in seconds} | against
    metrics = {
        "rows_per_s": {name: rate for name, rate in rows_per_s.items() if name != FLOOR},
        "floor_rows_per_s": rows_per_s[FLOOR],
        "step_ms": step_ms,
        "flops_per_s": flops_per_s,
        **report,
    }
    return result("throughput", setting.record(), metrics, ratios, origin)


def _over(values: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Put `others` in place of some values, parts of parts too."""
    return values | {
        name: _over(values[name], value) if isinstance(value, dict) and isinstance(values.get(name), dict) else value
        for name, value in others.items()
    }


if __name__ == "__main__":
    quieten_libraries()
    try:
        sys.exit(main(tyro.cli(Config)))
    except InputError as error:
        print(f"throughput: {error}", file=sys.stderr)
        sys.exit(2)
