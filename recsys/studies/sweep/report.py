"""What a sweep found: a table, a picture, and a page with both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recsys.page import PAGE, picture, table, tag
from recsys.place import whole
from recsys.studies.sweep.config import SweepConfig
from recsys.studies.sweep.space import Values, described

DPI = 120
# Of Okabe & Ito (2008), which the colour-blind can tell apart.
BLUE, RED, FAINT = "#0072b2", "#d55e00", "#b0b0b0"
COLUMNS = 3
"""Panels of a row of the picture."""
TITLES = {"ne": "normalised entropy", "logloss": "logloss, nats", "auc": "AUC"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A trial that ended."""

    name: str
    """Of its folder, in OUT/trials."""
    values: Values
    state: str
    """complete, stopped (pruned) or failed."""
    value: float
    """The metric at its end; of a stopped trial, at its last validation; NaN where there is none."""
    validations: dict[int, float]
    """The metric by step."""
    seconds: float
    problem: str | None


def ranked(config: SweepConfig, records: Sequence[Record]) -> list[Record]:
    """Complete trials from best to worst, then the stopped, then the failed."""
    order = {"complete": 0, "stopped": 1, "failed": 2}
    sign = 1 if config.lower_is_better else -1

    def place(record: Record) -> tuple[int, float, str]:
        return order[record.state], math.inf if math.isnan(record.value) else sign * record.value, record.name

    return sorted(records, key=place)


def rows(config: SweepConfig, records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    fields = list(records[0].values)
    head = ["trial", *fields, config.metric, "steps", "seconds", "state"]
    return head, [
        [
            record.name,
            *(described({field: record.values[field]}).removeprefix(f"{field}=") for field in fields),
            "" if math.isnan(record.value) else f"{record.value:.5f}",
            f"{max(record.validations, default=0):,}",
            f"{record.seconds:,.0f}",
            record.state if record.problem is None else f"{record.state}: {record.problem}",
        ]
        for record in ranked(config, records)
    ]


def show(config: SweepConfig, records: Sequence[Record]) -> None:
    """Print the table."""
    head, lines = rows(config, records)
    printed = Table(title=f"{config.out}: best first", title_justify="left")
    for column in head:
        printed.add_column(column, justify="left" if column in ("trial", "state") else "right")
    for line in lines:
        printed.add_row(*map(escape, line))
    Console().print(printed)


def write_report(config: SweepConfig, records: Sequence[Record], best: Record) -> Path:
    """Write OUT/sweep.png and OUT/sweep.html; returns the page."""
    drawn = draw(config, records, best, config.out / "sweep.png")
    counts = {state: sum(record.state == state for record in records) for state in ("complete", "stopped", "failed")}
    told = ", ".join(f"{state} {count}" for state, count in counts.items() if count)
    verdict = f"Best: {described(best.values)}, with {TITLES[config.metric]} {best.value:.5f} on validation rows."
    parts = [
        tag("h1", "Sweep"),
        f'<p class="verdict">{tag("b", verdict)}</p>',
        tag("p", f"Trials: {len(records)} ({told}), by {config.sampler}. `recsys train best.json` trains the best."),
        tag("p", "It was chosen on the validation rows, so its value there flatters it; the test rows were not used."),
        picture("sweep", {"sweep": drawn}),
        table(*rows(config, records)),
    ]
    path = config.out / "sweep.html"
    with whole(path) as partial:
        partial.write_text(PAGE.format(title="Sweep", body="\n".join(parts)))
    return path


def draw(config: SweepConfig, records: Sequence[Record], best: Record, path: Path) -> Path:
    """Draw the trials in turn, their validations, and what each field does."""
    fields = list(best.values)
    num_panels = 2 + len(fields)
    num_rows = -(-num_panels // COLUMNS)
    figure = Figure(figsize=(3.8 * COLUMNS, 3.2 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, COLUMNS, squeeze=False).flatten().tolist()
    for axes in panels[num_panels:]:
        axes.set_axis_off()
    _turns(panels[0], config, records)
    _courses(panels[1], records, best)
    for axes, field in zip(panels[2:], fields, strict=False):
        _effect(axes, records, best, field)
    for axes in panels[:num_panels]:
        axes.set_ylabel(TITLES[config.metric])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    with whole(path) as partial, partial.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=DPI)
    return path


def _scored(records: Sequence[Record], state: str) -> list[Record]:
    return [record for record in records if record.state == state and not math.isnan(record.value)]


def _turns(axes: Axes, config: SweepConfig, records: Sequence[Record]) -> None:
    """The trials one after another, and the best so far."""
    for state, marker, colour in (("complete", "o", BLUE), ("stopped", "x", FAINT)):
        shown = _scored(records, state)
        numbers = [records.index(record) + 1 for record in shown]
        axes.plot(numbers, [record.value for record in shown], marker, color=colour, label=state)
    pick = min if config.lower_is_better else max
    so_far: list[float] = []
    for record in records:
        before = so_far[-1] if so_far else math.nan
        now = record.value if record.state == "complete" else math.nan
        so_far.append(pick((value for value in (before, now) if not math.isnan(value)), default=math.nan))
    axes.step(range(1, len(records) + 1), so_far, where="post", color=RED, linewidth=1, label="best so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.legend(fontsize=8, frameon=False)


def _courses(axes: Axes, records: Sequence[Record], best: Record) -> None:
    """The validations of each trial."""
    for record in records:
        colour = RED if record is best else BLUE if record.state == "complete" else FAINT
        axes.plot(list(record.validations), list(record.validations.values()), ".-", color=colour, linewidth=1)
    axes.set_xlabel("step (red: the best, grey: stopped)")


def _effect(axes: Axes, records: Sequence[Record], best: Record, field: str) -> None:
    """The metric against one field."""
    drawn = isinstance(best.values[field], int | float)
    names = list(dict.fromkeys(str(record.values[field]) for record in records))
    for state, marker, colour in (("stopped", "x", FAINT), ("complete", "o", BLUE)):
        shown = _scored(records, state)
        places = [record.values[field] if drawn else names.index(str(record.values[field])) for record in shown]
        axes.plot(places, [record.value for record in shown], marker, color=colour)
    numbers = [float(record.values[field]) for record in records] if drawn else []
    if drawn and min(numbers) > 0 and max(numbers) / min(numbers) > 20:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if not drawn:
        axes.set_xticks(range(len(names)), names, rotation=20 if max(map(len, names)) > 8 else 0)
        axes.margins(x=0.2)
    axes.set_xlabel(field)
