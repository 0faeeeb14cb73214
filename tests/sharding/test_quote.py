"""Prices, computed by hand for one shard of each type on two nodes of two ranks, and in sum for whole plans."""

import numpy as np
import pytest

from recsys.config import InputError
from recsys.sharding.cluster import GIB, PHASES, Cluster, Hardware, Rates
from recsys.sharding.cost import CostModel, Tables
from recsys.sharding.plan import TYPES, Plan, TablePlan
from recsys.sharding.quote import quote, table_seconds
from recsys.sharding.search import Search
from recsys.sharding.work import MEMORIES, PARTS, Cost
from recsys.sharding.workload import TableSpec, Workload, optimizer_bytes
from tests.sharding.plans import hand_plan, mlperf, setting, small

# A gigabyte a second over either link and nothing else: seconds on a link are its gigabytes.
LINKS_ALONE = {phase: Rates(node_gbs=1.0, network_gbs=1.0) for phase in PHASES}
TWO_BY_TWO = Cluster(
    hardware=Hardware(
        name="paper", memory_gib=1, memory_gbs=1, node_gbs=1, network_gbs=1, tflops_fp32=1, tflops_bf16=1,
        host_gib=1, host_gbs=1, ssd_gib=1, ssd_gbs=1, rates=LINKS_ALONE,
    ),
    ranks_per_node=2,
    nodes=2,
)  # fmt: skip
# 16 rows a step, 4 from each rank, look up 3 ids each in 8 rows of 8 columns.
TABLE = TableSpec(name="t", rows=8, dim=8, pooling=3.0)
MODEL = CostModel(Workload(name="w", tables=(TABLE,), batch_size=16), TWO_BY_TWO)

# Of all that a rank gets, a quarter is its own, a quarter comes from its node, half from the other node.
#
# ids: 16 rows, each with a count of 4 bytes for each table, and 3 ids of 4 bytes that fall on the shard as rows do:
#   all rows: 48 ids, 256 bytes; a half of the rows: 24 ids, 160 bytes; a quarter: 12 ids, 112 bytes.
# pooled: 16 rows of 8 fp32 values are 512 bytes, of 4 are 256. Sums within a node first: half of all is of the rank's
#   own making, half goes within the node; then half a node's sums, half of them to the other node.
# Of each type: rows and columns of the shard; bytes of ids within the node and between; of pooled embeddings.
SHARDS = {
    "table_wise": ((8, 8), (64, 128), (128, 256)),
    "row_wise": ((2, 8), (28, 56), (128, 256)),
    "column_wise": ((8, 4), (64, 128), (64, 128)),
    "table_column_wise": ((8, 4), (64, 128), (64, 128)),
    "table_row_wise": ((4, 8), (40, 80), (256, 128)),
    "grid_shard": ((4, 4), (40, 80), (128, 64)),
}


def one_shard(kind: str, kernel: str, rows: int, columns: int, model: CostModel = MODEL) -> Cost:
    return model.shards(kind, kernel, Tables.of([TABLE]), np.array([float(rows)]), np.array([float(columns)]))


def link_bytes(cost: Cost, phase: str) -> list[float]:
    """Within the node, and between nodes."""
    return [round(float(links[0, PHASES.index(phase)]) * 1e9, 6) for links in (cost.node, cost.network)]


@pytest.mark.parametrize("kind", SHARDS)
def test_bytes_on_links_are_those_counted_by_hand(kind: str) -> None:
    (rows, columns), ids, pooled = SHARDS[kind]
    cost = one_shard(kind, "fused", rows, columns)
    assert link_bytes(cost, "input_dist") == list(ids)
    assert link_bytes(cost, "output_dist") == list(pooled)
    assert link_bytes(cost, "gradient_dist") == list(pooled)
    assert link_bytes(cost, "all_reduce") == [0, 0]


def test_a_replicated_table_sends_its_gradient_around_the_ring() -> None:
    # 256 bytes of gradient: twice all but a share within the node, then a half of it twice between two nodes, halved.
    cost = one_shard("data_parallel", "dense", 8, 8)
    assert link_bytes(cost, "all_reduce") == [256, 128]
    assert link_bytes(cost, "input_dist") == link_bytes(cost, "output_dist") == [0, 0]


def test_compressed_values_take_less_of_the_links() -> None:
    model = CostModel(MODEL.workload, TWO_BY_TWO, comm_bytes=(1, 2))
    cost = one_shard("table_wise", "fused", 8, 8, model)
    assert link_bytes(cost, "output_dist") == [32, 64]
    assert link_bytes(cost, "gradient_dist") == [64, 128]
    assert link_bytes(cost, "input_dist") == [64, 128]


@pytest.mark.parametrize(
    ("kernel", "shares"),
    [
        ("fused", (1, 0, 0)),
        ("fused_uvm", (0, 1, 0)),
        ("fused_uvm_caching", (0.2, 1, 0)),
        ("key_value", (0.2, 0, 1)),
    ],
)
def test_memory_is_that_counted_by_hand(kernel: str, shares: tuple[float, ...]) -> None:
    held = one_shard("row_wise", kernel, 2, 8).bytes[0]
    assert held.shape == (len(PARTS), len(MEMORIES))
    np.testing.assert_allclose(held[0], [2 * 8 * 4 * share for share in shares])
    np.testing.assert_allclose(held[1], [2 * 4 * share for share in shares], err_msg="an accumulator a row")
    # Ids of two batches (12 of 4 bytes each), and 16 rows of 8 pooled values with their gradients.
    np.testing.assert_allclose(held[2], [2 * 12 * 4 + 2 * 16 * 8 * 4, 0, 0])


