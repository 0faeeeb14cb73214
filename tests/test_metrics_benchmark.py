"""The benchmark of exact metrics runs; what it measures is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "metrics.py"
MEASURED = {"rank", "bytes", "seconds", "seconds_at_the_end"}


@pytest.mark.slow
def test_every_number_of_ranks_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--json", str(out), "--rows", "200000", "--decimals", "1"]
    done = subprocess.run([*command, "--ranks", "1", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["ranks"]) == {"1", "2"}
    for size, case in result["ranks"].items():
        assert [set(each) for each in case["by_rank"]] == [MEASURED] * int(size)
        assert 0.7 < case["metrics"]["auc"] < 0.8
    assert {"commit", "machine", "versions", "command", "date"} <= set(result)
