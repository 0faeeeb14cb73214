"""The merge study: whether a merge of independently trained members beats one bigger model of the same budget.

Members are trained alone, merged offline in disjoint sets, and compared with bigger models of their FLOPs. Source of
the question and of the backbones: arXiv 2512.07650.
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from recsys.config import InputError, dump, write_whole
from recsys.data.schema import Schema
from recsys.studies import analysis
from recsys.studies.analysis import Ablation, Point, RuleScores
from recsys.studies.comparisons import Comparison, comparisons
from recsys.studies.config import MergeStudyConfig
from recsys.studies.findings import NAMES, gain, limits, opponent, plain, sentence, verdict
from recsys.studies.jobs import Job, plan
from recsys.studies.pool import Pool, SetScores, read_pool
from recsys.studies.running import run_jobs, speed_of, state_of, steps_of
from recsys.studies.sets import SEEDS
from recsys.studies.whole_pool import Greedy, Likeness, greedy, likeness
from recsys.training.config import TrainConfig
from recsys.training.evaluate import bayes_optimal
from recsys.training.metrics import ClickMetrics

NO_TERMINAL_WIDTH = 120
SHOWN = ("auc", "logloss")
"""Metrics on the console; the report has all."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What a job cost."""

    name: str
    kind: str
    members: tuple[str, ...]
    mflops: float
    """Inference of one row by all its members."""
    table_bytes: int
    parameters: int
    """Outside the tables."""
    seconds: float | None
    """Of training alone."""
    rows_per_s: float | None
    test: dict[str, float]
    """Metrics of its members' mean logit."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All numbers of a study."""

    study: MergeStudyConfig
    recipe: TrainConfig
    dataset: str
    schema_hash: str
    num_test_rows: int
    base_rate: float
    bayes_optimal: ClickMetrics | None
    points: list[Point]
    comparisons: list[Comparison]
    ablations: list[Ablation]
    rules: list[RuleScores]
    greedy: Greedy
    likeness: Likeness
    sets: list[SetScores]
    jobs: list[JobRecord]

    @property
    def title(self) -> str:
        """Which data it was, in a few words."""
        made = ", synthetic log" if self.study.truth else ""
        return f"{self.dataset}{made}, {self.num_test_rows:,} test rows"


def merge_study(config: MergeStudyConfig, recipe: TrainConfig) -> Results | None:
    """Run what is left of a study, write its results and print the main ones; None where it only lists its jobs.

    Raises:
        InputError: data that is none, a folder that holds another run, or a job that failed.
    """
    data = config.data or recipe.data
    schema = Schema.load(data)
    jobs = plan(config, recipe, schema)
    num_steps = steps_of(recipe, data)
    if config.dry_run:
        _print_jobs(jobs, num_steps)
        return None
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{config.out}: cannot make the study's folder ({error.strerror})") from None
    run_jobs(config, jobs, num_steps)
    results = analyse(config, recipe, jobs, schema)
    write(results)
    _print(results)
    return results


def analyse(config: MergeStudyConfig, recipe: TrainConfig, jobs: list[Job], schema: Schema) -> Results:
    """Compute all results from the predictions of finished jobs."""
    pool = read_pool(jobs, schema)
    costs = {job.members[0]: job.cost for job in jobs if len(job.members) == 1}
    scores = analysis.set_scores(pool, config)
    data = config.data or recipe.data
    labels_N = pool.test.labels_N
    of_test = len(labels_N), float(labels_N.sum())
    best = bayes_optimal(config.truth, data, "test", *of_test) if config.truth else None
    return Results(
        study=config,
        recipe=recipe,
        dataset=schema.name,
        schema_hash=schema.hash,
        num_test_rows=len(pool.test.labels_N),
        base_rate=pool.base_rate,
        bayes_optimal=best,
        points=analysis.points(scores, costs),
        comparisons=comparisons(pool, config, jobs),
        ablations=analysis.ablations(pool, config, jobs),
        rules=analysis.rules(pool, config),
        greedy=greedy(pool, config),
        likeness=likeness(pool, config),
        sets=scores,
        jobs=[_record(job, pool) for job in jobs],
    )


def _record(job: Job, pool: Pool) -> JobRecord:
    speed = speed_of(job)
    return JobRecord(
        name=job.name,
        kind=job.kind,
        members=job.members,
        mflops=job.cost.flops / 1e6,
        table_bytes=job.cost.table_bytes,
        parameters=job.cost.parameters,
        seconds=speed.seconds if speed else None,
        rows_per_s=speed.rows_per_s if speed else None,
        test=pool.scores(job.members),
    )


def write(results: Results) -> None:
    """Write results.json, the pictures and report.html into the study's folder."""
    from recsys.studies.figures import draw_all  # noqa: PLC0415  (drawing takes a library that numbers do not need)
    from recsys.studies.report import html  # noqa: PLC0415

    out = results.study.out
    values = _without_nan(dump(results))
    write_whole(out / "results.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
    figures = draw_all(results, out)
    write_whole(out / "report.html", html(results, figures))


def _without_nan(values: Any) -> Any:
    """Plain values with None where a number is not finite: JSON has no word for it."""
    if isinstance(values, dict):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _print_jobs(jobs: list[Job], num_steps: int) -> None:
    table = Table(title=f"{len(jobs)} jobs of {num_steps:,} steps", title_justify="left")
    table.add_column("job")
    for column in ("members", "MFLOPs a row", "MB of tables", "left"):
        table.add_column(column, justify="right")
    for job in jobs:
        size = f"{job.cost.flops / 1e6:,.3f}", f"{job.cost.table_bytes / 1e6:,.1f}"
        table.add_row(f"{job.kind}/{job.name}", str(len(job.members)), *size, state_of(job, num_steps))
    Console().print(table)


def _print(results: Results) -> None:
    """The main result, and where all of it is."""
    console = Console() if sys.stdout.isatty() else Console(width=NO_TERMINAL_WIDTH)
    table = Table(title=results.title, title_justify="left", box=SIMPLE)
    table.add_column("merges of")
    for column in ("M", "sets", *(NAMES[name] for name in SHOWN), *(f"gain in {NAMES[name]}" for name in SHOWN)):
        table.add_column(column, justify="right")
    others = {f"{SEEDS} of {name}" for name in results.study.backbones if name not in results.study.more_seeds_of}
    for point in results.points:
        if point.source not in others:
            gains = [plain(point.over_mean[name], sign=True) if point.size > 1 else "" for name in SHOWN]
            metrics = [plain(point.merged[name]) for name in SHOWN]
            table.add_row(point.source, str(point.size), str(point.num_sets), *metrics, *gains)
    for found in results.comparisons:
        metrics = [plain(found.rival[name]) for name in SHOWN]
        table.add_row(opponent(found), f"budget {found.size}", str(found.rival["auc"].count), *metrics, "", "")
    console.print(table)
    told = [
        "gains are over the mean of a set's own members; ± is the standard error over sets",
        *map(sentence, results.comparisons),
        gain(results),
        verdict(results),
        *filter(None, [limits(results.comparisons)]),
        f"report: {results.study.out / 'report.html'}",
    ]
    for line in told:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
