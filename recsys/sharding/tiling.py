"""Tiles: a table's shards cover it once, in the form that its sharding type has."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from recsys.config import InputError

if TYPE_CHECKING:
    from recsys.sharding.plan import TablePlan

COLUMN_TYPES = frozenset({"column_wise", "table_column_wise", "grid_shard"})
"""Types that split columns: under row-wise Adagrad each part would keep accumulators of its own."""
ROW_TYPES = frozenset({"row_wise", "table_row_wise", "grid_shard"})
MIN_COLUMNS = 4
"""FBGEMM wants rows of a multiple of 16 bytes."""


class Shard(NamedTuple):
    """A rectangle of a table on a rank."""

    rank: int
    row: int
    column: int
    rows: int
    columns: int


def check_table(table: "TablePlan", shape: tuple[int, int], world_size: int, ranks_per_node: int, where: str) -> None:
    """See that the shards of a table tile it, on ranks that exist, in the form of its sharding type.

    Args:
        table: where it lives.
        shape: its rows and columns.
        world_size: ranks that may hold shards.
        ranks_per_node: of these.
        where: what an error begins with.

    Raises:
        InputError: they do not.
    """
    if table.sharding_type == "data_parallel":
        if table.shards:
            raise InputError(f"{where}: data_parallel tables lie whole on every rank; leave shards empty")
        if table.kernel != "dense":
            raise InputError(f"{where}: data_parallel takes the kernel dense, not {table.kernel}")
        return
    for index, shard in enumerate(table.shards):
        if not 0 <= shard.rank < world_size:
            raise InputError(f"{where}: shard {index} is on rank {shard.rank}; there are ranks 0 to {world_size - 1}")
        if min(shard.row, shard.column, shard.rows) < 0 or shard.columns < 1:
            raise InputError(f"{where}: shard {index} is {list(shard)}; sizes and offsets are not negative")
    _check_tiles(table, shape, where)
    _check_form(table, world_size, ranks_per_node, where)


def _check_tiles(table: "TablePlan", shape: tuple[int, int], where: str) -> None:
    """Shards are a grid: parts of rows times parts of columns, without gap or overlap."""
    columns: dict[tuple[int, int], list[Shard]] = {}
    for shard in table.shards:
        columns.setdefault((shard.column, shard.columns), []).append(shard)
    end = 0
    for (column, width), parts in sorted(columns.items()):
        if column != end:
            raise InputError(f"{where}: {_gap('columns', end, column)}; shards must cover columns 0 to {shape[1]} once")
        end, row = column + width, 0
        for shard in sorted(parts, key=lambda part: (part.row, part.rows)):
            if shard.row != row:
                raise InputError(
                    f"{where}: {_gap('rows', row, shard.row)}; shards must cover rows 0 to {shape[0]} once"
                )
            row += shard.rows
        if row != shape[0]:
            raise InputError(f"{where}: {_gap('rows', row, shape[0])}; shards must cover rows 0 to {shape[0]} once")
    if end != shape[1]:
        raise InputError(f"{where}: {_gap('columns', end, shape[1])}; shards must cover columns 0 to {shape[1]} once")


def _gap(what: str, end: int, begin: int) -> str:
    if begin > end:
        return f"{what} {end} to {begin} are in no shard"
    return f"{what} {begin} to {end} are in two shards"


def _check_form(table: "TablePlan", world_size: int, ranks_per_node: int, where: str) -> None:
    kind, shards, ranks = table.sharding_type, table.shards, table.ranks
    splits_columns = len({shard.column for shard in shards}) > 1
    splits_rows = len({shard.row for shard in shards if shard.rows}) > 1
    nodes = {rank // ranks_per_node for rank in ranks}
    if kind == "table_wise" and len(shards) != 1:
        raise InputError(f"{where}: table_wise is one shard, not {len(shards)}")
    if splits_columns and kind not in COLUMN_TYPES:
        raise InputError(f"{where}: {kind} does not split columns; column_wise does")
    if splits_rows and kind not in ROW_TYPES:
        raise InputError(f"{where}: {kind} does not split rows; row_wise does")
    if kind == "row_wise" and ranks != list(range(world_size)):
        raise InputError(f"{where}: row_wise has a shard on every rank, in order, if an empty one")
    if kind in ("table_row_wise", "table_column_wise") and len(nodes) != 1:
        raise InputError(f"{where}: {kind} stays within one node, its ranks are on {len(nodes)}")
    if kind in ("table_row_wise", "grid_shard"):
        for column in {shard.column for shard in shards}:
            held = [shard.rank for shard in shards if shard.column == column]
            first = held[0] // ranks_per_node * ranks_per_node
            if held != list(range(first, first + ranks_per_node)):
                raise InputError(f"{where}: {kind} splits rows over all ranks of a node, in order")
    for shard in shards:
        if shard.columns % MIN_COLUMNS and kind in COLUMN_TYPES:
            raise InputError(f"{where}: a part of {shard.columns} columns; parts take a multiple of {MIN_COLUMNS}")
    if kind in ROW_TYPES:
        _check_even(table, shards, where)


def _check_even(table: "TablePlan", shards: Sequence[Shard], where: str) -> None:
    """TorchRec finds the rank of a row by division, whatever the plan says, and would train rows that are not there."""
    for column in {shard.column for shard in shards}:
        parts = [shard for shard in shards if shard.column == column]
        sizes = even(sum(shard.rows for shard in parts), len(parts))
        begins = [0, *accumulate(sizes)]
        for shard, begin, size in zip(parts, begins, sizes, strict=False):
            if (shard.row, shard.rows) != (begin, size):
                raise InputError(
                    f"{where}: rank {shard.rank} has {shard.rows} rows from {shard.row}; {table.sharding_type} cuts "
                    f"rows evenly and in the order of ranks, so that it has {size} from {begin}"
                )


def even(total: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of `total`, all as large as the first but the last ones; TorchRec cuts rows so."""
    size = math.ceil(total / parts)
    return [max(0, min(size, total - index * size)) for index in range(parts)]
