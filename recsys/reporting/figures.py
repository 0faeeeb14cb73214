"""Pictures of runs: one colour a member where there is one run, one colour a run where there are several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from recsys.reporting.records import MERGED, Run
from recsys.training.phases import PHASES

DPI = 120
# The palette of Okabe & Ito (2008), which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BLACK = "#000000"
# Bars take its yellow too, which is too pale for lines, and grey.
FILLS = (*COLOURS, "#f0e442", "#999999")
METRICS = {"logloss": "logloss, nats", "ne": "normalised entropy", "auc": "AUC"}


def draw_all(runs: Sequence[Run], folder: Path) -> dict[str, Path]:
    """Draw what the runs have records of; name to PNG file."""
    figures = {}
    for name, draw in {"curves": _curves, "calibration": _calibration, "speed": _speed}.items():
        figure = draw(runs)
        if figure is not None:
            figures[name] = folder / f"{name}.png"
            figure.savefig(figures[name], format="png", dpi=DPI)
    return figures


def _lines(runs: Sequence[Run]) -> list[tuple[Run, str, str, str]]:
    """Run, member, label and colour of each line: members and merge of one run, the merges of several."""
    if len(runs) > 1:
        return [(run, MERGED, run.name, COLOURS[index % len(COLOURS)]) for index, run in enumerate(runs)]
    (run,) = runs
    lines = [(run, name, name, COLOURS[index % len(COLOURS)]) for index, name in enumerate(run.members)]
    return [*lines, (run, MERGED, MERGED, BLACK)]


def _curves(runs: Sequence[Run]) -> Figure | None:
    """Metrics by step: validation with markers, training predictions thin."""
    if not any(run.train or run.valid for run in runs):
        return None
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 3), METRICS.items(), strict=True):
        for run, member, label, colour in _lines(runs):
            # The merge has no training predictions of its own: several runs show their first member's.
            trained = member if member != MERGED else (run.members or [""])[0]
            if member != MERGED or len(runs) > 1:
                _training(axes, run, trained, metric, colour)
            steps, values = run.series("valid", member, metric)
            axes.plot(steps, values, color=colour, linewidth=1.4, marker="o", markersize=4, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        _finish(axes)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def _training(axes: Axes, run: Run, member: str, metric: str, colour: str) -> None:
    steps, values = run.series("train", "window", member, metric)
    if metric == "logloss" and not steps:
        steps, values = run.series("train", "loss", member)
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.5)


def _calibration(runs: Sequence[Run]) -> Figure | None:
    """Reliability diagram of the last validation."""
    lines = []
    for run, member, label, colour in _lines(runs):
        bins = run.valid[-1].get(member, {}).get("reliability", []) if run.valid else []
        bins = [of_bin for of_bin in bins if None not in of_bin]  # null is NaN
        if bins:
            lines.append(([p for p, _, _ in bins], [y for _, y, _ in bins], label, colour))
    if not lines:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    whole, ratio = figure.subplots(1, 2)
    highest = max(max(*predicted, *clicked) for predicted, clicked, _, _ in lines)
    whole.plot([0, highest], [0, highest], color="#999999", linewidth=0.8)
    ratio.axhline(1.0, color="#999999", linewidth=0.8)
    for predicted, clicked, label, colour in lines:
        whole.plot(predicted, clicked, color=colour, linewidth=1.2, marker="o", markersize=4, label=label)
        some = [(p, p / y) for p, y in zip(predicted, clicked, strict=True) if y]
        ratio.plot(*zip(*some, strict=True), color=colour, linewidth=1.2, marker="o", markersize=4)
    whole.set_ylabel("share of clicks")
    whole.set_title("reliability", fontsize=10)
    ratio.set_ylabel("predicted over observed")
    ratio.set_title("calibration by prediction", fontsize=10)
    ratio.set_xscale("log")
    ratio.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ratio.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    ratio.xaxis.set_minor_formatter(NullFormatter())
    for axes in (whole, ratio):
        axes.set_xlabel("mean prediction of a bin")
        _finish(axes)
    whole.legend(fontsize=8, frameon=False)
    return figure


def _speed(runs: Sequence[Run]) -> Figure | None:
    """Rows a second by step, and where the time of a step goes."""
    series = [run.series("train", "rows_per_s") for run in runs]
    if not any(steps for steps, _ in series):
        return None
    phases = [run.phases() for run in runs]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    rate, spent = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, (run, (steps, values)) in enumerate(zip(runs, series, strict=True)):
        rate.plot(steps, values, color=COLOURS[index % len(COLOURS)], linewidth=1.2, label=run.name)
    rate.set_ylim(bottom=0)
    rate.set_xlabel("step")
    rate.set_title("training rows a second", fontsize=10)
    if len(runs) > 1:
        rate.legend(fontsize=8, frameon=False)
    _finish(rate)
    if any(phases):
        _bars(spent, runs, phases)
    else:
        spent.set_axis_off()
    return figure


def _bars(axes: Axes, runs: Sequence[Run], phases: Sequence[Mapping[str, float]]) -> None:
    """A bar a run, of its phases in the order in which a step takes them."""
    names = [run.name for run in runs]
    found = {name for each in phases for name in each}
    ordered = [*(name for name in PHASES if name in found), *sorted(found - set(PHASES))]
    left = [0.0] * len(runs)
    for index, phase in enumerate(ordered):
        widths = [each.get(phase, 0.0) for each in phases]
        axes.barh(names, widths, left=left, color=FILLS[index % len(FILLS)], label=phase, height=0.5)
        left = [so_far + width for so_far, width in zip(left, widths, strict=True)]
    axes.set_ylim(max(len(runs), 3) - 0.5, -0.5)
    axes.set_title("a step by phase, ms", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    _finish(axes, "x")


def _finish(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e4e4e4", linewidth=0.6)
