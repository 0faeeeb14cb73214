"""The loader's benchmark runs; what it measures is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "loader.py"


def test_the_loaders_benchmark_reports_every_cost(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--rows", "20000", "--epochs", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [*command, "--cases", "multi-hot, pareto"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "multi-hot, pareto" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    costs = {"rows_per_cpu_second", "ids_per_cpu_second", "cpu_seconds", "wall_seconds", "peak_rss_bytes"}
    assert all(result[name] > 0 for name in (*costs, "memcpy_ratio", "warm_up_cpu_seconds"))
    assert set(result["cases"]) == {"multi-hot, pareto"}
    assert {"commit", "machine", "versions", "config", "command", "date"} <= set(result)
    assert result["rows"] == 20_000 // 8_192 * 8_192
    assert result["ids_per_cpu_second"] == pytest.approx(214 * result["rows_per_cpu_second"])
