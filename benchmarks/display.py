"""Results of the throughput benchmark as tables of a terminal, and sweeps as plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs import FLOOR, OURS

TO_FIRST = "ratio_to_first_"
"""Before the axis and the first value of a sweep in the name of a ratio."""
UNITS = {
    "batch_size": "batch size, rows",
    "dim": "embedding dimension, columns",
    "pooling": "ids a row and field",
    "members": "members",
    "rows_per_table": "rows of a table",
    "ranks": "ranks",
}
GROWS = {"batch_size": 1, "dim": 1, "pooling": 1, "members": 1, "rows_per_table": 0, "ranks": -1}
"""By which power of it a step's time grows, were it linear: tables cost what is looked up, whatever their rows; ranks
share the work."""


def tables(results: list[dict[str, Any]], axis: str | None) -> list[Table]:
    """What a terminal shows: rates and ratios of every case, then phases and ceilings of the first."""
    swept = axis or "backbone"
    rates = Table(title="Training, medians of turns", title_justify="left")
    for column in (swept.replace("_", " "), "case"):
        rates.add_column(column)
    for column in ("rows/s", "step, ms", "ours / case", *(["ours / first"] if axis else [])):
        rates.add_column(column, justify="right")
    for line in results:
        metrics, ratios = line["metrics"], line["ratios"]
        for name, step in metrics["step_ms"].items():
            rate = metrics["floor_rows_per_s"] if name == FLOOR else metrics["rows_per_s"][name]
            ratio = ratios.get("floor_share" if name == FLOOR else f"ratio_to_{name}")
            to_first = next((each for key, each in ratios.items() if key.startswith(TO_FIRST)), None)
            first = [_ratio(to_first if name == OURS else None)] if axis else []
            where = f"{line['config'][swept]}"
            rates.add_row(where, name, f"{rate['median']:,.0f}", f"{step['median']:.1f}", _ratio(ratio), *first)
        rates.add_section()
    return [rates, _first(results[0]["metrics"])]


def _first(metrics: Mapping[str, Any]) -> Table:
    shown = Table(title="A step, and its floors (of the first case)", title_justify="left", show_header=False)
    shown.add_column("what")
    shown.add_column("figure", justify="right")
    for phase, spent in metrics["phase_ms"].items():
        shown.add_row(f"{phase.replace('_', ' ')}, ms", f"{spent:.1f}")
    shown.add_row("step, ms", f"{metrics['step_ms'][OURS]['median']:.1f}")
    shown.add_row("matrix products alone, ms", f"{metrics['step_ms'][FLOOR]['median']:.1f}")
    shown.add_row("bytes of tables alone, ms", f"{metrics['table_floor_ms']:.1f}")
    shown.add_row("matrix products, GFLOP", f"{metrics['flops'] / 1e9:.1f}")
    shown.add_row("tables, MB", f"{metrics['table_bytes'] / 1e6:.1f}")
    for name, ceiling in metrics["ceilings"].items():
        what, unit = name.removesuffix("_per_s").rsplit("_", maxsplit=1)
        shown.add_row(f"{what.replace('_', ' ')}, {'GB' if unit == 'bytes' else 'GFLOP'}/s", f"{ceiling / 1e9:,.1f}")
    return shown


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""


def plot(results: list[dict[str, Any]], axis: str, path: Path) -> None:
    """Draw what a step takes along a sweep, beside a line that is exactly linear, to a PNG; both axes logarithmic."""
    import matplotlib as mpl  # noqa: PLC0415  (half a second, which only plots need)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    values = [line["config"][axis] for line in results]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in results[0]["metrics"]["step_ms"]:
        spans = [line["metrics"]["step_ms"][name] for line in results]
        medians = [span["median"] for span in spans]
        errors = [[span["median"] - span["low"] for span in spans], [span["high"] - span["median"] for span in spans]]
        axes.errorbar(values, medians, yerr=errors, marker="o", capsize=3, label=name.replace("_", " "))
    first = results[0]["metrics"]["step_ms"][OURS]["median"]
    linear = [first * (value / values[0]) ** GROWS[axis] for value in values]
    label = {1: "linear", 0: "flat", -1: "shared equally"}[GROWS[axis]]
    axes.plot(values, linear, linestyle="--", color="gray", label=f"{label}, from the first")
    axes.set(xscale="log", yscale="log", xlabel=UNITS[axis], ylabel="time of a step, ms")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.set_xticks([], minor=True)
    for which in ("major", "minor"):
        getattr(axes.yaxis, f"set_{which}_formatter")("{x:,.4g}")
    axes.set_title(_title(results[0]["config"], axis))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _title(config: Mapping[str, Any], axis: str) -> str:
    others = {"batch_size": "batch", "dim": "dim", "rows_per_table": "rows a table"}
    return f"{config['backbone']}, " + ", ".join(
        f"{word} {config[key]:,}" for key, word in others.items() if key != axis
    )
