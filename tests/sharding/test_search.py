"""Our search: finds room where there is any, keeps to memory, and is no worse than simpler plans."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import InputError
from recsys.sharding import search
from recsys.sharding.cluster import GIB, HARDWARE, Cluster
from recsys.sharding.constraints import Allowed
from recsys.sharding.cost import CostModel
from recsys.sharding.improve import Budget, _Norm, improve
from recsys.sharding.options import Option, Options
from recsys.sharding.plan import Plan
from recsys.sharding.quote import quote
from recsys.sharding.room import find_room
from recsys.sharding.search import Search
from recsys.sharding.workload import OptimizerKind, TableSpec, Workload
from tests.sharding.plans import mlperf, setting, small


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less patience than users have."""
    monkeypatch.setattr(search, "SHAKES", 1000)


def find(model: CostModel, rules: Sequence[Allowed], reserve: float = 0.0) -> Plan:
    plan = Search(model, rules, reserve).best()
    plan.check()
    return plan


def ways(option: Option, world: int, local: int) -> Iterator[list[int]]:
    """Every way to place a table's parts: ranks that get a shard, one by one."""
    nodes = [list(range(at, at + local)) for at in range(0, world, local)]
    if option.reach == "world":
        yield list(range(world))
    elif option.reach == "node":
        for chosen in itertools.combinations(nodes, option.columns):
            yield [rank for node in chosen for rank in node]
    elif option.sharding_type == "table_column_wise":
        for node in nodes:
            yield from map(list, itertools.combinations(node, option.columns))
    else:
        yield from map(list, itertools.combinations(range(world), option.columns))


def anything_fits(model: CostModel, rules: Sequence[Allowed], reserve: float) -> bool:
    """By trying all combinations of all ways."""
    options, group = Options(model, rules), model.group
    free = model.capacity(reserve) - model.every_rank().bytes.sum(axis=1)[0]
    held = np.zeros((1, group.world_size, len(free)))
    for table in range(len(rules)):
        of_table = []
        for index in np.flatnonzero(options.possible[table]):
            for ranks in ways(options.options[index], group.world_size, group.ranks_per_node):
                of_table.append(np.zeros((group.world_size, len(free))))
                of_table[-1][ranks] = options.bytes[table, index]
        held = (held[:, None] + np.unique(np.array(of_table), axis=0)[None]).reshape(-1, *held.shape[1:])
        held = np.unique(held[(held <= free * (1 - 2e-9)).all(axis=(1, 2))], axis=0)
    return bool(len(held))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.sampled_from([4, 8, 16])), min_size=1, max_size=4),
    nodes=st.integers(1, 2),
    local=st.integers(1, 2),
    types=st.lists(
        st.sampled_from(["table_wise", "row_wise", "column_wise", "table_column_wise", "table_row_wise", "grid_shard"]),
        min_size=1,
        max_size=2,
        unique=True,
    ),
    kernels=st.sampled_from([("fused",), ("fused_uvm",), ("fused", "fused_uvm"), ("fused_uvm_caching", "fused")]),
    tight=st.floats(0.3, 1.3),
)
def test_a_plan_is_found_exactly_where_there_is_one(
    shapes: list[tuple[int, int]], nodes: int, local: int, types: list[str], kernels: tuple[str, ...], tight: float
) -> None:
    workload = small(shapes, batch_size=nodes * local)
    needed = sum(table.weight_bytes for table in workload.tables) * 2 / (nodes * local) + 1000
    hardware = dataclasses.replace(HARDWARE["h100"], memory_gib=needed * tight / GIB, host_gib=needed / 2 / GIB)
    model, rules = setting(workload, Cluster(hardware=hardware, ranks_per_node=local, nodes=nodes), types, kernels)
    if anything_fits(model, rules, 0.0):
        assert quote(find(model, rules), model, reserve=0.0).fits
    else:
        with pytest.raises(InputError):
            find(model, rules)


def test_largest_first_is_not_enough_to_find_room() -> None:
    # 3 3 2 2 2 into two of 6: one after another to the emptier rank ends at 5 and 5 with 2 left over.
    workload = small([(rows * 1000, 4) for rows in (3, 3, 2, 2, 2)], optimizer="sgd", batch_size=2)
    hardware = dataclasses.replace(HARDWARE["h100"], memory_gib=6200 * 16 / GIB)
    model, rules = setting(workload, Cluster(hardware=hardware, ranks_per_node=2), ["table_wise"])
    plan = find(model, rules)
    assert quote(plan, model, reserve=0.0).fits
    by_rank = {table.shards[0].rank: 0 for table in plan.tables.values()}
    for table in plan.tables.values():
        by_rank[table.shards[0].rank] += table.shards[0].rows
    assert sorted(by_rank.values()) == [6000, 6000]


