"""Plans and their prices, to read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from recsys.sharding.cluster import GIB, PHASES
from recsys.sharding.plan import Plan, TablePlan
from recsys.sharding.quote import Quote
from recsys.sharding.work import MEMORIES, PARTS

MOST_COLUMNS, MOST_ROWS = 64, 64
"""Of a heat map; more tables or ranks are drawn together."""


def show(priced: Quote, seconds: np.ndarray, console: Console, *, most: int) -> None:
    """Print phases, ranks and tables of a plan.

    Args:
        priced: the plan.
        seconds: see `table_seconds` [ranks, tables].
        console: where to.
        most: ranks and tables to list.
    """
    workload, cluster = priced.workload, priced.cluster
    console.print(
        f"{workload.name} on {cluster.name}: {len(workload.tables):,} tables, "
        f"{sum(table.weight_bytes for table in workload.tables) / 1e9:,.1f} GB of weights, "
        f"{workload.optimizer_bytes / 1e9:,.1f} GB of {workload.optimizer}, batch {workload.batch_size:,}",
        highlight=False,
    )
    kinds = Counter(f"{table.sharding_type} ({table.kernel})" for table in priced.plan.tables.values())
    console.print("plan: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()), highlight=False)
    console.print(_phases(priced))
    console.print(_ranks(priced, most))
    console.print(_tables(priced, seconds, most))
    console.print(
        f"step {priced.step_seconds * 1e3:,.2f} ms, {priced.pipelined_seconds * 1e3:,.2f} with ids sent during the "
        f"dense part: {priced.rows_per_second:,.0f} rows/s; balance {priced.balance:.2f} (mean over slowest rank)",
        highlight=False,
    )


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _phases(priced: Quote) -> Table:
    table = _table("phases", ["phase"], ["slowest, ms", "mean, ms", "slowest rank", "share"])
    for index, name in enumerate(PHASES):
        column = priced.seconds[:, index]
        slowest = int(column.argmax())
        table.add_row(
            name.replace("_", " "),
            f"{column[slowest] * 1e3:,.3f}",
            f"{column.mean() * 1e3:,.3f}",
            str(slowest) if column.max() > column.min() else "all",
            f"{column[slowest] / max(priced.step_seconds, 1e-30):.0%}",
        )
    return table


def _ranks(priced: Quote, most: int) -> Table:
    """The fullest ranks first, where there are more than `most`; else all in order."""
    used = priced.used
    order = np.arange(len(used))
    title = "memory a rank, GiB"
    if len(order) > most:
        order = (-used[:, 0]).argsort(kind="stable")[:most]
        title += f", the fullest {most} of {len(used):,}"
    kinds = [index for index in range(len(MEMORIES)) if used[:, index].any()]
    columns = [f"{MEMORIES[kind]} {part}" if kind else part for kind in kinds for part in _parts(priced, kind)]
    table = _table(title, ["rank"], [*columns, "reserve", "free", "full", "tables, ms"])
    reserve = priced.capacity[0] / (1 - priced.reserve) * priced.reserve
    on_tables = priced.seconds.sum(axis=1) - priced.seconds[:, [PHASES.index("dense"), PHASES.index("all_reduce")]].sum(
        1
    )
    for rank in order.tolist():
        cells = [
            f"{priced.bytes[rank, PARTS.index(part), kind] / GIB:,.2f}"
            for kind in kinds
            for part in _parts(priced, kind)
        ]
        free = priced.capacity[0] - used[rank, 0]
        cells += [f"{reserve / GIB:,.2f}", f"{free / GIB:,.2f}", f"{used[rank, 0] / priced.capacity[0]:.0%}"]
        table.add_row(str(rank), *cells, f"{on_tables[rank] * 1e3:,.3f}")
    return table


def _parts(priced: Quote, kind: int) -> list[str]:
    return [part for index, part in enumerate(PARTS) if priced.bytes[:, index, kind].any()]


def _tables(priced: Quote, seconds: np.ndarray, most: int) -> Table:
    """The dearest tables first."""
    total = seconds.sum(axis=0)
    names = list(priced.plan.tables)
    specs = {table.name: table for table in priced.workload.tables}
    order = (-total).argsort(kind="stable")[:most].tolist()
    title = "tables" if len(order) == len(names) else f"the dearest {len(order)} of {len(names):,} tables"
    table = _table(
        title, ["table"], ["rows", "dim", "ids a row", "GB", "sharding", "kernel", "ranks", "ms over all ranks"]
    )
    for index in order:
        spec, where = specs[names[index]], priced.plan.tables[names[index]]
        table.add_row(
            spec.name,
            f"{spec.rows:,}",
            str(spec.dim),
            f"{spec.pooling:g}",
            f"{spec.weight_bytes / 1e9:,.3f}",
            where.sharding_type,
            where.kernel,
            spans(where),
            f"{total[index] * 1e3:,.3f}",
        )
    return table


def spans(table: TablePlan) -> str:
    """Ranks in short: 0-7, or 3, 5."""
    if not table.shards:
        return "all"
    ranks, found = sorted(set(table.ranks)), []
    begin = 0
    for index in range(1, len(ranks) + 1):
        if index == len(ranks) or ranks[index] != ranks[index - 1] + 1:
            found.append(str(ranks[begin]) if index - begin == 1 else f"{ranks[begin]}-{ranks[index - 1]}")
            begin = index
    return ", ".join(found) if len(found) <= 4 else f"{len(ranks)} of {ranks[0]}-{ranks[-1]}"


@dataclass(frozen=True)
class Change:
    """Of one table, from one plan to another.

    Args:
        table: its name.
        what: in words.
        moved: weights that must travel, elements: those that lie on another rank than before.
    """

    table: str
    what: str
    moved: int


def differences(before: Plan, after: Plan) -> list[Change]:
    """Tables that two plans place otherwise, those that move most first."""
    found = []
    for name in dict.fromkeys((*before.tables, *after.tables)):
        old, new = before.tables.get(name), after.tables.get(name)
        if old is None or new is None:
            found.append(Change(name, "only in the second plan" if old is None else "only in the first plan", 0))
        elif before.shapes[name] != after.shapes[name]:
            one, other = ("{} x {}".format(*plan.shapes[name]) for plan in (before, after))
            found.append(Change(name, f"{one} became {other}", 0))
        elif old != new:
            found.append(Change(name, _what(old, new), _moved(old, new, before.shapes[name], after.world_size)))
    return sorted(found, key=lambda change: -change.moved)


def _what(old: TablePlan, new: TablePlan) -> str:
    words = []
    if old.sharding_type != new.sharding_type:
        words.append(f"{old.sharding_type} became {new.sharding_type}")
    if old.kernel != new.kernel:
        words.append(f"{old.kernel} became {new.kernel}")
    if old.ranks != new.ranks:
        words.append(f"ranks {spans(old)} became {spans(new)}")
    return ", ".join(words) or "other cuts on the same ranks"


def _moved(old: TablePlan, new: TablePlan, shape: tuple[int, int], world_size: int) -> int:
    """Elements that a rank holds under the new plan and did not under the old one."""
    if not old.shards:
        return 0  # every rank had all
    if not new.shards:
        return shape[0] * shape[1] * (world_size - 1)
    total = 0
    had: dict[int, list] = {}
    for shard in old.shards:
        had.setdefault(shard.rank, []).append(shard)
    for shard in new.shards:
        kept = 0
        for other in had.get(shard.rank, []):
            rows = min(shard.row + shard.rows, other.row + other.rows) - max(shard.row, other.row)
            columns = min(shard.column + shard.columns, other.column + other.columns) - max(shard.column, other.column)
            kept += max(rows, 0) * max(columns, 0)
        total += shard.rows * shard.columns - kept
    return total


def show_differences(before: Plan, after: Plan, changes: Sequence[Change], console: Console, *, most: int) -> None:
    """Print what changed."""
    for name in ("world_size", "ranks_per_node", "replicas"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            console.print(f"{name.replace('_', ' ')}: {old} became {new}", highlight=False)
    if not changes:
        console.print(f"all {len(before.tables):,} tables lie alike", highlight=False)
        return
    moved = sum(change.moved for change in changes)
    table = _table(
        f"{len(changes):,} of {len(before.tables):,} tables lie otherwise; {moved:,} weights would move",
        ["table", "change"],
        ["weights that move"],
    )
    for change in changes[:most]:
        table.add_row(change.table, change.what, f"{change.moved:,}")
    console.print(table)
    if len(changes) > most:
        console.print(f"and {len(changes) - most:,} more; --show lists them", highlight=False)


@dataclass(frozen=True)
class Heat:
    """A heat map, binned to what an eye can tell apart.

    Args:
        milliseconds: [rows, columns] that the slowest rank of a row spends on the tables of a column.
        rows: ranks, one or a range.
        columns: tables, or ranges of them, the dearest first.
        ranks: first and last rank of each row.
    """

    milliseconds: np.ndarray
    rows: list[str]
    columns: list[str]
    ranks: list[tuple[int, int]]


def heat_values(priced: Quote, seconds: np.ndarray) -> Heat:
    """What each rank spends on each table; where there are many, on tables 1 to n by their time, n + 1 to 2n, ..."""
    names = list(priced.plan.tables)
    if len(names) > MOST_COLUMNS:
        dearest = (-seconds.sum(axis=0)).argsort(kind="stable")
        parts = np.array_split(dearest, MOST_COLUMNS)
        seconds = np.stack([seconds[:, part].sum(axis=1) for part in parts], axis=1)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        names = [f"{end - len(part) + 1:,}-{end:,}" for part, end in zip(parts, ends, strict=True)]
    size = -(-len(seconds) // MOST_ROWS)
    ranks = [(begin, min(begin + size, len(seconds)) - 1) for begin in range(0, len(seconds), size)]
    slowest = np.array([seconds[begin : end + 1].max(axis=0) for begin, end in ranks])
    rows = [str(begin) if begin == end else f"{begin}-{end}" for begin, end in ranks]
    return Heat(slowest * 1e3, rows, names, ranks)