def test_optimizers_keep_what_they_keep() -> None:
    kinds = ("sgd", "rowwise_adagrad", "adagrad", "adam")
    assert [optimizer_bytes(kind, 10, 8) for kind in kinds] == [0, 40, 320, 640]  # type: ignore[arg-type]
    for kind, of_a_row in zip(kinds, (0, 4, 32, 64), strict=True):
        workload = Workload(name="w", tables=(TABLE,), batch_size=16, optimizer=kind)  # type: ignore[arg-type]
        held = one_shard("table_wise", "fused", 8, 8, CostModel(workload, TWO_BY_TWO)).bytes[0]
        assert held[1, 0] == 8 * of_a_row


def test_mlperf_tables_are_as_large_as_published() -> None:
    # 204,184,588 rows of 128 fp32 values; an accumulator a row, or one a value.
    workload = mlperf()
    assert len(workload.tables) == 26
    assert sum(table.rows for table in workload.tables) == 204_184_588
    assert sum(table.weight_bytes for table in workload.tables) == 204_184_588 * 512 == 104_542_509_056
    assert workload.optimizer_bytes == 204_184_588 * 4
    assert mlperf(optimizer="adagrad").optimizer_bytes == 104_542_509_056
    model, rules = setting(workload, "h100x8")
    priced = quote(Search(model, rules, 0.1).best(), model)
    assert priced.values()["weight_bytes"] == 104_542_509_056
    assert priced.values()["optimizer_bytes"] == 816_738_352


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel", ["fused", "fused_uvm", "fused_uvm_caching", "key_value"])
def test_ranks_hold_the_tables_between_them(kind: str, kernel: str) -> None:
    workload = small([(10, 16), (3, 8), (1, 4), (1000, 24)], optimizer="adagrad")
    shapes = {table.name: (table.rows, table.dim) for table in workload.tables}
    plan = hand_plan(shapes, kind, 2, 2)
    if kind != "data_parallel":
        tables = {name: TablePlan(kind, kernel, table.shards) for name, table in plan.tables.items()}
        plan = Plan(tables, shapes, 4, 2)
    plan.check()
    priced = quote(plan, CostModel(workload, TWO_BY_TWO))
    copies = 4 if kind == "data_parallel" else 1
    memory = MEMORIES.index(
        "host" if "uvm" in kernel and copies == 1 else "ssd" if kernel == "key_value" and copies == 1 else "device"
    )
    weights = sum(table.weight_bytes for table in workload.tables)
    assert priced.bytes[:, PARTS.index("weights"), memory].sum() == weights * copies
    assert priced.bytes[:, PARTS.index("optimizer"), memory].sum() == weights * copies, "Adagrad keeps one value each"


@pytest.mark.parametrize("kind", TYPES)
def test_ids_arrive_once_wherever_rows_are(kind: str) -> None:
    # With a nanosecond an id and nothing else, seconds of the lookup count what falls on a shard.
    hardware = Hardware(
        name="paper", memory_gib=1, memory_gbs=1, node_gbs=1, network_gbs=1, tflops_fp32=1, tflops_bf16=1,
        rates=dict.fromkeys(PHASES, Rates(id_ns=1.0)),
    )  # fmt: skip
    workload = Workload(name="w", tables=(TABLE,), batch_size=16)
    group = Cluster(hardware=hardware, ranks_per_node=2, nodes=2)
    plan = hand_plan({"t": (8, 8)}, kind, 2, 2)
    seconds = quote(plan, CostModel(workload, group)).seconds[:, PHASES.index("lookup")].sum()
    # Each column shard needs every id; a count comes for each of 16 rows to each shard, or to each rank its own 4.
    parts = {shard.column for shard in plan.tables["t"].shards} or {0}
    counts = 16 * (len(plan.tables["t"].shards) or 1)
    assert seconds * 1e9 == pytest.approx(48 * len(parts) + counts)


def test_a_quote_adds_up() -> None:
    model, rules = setting(mlperf(optimizer="adagrad"), "h100x8x2")
    plan = Search(model, rules, 0.1).best()
    priced = quote(plan, model)
    assert priced.step_seconds == pytest.approx(sum(priced.phase_seconds.values()))
    assert priced.pipelined_seconds <= priced.step_seconds
    assert priced.fits
    assert priced.too_full() == []
    assert 0 < priced.balance <= 1
    assert table_seconds(plan, model).shape == (16, 26)
    assert (table_seconds(plan, model).sum(axis=1) > 0).all()


def test_what_does_not_fit_is_told_rank_by_rank() -> None:
    model, _ = setting(mlperf(), "a100-40x8")
    shapes = {table.name: (table.rows, table.dim) for table in model.workload.tables}
    priced = quote(hand_plan(shapes, "data_parallel", 1, 8), model)
    assert not priced.fits
    (line,) = priced.too_full()
    assert line.startswith("device memory is too small on 8 of 8 ranks: rank 0 needs ")
    assert priced.used[0, 0] > 104_542_509_056 > model.capacity(0.1)[0]
    assert model.capacity(0.25)[0] == pytest.approx(37.2 * 0.75 * GIB)


def test_a_quote_of_another_plan_is_refused() -> None:
    model, _ = setting(small([(10, 16)]), "h100x4")
    with pytest.raises(InputError, match="the job has 4"):
        quote(hand_plan({"t0": (10, 16)}, "table_wise", 1, 2), model)
    with pytest.raises(InputError, match="none of the model's"):
        quote(hand_plan({"t0": (10, 16), "t1": (3, 4)}, "table_wise", 1, 4), model)
