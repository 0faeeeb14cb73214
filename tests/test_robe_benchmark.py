"""The benchmark of ROBE runs; what it measures is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "robe.py"
PHASES = {"lookup", "backward and update"}


def test_the_benchmark_of_robe_reports_ratios_to_whole_tables(tmp_path: Path) -> None:
    options = ["--features", "3", "--num-ids", "500", "--batch-size", "64", "--rounds", "2", "--dims", "8"]
    options += ["--block-sizes", "8", "32", "--compressions", "2", "10"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", str(tmp_path / "out.json"), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    whole = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "machine", "versions", "config", "command", "date", "results"} <= set(whole)
    assert whole["copied_gigabytes_per_second"] > 0
    results = {result["name"]: result for result in whole["results"]}
    assert set(results) == {"tables", "robe Z=8 10x", "robe Z=32 2x", "robe Z=32 10x"}
    assert all(name in done.stdout for name in results)
    assert results["tables"]["megabytes"] == 3 * 500 * 8 * 4e-6
    assert results["robe Z=32 2x"]["megabytes"] == 3 * 500 * 8 * 4e-6 / 2
    for result in results.values():
        assert set(result["phases"]) == PHASES
        for phase in result["phases"].values():
            for clock in ("wall", "cpu"):
                for value in phase[clock].values():
                    assert 0 < value["low"] <= value["median"] <= value["high"]
    assert all(results["tables"]["phases"][phase]["cpu"]["ratio"]["high"] == 1 for phase in PHASES)
