"""Plans are saved, read, changed by hand, and refused where they could not be."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import InputError
from recsys.sharding.plan import TYPES, Plan, TablePlan
from recsys.sharding.tiling import Shard
from tests.sharding.plans import hand_plan, small

SHAPES = {"m/c": (100, 24), "m/a": (10, 16), "m/b": (3, 8), "m/d": (1, 4)}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 1), (1, 4), (2, 2), (3, 1)])
def test_a_plan_is_read_as_it_was_saved(kind: str, nodes: int, ranks_per_node: int, tmp_path: Path) -> None:
    plan = hand_plan(SHAPES, kind, nodes, ranks_per_node)
    plan.check()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert [line for line in lines if '"m/c"' in line] == [lines[1]], "a line a table, to be found and changed"


def values(kind: Any = ("column_wise", "row_wise", "table_wise", "table_row_wise")) -> dict[str, Any]:
    """A plan on two nodes of two ranks, as plain values: m/a by rows, m/b whole, m/c by columns, m/d within a node."""
    return json.loads(hand_plan(SHAPES, kind, 2, 2).dumps())


def shards(plan: dict[str, Any], table: str) -> list[list[int]]:
    return plan["tables"][table]["shards"]


def put(table: str, index: int, field: str, value: int) -> Callable[[dict[str, Any]], None]:
    return lambda plan: shards(plan, table)[index].__setitem__(Shard._fields.index(field), value)


def key(table: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["tables"][table].__setitem__(name, value)


BAD_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "gap in rows": (put("m/a", 1, "row", 4), "table m/a: rows 3 to 4 are in no shard"),
    "rows twice": (put("m/a", 1, "row", 2), "table m/a: rows 2 to 3 are in two shards"),
    "rows left out": (put("m/b", 0, "rows", 2), "table m/b: rows 2 to 3 are in no shard"),
    "more rows than there are": (put("m/b", 0, "rows", 4), "table m/b: rows 3 to 4 are in two shards"),
    "gap in columns": (put("m/c", 1, "column", 16), "table m/c: columns 4 to 16 are in no shard"),
    "columns twice": (put("m/c", 1, "column", 3), "table m/c: columns 3 to 4 are in two shards"),
    "columns left out": (put("m/c", 1, "columns", 8), "table m/c: columns 12 to 24 are in no shard"),
    "no rank": (put("m/b", 0, "rank", 4), "table m/b: shard 0 is on rank 4; there are ranks 0 to 3"),
    "rank below 0": (put("m/b", 0, "rank", -1), "table m/b: shard 0 is on rank -1"),
    "row below 0": (put("m/b", 0, "row", -1), "table m/b: shard 0 is [2, -1, 0, 3, 8]"),
    "no columns": (put("m/b", 0, "columns", 0), "table m/b: shard 0 is [2, 0, 0, 3, 0]"),
    "half a rank": (put("m/b", 0, "rank", 0.5), "table m/b: shard 0 is [0.5, 0, 0, 3, 8]; it must be [rank, row"),  # type: ignore[arg-type]
    "a number too few": (lambda plan: shards(plan, "m/b")[0].pop(), "table m/b: shard 0 is [2, 0, 0, 3]"),
    "a shard twice": (lambda plan: shards(plan, "m/b").append(shards(plan, "m/b")[0]), "table m/b: rows 0 to 3 are in"),
    "no shards": (lambda plan: shards(plan, "m/b").clear(), "table m/b: columns 0 to 8 are in no shard"),
    "rows unevenly": (
        key("m/a", "shards", [[0, 0, 0, 2, 16], [1, 2, 0, 4, 16], [2, 6, 0, 3, 16], [3, 9, 0, 1, 16]]),
        "table m/a: rank 0 has 2 rows from 0; row_wise cuts rows evenly and in the order of ranks, so that it has 3",
    ),
    "rows of two ranks swapped": (
        lambda plan: (put("m/a", 0, "row", 3)(plan), put("m/a", 1, "row", 0)(plan)),
        "table m/a: rank 0 has 3 rows from 3; row_wise cuts rows evenly and in the order of ranks",
    ),
    "columns not by four": (
        lambda plan: (
            put("m/c", 0, "columns", 10)(plan),
            put("m/c", 1, "column", 10)(plan),
            put("m/c", 1, "columns", 14)(plan),
        ),
        "table m/c: a part of 10 columns; parts take a multiple of 4",
    ),
    "unknown type": (
        key("m/b", "sharding_type", "rowwise"),
        "table m/b: unknown sharding_type 'rowwise'; did you mean row_wise",
    ),
    "unknown kernel": (key("m/b", "kernel", "fuse"), "table m/b: unknown kernel 'fuse'; did you mean fused"),
    "unknown key": (key("m/b", "rank", 1), "table m/b: unknown key 'rank'"),
    "missing key": (lambda plan: plan["tables"]["m/b"].pop("kernel"), "table m/b: kernel is missing"),
    "whole by rows": (key("m/a", "sharding_type", "table_wise"), "table m/a: table_wise is one shard, not 4"),
    "rows by columns": (
        key("m/a", "sharding_type", "column_wise"),
        "table m/a: column_wise does not split rows; row_wise",
    ),
    "columns by rows": (
        key("m/c", "sharding_type", "row_wise"),
        "table m/c: row_wise does not split columns; column_wise",
    ),
    "a row-wise rank missing": (
        key("m/b", "sharding_type", "row_wise"),
        "table m/b: row_wise has a shard on every rank",
    ),
    "rows across nodes": (
        put("m/d", 1, "rank", 1),
        "table m/d: table_row_wise stays within one node, its ranks are on 2",
    ),
    "half a node": (
        lambda plan: shards(plan, "m/d").pop(),
        "table m/d: table_row_wise splits rows over all ranks of a node",
    ),
    "columns across nodes": (
        lambda plan: (key("m/c", "sharding_type", "table_column_wise")(plan), put("m/c", 1, "rank", 2)(plan)),
        "table m/c: table_column_wise stays within one node, its ranks are on 2",
    ),
    "replicated shards": (
        key("m/b", "sharding_type", "data_parallel"),
        "table m/b: data_parallel tables lie whole on every rank",
    ),
    "replicated and fused": (
        lambda plan: (key("m/b", "sharding_type", "data_parallel")(plan), key("m/b", "shards", [])(plan)),
        "table m/b: data_parallel takes the kernel dense, not fused",
    ),
    "no shape": (key("m/b", "shape", [3]), "table m/b: shape is [3]; it must be [rows, columns]"),
    "version": (lambda plan: plan.__setitem__("version", 2), "version 2 of a plan; this release reads version 1"),
    "no ranks": (
        lambda plan: plan.__setitem__("world_size", 0),
        "world_size is 0; it must be a whole number of at least 1",
    ),
    "uneven nodes": (lambda plan: plan.__setitem__("ranks_per_node", 3), "4 ranks are no whole number of nodes of 3"),
    "tables in a list": (lambda plan: plan.__setitem__("tables", []), "tables must be an object"),
}


@pytest.mark.parametrize("name", BAD_EDITS)
def test_a_bad_edit_gives_one_line_that_names_the_table(name: str, tmp_path: Path) -> None:
    edit, message = BAD_EDITS[name]
    plan, path = values(), tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    Plan.load(path)
    edit(plan)
    path.write_text(json.dumps(plan))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan in JSON"),
        ("[]", "expected an object with ranks_per_node, replicas, tables, version, world_size"),
        ('{"version": 1, "version": 1}', "version stands twice"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Plan.load(path)
    with pytest.raises(InputError, match="no-such: cannot read it"):
        Plan.load(tmp_path / "no-such")


def test_a_table_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values()).replace('"m/d"', '"m/b"'))
    with pytest.raises(InputError, match=r"m/b stands twice; every table is placed once"):
        Plan.load(path)


def test_a_plan_of_other_tables_is_refused() -> None:
    workload = small([(10, 16), (3, 8)])
    shapes = {table.name: (table.rows, table.dim) for table in workload.tables}
    plan = hand_plan(shapes, "table_wise", 1, 2)
    plan.check_fits(workload.tables)
    with pytest.raises(InputError, match=r"table t9 is none of the model's; did you mean t"):
        hand_plan({**shapes, "t9": (1, 4)}, "table_wise", 1, 2).check_fits(workload.tables)
    with pytest.raises(InputError, match="the model's table t1 is not in the plan; plan again"):
        hand_plan({"t0": (10, 16)}, "table_wise", 1, 2).check_fits(workload.tables)
    with pytest.raises(InputError, match=r"t1 has 4 rows of 8 columns in the plan and 3 rows of 8 .* another schema"):
        hand_plan({**shapes, "t1": (4, 8)}, "table_wise", 1, 2).check_fits(workload.tables)


def test_a_plan_for_other_ranks_is_refused() -> None:
    plan = hand_plan(SHAPES, "row_wise", 2, 2)
    plan.check_world(4, 2)
    plan.check_world(4, 4)
    with pytest.raises(InputError, match="planned for 4 ranks, the job has 8; plan again for 8"):
        plan.check_world(8, 2)
    with pytest.raises(InputError, match="split within nodes of 2 ranks, the job's nodes have 4; plan again"):
        hand_plan(SHAPES, "table_row_wise", 2, 2).check_world(4, 4)


shapes = st.dictionaries(
    st.text("abc/", min_size=1, max_size=3),
    st.tuples(st.integers(1, 40), st.integers(1, 8).map(lambda n: 4 * n)),
    min_size=1,
)


@settings(max_examples=80, deadline=None)
@given(
    shapes=shapes, kinds=st.lists(st.sampled_from(TYPES), min_size=1), nodes=st.integers(1, 3), local=st.integers(1, 3)
)
def test_any_plan_that_is_right_survives(
    shapes: dict[str, tuple[int, int]], kinds: list[str], nodes: int, local: int
) -> None:
    plan = hand_plan(shapes, kinds, nodes, local)
    assert Plan.from_values(json.loads(plan.dumps()), "plan") == plan


@settings(max_examples=200, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(TYPES), min_size=1, max_size=4),
    at=st.integers(0, 10**6),
    change=st.sampled_from([-100, -4, -1, 1, 4, 100]),
)
def test_one_wrong_number_is_caught_or_moves_a_shard(kinds: list[str], at: int, change: int) -> None:
    plan = json.loads(hand_plan(SHAPES, kinds, 2, 2).dumps())
    numbers = [
        (table, index, field)
        for table, entry in plan["tables"].items()
        for index in range(len(entry["shards"]))
        for field in range(5)
    ]
    if not numbers:
        return
    table, index, field = numbers[at % len(numbers)]
    plan["tables"][table]["shards"][index][field] += change
    read = _read(plan)
    if isinstance(read, Plan):
        assert field == Shard._fields.index("rank"), "the rank alone leaves every row and column where it was"
        assert cells(read.tables[table]) == cells(hand_plan(SHAPES, kinds, 2, 2).tables[table])
    else:
        assert f"table {table}: " in read
        assert "\n" not in read


def _read(values: Any) -> Plan | str:
    try:
        return Plan.from_values(values, "plan")
    except InputError as error:
        return str(error)


def cells(table: TablePlan) -> list[tuple[int, int]]:
    """Every element of a table, once for each shard that has it."""
    return sorted(
        (row, column)
        for shard in table.shards
        for row in range(shard.row, shard.row + shard.rows)
        for column in range(shard.column, shard.column + shard.columns)
    )
