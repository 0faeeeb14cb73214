"""A damaged row group in a job of two ranks: both go on without it, or the job ends and one line names it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.jobs import free_port
from tests.test_corrupt_groups import damage

OPTIONS = ["--members", "dcnv2", "--train.num-steps", "5", "--train.batch-size", "256"]


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("damaged") / "data")
    damage(min((folder / "train").iterdir()), 0, "I1")
    return folder


def train(folder: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`recsys train` under torchrun on two ranks."""
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = ["-m", "recsys.cli", "train", "criteo_kaggle", "--data", str(folder), "--out", str(out), *OPTIONS]
    run = [sys.executable, "-m", *launcher, *command, *options]
    return subprocess.run(run, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_two_ranks_go_on_without_it(folder: Path, tmp_path: Path) -> None:
    done = train(folder, tmp_path / "run", "--loader.on-corrupt", "skip")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "row group 0: cannot decode it" in done.stderr
    assert "rows get weight 0" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if record["kind"] == "train")
    assert last["num_skipped_groups"] == 1
    assert last["num_skipped_rows"] > 0


@pytest.mark.slow
def test_it_ends_the_job_of_two_ranks_and_is_named(folder: Path, tmp_path: Path) -> None:
    done = train(folder, tmp_path / "run")
    assert done.returncode != 0
    named = [line for line in done.stderr.splitlines() if "row group 0: cannot decode it" in line]
    assert named
    assert all("recsys: " in line for line in named)
    assert "recsys/training" not in done.stderr  # no traceback of ours, of the rank that lost its peer either
