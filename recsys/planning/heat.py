"""The heat map of a plan: ranks x tables, and beside it what each rank spends by phase and holds by part."""

import base64
import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from recsys.config import write_whole
from recsys.page import PAGE, table, tag
from recsys.place import whole
from recsys.sharding.cluster import GIB, PHASES
from recsys.sharding.quote import Quote
from recsys.sharding.report import Heat
from recsys.sharding.work import PARTS

DPI = 120
# The palette of Okabe & Ito (2008), which the colour-blind can tell apart.
PHASE_COLOURS = ("#56b4e9", "#0072b2", "#009e73", "#b0b0b0", "#f0e442", "#d55e00", "#cc79a7")
PART_COLOURS = ("#0072b2", "#56b4e9", "#e69f00", "#b0b0b0")
MOST_LABELS = 32


def draw(heat: Heat, priced: Quote, path: Path) -> None:
    """Write a PNG, or an HTML page with the picture and a table that names every cell."""
    figure = _figure(heat, priced)
    if path.suffix == ".html":
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        write_whole(path, _html(heat, priced, buffer.getvalue()))
        return
    with whole(path) as partial, partial.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=DPI)


def _figure(heat: Heat, priced: Quote) -> Figure:
    rows, columns = heat.milliseconds.shape
    height = min(max(2.6 + 0.28 * rows, 4.5), 13)
    width = min(max(7 + 0.22 * columns, 11), 19)
    figure = Figure(figsize=(width, height), layout="constrained")
    cells, times, memory = figure.subplots(1, 3, sharey=True, width_ratios=[max(columns * 0.22, 4), 2.2, 2.2])
    figure.suptitle(
        f"{priced.workload.name} on {priced.cluster.name}: step {priced.step_seconds * 1e3:,.2f} ms, "
        f"{priced.rows_per_second / 1e6:,.2f} M rows/s, balance {priced.balance:.2f}",
        fontsize=11,
    )
    _cells(figure, cells, heat)
    of_row = [int(begin + priced.seconds[begin : end + 1].sum(axis=1).argmax()) for begin, end in heat.ranks]
    _bars(times, priced.seconds[of_row] * 1e3, PHASES, PHASE_COLOURS)
    times.set_title("by phase, ms", fontsize=9)
    fullest = [int(begin + priced.used[begin : end + 1, 0].argmax()) for begin, end in heat.ranks]
    _bars(memory, priced.bytes[fullest, :, 0] / GIB, PARTS, PART_COLOURS)
    memory.axvline(priced.capacity[0] / GIB, color="#d55e00", linewidth=1.2)
    memory.set_xlim(0, priced.capacity[0] / GIB * 1.04)
    memory.set_title(f"device memory, GiB (of {priced.capacity[0] / GIB:,.0f})", fontsize=9)
    return figure


def _cells(figure: Figure, axes: Axes, heat: Heat) -> None:
    values = np.ma.masked_equal(heat.milliseconds, 0.0)
    high = float(values.max()) if values.count() else 1.0
    low = max(float(values.min()), high * 1e-4) if values.count() else 0.1
    image = axes.imshow(
        values, aspect="auto", cmap="viridis", norm=LogNorm(low, max(high, low * 1.01)), interpolation="none"
    )
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.set_label("ms on a rank", fontsize=8)
    for which in ("major", "minor"):
        bar.ax.tick_params(axis="y", which=which, labelsize=6)
    for set_formatter in (bar.ax.yaxis.set_major_formatter, bar.ax.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    for axis, labels in ((axes.xaxis, heat.columns), (axes.yaxis, heat.rows)):
        step = -(-len(labels) // (MOST_LABELS * (2 if axis is axes.xaxis else 1)))
        axis.set_ticks(range(0, len(labels), step), labels[::step])
    axes.tick_params(axis="x", rotation=90, labelsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylabel("rank")
    axes.set_title("time on each table (white: none)", fontsize=9)
    if any("-" in name for name in heat.columns):
        axes.set_xlabel("tables, the dearest first", fontsize=8)


def _bars(axes: Axes, values: np.ndarray, names: tuple[str, ...], colours: tuple[str, ...]) -> None:
    """Stacked bars, one a row of the heat map."""
    left = np.zeros(len(values))
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        if values[:, index].any():
            axes.barh(
                range(len(values)), values[:, index], left=left, height=0.85, color=colour, label=name.replace("_", " ")
            )
        left += values[:, index]
    axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _html(heat: Heat, priced: Quote, png: bytes) -> str:
    title = f"{priced.workload.name} on {priced.cluster.name}"
    image = base64.b64encode(png).decode()
    phases = table(
        ["phase", "slowest rank, ms", "mean, ms"],
        [
            [name.replace("_", " "), f"{column.max() * 1e3:,.3f}", f"{column.mean() * 1e3:,.3f}"]
            for name, column in zip(PHASES, priced.seconds.T, strict=True)
        ],
    )
    cells = table(
        ["rank", *heat.columns],
        [
            [row, *(f"{value:.3f}" if value else "" for value in values)]
            for row, values in zip(heat.rows, heat.milliseconds.tolist(), strict=True)
        ],
    )
    body = [
        tag("h1", title),
        tag("p", f"Step {priced.step_seconds * 1e3:,.2f} ms, {priced.rows_per_second:,.0f} rows/s."),
        f'<p><img alt="heat map" src="data:image/png;base64,{image}"></p>',
        tag("h2", "Phases"),
        phases,
        tag("h2", "Milliseconds of each rank on each table"),
        cells,
    ]
    return PAGE.format(title=title, body="\n".join(body))
