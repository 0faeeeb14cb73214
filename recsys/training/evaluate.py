"""Evaluate: a run's members and their merge on held-out rows, beside what is best possible where that is known."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
from tyro.conf import Positional

from recsys.config import InputError, write_whole
from recsys.data.schema import SPLITS
from recsys.data.split import TEST, split_of
from recsys.distributed import World
from recsys.embeddings.config import served_dtype
from recsys.embeddings.quantised import TableBytes
from recsys.metrics.click import ClickMetrics, click_metrics
from recsys.metrics.groups import Grouped
from recsys.place import Place
from recsys.training.predict import Predictor
from recsys.training.predictions import MERGED
from recsys.training.share import with_groups

BAYES_OPTIMAL = "Bayes-optimal"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which run to evaluate, on what."""

    run: Positional[Path]
    """Run folder."""
    split: Literal["valid", "test"] = "test"
    """Held-out split."""
    data: Place | None = None
    """Prepared folder, may be a URL; without it, the one that the run was trained on."""
    truth: Path | None = None
    """FILE.truth.parquet of `recsys synth`: adds the row of the best possible predictions."""
    json: Path | None = None
    """Also write the metrics to this file."""
    by: str | None = None
    """Sparse feature to group rows by: adds the GAUC, and metrics of the rows of its most frequent ids."""
    tables: str | None = None
    """Quantise tables row by row before predicting: fp32, fp16, int8, int4 or int2."""

    def __post_init__(self) -> None:
        if self.tables is not None:
            served_dtype(self.tables)


@dataclass(frozen=True)
class Evaluation:
    """What a run is worth."""

    metrics: dict[str, ClickMetrics]
    """Of each member, of their merge, and of the truth if given."""
    grouped: dict[str, Grouped]
    """Within groups, of each member and of their merge, where rows are grouped."""
    tables: TableBytes | None
    """Where tables were quantised."""


def evaluate(config: EvaluateConfig, world: World) -> Evaluation | None:
    """Evaluate the members of a run and their merge; None on ranks other than 0.

    Raises:
        InputError: no run, no checkpoint, or data that does not fit it.
    """
    if config.json and not config.json.absolute().parent.is_dir():
        raise InputError(f"--json {config.json}: no such folder to write it to")
    predictor = Predictor(config.run, world, data=config.data)
    merge = predictor.merge()  # of the members as they were trained, where it is fitted only now
    tables = predictor.quantise(config.tables) if config.tables else None
    share = predictor.share(config.split, config.by)
    metrics, grouped, clicks = share.metrics(merge), share.grouped(merge) if config.by else {}, share.clicks()
    if not world.is_first:
        return None
    if grouped:
        metrics = with_groups(metrics, grouped)
    if config.truth:
        rows = metrics[MERGED].num_rows
        metrics[BAYES_OPTIMAL] = bayes_optimal(config.truth, predictor.config.data, config.split, rows, clicks)
    if config.json:
        values: dict[str, Any] = {"run": str(config.run), "split": config.split, "step": predictor.step}
        if tables:
            values["tables"] = asdict(tables)
        values["metrics"] = {name: asdict(member) for name, member in metrics.items()}
        if config.by:
            values["by"] = config.by
            values["groups"] = {name: asdict(found) for name, found in grouped.items()}
        write_whole(config.json, json.dumps(values, indent=2) + "\n")
    return Evaluation(metrics, grouped, tables)


def bayes_optimal(truth: Path, data: Path, split: str, num_rows: int, num_clicks: float) -> ClickMetrics:
    """Metrics of the true probabilities, on the rows of the log that `prepare` put into `split`.

    Args:
        truth: file of `recsys synth`.
        data: prepared folder.
        split: held-out split.
        num_rows: rows of the split, which must be those of the truth.
        num_clicks: of them, those with label 1.

    Raises:
        InputError: the truth of another log, or data whose rows do not tell their split.
    """
    try:
        manifest = json.loads((data / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{data / 'manifest.json'}: cannot read which rows are held out ({error})") from None
    rule, seed, of_log = manifest["config"]["split"], manifest["config"]["seed"], manifest["num_rows"]
    if rule not in ("random", "time", "test"):
        raise InputError(f"--truth needs data that were split by random or time, or all test, not by {rule}")
    try:
        found = pl.read_parquet_schema(truth)
        missing = [name for name in ("label", "probability") if name not in found]
        if missing:
            lacks = " and no ".join(missing)
            raise InputError(f"{truth}: not a truth file of `recsys synth`: it has no column {lacks}")
        rows = pl.scan_parquet(truth, row_index_name="row").with_columns(pl.col("row").cast(pl.UInt64))
        splits = pl.lit(TEST) if rule == "test" else split_of(pl.col("row"), rule, seed=seed, num_rows=of_log)
        is_held_out = splits == SPLITS.index(split)
        held_out = rows.filter(is_held_out).select("label", "probability").collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{truth}: not a truth file of `recsys synth` ({error})") from None
    labels = held_out["label"].to_numpy()
    if len(labels) != num_rows or labels.sum() != num_clicks:
        raise InputError(f"{truth}: not the truth of the log that {data} was prepared from (other rows or clicks)")
    return click_metrics(labels, held_out["probability"].to_numpy())
