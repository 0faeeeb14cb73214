"""Panels: a picture of a profile, one small panel a column.

Bars are rows by value of a dense column; a curve is rows an id by rank of a sparse feature, on log axes. The second
line is the label mean, on a scale that all panels share, and the dashed one the label mean of all rows.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from recsys.data.profile import Buckets, DenseProfile, Profile, SparseProfile

ACROSS = 6
PANEL_INCHES = (2.4, 1.8)
HEAD_INCHES = 0.9
DPI = 110
ROWS_COLOUR, LABEL_COLOUR, FAINT = "#7f9cc0", "#c8501e", "#b0b0b0"
MIN_COUNT = 50
"""Rows of a bucket whose label mean is drawn; that of fewer is noise."""


def draw(profile: Profile, path: Path) -> None:
    """Write the picture as PNG."""
    columns: list[DenseProfile | SparseProfile] = [*profile.dense, *profile.sparse]
    across = min(ACROSS, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(across * PANEL_INCHES[0], down * PANEL_INCHES[1] + HEAD_INCHES), layout="constrained")
    figure.suptitle(
        f"{profile.name}: {profile.num_sampled:,} rows of {profile.split}, label mean {profile.label_mean:.3f}\n"
        "blue: rows by value (dense), or share of rows by rank of id (sparse, log axes); "
        "orange: label mean; dashed: of all rows",
        fontsize=10,
        parse_math=False,
    )
    label_limit = _label_limit(columns, profile.label_mean)
    axes = figure.subplots(down, across, squeeze=False).flat
    for index, (panel, column) in enumerate(zip(axes, columns, strict=False)):
        if isinstance(column, DenseProfile):
            middles = _draw_dense(panel, column)
        else:
            middles = _draw_sparse(panel, column, profile.num_sampled)
        is_last = index % across == across - 1
        _draw_label_means(panel, middles, column.buckets, profile.label_mean, label_limit, show_scale=is_last)
    for panel in axes[len(columns) :]:
        panel.set_visible(False)
    with path.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=DPI)


def _draw_dense(panel: Axes, column: DenseProfile) -> np.ndarray:
    edges, counts = np.array(column.buckets.edges), column.buckets.counts
    panel.stairs(counts, edges, fill=True, color=ROWS_COLOUR)
    panel.yaxis.set_major_locator(NullLocator())
    panel.xaxis.set_major_locator(MaxNLocator(4))
    _head(panel, column.name)
    return (edges[:-1] + edges[1:]) / 2


def _draw_sparse(panel: Axes, feature: SparseProfile, num_rows: int) -> np.ndarray:
    edges, counts = np.array(feature.buckets.edges), np.array(feature.buckets.counts)
    panel.set_xscale("log")
    panel.set_yscale("log")
    middles = np.sqrt(edges[:-1] * np.maximum(edges[1:] - 1, 1))
    shares = counts / np.diff(edges) / (num_rows * feature.hotness)
    panel.plot(middles, shares, color=ROWS_COLOUR, linewidth=1.8, marker="o", markersize=1.8)
    panel.set_xlim(0.8, 1.2 * max(feature.num_ids, 10))
    panel.set_ylim(10 ** np.floor(np.log10(shares.min(initial=0.1))), 1)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(numticks=4))
        axis.set_minor_locator(NullLocator())
    _head(panel, f"{feature.name}  {feature.num_ids:,} ids")
    return middles


def _head(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=8, loc="left", pad=3, parse_math=False)
    panel.tick_params(labelsize=6, length=2, colors="#606060")
    panel.spines[:].set_color(FAINT)


def _label_limit(columns: list[DenseProfile | SparseProfile], base: float) -> float:
    means = [
        mean
        for column in columns
        for mean, count in zip(column.buckets.label_means, column.buckets.counts, strict=True)
        if mean is not None and count >= MIN_COUNT
    ]
    return 1.1 * max([base, *means]) or 1.0


def _draw_label_means(
    panel: Axes, middles: np.ndarray, buckets: Buckets, base: float, limit: float, *, show_scale: bool
) -> None:
    shown = np.array(buckets.counts) >= MIN_COUNT
    means = np.array([np.nan if mean is None else mean for mean in buckets.label_means])
    second = panel.twinx()
    second.axhline(base, color=FAINT, linewidth=0.8, linestyle="--")
    second.plot(middles[shown], means[shown], color=LABEL_COLOUR, linewidth=1.2, marker="o", markersize=1.8)
    second.set_ylim(0, limit)
    second.spines[:].set_visible(False)
    if show_scale:
        second.yaxis.set_major_locator(MaxNLocator(4))
        second.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        second.tick_params(labelsize=6, length=2, colors=LABEL_COLOUR)
    else:
        second.yaxis.set_major_locator(NullLocator())
