"""Pictures of a merge study, as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

from recsys.place import whole
from recsys.studies.estimates import Estimate
from recsys.studies.pool import METRICS
from recsys.studies.sets import BACKBONES, MIXED, SEEDS

if TYPE_CHECKING:
    from recsys.studies.merge_study import Results

DPI = 120
# The palette of Okabe & Ito (2008), which the colour-blind can tell apart.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
FAINT = "#b0b0b0"
TITLES = {"auc": "AUC", "logloss": "logloss, nats", "ne": "normalised entropy"}
SHOWN = ("auc", "logloss")
BAYES_SPANS = 1.0
"""How far from the curves the best possible may lie, in spans of the curves, to be drawn without a break."""


def draw_all(results: "Results", folder: Path) -> dict[str, Path]:
    """Draw every picture; returns name to file."""
    draws: dict[str, Callable[[Results], Figure]] = {
        "curves": _curves,
        "gains": _gains,
        "correlations": _correlations,
        "greedy": _greedy,
        "ambiguity": _ambiguity,
    }
    paths = {}
    for name, draw in draws.items():
        paths[name] = folder / f"{name}.png"
        with whole(paths[name]) as partial, partial.open("wb") as stream:
            draw(results).savefig(stream, format="png", dpi=DPI)
    return paths


def _styles(results: "Results") -> dict[str, tuple[str, str, str]]:
    """Source to colour, marker and label."""
    styles = {
        BACKBONES: (BLUE, "o", "different backbones"),
        SEEDS: (ORANGE, "s", "seeds of one backbone, all backbones"),
        MIXED: (GREEN, "^", "both mixed"),
    }
    for name in results.study.more_seeds_of[:1]:
        styles[f"{SEEDS} of {name}"] = (RED, "D", f"seeds of {name}")
    return styles


def _curves(results: "Results") -> Figure:
    """Level of each metric against M, with the bigger models at their budget."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = _styles(results)
    marks = {"wider": (PURPLE, "v"), "deeper": (BLACK, "P"), "bigger": (SKY, "X")}
    num_series = len(styles) + len(marks)
    for panel, metric in zip(panels, SHOWN, strict=True):
        for place, (source, style) in enumerate(styles.items()):
            points = [point for point in results.points if point.source == source]
            series = [(point.size, point.merged[metric]) for point in points]
            _errors(panel, series, _shift(place, num_series), *style, line="-")
        for place, (kind, (colour, marker)) in enumerate(marks.items(), start=len(styles)):
            series = [(found.size, found.rival[metric]) for found in results.comparisons if found.kind == kind]
            label = f"one {kind} {results.study.main}" if series else ""
            _errors(panel, series, _shift(place, num_series), colour, marker, label, line="none")
        _size_axis(panel, results, "members M, or one model with the FLOPs of M")
        _bayes_line(figure, panel, results, metric)
        panel.set_ylabel(f"test {TITLES[metric]} ({'higher' if METRICS[metric] > 0 else 'lower'} is better)")
    figure.suptitle(
        f"{results.title}: merges of M members by the mean logit\n"
        "points: mean over disjoint sets; bars: standard error of it over sets, on these test rows",
        fontsize=11,
        parse_math=False,
    )
    _legend_below(figure, panels[0])
    return figure


