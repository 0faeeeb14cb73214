"""Bookkeeping of benchmarks without a clock, and floors that count what the models do; no timing is asserted."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from throughput import Config, main, to_first

import harness
import roofline
import workload
from harness import Gate, Turns, append, measure, rates, result, runner, speedup, summary
from jobs import Jobs, RankedJob
from recsys.backbones import BACKBONES
from recsys.backbones.dcnv2 import DCNv2Config
from recsys.config import InputError
from recsys.data.loader import Loader
from recsys.data.schema import Schema
from recsys.members import ModelConfig, parse_members
from recsys.model import Member
from recsys.native import available
from recsys.training.workload import dense_flops
from roofline import Ceilings, Floor, Operand, Product, TableTraffic, member_products
from workload import Setting, make_data

CPU = torch.device("cpu")
GATE = Path(__file__).parents[1] / "benchmarks" / "gate.json"
LIBRARIES = pytest.mark.filterwarnings("ignore")  # of what others tell when they are used as they come


def test_a_summary_tells_median_range_and_the_middle_half() -> None:
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 1.0, "high": 5.0, "spread": 2 / 3}
    assert summary([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "spread": 0.0}


def test_ratios_are_paired_turn_by_turn() -> None:
    ours, theirs = [1.0, 10.0, 2.0], [2.0, 40.0, 2.0]
    found = speedup(ours, theirs)
    assert (found["median"], found["low"], found["high"]) == (2.0, 1.0, 4.0)
    with pytest.raises(ValueError, match="zip"):
        speedup(ours, theirs[:2])


def test_rates_are_units_a_second() -> None:
    assert rates(100, [0.5, 0.25, 1.0])["median"] == 200
    assert rates(100, [0.5, 0.25, 1.0])["high"] == 400


def test_a_turn_has_enough_steps_for_its_seconds() -> None:
    turns = Turns(seconds=1.0, least_steps=3)
    assert [turns.steps(seconds) for seconds in (0.3, 0.5, 9.0, 0.0)] == [4, 3, 3, 10**9]


@pytest.mark.parametrize(("name", "value"), [("turns", 0), ("least_steps", 0), ("seconds", -1.0), ("warmup_steps", 0)])
def test_turns_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} {value}"):
        Turns(**{name: value})


def test_cases_take_turns_after_a_warm_up() -> None:
    calls: list[tuple[str, int]] = []
    step_seconds = {"a": 0.1, "b": 0.5}

    def case(name: str):
        def run(steps: int) -> float:
            calls.append((name, steps))
            return steps * step_seconds[name] * len(calls)

        return run

    turns = Turns(turns=2, seconds=1.0, least_steps=2, warmup_steps=5, settling_steps=1)
    found = measure({name: case(name) for name in "ab"}, turns)
    # The warm-up's second call of a takes .2 s a step, and that of b 2 s: 5 steps a turn, and 2.
    assert calls[:4] == [("a", 5), ("a", 2), ("b", 5), ("b", 2)]
    assert calls[4:] == 2 * [("a", 1), ("a", 5), ("b", 1), ("b", 2)]
    assert found["a"] == pytest.approx([0.6, 1.0])
    assert found["b"] == pytest.approx([0.5 * 8, 0.5 * 12])


def test_a_runner_waits_for_the_device_on_both_sides_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    times = iter([10.0, 12.5])

    def clock() -> float:
        told.append("clock")
        return next(times)

    monkeypatch.setattr(harness.time, "perf_counter", clock)
    run = runner(lambda: told.append("step"), lambda: told.append("wait"))
    assert run(2) == 2.5
    assert told == ["wait", "clock", "step", "step", "wait", "clock"]


def test_results_are_lines_whose_ratios_stand_alone_too(tmp_path: Path) -> None:
    line = result("speed", {"batch": 4}, {"rows": 7.0}, {"floor_share": summary([0.4, 0.6, 0.5])}, {"commit": "c0ffee"})
    assert line["floor_share"] == line["ratios"]["floor_share"]["median"] == 0.5
    append(tmp_path / "out.json", [line])
    append(tmp_path / "out.json", [line, line])
    assert [json.loads(text) for text in (tmp_path / "out.json").read_text().splitlines()] == [line] * 3


def test_a_gate_names_what_is_too_low() -> None:
    gate = Gate(setting={}, turns={}, least={"floor_share": 0.5, "ratio_to_x": 2.0})
    ratios = {"floor_share": summary([0.4]), "ratio_to_x": summary([2.0])}
    assert gate.failures(ratios) == ["floor_share 0.4 is below 0.5"]
    with pytest.raises(InputError, match="no ratio 'ratio_to_x' was measured; there are floor_share"):
        gate.failures({"floor_share": summary([1.0])})


@pytest.mark.parametrize("dense", [(), ("I1", "I2")])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_recorded_products_are_all_that_a_step_multiplies(backbone: str, dense: tuple[str, ...]) -> None:
    schema = Schema(name="x", dense=dense, sparse={f"C{i}": 50 for i in range(6)}, labels=("label",))
    (spec,) = parse_members((backbone,), 0)
    found = sum(product.flops for product in member_products(spec, schema, 8, CPU))
    member = Member(spec, schema)
    # Nothing needs the gradient of the dense columns, so the layer that reads them is multiplied once less.
    first = 0 if member.dense_field is None else 2 * 8 * next(iter(member.dense_field.parameters())).numel()
    assert found == 3 * 8 * dense_flops([member]) - first


@pytest.mark.parametrize(
    ("operator", "operands", "flops"),
    [
        ("mm", [((3, 4), (4, 1)), ((4, 5), (1, 4))], 2 * 3 * 4 * 5),
        ("mm", [((3, 4), (1, 3)), ((4, 5), (5, 1))], 2 * 3 * 4 * 5),
        ("bmm", [((2, 3, 4), (12, 4, 1)), ((2, 4, 5), (0, 5, 1))], 2 * 2 * 3 * 4 * 5),
        ("bmm", [((2, 3, 4), (4, 8, 1)), ((2, 4, 5), (20, 1, 4))], 2 * 2 * 3 * 4 * 5),
    ],
)
def test_a_bare_product_has_the_layout_and_work_of_what_was_recorded(operator, operands, flops) -> None:
    product = Product(operator, tuple(Operand(*operand) for operand in operands))
    assert product.flops == flops
    made = [operand.made(torch.float32, CPU) for operand in product.operands]
    assert [(tuple(matrix.shape), matrix.stride()) for matrix in made] == operands
    out = product.bare(torch.float32, CPU)
    assert out() is out()
    assert out().shape == getattr(torch, operator)(*made).shape
    assert Floor([product, product], torch.bfloat16, CPU).flops == 2 * flops


def test_a_floor_runs_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    floor = Floor([], torch.float32, CPU)
    monkeypatch.setattr(floor, "_bare", [lambda i=i: ran.append(i) for i in range(3)])
    floor()
    assert ran == [0, 1, 2]


def test_table_traffic_is_what_a_slow_count_of_bytes_finds() -> None:
    rng = np.random.default_rng(0)
    ids, dim, state = rng.integers(9, size=(2, 5, 3)), 4, 4  # fields, rows, ids a row
    random = streamed = 0
    for field in ids:
        for _ in field:
            streamed += dim * 4 + dim * 4  # writes the sum, later reads its gradient
        for _ in set(field.ravel().tolist()):
            random += 3 * dim * 4 + 2 * state  # looks up, reads and writes
    unique = sum(len(np.unique(field)) for field in ids)
    sizes = {"row_bytes": 4 * dim, "state_bytes": state, "output_bytes": 4 * dim}
    traffic = TableTraffic(bags=10, unique_rows=unique, **sizes)
    assert (traffic.random, traffic.streamed, traffic.total) == (random, streamed, random + streamed)
    rates_of = {field.name: 1.0 for field in dataclasses.fields(Ceilings)}
    ceilings = Ceilings(**rates_of | {"copy_bytes_per_s": 4.0})
    assert traffic.seconds(ceilings) == (random + streamed) / 4


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("COPIED_BYTES", 2**16), ("GATHERED_ROWS", 64), ("SQUARE", 16)):
        monkeypatch.setattr(roofline, name, {"cpu": small})
    side = Operand((4, 4), (4, 1))
    found = roofline.ceilings([Product("mm", (side, side))], CPU, lambda: None)
    assert all(value > 0 for value in dataclasses.astuple(found))


@pytest.mark.parametrize("pooling", [1, 3])
def test_data_have_the_ids_that_a_setting_asks_for(pooling: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("workload.EPOCH_IDS", 20_000)
    setting = Setting(fields=4, rows_per_table=50, pooling=pooling, zipf=1.2, batch_size=64)
    folder = make_data(setting, tmp_path)
    assert make_data(setting, tmp_path) == folder
    loader = Loader(folder, "train", batch_size=64)
    assert loader.num_rows == 20_000 // (4 * pooling)
    batches = list(loader.epoch(0))
    ids = torch.stack([batch.sparse.values() for batch in batches]).view(len(batches), 4, -1)
    assert ids.shape[2] == 64 * pooling
    counts = torch.bincount(ids[:, 0].flatten().long(), minlength=50)
    assert len(counts) == 50
    assert counts[0] / counts[7] == pytest.approx(8**1.2, rel=0.3)
    uniform = next(
        Loader(make_data(dataclasses.replace(setting, zipf=None), tmp_path), "train", batch_size=64).epoch(0)
    )
    assert uniform.sparse.values().max() > 45


def test_a_result_is_named_by_sizes_and_by_what_is_not_default() -> None:
    usual = Setting()
    record = dataclasses.replace(usual, model=dataclasses.replace(usual.model, precision="fp32"), dim=32).record()
    assert (record["dim"], record["model"], record["optimizer"]) == (32, {"precision": "fp32"}, {})
    with pytest.raises(ValueError, match="unknown backbone 'dcnv3'; did you mean"):
        Setting(backbone="dcnv3")
    with pytest.raises(ValueError, match="batch_size 9 must be a multiple of ranks 2"):
        Setting(batch_size=9, ranks=2)
    with pytest.raises(ValueError, match="embedding_dim 32 is not dim 16"):
        Setting(model=ModelConfig(embedding_dim=32))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and ceilings that are quick to measure, if far from true."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # threads on busy cores wait for one another
    for name, size in (("COPIED_BYTES", 2**16), ("GATHERED_ROWS", 64), ("SQUARE", 16)):
        monkeypatch.setattr(roofline, name, {"cpu": size})
    monkeypatch.setattr(workload, "EPOCH_IDS", 1_000)
    return tmp_path


TINY: dict[str, Any] = {"sizes": "default", "fields": 3}
SIZES: dict[str, Any] = {"rows_per_table": (20,), "dim": (4,)}
SHORT: dict[str, Any] = {"turns": 2, "seconds": 0.0, "least_steps": 1, "warmup_steps": 1}


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@LIBRARIES
def test_throughput_reports_ratios_floors_and_phases_and_draws_a_sweep(small: Path) -> None:
    config = Config(
        **TINY,
        **SIZES,
        batch_size=(16, 32),
        baselines=True,
        timing=Turns(**SHORT),
        json=small / "out.json",
        plot=small / "sweep.png",
    )
    assert main(config) == 0
    first, second = results(small / "out.json")
    keys = {"floor_share", "ratio_to_plain_pytorch", "ratio_to_sparse_bags", "ratio_to_torchrec_default"}
    assert first["ratios"].keys() == keys
    assert second["ratios"].keys() == keys | {"ratio_to_first_batch_size_16"}
    assert all(first[key] > 0 for key in keys)
    assert {"commit", "machine", "versions", "command", "date", "name", "config"} <= first.keys()
    metrics = first["metrics"]
    assert metrics["rows_per_s"].keys() == {"ours", "plain_pytorch", "sparse_bags", "torchrec_default"}
    assert {"data", "input_dist", "forward", "backward", "optimizer"} <= metrics["phase_ms"].keys()
    assert {"copy_bytes_per_s", "bf16_square_flops_per_s"} <= metrics["ceilings"].keys()
    assert min(metrics["flops"], metrics["table_bytes"], metrics["floor_rows_per_s"]["median"]) > 0
    assert second["metrics"]["flops"] == 2 * metrics["flops"]
    for line in (first, second):
        step_ms = line["metrics"]["step_ms"]
        ours, floor = step_ms["ours"], step_ms["floor"]
        assert floor["low"] / ours["high"] <= line["floor_share"] <= floor["high"] / ours["low"]
    assert (small / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_compares_rows_a_second_with_its_first_value() -> None:
    settings = [Setting(batch_size=size) for size in (16, 32)]
    found = to_first(settings, [0.1, 0.1], settings[1], [0.1, 0.2], "batch_size")
    assert (found["ratio_to_first_batch_size_16"]["high"], found["ratio_to_first_batch_size_16"]["low"]) == (2.0, 1.0)
    assert not to_first(settings, [0.1], settings[0], [0.1], "batch_size")


@LIBRARIES
def test_phases_leave_out_the_turns_of_others(small: Path) -> None:
    setting = Setting(sizes="default", fields=3, rows_per_table=20, batch_size=16, backbone="fnn")
    with Jobs() as jobs:
        job = jobs.start(setting, make_data(setting, small), (), ranked=False)
        for _ in range(3):
            job.cases()["ours"](1)
            time.sleep(0.2)
        phases = job.report()["phase_ms"]
    assert phases["forward"] > 0
    assert phases["other"] < 100


@LIBRARIES
def test_bytes_of_tables_are_those_of_all_members(small: Path) -> None:
    sizes: dict[str, Any] = {"rows_per_table": (1,), "dim": (8,), "members": (2,), "batch_size": (16,)}
    assert main(Config(**TINY, **sizes, backbone="fnn", timing=Turns(**SHORT), json=small / "out.json")) == 0
    (found,) = results(small / "out.json")
    bags, rows = 2 * 3 * 16, 2 * 3
    vector = 16 if available("tables") else 32  # bf16 at once, or float32
    assert found["metrics"]["table_bytes"] == rows * 32 + 2 * rows * (32 + 4) + 2 * bags * vector


def test_a_setting_becomes_the_config_of_a_job() -> None:
    paper, small = (Setting(sizes=sizes, dim=8, members=2) for sizes in ("paper", "default"))
    config = paper.config(Path("data"))
    assert config.model == ModelConfig(precision="bf16", embedding_dim=8)
    assert [spec.sizes.hidden for spec in config.specs()] == 2 * [(1024, 512, 256)]
    assert [spec.sizes for spec in small.config(Path("data")).specs()] == 2 * [DCNv2Config()]


@LIBRARIES
def test_a_gate_shuts(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = TINY | {name: value for name, (value,) in SIZES.items()} | {"batch_size": 16, "backbone": "fnn"}
    gate = {"setting": setting, "turns": SHORT, "least": {"floor_share": 1e9, "ratio_to_plain_pytorch": 1e-9}}
    path = small / "gate.json"
    config = Config(gate=path)
    path.write_text(json.dumps(gate))
    assert main(config) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "gate.json: floor_share" in told.err
    assert "plain_pytorch" in told.out
    assert "torchrec_default" not in told.out
    path.write_text(json.dumps(gate | {"least": {"floor_share": 1e-9}}))
    assert main(config) == 0
    path.write_text(json.dumps(gate | {"setting": {"sise": 1}}))
    with pytest.raises(InputError, match=r"gate\.json: setting.* 'sise'"):
        main(config)


@pytest.mark.slow
def test_ranks_of_their_own_take_turns(small: Path) -> None:
    main(Config(**TINY, **SIZES, batch_size=(32,), ranks=(2,), timing=Turns(**SHORT), json=small / "out.json"))
    (two,) = results(small / "out.json")
    assert two["config"]["ranks"] == 2
    assert two["floor_share"] > 0


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_benchmark(small: Path) -> None:
    with pytest.raises(InputError, match="a rank of the job ended with 1"):
        RankedJob(Setting(), small / "nowhere")


def test_the_gate_of_this_repository_can_be_read() -> None:
    values = json.loads(GATE.read_text())
    assert {field.name for field in dataclasses.fields(Setting)} >= values["setting"].keys()
    assert {field.name for field in dataclasses.fields(Turns)} >= values["turns"].keys()
    assert all(least > 0 for least in values["least"].values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "8", "16", "--dim", "4", "8"], "batch_size and dim have several values each"),
        (["--gate", "x.json", "--ranks", "1", "2"], "leave out several values of ranks"),
        (["--plot", "x.png"], "there is nothing to draw"),
        (["--ranks", "1", "2", "--baselines"], "baselines train on one rank"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], words: str, monkeypatch) -> None:
    from throughput import Config

    with pytest.raises(SystemExit) as stop:
        tyro.cli(Config, args=options)
    error: BaseException | None = stop.value
    while error and not isinstance(error, ValueError):
        error = error.__context__
    assert words in str(error)
