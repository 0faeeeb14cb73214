"""The benchmark of quantised tables runs; what it measures is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.distributed import process_group
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "quantised.py"
KINDS = {"fused fp32", "fused fp16", "fp32", "fp16", "int8", "int4", "int2"}


@pytest.mark.slow
def test_the_benchmark_of_quantised_tables_reports_throughput_and_metrics(prepared: Path, tmp_path: Path) -> None:
    with process_group() as world:
        Trainer(small_config(prepared, out=tmp_path / "run", members=("fnn",), num_steps=2), world).train()
    sizes = ["--rows", "500", "--num-tables", "3", "--dims", "8", "--batch-sizes", "16", "--hotness", "1", "2"]
    options = [*sizes, "--rounds", "2", "--seconds", "0.01", "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", str(tmp_path / "out.json"), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "throughput" in done.stdout
    whole = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "machine", "versions", "config", "command", "date", "results", "run"} == set(whole)
    assert [(row["dim"], row["batch_size"], row["hotness"]) for row in whole["results"]] == [(8, 16, 1), (8, 16, 2)]
    for row in whole["results"]:
        assert set(row["ms"]) == set(row["throughput"]) == KINDS
        assert all(0 < each["low"] <= each["median"] <= each["high"] for each in row["throughput"].values())
        assert row["throughput"]["fused fp32"]["median"] == 1
        assert row["bytes"]["fused fp32"] == 3 * 500 * 8 * 4 > row["bytes"]["int8"] > row["bytes"]["int2"]
    assert [row["tables"] for row in whole["run"]] == [None, "fp32", "fp16", "int8", "int4", "int2"]
    assert whole["run"][0]["metrics"] == whole["run"][1]["metrics"]