def test_room_is_found_by_going_back() -> None:
    workload = small([(rows * 1000, 4) for rows in (5, 4, 4, 3, 2)], optimizer="sgd", batch_size=2)
    hardware = dataclasses.replace(HARDWARE["h100"], memory_gib=9200 * 16 / GIB)
    model, rules = setting(workload, Cluster(hardware=hardware, ranks_per_node=2), ["table_wise"])
    ground = Search(model, rules, 0.0).ground
    packing = find_room(ground, ground.options.possible)
    assert packing is not None
    assert (packing.bytes <= ground.capacity).all()
    assert (packing.choice >= 0).all()


@pytest.mark.parametrize(
    ("cluster", "optimizer", "kernels"),
    [
        ("a100-40x8", "adagrad", ("fused",)),
        ("a100-40x4", "rowwise_adagrad", ("fused",)),
        ("a100-40x4", "adagrad", ("fused", "fused_uvm_caching")),
        ("a100-40x2", "rowwise_adagrad", ("fused", "fused_uvm", "fused_uvm_caching", "key_value")),
        ("h100x8x2", "adagrad", ("fused", "fused_uvm_caching")),
    ],
)
def test_memory_is_never_exceeded(cluster: str, optimizer: OptimizerKind, kernels: tuple[str, ...]) -> None:
    model, rules = setting(mlperf(optimizer=optimizer), cluster, kernels=kernels)
    priced = quote(find(model, rules, 0.1), model, reserve=0.1)
    assert priced.fits
    used = {table.kernel for table in priced.plan.tables.values()}
    assert used == {"fused"} if cluster == "h100x8x2" else used <= set(kernels)


def test_nine_tenths_full_is_not_full() -> None:
    # One rank's share of the five large tables is all that the device has room for.
    model, rules = setting(mlperf(optimizer="adagrad", batch_size=4096), "h100x4")
    used = quote(find(model, rules), model, reserve=0.0).used[:, 0]
    tight = dataclasses.replace(HARDWARE["h100"], memory_gib=float(used.mean()) / 0.9 / GIB)
    model, rules = setting(model.workload, Cluster(hardware=tight, ranks_per_node=4))
    assert quote(find(model, rules), model, reserve=0.0).fits


@pytest.mark.parametrize(("cluster", "optimizer"), [("h100x8x4", "rowwise_adagrad"), ("a100-80x4x2", "adagrad")])
def test_no_plan_of_one_type_is_better(cluster: str, optimizer: OptimizerKind) -> None:
    model, rules = setting(mlperf(optimizer=optimizer), cluster)
    ours = quote(find(model, rules, 0.1), model).step_seconds
    for kind in rules[0].types:
        try:
            uniform = find(model, [Allowed((kind,), ("fused",))] * len(rules), 0.1)
        except InputError:
            continue
        assert ours <= quote(uniform, model).step_seconds * 1.005  # with less patience than users have


def test_the_same_question_gets_the_same_answer() -> None:
    workload = mlperf(optimizer="adagrad")
    first, second = (find(*setting(workload, "h100x8x2"), 0.1) for _ in range(2))
    assert first == second


def test_improvement_gains_and_comes_to_an_end() -> None:
    model, rules = setting(mlperf(optimizer="adagrad"), "h100x8")
    searched = Search(model, rules, 0.1)
    packing = searched._pack(np.where(searched.possible, searched.all.total, np.inf).argmin(axis=1))
    assert packing is not None
    before, budget = packing.seconds, Budget(1e6)
    after = improve(packing.copy(), searched.possible, budget)
    assert after.seconds < before * 0.9, "whole tables wait for the largest of them"
    assert (after.bytes <= searched.ground.capacity).all()
    left = budget.left
    again = improve(after.copy(), searched.possible, budget)
    assert again.seconds <= after.seconds
    assert left - budget.left < 1e6 - left, "nothing is left to gain, so that few sweeps find nothing"
    norm = _Norm(after.copy(), searched.possible, 8, budget)
    steady = norm.packing.seconds
    for table in range(len(rules)):
        if not norm.replace([table]):
            assert norm.packing.seconds == pytest.approx(steady, rel=1e-12), "what gains nothing is put back"
        steady = norm.packing.seconds
    settled = improve(norm.packing, searched.possible, budget)
    while _Norm(settled, searched.possible, 8, budget).sweep():
        pass
    assert budget.left > 0
    assert not any(_Norm(settled, searched.possible, 8, budget).replace([table]) for table in range(len(rules)))


