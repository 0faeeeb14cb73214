"""The picture of `recsys shard-bench`: predicted against measured, one panel a phase."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from recsys.place import whole
from recsys.sharding.cluster import PHASES
from recsys.sharding.plan import TYPES
from recsys.studies.figures import BLACK, BLUE, DPI, FAINT, GREEN, ORANGE, PURPLE, RED, SKY

COLOURS = dict(zip(TYPES, (BLACK, BLUE, SKY, ORANGE, RED, GREEN, PURPLE), strict=True))
MARKERS = ("o", "^", "s", "D", "v", "P")
BAND = 0.3
"""Of the shaded band: relative error on either side."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(13.5, 7.4), layout="constrained")
    panels = figure.subplots(2, 4).flatten()
    ranks = sorted({_ranks(case) for case in result["cases"]})
    markers = {count: MARKERS[index % len(MARKERS)] for index, count in enumerate(ranks)}
    for panel, phase in zip(panels, PHASES, strict=False):
        _panel(panel, result, phase, markers)
    for panel in panels[[0, 4]]:
        panel.set_ylabel("predicted, ms")
    for panel in panels[3:7]:
        panel.set_xlabel("measured, ms")
    _legend(panels[7], result, markers)
    figure.suptitle(
        f"Phases of a step under {len(result['cases'])} plans: each point a case, predicted by rates that were fitted "
        "to the other half of the cases",
        fontsize=11,
    )
    with whole(path) as partial, partial.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=DPI)


def _panel(panel: Axes, result: Mapping[str, Any], phase: str, markers: Mapping[int, str]) -> None:
    statistic = result["config"]["statistic"]
    points = [
        (case["measured"][phase][statistic] * 1e3, predicted * 1e3, case)
        for case in result["cases"]
        if (predicted := case.get("calibrated", case["predicted"]).get(phase))
    ]
    for x, y, case in points:
        panel.scatter(
            x, y, s=16, color=COLOURS[case["sharding_type"]], marker=markers[_ranks(case)], alpha=0.65, linewidths=0
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_box_aspect(1)
    if points:
        values = [value for x, y, _ in points for value in (x, y)]
        ends = np.array([min(values) / 1.4, max(values) * 1.4])
        panel.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color="#ececec", linewidth=0, zorder=0)
        panel.plot(ends, ends, color=FAINT, linewidth=1.0, zorder=1)
        panel.set_xlim(*ends)
        panel.set_ylim(*ends)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    panel.spines[["top", "right"]].set_visible(False)
    off = [abs(y - x) / x for x, y, _ in points]
    panel.set_title(f"{phase.replace('_', ' ')}: median error {np.median(off):.0%}" if off else phase, fontsize=10)


def _legend(panel: Axes, result: Mapping[str, Any], markers: Mapping[int, str]) -> None:
    panel.set_axis_off()
    types = [name for name in TYPES if any(case["sharding_type"] == name for case in result["cases"])]
    dots: list[Any] = [
        Line2D([], [], linestyle="none", marker="o", color=COLOURS[name], label=name.replace("_", " "))
        for name in types
    ]
    dots += [
        Line2D([], [], linestyle="none", marker=marker, color=FAINT, label=f"{count} ranks")
        for count, marker in markers.items()
    ]
    dots += [
        Line2D([], [], color=FAINT, label="predicted = measured"),
        Patch(color="#ececec", label=f"within {BAND:.0%}"),
    ]
    panel.legend(handles=dots, loc="center left", frameon=False, fontsize=10)


def _ranks(case: Mapping[str, Any]) -> int:
    return int(case["layout"]["ranks_per_node"] * case["layout"]["nodes"])
