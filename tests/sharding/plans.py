"""Workloads, and plans made by hand."""

from collections.abc import Mapping, Sequence

from recsys.data.formats import MLPERF_NUM_IDS
from recsys.data.multihot import MLPERF_SIZES
from recsys.sharding.cluster import Cluster, parse_cluster
from recsys.sharding.constraints import Allowed, allowed
from recsys.sharding.cost import CostModel
from recsys.sharding.plan import Plan, TablePlan
from recsys.sharding.tiling import Shard, even
from recsys.sharding.workload import OptimizerKind, TableSpec, Workload


def mlperf(
    *, optimizer: OptimizerKind = "rowwise_adagrad", batch_size: int = 65_536, most_rows: int = 10**9
) -> Workload:
    """MLPerf's 26 tables of 128 columns."""
    tables = tuple(
        TableSpec(name=f"C{index}", rows=min(rows, most_rows), dim=128, pooling=float(pooling))
        for index, (rows, pooling) in enumerate(zip(MLPERF_NUM_IDS, MLPERF_SIZES, strict=True), 1)
    )
    return Workload(name="mlperf", tables=tables, batch_size=batch_size, optimizer=optimizer)


def small(shapes: Sequence[tuple[int, int]], *, optimizer: OptimizerKind = "adagrad", batch_size: int = 64) -> Workload:
    """Tables t0, t1 ... of these rows and columns."""
    tables = tuple(TableSpec(name=f"t{index}", rows=rows, dim=dim) for index, (rows, dim) in enumerate(shapes))
    return Workload(name="small", tables=tables, batch_size=batch_size, optimizer=optimizer)


def setting(
    workload: Workload,
    cluster: str | Cluster,
    types: Sequence[str] = (),
    kernels: Sequence[str] = ("fused",),
    constraints: Sequence[str] = (),
) -> tuple[CostModel, list[Allowed]]:
    """Prices and rules."""
    group = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    return CostModel(workload, group), allowed(workload, group.hardware, types, kernels, constraints)


def hand_plan(
    shapes: Mapping[str, tuple[int, int]], kind: str | Sequence[str], nodes: int, ranks_per_node: int
) -> Plan:
    """Every table under this type (or these in turn), here and there, columns cut unevenly where they can be."""
    kinds = [kind] if isinstance(kind, str) else kind
    tables = {
        name: hand_table(kinds[index % len(kinds)], shape, index, nodes, ranks_per_node)
        for index, (name, shape) in enumerate(shapes.items())
    }
    return Plan(tables, shapes, nodes * ranks_per_node, ranks_per_node)


def hand_table(kind: str, shape: tuple[int, int], index: int, nodes: int, local: int) -> TablePlan:
    """Where the index-th table lives."""
    (rows, dim), world, node = shape, nodes * local, index % nodes * local
    if kind == "data_parallel":
        return TablePlan(kind, "dense", ())
    if kind == "table_wise":
        return TablePlan(kind, "fused", (Shard(index % world, 0, 0, rows, dim),))
    if kind == "row_wise":
        return TablePlan(kind, "fused", _by_row(rows, 0, dim, range(world)))
    if kind == "table_row_wise":
        return TablePlan(kind, "fused", _by_row(rows, 0, dim, range(node, node + local)))
    # 4 columns and the rest, two halves, or a whole: in turn. A rank may get two parts of one table.
    cuts = (([4, dim - 4] if dim > 4 else [dim]), ([dim // 2] * 2 if dim % 8 == 0 else [dim]), [dim])[index % 3]
    shards: list[Shard] = []
    for part, width in enumerate(cuts):
        column = sum(cuts[:part])
        if kind == "grid_shard":
            first = (index + part) % nodes * local
            shards += _by_row(rows, column, width, range(first, first + local))
        else:
            rank = (index + part) % world if kind == "column_wise" else node + (index + part) % local
            shards.append(Shard(rank, 0, column, rows, width))
    return TablePlan(kind, "fused", tuple(shards))


def _by_row(rows: int, column: int, width: int, ranks: Sequence[int]) -> tuple[Shard, ...]:
    sizes = even(rows, len(ranks))
    return tuple(
        Shard(rank, sum(sizes[:part]), column, size, width)
        for part, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
    )
