"""The benchmarks run; what they measure is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = 20_000


def test_prepare_reports_every_cost(tmp_path: Path) -> None:
    out, work = tmp_path / "result.json", tmp_path / "work"
    command = [sys.executable, str(BENCHMARKS / "prepare.py"), "--rows", str(ROWS), "--files", "3"]
    done = subprocess.run(
        [*command, "--json", str(out), "--work", str(work), "--keep"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    costs = {
        *("raw_bytes", "gz_bytes", "distinct", "cpu_seconds", "wall_seconds", "peak_rss_bytes", "max_rss_child_bytes"),
        *("rows_per_cpu_second", "output_bytes", "pyarrow_read_cpu_seconds", "ratio_to_pyarrow_read"),
        *("pyarrow_stream_cpu_seconds", "ratio_to_pyarrow_stream"),
        *("gunzip_cpu_seconds", "byte_read_cpu_seconds", "core_hours_for_4_37_billion_rows"),
    }
    facts = {"distinct_note", "stages", "memory", "threshold", "commit", "machine", "versions", "command", "date"}
    assert set(result) == {"rows", "files"} | costs | facts
    assert all(result[name] > 0 for name in costs)
    assert (result["rows"], result["files"]) == (ROWS, 3)
    splits = json.loads((work / "prepared" / "manifest.json").read_text())["splits"]
    assert sum(split["num_rows"] for split in splits.values()) == ROWS
    assert result["rows_per_cpu_second"] * result["cpu_seconds"] == pytest.approx(ROWS)
    assert result["ratio_to_pyarrow_read"] * result["pyarrow_read_cpu_seconds"] == pytest.approx(result["cpu_seconds"])
    assert 240 < result["raw_bytes"] / ROWS < 280


def test_checkpoints_are_timed_both_ways(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--embedding-dim", "8", "--batch-size", "64", "--quiet-steps", "2", "--turns", "1"]
    command = [sys.executable, str(BENCHMARKS / "checkpoint.py"), "--data", str(prepared), "--json", str(out), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    for kind in ("async", "sync"):
        assert all(value > 0 for value in result[kind].values())
        assert result[kind]["call_ms"] <= result[kind]["writing_ms"]
    assert {"commit", "machine", "versions", "command"} <= result.keys()
