"""What `recsys shard-bench` found, to read."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from recsys.sharding.cluster import PHASES

WIDTH = 200
"""Of the table where nothing says how wide a line may be: in a file or a pipe."""


def show(result: Mapping[str, Any]) -> None:
    """Print every case, the errors by phase, and what plans took."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(cases(result))
    console.print(error_table(result["errors"]))
    for layout in result["plans"]:
        console.print(plans(layout))


def cases(result: Mapping[str, Any]) -> Table:
    """Measured and predicted milliseconds of every case, phase by phase."""
    statistic = result["config"]["statistic"]
    table = _table(
        f"ms of each phase, measured ({statistic} of steps) / predicted by rates fitted to the other half of the cases",
        ["type", "ranks"],
        ["batch", "ids", "dim", "tables", *(phase.replace("_", " ") for phase in PHASES), "error of the step"],
    )
    for case in sorted(result["cases"], key=_order):
        measured = {phase: found[statistic] for phase, found in case["measured"].items()}
        predicted = case.get("calibrated", case["predicted"])
        layout = case["layout"]
        total, expected = sum(measured.values()), sum(predicted.values())
        table.add_row(
            case["sharding_type"],
            " x ".join(str(layout[name]) for name in ("nodes", "ranks_per_node")),
            *(f"{case[name]:,}" for name in ("batch_size", "pooling", "dim", "num_tables")),
            *(f"{_ms(measured.get(phase))} / {_ms(predicted.get(phase))}" for phase in PHASES),
            f"{(expected - total) / total:+.0%}",
        )
    return table


def error_table(errors: Mapping[str, Any]) -> Table:
    """Median relative error by phase and ranks, before rates were fitted and after, held out."""
    columns = [f"{ranks} ranks, {when}" for ranks in errors for when in ("as it stood", "fitted, held out", "cases")]
    table = _table("median relative error of what was predicted", ["phase"], columns)
    for phase in PHASES:
        shown = []
        for of_ranks in errors.values():
            found = of_ranks.get(phase)
            shown += [_percent(found, "before"), _percent(found, "after"), str(found["cases"]) if found else "-"]
        table.add_row(phase.replace("_", " "), *shown)
    return table


def plans(layout: Mapping[str, Any]) -> Table:
    """What steps took under plans of different makers."""
    table = _table(
        f"steps of {layout['workload']} on {layout['ranks']} ranks under plans of",
        ["maker"],
        ["measured, ms", "predicted, ms", "of TorchRec's planner", "types"],
    )
    base = layout["plans"]["torchrec"]["measured"]
    for maker, found in layout["plans"].items():
        kinds = ", ".join(f"{count} {name}" for name, count in found["types"].items())
        ratio = f"{found['measured'] / base:.2f}"
        table.add_row(maker, _ms(found["measured"]), _ms(found["predicted"]), ratio, kinds)
    return table


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _order(case: Mapping[str, Any]) -> tuple[Any, ...]:
    sizes = (case[name] for name in ("batch_size", "pooling", "dim", "num_tables"))
    return (case["sharding_type"], *reversed(case["layout"].values()), *sizes)


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.2f}" if seconds < 0.01 else f"{seconds * 1e3:,.0f}"


def _percent(found: Mapping[str, Any] | None, name: str) -> str:
    return f"{found[name]:.0%}" if found and found[name] is not None else "-"
