"""The plan: where each table lives, as an object that is saved, read, changed by hand and checked."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recsys.config import InputError, nearest, write_whole
from recsys.sharding.tiling import Shard, check_table
from recsys.sharding.workload import TableSpec

ShardingType = Literal[
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]
Kernel = Literal["dense", "fused", "fused_uvm", "fused_uvm_caching", "key_value"]

TYPES: tuple[str, ...] = ShardingType.__args__  # type: ignore[attr-defined]
KERNELS: tuple[str, ...] = Kernel.__args__  # type: ignore[attr-defined]

VERSION = 1


@dataclass(frozen=True)
class TablePlan:
    """Where one table lives."""

    sharding_type: str
    kernel: str
    shards: tuple[Shard, ...]
    """None where every rank holds all of it (data_parallel)."""

    @property
    def ranks(self) -> list[int]:
        """Ranks that hold a part, each once."""
        return list(dict.fromkeys(shard.rank for shard in self.shards))


@dataclass(frozen=True)
class Plan:
    """Where all tables live.

    Args:
        tables: name to where; in the workload's order.
        shapes: name to rows and columns.
        world_size: ranks among which the tables are split.
        ranks_per_node: of these; types that stay within a node depend on it.
        replicas: groups of world_size ranks, each with a copy of all tables (2-D parallelism); 1 for none.
    """

    tables: Mapping[str, TablePlan]
    shapes: Mapping[str, tuple[int, int]]
    world_size: int
    ranks_per_node: int
    replicas: int = 1

    @property
    def replicated(self) -> list[str]:
        """Tables that every rank holds whole."""
        return [name for name, table in self.tables.items() if table.sharding_type == "data_parallel"]

    def save(self, path: Path) -> None:
        """Write as JSON, a line a table, a shard as [rank, first row, first column, rows, columns]."""
        write_whole(path, self.dumps())

    def dumps(self) -> str:
        """The text that `save` writes."""
        head = {
            "version": VERSION,
            "world_size": self.world_size,
            "ranks_per_node": self.ranks_per_node,
            "replicas": self.replicas,
        }
        lines = [
            f"  {json.dumps(name)}: "
            + json.dumps(
                {
                    "shape": self.shapes[name],
                    "sharding_type": table.sharding_type,
                    "kernel": table.kernel,
                    "shards": table.shards,
                }
            )
            for name, table in self.tables.items()
        ]
        return json.dumps(head)[:-1] + ', "tables": {\n' + ",\n".join(lines) + "\n}}\n"

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what `save` wrote, changed by hand or not, and check that it is a plan at all.

        Raises:
            InputError: no such file, not JSON, a key or value that cannot be, shards that do not tile their table.
        """
        try:
            text = path.read_text()
        except OSError as error:
            raise InputError(f"{path}: cannot read it ({error.strerror})") from None
        try:
            values = json.loads(text, object_pairs_hook=_no_name_twice)
        except ValueError as error:
            raise InputError(f"{path}: not a plan in JSON: {error}") from None
        return cls.from_values(values, str(path))

    @classmethod
    def from_values(cls, values: Any, where: str) -> "Plan":
        """Read plain values; see `load`."""
        _keys(values, {"version", "world_size", "ranks_per_node", "replicas", "tables"}, where)
        if values["version"] != VERSION:
            raise InputError(f"{where}: version {values['version']!r} of a plan; this release reads version {VERSION}")
        for name in ("world_size", "ranks_per_node", "replicas"):
            if type(values[name]) is not int or values[name] < 1:
                raise InputError(f"{where}: {name} is {values[name]!r}; it must be a whole number of at least 1")
        if values["world_size"] % values["ranks_per_node"]:
            raise InputError(
                f"{where}: {values['world_size']} ranks are no whole number of nodes of {values['ranks_per_node']}"
            )
        if not isinstance(values["tables"], dict):
            raise InputError(f"{where}: tables must be an object, a name to where the table lives")
        tables, shapes = {}, {}
        for name, table in values["tables"].items():
            of = f"{where}: table {name}"
            _keys(table, {"shape", "sharding_type", "kernel", "shards"}, of)
            shapes[name] = _shape(table["shape"], of)
            tables[name] = _table_plan(table, of)
        plan = cls(tables, shapes, values["world_size"], values["ranks_per_node"], values["replicas"])
        plan.check(where)
        return plan

    def check(self, where: str = "plan") -> None:
        """See that the shards of each table tile it, on ranks that exist, as its sharding type has it.

        Raises:
            InputError: they do not, naming the table, the first shard at fault and what would be right.
        """
        for name, table in self.tables.items():
            check_table(table, self.shapes[name], self.world_size, self.ranks_per_node, f"{where}: table {name}")

    def check_fits(self, tables: Iterable[TableSpec], where: str = "plan") -> None:
        """See that the plan is of these tables, each exactly once and of its size.

        Raises:
            InputError: a table is missing, foreign or of another shape.
        """
        expected = {table.name: (table.rows, table.dim) for table in tables}
        for name in self.tables:
            if name not in expected:
                raise InputError(f"{where}: table {name} is none of the model's; {nearest(name, expected)}")
        for name, shape in expected.items():
            if name not in self.tables:
                raise InputError(f"{where}: the model's table {name} is not in the plan; plan again")
            if self.shapes[name] != shape:
                planned = "{} rows of {}".format(*self.shapes[name])
                raise InputError(
                    f"{where}: table {name} has {planned} columns in the plan and {shape[0]} rows of {shape[1]} in the "
                    "model: the plan is of another schema or embedding_dim; plan again"
                )

    def check_world(self, world_size: int, ranks_per_node: int, where: str = "plan") -> None:
        """See that the plan is for this many ranks.

        Raises:
            InputError: it is for others.
        """
        planned = self.world_size * self.replicas
        if planned != world_size:
            raise InputError(
                f"{where}: planned for {planned} ranks, the job has {world_size}; plan again for {world_size}"
            )
        bound = any(table.sharding_type in ("table_row_wise", "grid_shard") for table in self.tables.values())
        if bound and self.ranks_per_node != ranks_per_node:
            raise InputError(
                f"{where}: tables are split within nodes of {self.ranks_per_node} ranks, the job's nodes have "
                f"{ranks_per_node}; plan again"
            )


def _no_name_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} stands twice; every table is placed once")
        values[name] = value
    return values


def _keys(values: Any, expected: set[str], where: str) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object with {', '.join(sorted(expected))}")
    for key in values:
        if key not in expected:
            raise InputError(f"{where}: unknown key {key!r}; {nearest(key, expected)}")
    for key in sorted(expected):
        if key not in values:
            raise InputError(f"{where}: {key} is missing")


def _shape(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise InputError(f"{where}: shape is {value!r}; it must be [rows, columns]")
    return value[0], value[1]


def _table_plan(values: dict[str, Any], where: str) -> TablePlan:
    for key, known in (("sharding_type", TYPES), ("kernel", KERNELS)):
        if values[key] not in known:
            raise InputError(f"{where}: unknown {key} {values[key]!r}; {nearest(str(values[key]), known)}")
    shards = []
    for index, shard in enumerate(values["shards"] if isinstance(values["shards"], list) else [None]):
        if not isinstance(shard, list) or len(shard) != len(Shard._fields) or not all(type(n) is int for n in shard):
            raise InputError(f"{where}: shard {index} is {shard!r}; it must be [{', '.join(Shard._fields)}]")
        shards.append(Shard(*shard))
    return TablePlan(values["sharding_type"], values["kernel"], tuple(shards))
