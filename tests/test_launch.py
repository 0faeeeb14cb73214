"""The torchx component, rendered and run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.train import ddp
from recsys.sharding.plan import Plan
from tests.distributed.jobs import free_port

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
OPTIONS = ["--members", "dcnv2", "--train.num-steps", "4", "--train.batch-size", "64", "--sharding.types", "table_wise"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_the_component_runs_the_train_verb_on_every_rank() -> None:
    app = ddp("criteo_kaggle", "--out", "run", j="3x4", h=None, env={"EXTRA": "1"}, max_retries=2, image="image")
    (role,) = app.roles
    command = " ".join(role.args)
    assert role.num_replicas == 3
    assert "--nproc_per_node 4" in command or "--nproc-per-node 4" in command
    assert "-m recsys.cli train criteo_kaggle --out run" in command
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert role.env["EXTRA"] == "1"
    assert role.max_retries == 2
    assert role.image == "image"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1x2", "2x1"])
def test_torchx_trains_on_two_processes_of_this_machine(prepared: Path, tmp_path: Path, shape: str) -> None:
    component = ["launchers/train.py:ddp", "-j", shape, "--rdzv_port", str(free_port()), "--"]
    out = tmp_path / "run"
    done = run(
        f"{BIN}/torchx",
        "run",
        "-s",
        "local_cwd",
        *component,
        "criteo_kaggle",
        "--data",
        f"{prepared}",
        "--out",
        f"{out}",
        *OPTIONS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SUCCEEDED" in done.stderr
    plan = Plan.load(out / "plan.json")
    assert {rank for table in plan.tables.values() for rank in table.ranks} == {0, 1}
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.slow
def test_torchrun_reports_bad_input_once_and_fails(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    done = run(
        f"{BIN}/torchrun", "--standalone", "--nproc-per-node", "2", "-m", "recsys.cli", "train", "criteo_kaggle",
        "--data", f"{prepared}", "--out", f"{tmp_path}", *OPTIONS,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("holds a run already") == 1
    assert "recsys/training" not in done.stderr  # no traceback of ours
