"""`recsys shard-bench` without ranks: its cases, the work in them, the fit, the halves, and bad input."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.config import InputError, load
from recsys.sharding.cluster import HARDWARE, PHASES, Cluster, Hardware, Rates, parse_cluster
from recsys.sharding.cost import CostModel
from recsys.sharding.plan import TYPES
from recsys.sharding.quote import quote
from recsys.studies.shard_calibrate import FIELDS, Amounts, amounts, fit, predict, profile
from recsys.studies.shard_cases import Case, Layout, cases, cluster, layouts
from recsys.studies.shard_config import ShardBenchConfig
from tests.test_cli import error_line

CPU = replace(HARDWARE["cpu"], rates={}, flops_share=0.4)  # as if it had never been measured
ROWS = (100, 40)

TRUE = replace(
    CPU,
    flops_share=0.3,
    rates={
        "input_dist": Rates(call_us=300, peer_us=150, field_us=20, id_ns=9, node_gbs=0.7, network_gbs=0.4),
        "lookup": Rates(call_us=500, field_us=30, id_ns=8, memory_gbs=9),
        "output_dist": Rates(call_us=400, peer_us=200, field_us=10, node_gbs=0.5, network_gbs=0.3),
        "dense": Rates(call_us=900, memory_gbs=7),
        "gradient_dist": Rates(call_us=350, peer_us=250, field_us=5, node_gbs=0.6, network_gbs=0.2),
        "update": Rates(call_us=450, field_us=40, id_ns=7, memory_gbs=6),
        "all_reduce": Rates(call_us=200, peer_us=390, node_gbs=1.05, network_gbs=0.5),
    },
)


def every_case(config: ShardBenchConfig) -> list[Case]:
    return [case for layout in layouts(config) for case in cases(config, layout, simulated=True)[0]]


def work_of(sharding_type: str, layout: Layout) -> Amounts:
    """Of a batch of 64 rows, 10 ids each in two tables of 100 and 40 rows of 16 fp32."""
    case = Case(sharding_type, 64, 10, 16, 2, layout)
    workload = case.workload(ROWS)
    return amounts(workload, case.plan(workload), cluster(CPU, layout, simulated=True))


def counts(work: Amounts, rank: int, phase: str, field: str) -> float:
    unit = {"call_us": 1e-6, "peer_us": 1e-6, "field_us": 1e-6, "id_ns": 1e-9}.get(field, 1e-9)
    return float(work.work[rank, PHASES.index(phase), FIELDS.index(field)] / unit)


ONE, TWO = Layout(4), Layout(2, 2)
# By hand. A table has 640 ids of 4 bytes, 64 counts of ids, and 64 pooled rows of 16 fp32: 4096 bytes.
# type, layout: of rank 0, ids and counts that reach it, the bytes of both within the node and between nodes; bytes of
# gradients that reach it within the node and between nodes; calls and peers of what brings pooled embeddings back.
BY_HAND = {
    # t0 is on rank 0: (640 + 64) * 4 bytes, a quarter of which were its own.
    ("table_wise", ONE): (640, 64, 2112, 0, 3072, 0, 1, 3),
    # Both tables, a quarter of the ids of each, but all counts.
    ("row_wise", ONE): (320, 128, 1344, 0, 6144, 0, 1, 3),
    # Both tables, 4 of 16 columns: all ids.
    ("column_wise", ONE): (1280, 128, 4224, 0, 1536, 0, 1, 3),
    # t0 is on ranks 0 and 1, half of its ids each; half of the sums stays, and of the other a half crosses.
    ("table_row_wise", TWO): (320, 64, 384, 768, 2048, 1024, 2, 2),
    # 8 columns of t0 for all rows: a quarter stays, a quarter goes to the neighbour, half to the other node.
    ("table_column_wise", TWO): (640, 64, 704, 1408, 512, 1024, 1, 3),
    # 8 columns of both tables, half of the ids.
    ("grid_shard", TWO): (640, 128, 768, 1536, 2048, 1024, 2, 2),
    ("data_parallel", ONE): (0, 0, 0, 0, 0, 0, 0, 0),
}


def test_work_is_counted_by_hand_for_every_type() -> None:
    assert {sharding_type for sharding_type, _ in BY_HAND} == set(TYPES)


@pytest.mark.parametrize(("sharding_type", "layout"), BY_HAND)
def test_ids_bytes_and_calls_are_those_counted_by_hand(sharding_type: str, layout: Layout) -> None:
    work = work_of(sharding_type, layout)
    ids, rows, near, far, pooled_near, pooled_far, calls, peers = BY_HAND[sharding_type, layout]
    by_rows = sharding_type in ("row_wise", "table_row_wise", "grid_shard")
    expected = {
        ("input_dist", "id_ns"): rows + ids * (4 if by_rows else 1),  # those of split rows are sorted first
        ("input_dist", "node_gbs"): near,
        ("input_dist", "network_gbs"): far,
        ("input_dist", "call_us"): 2 if calls else 0,
        ("input_dist", "peer_us"): 6 if calls else 0,
        ("output_dist", "node_gbs"): pooled_near * (2 if by_rows else 1),  # gloo's reduce-scatter is an all-reduce
        ("output_dist", "network_gbs"): pooled_far,
        ("output_dist", "call_us"): calls,
        ("output_dist", "peer_us"): peers,
        ("gradient_dist", "node_gbs"): pooled_near,
        ("gradient_dist", "network_gbs"): pooled_far,
    }
    if ids:
        expected["lookup", "id_ns"] = ids + rows
    found = {(phase, field): counts(work, 0, phase, field) for phase, field in expected}
    assert found == pytest.approx(expected)


def test_replicated_tables_look_up_their_own_rows_and_average_gradients_as_large_as_they_are() -> None:
    work = work_of("data_parallel", ONE)
    assert counts(work, 3, "lookup", "id_ns") == pytest.approx(2 * (160 + 16))
    dense = (32 * 256 + 256) + (256 * 64 + 64) + (64 + 1)
    sent = 2 * 3 / 4 * 4
    assert counts(work, 3, "all_reduce", "node_gbs") == pytest.approx(sent * (dense + 140 * 16))
    assert counts(work, 3, "all_reduce", "call_us") == pytest.approx(2)
    alone = work_of("table_wise", ONE)
    assert counts(alone, 3, "all_reduce", "node_gbs") == pytest.approx(sent * dense)
    assert counts(alone, 3, "lookup", "id_ns") == 0  # two tables on four ranks


def test_flops_and_memory_of_the_dense_part_are_counted_by_hand() -> None:
    work = work_of("row_wise", ONE)
    products = 32 * 256 + 256 * 64 + 64
    assert work.flops == pytest.approx([3 * 2 * products * 16] * 4)
    values = 32 + 256 + 256 + 64 + 64 + 1
    assert counts(work, 0, "dense", "memory_gbs") == pytest.approx(3 * 4 * values * 16)


def test_an_update_moves_the_same_bytes_on_a_cpu_and_on_a_gpu() -> None:
    case = Case("column_wise", 64, 10, 16, 2, ONE)
    workload = case.workload(ROWS)
    plan = case.plan(workload)
    at = (0, PHASES.index("update"), FIELDS.index("memory_gbs"))
    cpu, gpu = (amounts(workload, plan, Cluster(hardware=HARDWARE[name], ranks_per_node=4)) for name in ("cpu", "h100"))
    # 640 ids reach 100 (1 - e^-6.4) and 40 (1 - e^-16) rows, of which it has 4 columns of weight and accumulator.
    rows = 100 * (1 - np.exp(-6.4)) + 40 * (1 - np.exp(-16))
    assert cpu.work[at] == gpu.work[at]
    assert cpu.work[at] * 1e9 > 2 * rows * 4 * (4 + 4)


def test_every_case_has_a_plan_that_holds() -> None:
    config = ShardBenchConfig(num_tables=(3,), ranks=(2, 3, 4), batch_sizes=(24, 256))
    every = every_case(config)
    assert {case.sharding_type for case in every} == set(TYPES)
    assert {case.layout for case in every} == {Layout(2), Layout(3), Layout(4), Layout(2, 2)}
    for case in every:
        workload = case.workload(config.rows)
        case.plan(workload).check()
        assert workload.optimizer == ("adagrad" if case.columns > 1 else "rowwise_adagrad")


def test_what_cannot_be_is_left_out_with_the_reason() -> None:
    config = ShardBenchConfig(types=("column_wise", "grid_shard"), dims=(8,), batch_sizes=(255,), ranks=(3, 4))
    found, skipped = cases(config, Layout(3), simulated=True)
    assert {case.sharding_type for case in found} == {"column_wise"}
    assert skipped == {
        "grid_shard on 3 ranks": "on one node this is table_row_wise; it needs two nodes of several ranks, as "
        "--ranks 4 makes them"
    }
    found, skipped = cases(config, Layout(4), simulated=True)
    assert (found, skipped) == ([], {"column_wise on 4 ranks": "255 rows cannot be split evenly over 4 ranks"})
    _, skipped = cases(replace(config, batch_sizes=(256,)), Layout(4), simulated=True)
    assert skipped == {"column_wise on 4 ranks": "8 columns cannot be cut into 4 parts of a multiple of 4"}


def test_ranks_that_share_cores_slow_one_another_as_far_as_they_work_at_once() -> None:
    four_on_two = Cluster(hardware=replace(CPU, cores=2), ranks_per_node=4)
    seconds = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.5], [0.0, 1.0, 0.0]])
    assert four_on_two.shared(seconds).max(axis=0).tolist() == [1.0, 2.0, 1.25]
    two_on_two = Cluster(hardware=replace(CPU, cores=2), ranks_per_node=2)
    assert two_on_two.shared(seconds[:2]).tolist() == seconds[:2].tolist()
    gpus = Cluster(hardware=HARDWARE["h100"], ranks_per_node=4)
    assert gpus.shared(seconds) is seconds


def test_quotes_are_of_ranks_that_share_cores_and_of_cores_that_serve_both_links() -> None:
    case = Case("table_row_wise", 64, 10, 16, 2, TWO)
    workload = case.workload(ROWS)
    plan = case.plan(workload)

    def priced(**figures: Any) -> np.ndarray:
        ran = Cluster(hardware=replace(TRUE, **figures), ranks_per_node=2, nodes=2)
        return quote(plan, CostModel(workload, ran)).seconds

    alone = priced(cores=0)
    assert priced(cores=1).max(axis=0) == pytest.approx(2 * alone.max(axis=0))
    at = PHASES.index("gradient_dist")
    # Two stages of one peer each, a shard, 2048 bytes within the node and 1024 between nodes.
    expected = 2 * 350e-6 + 2 * 250e-6 + 5e-6 + 2048 / 0.6e9 + 1024 / 0.2e9
    assert alone[0, at] == pytest.approx(expected)


def test_nodes_that_one_machine_plays_have_half_of_its_cores() -> None:
    assert [cluster(CPU, layout, simulated=True).hardware.cores for layout in (Layout(2), ONE, TWO)] == [2, 2, 1]
    assert cluster(CPU, TWO, simulated=False).hardware.cores == 2


def test_nodes_share_no_cores_with_one_another() -> None:
    nodes = Cluster(hardware=replace(CPU, cores=1), ranks_per_node=2, nodes=2)
    assert nodes.shared(np.array([[1.0], [1.0], [1.0], [0.0]]))[:, 0].tolist() == [2.0, 2.0, 1.0, 0.0]


def measured(hardware: Hardware, config: ShardBenchConfig, noise: float) -> list:
    """Cases as if they had been measured on `hardware`, as far as chance lets them."""
    from recsys.studies.shard_bench import _measured

    chance = np.random.default_rng(0)
    found = []
    for case in every_case(config):
        workload = case.workload(config.rows)
        ran = cluster(hardware, case.layout, simulated=True)
        seconds = quote(case.plan(workload), CostModel(workload, ran)).phase_seconds
        record = {
            "sharding_type": case.sharding_type,
            "batch_size": case.batch_size,
            "pooling": case.pooling,
            "dim": case.dim,
            "num_tables": case.num_tables,
            "layout": case.layout._asdict(),
            "steps": 3,
            "measured": {
                phase: {"median": value * float(np.exp(noise * chance.standard_normal()))}
                for phase, value in seconds.items()
            },
        }
        found.append(_measured(record, config, CPU, simulated=True))
    return found


def test_calibration_recovers_the_rates_that_made_the_measurements() -> None:
    from recsys.studies.shard_bench import calibrate, errors

    config = ShardBenchConfig(num_tables=(2, 8), dims=(16, 64), batch_sizes=(256, 8192))
    every = measured(TRUE, config, noise=0.0)
    fitted = calibrate(every, CPU, config)
    assert fitted.flops_share == pytest.approx(TRUE.flops_share, rel=0.01)
    for phase, rates in TRUE.rates.items():
        found, wanted = fitted.rates[phase], {name: value for name in FIELDS if (value := getattr(rates, name))}
        assert {name: getattr(found, name) for name in wanted} == pytest.approx(wanted, rel=0.02), phase
    for of_ranks in errors(every, "median").values():
        assert set(of_ranks) == set(PHASES)
        for phase, error in of_ranks.items():
            assert error["after"] < 0.01 < error["before"], phase


def test_noise_is_not_learnt_but_judged_by_the_other_half() -> None:
    from recsys.studies.shard_bench import calibrate, errors

    config = ShardBenchConfig(dims=(16, 64), num_tables=(2, 8))
    every = measured(TRUE, config, noise=0.2)
    calibrate(every, CPU, config)
    for of_ranks in errors(every, "median").values():
        for found in of_ranks.values():
            assert 0.08 < found["after"] < 0.3  # the median of |e^N(0, .2) - 1| is .13


def test_halves_have_as_many_of_every_type_on_any_ranks_and_each_judges_the_other() -> None:
    from recsys.studies.shard_bench import calibrate

    config = ShardBenchConfig(dims=(16,), num_tables=(2, 8))
    every = measured(TRUE, config, noise=0.0)
    # One half is twice as slow: what is predicted for it comes from the other, and the other way round.
    calibrate(every, CPU, config)
    halves = [case.record["half"] for case in every]
    for case in every:
        if case.record["half"]:
            for found in case.record["measured"].values():
                found["median"] *= 2
    before = {id(case): case.record.pop("calibrated") for case in every}
    calibrate(every, CPU, config)
    assert [case.record["half"] for case in every] == halves
    for case in every:
        factor = 1 if case.record["half"] else 2
        expected = {phase: value * factor for phase, value in before[id(case)].items()}
        assert case.record["calibrated"] == pytest.approx(expected, rel=0.02)
    split: dict[tuple, list[int]] = defaultdict(list)
    for case in every:
        split[case.record["sharding_type"], case.amounts.cluster.name].append(case.record["half"])
    assert len(split) == 5 + 5 + 3
    for alike in split.values():
        assert abs(alike.count(0) - alike.count(1)) <= len(alike) % 2


def test_what_no_case_had_keeps_its_rate_and_bytes_are_never_free() -> None:
    work = [work_of("table_wise", ONE), work_of("row_wise", ONE), work_of("column_wise", ONE)]
    weights = fit(work, np.array([1e-3, 1e-3, 1e-3]), "output_dist", CPU)
    rates = profile(CPU, {"output_dist": weights}).rates["output_dist"]
    assert rates.network_gbs == pytest.approx(CPU.network_gbs * CPU.link_share)
    assert rates.node_gbs is not None
    assert rates.node_gbs <= CPU.memory_gbs
    assert [predict(case, "output_dist", weights) for case in work] == pytest.approx([1e-3] * 3, rel=0.05)


def test_a_fitted_profile_is_read_where_hardware_is_asked_for(tmp_path: Path) -> None:
    import yaml

    from recsys.config import dump

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(dump(TRUE)))
    assert parse_cluster(f"{path}x4") == Cluster(hardware=TRUE, ranks_per_node=4)


def test_configs_survive_json() -> None:
    from recsys.config import dump

    config = ShardBenchConfig(types=("row_wise",), calibrate=Path("x.yaml"))
    assert load(ShardBenchConfig, json.loads(json.dumps(dump(config)))) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--types", "tabel_wise"], "--types: unknown sharding type 'tabel_wise'; did you mean table_wise"),
        (["--ranks", "0"], "--ranks 0 must be at least 1"),
        (["--ranks", "2", "-1"], "--ranks -1 must be at least 1"),
        (["--dims", "6"], "--dims 6 must be a multiple of 4"),
        (["--repeats", "2"], "--repeats 2 must be at least 3"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--seconds", "0"], "--seconds 0.0 must be above 0"),
        (["--out", "nowhere/out.json"], "--out nowhere/out.json: no folder nowhere; make it first"),
        (["--picture", "nowhere/out.png"], "--picture nowhere/out.png: no folder nowhere; make it first"),
        (["--calibrate", "rates.txt"], "--calibrate rates.txt: must end in .yaml"),
        (["--hardware", "cpuu"], "unknown hardware 'cpuu'; did you mean cpu"),
    ],
)
def test_bad_input_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_line(capsys, "shard-bench", *options)


def test_nothing_to_measure_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from recsys.studies.shard_bench import shard_bench

    with pytest.raises(InputError, match="no case was measured"):
        shard_bench(ShardBenchConfig(types=("grid_shard",), ranks=(2,)))
    assert "grid_shard on 2 ranks left out: on one node this is table_row_wise" in capsys.readouterr().err


def test_the_table_of_errors_and_the_picture_are_made_of_what_was_found(tmp_path: Path) -> None:
    from rich.console import Console

    from recsys.config import dump
    from recsys.studies.shard_bench import calibrate, errors
    from recsys.studies.shard_figure import draw
    from recsys.studies.shard_report import cases as table_of
    from recsys.studies.shard_report import error_table

    config = ShardBenchConfig(dims=(16,), num_tables=(2,), poolings=(1,))
    every = measured(TRUE, config, noise=0.1)
    calibrate(every, CPU, config)
    result = {"config": dump(config), "cases": [case.record for case in every], "errors": errors(every, "median")}
    assert table_of(result).row_count == len(every)
    console = Console(width=200)
    with console.capture() as printed:
        console.print(error_table(result["errors"]))
    text = printed.get()
    for phase in PHASES:
        assert phase.replace("_", " ") in text
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
