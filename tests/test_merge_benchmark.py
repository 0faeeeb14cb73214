"""The benchmark of members in one job runs; what it measures is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "merge.py"
PHASES = {"tables", "dense forward", "dense backward", "tables backward", "dense optimizer"}


def test_the_benchmark_of_members_reports_ratios_and_phases(tmp_path: Path) -> None:
    options = ["--rows", "4000", "--members", "1", "2", "--batch-sizes", "32", "--rounds", "2", "--seconds", "0.01"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", str(tmp_path / "out.json"), "--backbone", "fnn", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "fnn*2" in done.stdout
    whole = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "machine", "versions", "config", "command", "date", "results"} == set(whole)
    (result,) = whole["results"]
    assert result["batch_size"] == 32
    jobs = {"fnn", "fnn+fnn", "dcnv2", "wukong", "dcnv2+wukong"}
    for kind in ("training", "inference"):
        assert set(result[kind]) == jobs
        assert {tuple(row["members"]) for row in result["ratios"] if row["kind"] == kind} == {
            ("fnn", "fnn"),
            ("dcnv2", "wukong"),
        }
    for job in result["training"].values():
        assert set(job["phases"]) == PHASES
        assert all(phase["cpu"] > 0 and phase["wall"] > 0 for phase in job["phases"].values())
        assert 0 < job["cpu"]["low"] <= job["cpu"]["median"] <= job["cpu"]["high"]
        assert job["gflops"] > 0
    for job in result["inference"].values():
        assert job["phases"]["dense backward"]["cpu"] == 0
    one, two = (result["training"][job]["mflop"] for job in ("fnn", "fnn+fnn"))
    assert two == 2 * one
    assert all(0 < row[clock]["low"] <= row[clock]["high"] for row in result["ratios"] for clock in ("wall", "cpu"))
