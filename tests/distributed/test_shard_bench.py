"""`recsys shard-bench` on real gloo ranks: those that it starts, and those of torchrun."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recsys.sharding.cluster import PHASES, parse_cluster
from recsys.sharding.cost import CostModel
from recsys.sharding.plan import Plan
from recsys.sharding.quote import quote
from recsys.sharding.workload import TableSpec
from recsys.studies.shard_cases import Case, Layout, with_dense

SMALL = ["--batch-sizes", "64", "--dims", "8", "--num-tables", "2", "--rows", "50", "30", "--repeats", "3"]


def bench(folder: Path, *options: str, launcher: tuple[str, ...] = ("python",)) -> tuple[dict[str, Any], str]:
    """Run it; returns what it wrote, and what it said on stderr."""
    out = folder / "out.json"
    command = [sys.executable, *launcher[1:], "-m", "recsys", "shard-bench", "--out", str(out), *SMALL, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "median relative error" in done.stdout
    assert (folder / "out.png").exists()
    return json.loads(out.read_text()), done.stderr


@pytest.mark.slow
def test_a_tiny_sweep_on_two_ranks(tmp_path: Path) -> None:
    rates = tmp_path / "rates.yaml"
    types = ["data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard"]
    found, said = bench(tmp_path, "--ranks", "2", "--types", *types, "--calibrate", str(rates))
    assert set(found) == {
        "config", "machine", "num_cases", "skipped", "errors", "hardware", "fitted", "cases", "plans",
    }  # fmt: skip
    assert list(found["skipped"]) == ["grid_shard on 2 ranks"]
    assert "recsys: grid_shard on 2 ranks left out: on one node" in said
    assert found["num_cases"] == len(found["cases"]) == 2 * (len(types) - 1)
    assert set(found["machine"]) >= {"cpu", "cores", "memory", "load_at_start", "versions"}
    for case in found["cases"]:
        assert set(case["measured"]) == set(case["predicted"]) == set(PHASES)
        assert case["steps"] >= 3
        for phase in case["measured"].values():
            assert 0 < phase["low"] <= phase["median"] <= phase["high"]
            assert len(phase["ranks"]) == 2
            assert max(phase["ranks"]) <= phase["high"]
    for phase in PHASES:
        error = found["errors"]["2"][phase]
        moved_apart = phase in ("input_dist", "output_dist", "gradient_dist")
        # Nothing of replicated tables is sent: no work, no error.
        assert error["cases"] == len(found["cases"]) - 2 * moved_apart
        assert error["before"] >= 0
        assert error["after"] >= 0
    # The profile that it wrote prices plans.
    cluster = parse_cluster(f"{rates}x2")
    assert set(cluster.hardware.rates) == set(PHASES)
    case = Case("table_wise", 64, 1, 8, 2, Layout(2))
    workload = case.workload((50, 30))
    assert quote(case.plan(workload), CostModel(workload, cluster)).step_seconds > 0


@pytest.mark.slow
def test_ranks_that_torchrun_started_are_measured_as_they_are(tmp_path: Path) -> None:
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found, _ = bench(tmp_path, "--types", "row_wise", "--rounds", "1", launcher=launcher)
    assert {tuple(case["layout"].values()) for case in found["cases"]} == {(2, 1)}
    assert found["num_cases"] == len(found["cases"]) == 2


@pytest.mark.slow
def test_plans_of_several_makers_take_turns(tmp_path: Path) -> None:
    found, _ = bench(tmp_path, "--ranks", "2", "--types", "table_wise", "--rounds", "1", "--compare-plans")
    assert [(layout["workload"], layout["ranks"]) for layout in found["plans"]] == [
        ("tables like a click log's", 2),
        ("one heavy table", 2),
    ]
    for layout in found["plans"]:
        assert set(layout["plans"]) == {
            "search", "torchrec", "torchrec, types of search", "table_wise", "row_wise",
        }  # fmt: skip
        for plan in layout["plans"].values():
            assert len(plan["steps"]) == 3
            assert min(plan["steps"]) > 0
            assert plan["predicted"] > 0
            assert Plan.from_values(json.loads(plan["plan"]), "plan").world_size == 2


def _phases_of(world: Any, plan: Plan, path: Path) -> None:
    from recsys.studies.shard_measure import Bench

    tables = tuple(TableSpec(name=name, rows=shape[0], dim=shape[1]) for name, shape in plan.shapes.items())
    bench = Bench(with_dense(tables, 32, "rowwise_adagrad"), plan, world)
    before = {name: weight.detach().clone() for name, weight in bench.tables.named_parameters()}
    seconds = bench.measure(3, 1.0)
    whole = bench.whole_step(bench.batch())
    changed = [name for name, weight in bench.tables.named_parameters() if (weight != before[name]).any()]
    if world.is_first:
        values = {"shape": list(seconds.shape), "least": seconds.min().item(), "whole": whole, "changed": changed}
        path.write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize("sharding_type", ["table_wise", "data_parallel"])
def test_a_measured_step_updates_the_tables(sharding_type: str, tmp_path: Path) -> None:
    from tests.distributed.jobs import on_ranks

    case = Case(sharding_type, 32, 1, 8, 2, Layout(2))
    plan = case.plan(case.workload((50, 30)))
    on_ranks(2, _phases_of, plan, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["shape"] == [3, 2, len(PHASES)]
    assert found["least"] > 0
    assert found["whole"] > 0
    here = ["t0"] if sharding_type == "table_wise" else ["t0", "t1"]
    assert [name.split(".")[-2] for name in found["changed"]] == here
