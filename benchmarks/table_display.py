"""Results of benchmarks/tables.py as a table of a terminal, and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from table_cases import FBGEMM, OURS, PHASES

from harness import Summary

Results = Sequence[Mapping[str, Any]]


def shown(results: Results) -> Table:
    """What a terminal shows; ratios are FBGEMM's time, memory's, and that of separate tables, over ours."""
    table = Table(title="Tables alone: ms, medians of turns", title_justify="left")
    table.add_column("tables", no_wrap=True)
    for column in ("", "ours", "FBGEMM", "ratio", "memory", "layout"):
        table.add_column(column, justify="right")
    for line in results:
        ms, ratios, titles = line["metrics"]["ms"], line["ratios"], _titles(line["config"])
        for phase in PHASES:
            times = [f"{ms[name][phase]['median']:.2f}" if name in ms else "" for name in (OURS, FBGEMM)]
            names = (f"{phase}_ratio_to_fbgemm", f"{phase}_bandwidth_share", f"{phase}_ratio_to_separate")
            what = titles[PHASES.index(phase)]
            table.add_row(what, phase, *times, *(_ratio(ratios.get(name)) for name in names))
        table.add_section()
    return table


def _titles(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """A line a phase."""
    members, spinning = config["members"], config["busy"]
    return (
        f"{config['features']} of {config['rows']:,} x {config['dim']}",
        config["ids"] + (f", busy {spinning}" if spinning else ""),
        f"{members} members {config['layout']}" if members > 1 else "",
    )


def _ratio(ratio: Summary | None) -> str:
    return f"{ratio['median']:.2f}" if ratio else ""


def plot(results: Results, path: Path) -> None:
    """Draw what a lookup takes by the rows of a table, a panel a width and way to draw ids, to a PNG.

    Of a lookup, not of a batch: large tables may be fewer. Both axes are logarithmic, bars reach from the lowest turn
    to the highest.
    """
    import matplotlib as mpl  # noqa: PLC0415  (half a second, which only plots need)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    panels: dict[tuple[int, str], dict[str, list[tuple[float, ...]]]] = {}
    for line in results:
        config = line["config"]
        curves = panels.setdefault((config["dim"], config["ids"]), {})
        for label, point in _points(line):
            curves.setdefault(label, []).append(point)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 5), layout="constrained", squeeze=False, sharey=True
    )
    for axis, ((dim, ids), curves) in zip(axes[0], panels.items(), strict=True):
        for label, points in curves.items():
            rows, medians, below, above = zip(*sorted(points), strict=True)
            axis.errorbar(rows, medians, yerr=(below, above), marker="o", capsize=3, label=label)
        axis.set(xscale="log", yscale="log", title=f"dim {dim}, {ids} ids", xlabel="rows of a table")
    for which in ("major", "minor"):
        getattr(axes[0][0].yaxis, f"set_{which}_formatter")("{x:,.3g}")
    axes[0][0].set_ylabel("ns a lookup of one member")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _points(line: Mapping[str, Any]) -> list[tuple[str, tuple[float, ...]]]:
    """Curves, and on each one rows, ns a lookup of one member, and how far the bar reaches below and above."""
    config = line["config"]
    lookups = line["metrics"]["lookups"] * (config["members"] if config["layout"] == "interleaved" else 1)
    more = [config["layout"]] if config["members"] > 1 else []
    if config["busy"]:
        more.append(f"busy {config['busy']}")
    found: list[tuple[str, tuple[float, ...]]] = []
    for name, by_phase in line["metrics"]["ms"].items():
        for phase in PHASES[:-1]:
            low, median, high = (1e6 * by_phase[phase][key] / lookups for key in ("low", "median", "high"))
            label = ", ".join(["FBGEMM" if name == FBGEMM else name, phase, *more])
            found.append((label, (config["rows"], median, median - low, high - median)))
    return found