def test_progress_is_told_from_nought_to_one() -> None:
    told: list[float] = []
    model, rules = setting(mlperf(), "h100x8")
    Search(model, rules, 0.1).best(lambda amount, note="": told.append(amount))
    assert sum(told) == pytest.approx(1.0)
    assert min(told) >= 0
    assert len(told) > 20


def test_constraints_are_kept() -> None:
    constraints = ["C1=row_wise", "C2=:fused_uvm_caching", "C1?=column_wise", "C6=data_parallel", "C7=table_row_wise"]
    model, rules = setting(mlperf(optimizer="adagrad"), "h100x8x2", constraints=constraints)
    tables = find(model, rules, 0.1).tables
    assert tables["C1"].sharding_type == "row_wise"
    assert tables["C2"].kernel == "fused_uvm_caching"
    assert {tables[f"C{index}"].sharding_type for index in range(10, 20)} == {"column_wise"}
    assert (tables["C6"].sharding_type, tables["C6"].kernel) == ("data_parallel", "dense")
    assert tables["C7"].sharding_type == "table_row_wise"


def test_small_tables_are_not_cut_for_nothing() -> None:
    sizes = [(10_000_000, 128)] * 2 + [(100, 128)] * 12
    workload = small(sizes, batch_size=65_536)
    model, rules = setting(workload, "h100x8")
    plan = find(model, rules, 0.1)
    parts = [len({shard.column for shard in plan.tables[f"t{index}"].shards}) for index in range(len(sizes))]
    work = sum(parts)
    whole = quote(find(model, [Allowed(("column_wise",), ("fused",))] * len(sizes), 0.1), model).step_seconds
    assert quote(plan, model).step_seconds <= whole * 1.001
    assert work < len(sizes) * 8, "eight ranks have one part of each table else"


def test_columns_that_cannot_be_split_stay_whole() -> None:
    model, rules = setting(small([(100, 20), (100, 4), (100, 12)]), "h100x8", ["column_wise"])
    plan = find(model, rules)
    for name, width in (("t0", 20), ("t1", 4), ("t2", 12)):
        shards = plan.tables[name].shards
        assert sum(shard.columns for shard in shards) == width
        assert all(shard.columns % 4 == 0 for shard in shards)


def test_tables_of_fewer_rows_than_ranks_are_cut_like_others() -> None:
    model, rules = setting(small([(3, 8), (1, 8)]), "h100x8", ["row_wise"])
    plan = find(model, rules)
    assert [shard.rows for shard in plan.tables["t0"].shards] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_table_that_no_rank_can_hold_is_named() -> None:
    tables = (TableSpec(name="small", rows=10, dim=8), TableSpec(name="huge", rows=10**10, dim=128))
    workload = Workload(name="w", tables=tables, batch_size=64)
    with pytest.raises(
        InputError, match=r"nothing fits: table huge \(4,768.4 GiB of weights\) needs 6\d\d\.\d GiB a rank"
    ):
        find(*setting(workload, "h100x8"))
    model, _ = setting(workload, "h100x8")
    # The kernel dense has a gradient as large as the table.
    with pytest.raises(InputError, match=r"needs 9,5\d\d\.\d GiB a rank even table_wise under the kernel dense"):
        find(model, [Allowed(("table_wise",), ("dense",))] * 2)


def test_whole_tables_that_only_fit_in_pieces_are_told_so() -> None:
    model, rules = setting(mlperf(), "a100-40x4", ["table_wise"])
    with pytest.raises(InputError, match=r"nothing fits: .* though not table by table; allow more --sharding.types"):
        find(model, rules, 0.1)
    model, rules = setting(mlperf(optimizer="adagrad"), "a100-40x2")
    with pytest.raises(
        InputError, match=r"nothing fits: the tables need \d+\.\d GiB in all .* and \d+\.\d GiB are free"
    ):
        find(model, rules, 0.1)


def test_two_copies_of_the_tables_have_half_the_ranks_each() -> None:
    workload = mlperf()
    model = CostModel(workload, setting(workload, "h100x8x4")[0].cluster, replicas=2)
    plan = find(model, setting(workload, "h100x8x4")[1], 0.1)
    assert (plan.world_size, plan.replicas) == (16, 2)
    assert quote(plan, model).fits
