"""The benchmark of dynamic tables runs; what it measures is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "dynamic.py"


def test_the_benchmark_of_dynamic_tables_reports_every_cost(tmp_path: Path) -> None:
    sizes = {"batch-size": 64, "features": 2, "num-values": 1000, "rows": 96, "batches": 4, "turns": 3, "interval": 2}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", str(tmp_path / "out.json"), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "changed hands" in done.stdout
    whole = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "machine", "versions", "config", "command", "date", "result"} == set(whole)
    result = whole["result"]
    assert set(result["costs"]) == {"learn", "find", "look up", "update", "torchrec"}
    assert result["costs"]["look up"]["of_look_up"] == 1
    assert all(cost["ms"] > 0 for cost in result["costs"].values())
    assert 0 < result["share_with_own_row"] < 1