def _gains(results: "Results") -> Figure:
    """Paired gain over the mean of a set's own members."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = _styles(results)
    for panel, metric in zip(panels, SHOWN, strict=True):
        others = [f"{SEEDS} of {name}" for name in results.study.backbones if f"{SEEDS} of {name}" not in styles]
        for place, source in enumerate(others):
            points = [point for point in results.points if point.source == source]
            label = "seeds of another backbone" if place == 0 else ""
            sizes, means = [p.size for p in points], [1e3 * p.over_mean[metric].mean for p in points]
            panel.plot(sizes, means, color=FAINT, linewidth=1.0, label=label, zorder=1)
        for place, (source, style) in enumerate(styles.items()):
            points = [point for point in results.points if point.source == source]
            series = [(point.size, _times(point.over_mean[metric], 1e3)) for point in points]
            _errors(panel, series, _shift(place, len(styles)), *style, line="-")
        panel.axhline(0.0, color=FAINT, linewidth=0.8, linestyle="--")
        _size_axis(panel, results, "members M")
        panel.set_ylabel(f"gain in {TITLES[metric].replace(', nats', '')}, {_unit(metric)}")
    figure.suptitle(
        f"{results.title}: gain of the merge over the mean of its own members\n"
        "points: mean over disjoint sets, paired by set; bars: standard error of it over sets",
        fontsize=11,
        parse_math=False,
    )
    _legend_below(figure, panels[0])
    return figure


def _unit(metric: str) -> str:
    return "thousandths" if metric == "auc" else "millinats"


def _times(found: Estimate, factor: float) -> Estimate:
    error = None if found.standard_error is None else factor * found.standard_error
    return Estimate(mean=factor * found.mean, standard_error=error, count=found.count)


def _errors(
    panel: Axes,
    series: Sequence[tuple[int, Estimate]],
    shift: float,
    colour: str,
    marker: str,
    label: str,
    line: str,
) -> None:
    """Means at M, moved sideways by a factor so that bars of several series do not hide one another."""
    sizes = [size * shift for size, _ in series]
    means = [found.mean for _, found in series]
    errors = [found.standard_error or 0.0 for _, found in series]
    panel.errorbar(
        sizes, means, errors, color=colour, marker=marker, linestyle=line, label=label, markersize=5.5, linewidth=1.4,
        elinewidth=1.2, capsize=3,
    )  # fmt: skip


def _shift(place: int, num_series: int) -> float:
    return float(2.0 ** (0.055 * (place - (num_series - 1) / 2)))


def _size_axis(panel: Axes, results: "Results", label: str) -> None:
    sizes = sorted({*results.study.sizes, *results.study.rivals})
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    panel.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.35)
    panel.set_xlabel(label)
    panel.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _bayes_line(figure: Figure, panel: Axes, results: "Results", metric: str) -> None:
    """A line for the best possible; where it would flatten the curves, in a strip beyond a break of the axis."""
    if results.bayes_optimal is None:
        return
    best = getattr(results.bayes_optimal, metric)
    low, high = panel.get_ylim()
    line: dict[str, Any] = {
        "color": BLACK,
        "linewidth": 1.2,
        "linestyle": ":",
        "label": "best possible (true probabilities)",
    }
    if low - BAYES_SPANS * (high - low) <= best <= high + BAYES_SPANS * (high - low):
        panel.axhline(best, **line)
        return
    # What is above is drawn above: the panel keeps seven eighths of its place, and the strip gets the rest.
    place = panel.get_subplotspec()
    assert place is not None
    is_above = best > high
    parts = place.subgridspec(2, 1, height_ratios=(1, 7) if is_above else (7, 1), hspace=0.03)
    panel.set_subplotspec(parts[1 if is_above else 0])
    strip = figure.add_subplot(parts[0 if is_above else 1], sharex=panel)
    strip.axhline(best, **line)
    strip.set_ylim(best - (high - low) / 14, best + (high - low) / 14)
    strip.set_yticks([best], [f"{best:.4f}"])
    strip.spines[["top", "right", "bottom"] if is_above else ["top", "right"]].set_visible(False)
    upper, lower = (strip, panel) if is_above else (panel, strip)
    upper.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    upper.spines["bottom"].set_visible(False)
    lower.set_xlabel(panel.get_xlabel())
    if not is_above:
        panel.set_xlabel("")
    # The break: two short strokes across the axis on either side of it.
    for axes, edge in ((upper, 0.0), (lower, 1.0)):
        axes.plot([0], [edge], transform=axes.transAxes, marker=[(-1, -0.5), (1, 0.5)], markersize=9, color=BLACK,
                  clip_on=False, linestyle="none")  # fmt: skip
    panel.plot([], [], **line)  # for the legend


def _legend_below(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _correlations(results: "Results") -> Figure:
    """Correlation of logits, and disagreement, by pair of backbones."""
    found = results.likeness
    count = len(found.backbones)
    side = 1.6 + 0.62 * count
    figure = Figure(figsize=(2 * side, 0.92 * side), layout="constrained")
    panels = figure.subplots(1, 2)
    matrices = (found.correlations, found.disagreement)
    titles = ("correlation of logits", "disagreement at the base rate, share of rows")
    for panel, matrix, title, colours in zip(panels, matrices, titles, ("viridis", "cividis"), strict=True):
        values = np.array([[np.nan if value is None else value for value in row] for row in matrix])
        image = panel.imshow(values, cmap=colours)
        panel.set_xticks(range(count), found.backbones, rotation=45, ha="right", fontsize=9)
        panel.set_yticks(range(count), found.backbones, fontsize=9)
        panel.set_title(title, fontsize=10)
        middle = (np.nanmin(values) + np.nanmax(values)) / 2 if np.isfinite(values).any() else 0.0
        for i, j in np.ndindex(values.shape):
            if np.isfinite(values[i, j]):
                ink = "white" if values[i, j] < middle else "black"
                text = f"{values[i, j]:.3f}".removeprefix("0")
                panel.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
        figure.colorbar(image, ax=panel, shrink=0.75)
    figure.suptitle("Members by backbone, means over pairs of members; on the diagonal pairs of seeds", fontsize=11)
    return figure


def _greedy(results: "Results") -> Figure:
    """Metrics of the first 1, 2, ... members as greedy selection takes them."""
    found = results.greedy
    count = len(found.members)
    places = np.arange(1, count + 1)
    figure = Figure(figsize=(max(8.0, 2.0 + 0.3 * count), 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(places, found.valid_loglosses, color=SKY, marker="o", markersize=4, label="validation, selected on")
    upper.plot(places, [s["logloss"] for s in found.test], color=BLUE, marker="s", markersize=4, label="test")
    upper.set_ylabel(TITLES["logloss"])
    lower.plot(places, [s["auc"] for s in found.test], color=BLUE, marker="s", markersize=4)
    lower.set_ylabel("test AUC")
    for panel in (upper, lower):
        panel.axvline(found.num_chosen, color=RED, linewidth=1.0, linestyle="--", label="best on validation")
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    upper.legend(frameon=False, fontsize=9)
    lower.set_xticks(places, found.members, rotation=90, fontsize=8)
    lower.set_xlabel("members in the order in which they are taken")
    figure.suptitle(f"Greedy selection over the pool of {count}: the mean logit of all taken so far", fontsize=11)
    return figure


def _ambiguity(results: "Results") -> Figure:
    """What members' differences are worth against what is gained by them, a dot a set."""
    figure = Figure(figsize=(11, 5.0), layout="constrained")
    panels = figure.subplots(1, 2)
    wanted = {f"{SEEDS} of {name}" for name in results.study.backbones} | {BACKBONES, MIXED}
    groups = ((SEEDS, ORANGE, "s", "seeds of one backbone"), (BACKBONES, BLUE, "o", "different backbones"),
              (MIXED, GREEN, "^", "both mixed"))  # fmt: skip
    labels = ("gain in logloss over the best member, millinats", "gain in AUC over the mean member, thousandths")
    for group, colour, marker, label in groups:
        sets = [s for s in results.sets if s.size > 1 and s.source in wanted and s.source.startswith(group)]
        x = [1e3 * s.ambiguity for s in sets]
        gains = ([1e3 * s.over_best["logloss"] for s in sets], [1e3 * s.over_mean["auc"] for s in sets])
        for panel, y in zip(panels, gains, strict=True):
            panel.scatter(x, y, s=26, color=colour, marker=marker, alpha=0.7, linewidths=0, label=label)
    for panel, label in zip(panels, labels, strict=True):
        panel.axhline(0.0, color=FAINT, linewidth=0.8, linestyle="--")
        panel.set_xlabel("ambiguity, millinats (the gain in logloss over the mean member)")
        panel.set_ylabel(label)
        panel.grid(color="#e8e8e8", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Sets of members: how much they differ, and what merging them gains on the test rows", fontsize=11)
    _legend_below(figure, panels[0])
    return figure
