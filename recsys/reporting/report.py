"""`recsys report`: one HTML file that holds what is known of some runs, finished or not."""

import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from recsys.config import InputError, write_whole
from recsys.page import PAGE, picture, table, tag
from recsys.reporting.config import ReportConfig
from recsys.reporting.differences import OF_THE_PLACE, differences, from_nearest_recipe
from recsys.reporting.figures import draw_all
from recsys.reporting.records import MERGED, Run, read_runs

CURVES = (
    "Points: validation rows. Thin lines: predictions of training rows, each made before its row was learnt, since the "
    "line of the log before."
)
BINS = (
    "Validation rows in bins of equal weight by rising prediction: how often they were clicked, beside the mean "
    "prediction. Grey: perfect calibration."
)


def report(config: ReportConfig) -> Path:
    """Write the report; returns its file.

    Raises:
        InputError: a folder that is no run's, or no place to write to.
    """
    out = _out(config)
    runs = read_runs(config.runs)
    with tempfile.TemporaryDirectory() as folder:
        write_whole(out, html(runs, draw_all(runs, Path(folder))))
    return out


def _out(config: ReportConfig) -> Path:
    if config.out is None and len(config.runs) > 1:
        raise InputError(f"{len(config.runs)} runs have one report: name its file by --out")
    out = config.out or Path(*config.runs[:1]) / "report.html"
    if config.out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder to write it to")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file in it, such as {out / 'report.html'}")
    return out


def html(runs: Sequence[Run], figures: Mapping[str, Path]) -> str:
    """Write the page; `figures` are name to PNG file."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"Runs {', '.join(run.name for run in runs)}"
    parts = [tag("h1", title), *_overview(runs), *_metrics(runs)]
    for name, head, text in (
        ("curves", "Training and validation", CURVES + _of_several(runs)),
        ("calibration", "Calibration", BINS),
        ("speed", "Throughput", _speed(runs)),
    ):
        if name in figures:
            parts += [tag("h2", head), picture(name, figures), f'<p class="note">{escape(text)}</p>']
    return PAGE.format(title=escape(title), body="\n".join([*parts, *_configs(runs)]))


def _of_several(runs: Sequence[Run]) -> str:
    return " Of several runs, validation is that of the merge and training that of the first member." * (len(runs) > 1)


def _overview(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs:
        trained, seconds = run.step * run.config["train"]["batch_size"], run.seconds()
        speed = [f"{trained / seconds:,.0f}", f"{seconds:,.0f}"] if seconds else ["", ""]
        rows.append([run.name, run.state, ", ".join(run.members), str(run.config["data"]), f"{trained:,}", *speed])
    head = ["run", "state", "members", "data", "rows trained", "rows/s", "training s"]
    return [table(head, rows)]


def _metrics(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs:
        last = run.valid[-1] if run.valid else {}
        for name in (*run.members, MERGED):
            if name in last:
                start = [run.name] if len(runs) > 1 else []
                rows.append([*start, name, f"{last['step']:,}", *_cells(last[name])])
    if not rows:
        return [tag("p", "No validation yet.")]
    start = ["run"] if len(runs) > 1 else []
    head = [*start, "member", "step", "AUC", "logloss", "NE", "calibration", "AUPRC", "ECE", "rows"]
    text = "The last validation; in brackets, 95 % intervals over validation rows (DeLong's for AUC)."
    return [tag("h2", "Metrics"), table(head, rows), f'<p class="note">{escape(text)}</p>']


def _cells(values: Mapping[str, Any]) -> list[str]:
    cells = []
    for name in ("auc", "logloss", "ne"):
        interval = values.get(f"{name}_ci")
        around = f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else ""
        cells.append(_number(values[name]) + around if name in values else "")
    cells += [_number(values[name]) if name in values else "" for name in ("calibration", "auprc", "ece")]
    return [*cells, f"{values['num_rows']:,}" if "num_rows" in values else ""]


def _number(value: float | None) -> str:
    """A number of a record, in which null is NaN."""
    return "nan" if value is None else f"{value:.5f}"


def _speed(runs: Sequence[Run]) -> str:
    told = []
    for run in runs:
        _, utilisation = run.series("train", "mfu")
        _, ids = run.series("train", "ids_per_s")
        if utilisation and ids:
            told.append(f"{run.name}: last {ids[-1]:,.0f} ids/s, {utilisation[-1]:.2%} MFU")
    phases = " Phases are those of rank 0, on a GPU as its host sees them." if any(run.phases() for run in runs) else ""
    mfu = ". MFU counts the matrix products of dense layers alone." if told else ""
    return f"Without validation and starts.{phases} {'; '.join(told)}{mfu}"


def _configs(runs: Sequence[Run]) -> list[str]:
    if len(runs) > 1:
        # Runs of other data are not alike, whatever else is.
        rows = differences([run.config for run in runs], OF_THE_PLACE - {"data"})
        names = [run.name for run in runs]
        title, alike = "Where their configs differ", "Their configs are alike."
    else:
        recipe, rows = from_nearest_recipe(runs[0].config)
        names = [f"recipe {recipe}", "this run"]
        title, alike = "Config", f"That of the recipe {recipe}."
    text = table(["field", *names], [[name, *values] for name, values in rows]) if rows else tag("p", alike)
    return [tag("h2", title), text]
