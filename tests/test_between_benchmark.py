"""The benchmark of what stands between products runs; what it measures is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.native import available

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "between.py"


@pytest.mark.skipif(not available("fused"), reason="the operators are not built: there was no compiler")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_piece_is_measured_both_ways(precision: str, tmp_path: Path) -> None:
    short = ["--turns", "2", "--seconds", "0", "--least-steps", "1", "--warmup-steps", "1"]
    options = ["--batch-size", "8", "--precision", precision, "--json", str(tmp_path / "out.json"), *short]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert len({line["config"]["piece"] for line in results}) == len(results) == 8
    for line in results:
        assert line["forward_ratio_to_pytorch"] > 0
        assert line["backward_ratio_to_pytorch"] > 0
        assert line["config"]["piece"] in done.stdout
    refused = subprocess.run(
        [sys.executable, str(SCRIPT), "--batch-size", "0"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "must be at least 1" in refused.stderr
