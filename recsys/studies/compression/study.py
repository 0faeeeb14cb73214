"""The compression study: runs, results, pictures, report. Source of the question: arXiv 2207.10731."""

import json
import sys
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from recsys.config import InputError, dump, write_whole
from recsys.data.schema import Schema
from recsys.distributed import process_group
from recsys.studies.compression.config import CompressionStudyConfig
from recsys.studies.compression.jobs import WHOLE, Size, Variant, job, possible, rates
from recsys.studies.compression.results import Point, Results, rows_of
from recsys.studies.compression.speed import speed_of
from recsys.studies.estimates import estimate
from recsys.studies.jobs import Job
from recsys.studies.running import predictions_of, run_jobs, state_of, steps_of
from recsys.training.config import TrainConfig
from recsys.training.metrics import click_metrics

METRICS = ("auc", "logloss", "ne")
NO_TERMINAL_WIDTH = 130


def compression_study(config: CompressionStudyConfig, recipe: TrainConfig) -> Results | None:
    """Run what is left of a study, write its results and print them; None where it only lists its jobs.

    Raises:
        InputError: data that is none, a folder that holds another run, or a job that failed.
    """
    data = config.data or recipe.data
    schema = Schema.load(data)
    sizes, lost = possible(config, recipe, schema)
    for variant, why in lost.items():
        print(f"study: left out {variant.name}: {why}", file=sys.stderr)  # noqa: T201
    num_steps = steps_of(recipe, data)
    first = {
        variant: [job(config, recipe, schema, variant, lr, 0) for lr in rates(config, recipe)] for variant in sizes
    }
    if config.dry_run:
        _print_jobs(config, first, sizes, num_steps)
        return None
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{config.out}: cannot make the study's folder ({error.strerror})") from None
    run_jobs(config, [own for jobs in first.values() for own in jobs], num_steps)
    chosen = {variant: _best(jobs, schema) for variant, jobs in first.items()}
    jobs = {
        variant: [job(config, recipe, schema, variant, lr, seed) for seed in range(config.seeds)]
        for variant, lr in chosen.items()
    }
    # Seed by seed, so that a study that is stopped has something to compare.
    run_jobs(config, [jobs[variant][seed] for seed in range(config.seeds) for variant in jobs], num_steps)
    results = _analyse(config, recipe, schema, jobs, sizes, {variant.name: why for variant, why in lost.items()})
    _write(results)
    _print(results)
    return results


def _best(jobs: Sequence[Job], schema: Schema) -> float:
    """The learning rate of lowest validation logloss; the first seed's."""
    losses = [_metrics(own, schema, "valid")["logloss"] for own in jobs]
    return jobs[int(np.argmin(losses))].config.optimizer.table_lr


def _metrics(own: Job, schema: Schema, split: str) -> dict[str, float]:
    found = predictions_of(own, split, schema)
    logits, labels, weights = found.tensors
    metrics = click_metrics(labels.numpy(), logits[:, 0].sigmoid().numpy(), weights.numpy())
    return {name: getattr(metrics, name) for name in METRICS}


def _analyse(
    config: CompressionStudyConfig,
    recipe: TrainConfig,
    schema: Schema,
    jobs: dict[Variant, list[Job]],
    sizes: dict[Variant, Size],
    lost: dict[str, str],
) -> Results:
    scores = {variant: [_metrics(own, schema, "test") for own in of_variant] for variant, of_variant in jobs.items()}
    whole = next(variant for variant in jobs if variant.kind == WHOLE)
    with process_group() as world:
        timed = {variant: speed_of(of_variant[0], config.batch_size, world) for variant, of_variant in jobs.items()}
    points = []
    for variant, of_variant in jobs.items():
        points.append(
            Point(
                variant=variant,
                title=variant.title,
                size=sizes[variant],
                compression=sizes[whole].floats / sizes[variant].floats,
                table_lr=of_variant[0].config.optimizer.table_lr,
                test={name: estimate([score[name] for score in scores[variant]]) for name in METRICS},
                against_whole={
                    name: estimate(
                        [own[name] - base[name] for own, base in zip(scores[variant], scores[whole], strict=True)]
                    )
                    for name in METRICS
                },
                speed=timed[variant],
            )
        )
    rows = len(predictions_of(jobs[whole][0], "test", schema).labels_N)
    return Results(study=config, recipe=recipe, dataset=schema.name, num_test_rows=rows, points=points, left_out=lost)


def _write(results: Results) -> None:
    """Write results.json, the picture and report.html into the study's folder."""
    from recsys.studies.compression.report import draw, html  # noqa: PLC0415  (drawing takes a library of its own)

    out = results.study.out
    write_whole(out / "results.json", json.dumps(dump(results), indent=2) + "\n")
    picture = draw(results, out / "compression.png")
    write_whole(out / "report.html", html(results, picture))


def _print(results: Results) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=NO_TERMINAL_WIDTH)
    table = Table(title=results.title, title_justify="left", box=SIMPLE)
    head, rows = rows_of(results)
    table.add_column(head[0])
    for column in head[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"report: {results.study.out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _print_jobs(
    config: CompressionStudyConfig, first: dict[Variant, list[Job]], sizes: dict[Variant, Size], num_steps: int
) -> None:
    count = sum(map(len, first.values())) + (config.seeds - 1) * len(first)
    table = Table(title=f"{count} jobs of {num_steps:,} steps; of the first seed:", title_justify="left")
    table.add_column("job")
    for column in ("MB of embeddings", "left"):
        table.add_column(column, justify="right")
    for variant, jobs in first.items():
        for own in jobs:
            table.add_row(own.name, f"{sizes[variant].bytes / 1e6:,.3g}", state_of(own, num_steps))
    Console().print(table)
