"""The picture and the page of a compression study."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recsys.page import PAGE, picture, table, tag
from recsys.place import whole
from recsys.studies.compression.jobs import WHOLE
from recsys.studies.compression.results import Point, Results, rows_of

DPI = 120
# The palette of Okabe & Ito (2008), which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"


def draw(results: Results, path: Path) -> Path:
    """Draw quality, step time and inference throughput against compression."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    figure.suptitle(f"{results.title} (bars: standard error)", fontsize=11)
    base = next(point for point in results.points if point.variant.kind == WHOLE)
    for axes, metric, title in ((panels[0, 0], "auc", "AUC"), (panels[0, 1], "logloss", "logloss, nats")):
        _quality(axes, results, base, metric)
        axes.set_title(title, fontsize=10)
    _speed(panels[1, 0], results, base, lambda point: point.speed.step_ms, "training step, ms")
    _speed(panels[1, 1], results, base, lambda point: point.speed.rows_per_s / 1e3, "inference, thousand rows/s")
    for axes in panels[1]:
        axes.set_xlabel("times fewer floats than whole tables")
    panels[0, 0].legend(fontsize=8, frameon=False)
    with whole(path) as partial, partial.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=DPI)
    return path


def _series(results: Results) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in results.points:
        if point.variant.kind != WHOLE:
            found.setdefault(point.title, []).append(point)
    return found


def _quality(axes: Axes, results: Results, base: Point, metric: str) -> None:
    of_base = base.test[metric]
    axes.axhline(of_base.mean, color="#000000", linewidth=1, label="whole tables")
    if of_base.standard_error:
        low, high = of_base.mean - of_base.standard_error, of_base.mean + of_base.standard_error
        axes.axhspan(low, high, color="#000000", alpha=0.1, linewidth=0)
    for index, (title, points) in enumerate(_series(results).items()):
        axes.errorbar(
            [point.compression for point in points],
            [point.test[metric].mean for point in points],
            yerr=[point.test[metric].standard_error or 0.0 for point in points],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            capsize=3,
            linewidth=1.4,
            label=title,
        )
    _finish(axes)


def _speed(axes: Axes, results: Results, base: Point, value: Callable[[Point], float], title: str) -> None:
    axes.axhline(value(base), color="#000000", linewidth=1)
    for index, points in enumerate(_series(results).values()):
        axes.plot(
            [point.compression for point in points],
            [value(point) for point in points],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
        )
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)


def html(results: Results, path: Path) -> str:
    """The page."""
    head, rows = rows_of(results)
    title = f"Compressed embeddings: {results.dataset}"
    body = [
        tag("h1", title),
        tag(
            "p",
            f"{results.title}. Learning rates of embeddings were chosen by validation logloss of the first seed; ± is "
            "the standard error over seeds; differences from whole tables are between runs of the same seed.",
        ),
        picture("compression", {"compression": path}),
        table(head, rows),
    ]
    if results.left_out:
        body += [tag("h2", "Left out"), table(["embeddings", "why"], [list(item) for item in results.left_out.items()])]
    return PAGE.format(title=title, body="\n".join(body))
