"""A profile of a CUDA device: times of the device beside those of the host, and a snapshot of its memory."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from recsys.distributed import World
from recsys.training.profile import ProfileConfig, profiler

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_has_times_and_a_snapshot_of_its_own(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=device)
    with profiler(ProfileConfig(steps=2, wait=1, memory=True), tmp_path, world) as profile:
        for step in range(4):
            with torch.profiler.record_function(f"## forward {step} ##"):
                torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)
            profile.step()
    lines = (tmp_path / "profile" / "phases.txt").read_text().splitlines()
    (forward,) = [line.split() for line in lines if line.startswith("forward")]
    assert float(forward[-1]) > 0
    assert any("gemm" in line for line in lines)
    assert (tmp_path / "profile" / "memory-rank0.pickle").stat().st_size > 0
    with gzip.open(tmp_path / "profile" / "trace-rank0.json.gz") as file:
        assert any(event.get("cat") == "kernel" for event in json.load(file)["traceEvents"])
