"""Cases of `recsys shard-bench`: small workloads, each under a plan that has one sharding type for all tables."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from recsys.sharding.cluster import Cluster, Hardware
from recsys.sharding.options import MIN_COLUMNS, Option, table_plan
from recsys.sharding.plan import Plan
from recsys.sharding.tiling import COLUMN_TYPES
from recsys.sharding.workload import OptimizerKind, TableSpec, Workload
from recsys.studies.shard_config import ShardBenchConfig

DENSE_HIDDEN = (256, 64)
"""Widths of the dense part, which ends in one logit."""
NODE_TYPES = ("table_row_wise", "table_column_wise", "grid_shard")
"""Types to which it matters which ranks share a node."""
ON_ONE_NODE = {"table_column_wise": "column_wise", "grid_shard": "table_row_wise"}
"""What types come to on one node."""


class Layout(NamedTuple):
    """Ranks in nodes."""

    ranks_per_node: int
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """In all."""
        return self.ranks_per_node * self.nodes


@dataclass(frozen=True)
class Case:
    """One point of the sweep."""

    sharding_type: str
    batch_size: int
    """Rows of a global batch."""
    pooling: int
    dim: int
    num_tables: int
    layout: Layout

    @property
    def columns(self) -> int:
        """Parts that columns are cut into."""
        parts = {
            "column_wise": self.layout.ranks,
            "table_column_wise": self.layout.ranks_per_node,
            "grid_shard": self.layout.nodes,
        }.get(self.sharding_type, 1)
        return 2 ** (parts.bit_length() - 1)

    def impossible(self) -> str | None:
        """Why this case cannot be, or None where it can."""
        if self.batch_size % self.layout.ranks:
            return f"{self.batch_size} rows cannot be split evenly over {self.layout.ranks} ranks"
        if self.dim % (self.columns * MIN_COLUMNS) and self.columns > 1:
            return f"{self.dim} columns cannot be cut into {self.columns} parts of a multiple of {MIN_COLUMNS}"
        if self.sharding_type in ON_ONE_NODE and self.layout.nodes == 1:
            return (
                f"on one node this is {ON_ONE_NODE[self.sharding_type]}; it needs two nodes of several ranks, as "
                "--ranks 4 makes them"
            )
        return None

    def workload(self, rows: Sequence[int]) -> Workload:
        """Its tables and dense part; tables take their sizes from `rows` in turn."""
        tables = tuple(
            TableSpec(name=f"t{index}", rows=rows[index % len(rows)], dim=self.dim, pooling=self.pooling)
            for index in range(self.num_tables)
        )
        # Row-wise accumulators and split columns do not go together, see `constraints`.
        optimizer: OptimizerKind = "adagrad" if self.sharding_type in COLUMN_TYPES else "rowwise_adagrad"
        return with_dense(tables, self.batch_size, optimizer)

    def plan(self, workload: Workload) -> Plan:
        """Tables one after another on the next ranks or nodes."""
        local = self.layout.ranks_per_node
        reach = {"row_wise": "world", "data_parallel": "world", "table_row_wise": "node", "grid_shard": "node"}
        option = Option(self.sharding_type, "fused", self.columns, reach.get(self.sharding_type, "rank"))
        return Plan(
            tables={
                spec.name: table_plan(option, spec.rows, spec.dim, self._places(index), local)
                for index, spec in enumerate(workload.tables)
            },
            shapes={spec.name: (spec.rows, spec.dim) for spec in workload.tables},
            world_size=self.layout.ranks,
            ranks_per_node=local,
        )

    def _places(self, index: int) -> Sequence[int]:
        """Ranks, or nodes, of the parts of a table."""
        local, nodes = self.layout
        first = index * self.columns
        if self.sharding_type in ("row_wise", "data_parallel"):
            return range(local * nodes)
        if self.sharding_type in ("table_row_wise", "grid_shard"):
            return [(first + part) % nodes for part in range(self.columns)]
        if self.sharding_type == "table_column_wise":
            return [index % nodes * local + part for part in range(self.columns)]
        return [(first + part) % self.layout.ranks for part in range(self.columns)]


def with_dense(tables: tuple[TableSpec, ...], batch_size: int, optimizer: OptimizerKind) -> Workload:
    """A workload of these tables under the dense part that all cases have."""
    widths = [sum(table.dim for table in tables), *DENSE_HIDDEN, 1]
    products = [width * after for width, after in itertools.pairwise(widths)]
    return Workload(
        name="shard-bench",
        tables=tables,
        batch_size=batch_size,
        optimizer=optimizer,
        dense_parameters=sum(products) + sum(widths[1:]),
        dense_flops=2 * sum(products),
        dense_activations=sum(widths[:-1]) + sum(widths[1:]),
    )


def layouts(config: ShardBenchConfig) -> list[Layout]:
    """Ranks to start."""
    found = [Layout(ranks) for ranks in config.ranks]
    if set(config.types) & set(NODE_TYPES):
        found += [Layout(ranks // 2, 2) for ranks in config.ranks if _as_two_nodes(ranks)]
    return found


def _as_two_nodes(ranks: int) -> bool:
    return ranks >= 4 and ranks % 2 == 0


def cases(config: ShardBenchConfig, layout: Layout, simulated: bool) -> tuple[list[Case], dict[str, str]]:
    """Every case on these ranks in random order, and for what cannot be why.

    Args:
        config: of the sweep.
        layout: ranks in nodes.
        simulated: these nodes are of one machine, so only types to which nodes matter are worth a case; those that
            are nothing of their own on one node have theirs on two.
    """
    types: Sequence[str] = config.types
    if simulated and layout.nodes > 1:
        types = [name for name in types if name in NODE_TYPES]
    elif simulated and _as_two_nodes(layout.ranks):
        types = [name for name in types if name not in ON_ONE_NODE]
    every = [
        Case(*values, layout)
        for values in itertools.product(types, config.batch_sizes, config.poolings, config.dims, config.num_tables)
    ]
    skipped: dict[str, str] = {}
    possible = []
    for case in every:
        reason = case.impossible()
        if reason is None:
            possible.append(case)
        else:
            what = f"{case.sharding_type} on {layout.ranks} ranks"
            if reason not in skipped.setdefault(what, reason):
                skipped[what] += f"; {reason}"
    random.Random(config.seed).shuffle(possible)
    return possible, skipped


def cluster(hardware: Hardware, layout: Layout, simulated: bool) -> Cluster:
    """What predicts a case: two nodes that one machine plays have half of its cores each."""
    if simulated and layout.nodes > 1 and hardware.cores:
        hardware = replace(hardware, cores=max(1, hardware.cores // layout.nodes))
    return Cluster(hardware=hardware, ranks_per_node=layout.ranks_per_node, nodes=layout.nodes)
