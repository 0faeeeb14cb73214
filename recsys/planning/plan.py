"""Plan for a cluster: make or read the plan, price it, write what was asked for."""

import json

import numpy as np
from rich.console import Console

from recsys.config import InputError, write_whole
from recsys.planning.config import DiffConfig, PlanConfig
from recsys.planning.remedies import remedies
from recsys.planning.workloads import workload_of
from recsys.progress import progress
from recsys.sharding.cluster import parse_cluster
from recsys.sharding.cost import CostModel
from recsys.sharding.make import cost_model, make_plan
from recsys.sharding.plan import Plan
from recsys.sharding.quote import Quote, quote, table_seconds
from recsys.sharding.report import differences, heat_values, show, show_differences

WIDTH = 140


def plan(recipe: str, config: PlanConfig) -> Quote:
    """Make, price, show and save a plan.

    Raises:
        InputError: bad input, or nothing that fits, with what would.
    """
    config.check_places()
    cluster = parse_cluster(config.cluster)
    workload = workload_of(recipe, config)
    if not workload.tables:
        raise InputError(
            f"{recipe} has no tables to shard: all its embeddings are of kinds that every rank holds whole"
        )
    model = cost_model(workload, cluster, config.sharding)
    try:
        with progress("plan", total=100, unit="%", show=len(workload.tables) >= 1000) as advance:
            made = make_plan(model, config.sharding, lambda share, note="": advance(100 * share, note))
    except InputError as error:
        if "nothing fits" not in str(error):
            raise
        found = remedies(workload, cluster, config.sharding)
        raise InputError(
            f"{error}; {'what would fit: ' + ', or '.join(found) if found else 'no single change mends it'}"
        ) from None
    priced = quote(made, model, reserve=config.sharding.reserve)
    if not priced.fits:  # a pinned plan, which nobody searched for
        found = remedies(workload, cluster, config.sharding)
        raise InputError(f"{'; '.join(priced.too_full())}; what would fit: {', or '.join(found) or 'no single change'}")
    _write(priced, model, config)
    show(priced, table_seconds(made, model), _console(), most=config.show)
    return priced


def _write(priced: Quote, model: CostModel, config: PlanConfig) -> None:
    if config.out:
        priced.plan.save(config.out)
    if config.json:
        write_whole(config.json, json.dumps(priced.values(), indent=1) + "\n")
    if config.heat:
        # Drawing takes a library that numbers do not need.
        from recsys.planning.heat import draw  # noqa: PLC0415

        draw(heat_values(priced, table_seconds(priced.plan, model)), priced, config.heat)


def _console() -> Console:
    """A terminal as wide as it is; a file or a pipe wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def diff(config: DiffConfig) -> int:
    """Show what two plans do otherwise; returns how many tables."""
    before, after = Plan.load(config.before), Plan.load(config.after)
    changes = differences(before, after)
    console = _console()
    show_differences(before, after, changes, console, most=config.show)
    if config.recipe and config.cluster:
        workload, cluster = workload_of(config.recipe, config), parse_cluster(config.cluster)
        priced = []
        for path, made in ((config.before, before), (config.after, after)):
            made.check_fits(workload.tables, str(path))
            made.check_world(cluster.world_size, cluster.ranks_per_node, str(path))
            priced.append(quote(made, CostModel(workload, cluster, replicas=made.replicas)))
        _show_prices(console, *priced)
    return len(changes)


def _show_prices(console: Console, before: Quote, after: Quote) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=f"slowest rank, ms, on {before.cluster.name}", title_justify="left")
    for column in ("phase", "before", "after", "after / before"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    one, other = before.phase_seconds, after.phase_seconds
    rows = {**{name: (one[name], other[name]) for name in one}, "step": (before.step_seconds, after.step_seconds)}
    for name, (old, new) in rows.items():
        ratio = f"{new / old:.2f}" if old else ("1.00" if not new else "")
        table.add_row(name, f"{old * 1e3:,.3f}", f"{new * 1e3:,.3f}", ratio)
    console.print(table)
    fullest = [float(np.max(quote_.used[:, 0])) / 2**30 for quote_ in (before, after)]
    console.print(f"fullest rank: {fullest[0]:,.1f} GiB before, {fullest[1]:,.1f} GiB after")
