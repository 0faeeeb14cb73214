"""Options: every way in which a table may be split, priced for all tables at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys.sharding.constraints import Allowed
from recsys.sharding.cost import CostModel, Tables
from recsys.sharding.plan import TablePlan
from recsys.sharding.tiling import MIN_COLUMNS, Shard, even
from recsys.sharding.work import Cost


@dataclass(frozen=True)
class Option:
    """A way to split tables.

    Args:
        sharding_type: TorchRec's word.
        kernel: TorchRec's word.
        columns: parts that columns are cut into.
        reach: who takes part: one rank a part, one node a part, or every rank.
    """

    sharding_type: str
    kernel: str
    columns: int
    reach: str


class Options:
    """All options of all tables.

    Args:
        model: prices them.
        rules: what each table may have.

    Attributes:
        options: O of them.
        possible: [T, O] whether a table may have an option.
        work: seconds of one shard [T, O, 3, phases], on links within nodes, between nodes, and of all else.
        bytes: of one shard by memory [T, O, memories].
        seconds: of one shard, phases together [T, O].
        num_shards: of each option [O].
        total: seconds of all shards of the table [T, O].
    """

    def __init__(self, model: CostModel, rules: Sequence[Allowed]) -> None:
        specs, group = model.workload.tables, model.group
        tables = Tables.of(specs)
        self.options = _options(rules, group.ranks_per_node, group.nodes, int(tables.dim.max()))
        costs = []
        self.possible = np.zeros((len(specs), len(self.options)), dtype=bool)
        of_rule = {rule: np.array([own == rule for own in rules]) for rule in set(rules)}
        for index, option in enumerate(self.options):
            for rule, mask in of_rule.items():
                if option.sharding_type in rule.types and _kernel_of(option, rule):
                    self.possible[mask, index] = True
            self.possible[:, index] &= tables.dim % (option.columns * MIN_COLUMNS if option.columns > 1 else 1) == 0
            ranks = self.rows_over(option, model)
            rows = np.ceil(tables.rows / ranks)
            costs.append(model.shards(option.sharding_type, option.kernel, tables, rows, tables.dim / option.columns))
        self.work = np.stack([work_of(cost) for cost in costs], axis=1)
        self.bytes = np.stack([cost.bytes.sum(axis=1) for cost in costs], axis=1)
        self.seconds = np.stack([cost.seconds.sum(axis=1) for cost in costs], axis=1)
        shards = np.array([option.columns * self.rows_over(option, model) for option in self.options])
        shards = np.where([option.reach == "world" for option in self.options], group.world_size, shards)
        self.num_shards = shards
        self.total = self.seconds * shards

    @staticmethod
    def rows_over(option: Option, model: CostModel) -> int:
        """Ranks that rows are split over."""
        if option.sharding_type == "row_wise":
            return model.group.world_size
        return model.group.ranks_per_node if option.reach == "node" else 1


def work_of(cost: Cost) -> np.ndarray:
    """Seconds [n, 3, phases] on links within nodes, between nodes, and of all else."""
    return np.stack([cost.node, cost.network, cost.rest], axis=1)


def _kernel_of(option: Option, rule: Allowed) -> bool:
    return option.sharding_type == "data_parallel" or option.kernel in rule.kernels


def _options(rules: Sequence[Allowed], local: int, nodes: int, dim: int) -> list[Option]:
    types = {name for rule in rules for name in rule.types}
    kernels = list(dict.fromkeys(kernel for rule in rules for kernel in rule.kernels))
    parts = [2**power for power in range(1, 11) if 2**power * MIN_COLUMNS <= dim]
    found = []
    if "data_parallel" in types:
        found.append(Option("data_parallel", "dense", 1, "world"))
    for kernel in kernels:
        for name, limit, reach in (
            ("table_wise", 1, "rank"),
            ("row_wise", 1, "world"),
            ("table_row_wise", 1, "node"),
            ("column_wise", local * nodes, "rank"),
            ("table_column_wise", local, "rank"),
            ("grid_shard", nodes, "node"),
        ):
            if name in types:
                # One part too: a small table in one piece under the type that others need saves collectives.
                found += [Option(name, kernel, count, reach) for count in (1, *parts) if count <= limit]
    return found


def table_plan(option: Option, rows: int, dim: int, places: Sequence[int], ranks_per_node: int) -> TablePlan:
    """Where a table lives that has an option.

    Args:
        option: how it is split.
        rows: of the table.
        dim: of the table.
        places: a rank for each part of its columns; with a node's reach, a node.
        ranks_per_node: ranks of a node.
    """
    if option.sharding_type == "data_parallel":
        return TablePlan("data_parallel", "dense", ())
    width = dim // option.columns
    shards = []
    for part in range(option.columns):
        if option.reach == "rank":
            ranks = [places[part]]
        elif option.reach == "node":
            ranks = list(range(places[part] * ranks_per_node, (places[part] + 1) * ranks_per_node))
        else:
            ranks = list(places)
        row = 0
        for rank, size in zip(ranks, even(rows, len(ranks)), strict=True):
            shards.append(Shard(rank, row, part * width, size, width))
            row += size
    return TablePlan(option.sharding_type, option.kernel, tuple(shards))
