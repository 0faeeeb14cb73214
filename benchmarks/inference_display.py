"""Results of benchmarks/inference.py as a table of a terminal, and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

PERCENTILES = (50, 90, 99)
Results = Sequence[Mapping[str, Any]]


def shown(results: Results) -> Table:
    """What a terminal shows."""
    table = Table(title="Predictions: ms of a call", title_justify="left")
    for column in ("rows", "members", "", "p50", "p90", "p99", "rows/s", "floor", "share"):
        table.add_column(column, justify="right")
    rows = None
    for line in results:
        config, metrics = line["config"], line["metrics"]
        if rows not in (None, config["batch_size"]):
            table.add_section()
        rows = config["batch_size"]
        table.add_row(
            f"{rows:,}",
            str(config["members"]),
            config["precision"],
            *(f"{metrics['ms'][f'p{q}']:.2f}" for q in PERCENTILES),
            f"{metrics['rows_per_s']['median']:,.0f}",
            f"{metrics['floor_ms']['median']:.2f}",
            f"{line['floor_share']:.2f}",
        )
    return table


def plot(results: Results, path: Path) -> None:
    """Draw the median and the 99th percentile of a call's latency by the rows of its batch; axes are logarithmic."""
    import matplotlib as mpl  # noqa: PLC0415  (half a second, which only plots need)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    curves: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for line in results:
        curves.setdefault((line["config"]["members"], line["config"]["precision"]), []).append(line)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (members, precision), lines in curves.items():
        rows = [line["config"]["batch_size"] for line in lines]
        ms = [line["metrics"]["ms"] for line in lines]
        label = f"{members} x {precision}"
        (drawn,) = axes.plot(rows, [each["p50"] for each in ms], marker="o", label=f"{label}, p50")
        axes.plot(
            rows,
            [each["p99"] for each in ms],
            linestyle=":",
            marker=".",
            color=drawn.get_color(),
            label=f"{label}, p99",
        )
    (members, _), lines = next(iter(curves.items()))
    floor = [line["metrics"]["floor_ms"]["median"] for line in lines]
    rows = [line["config"]["batch_size"] for line in lines]
    axes.plot(rows, floor, linestyle="--", color="gray", label=f"floor of {members} x bf16")
    axes.set(xscale="log", yscale="log", xlabel="rows of a call", ylabel="latency, ms")
    axes.set_title(results[0]["config"]["backbone"])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.4g}")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
