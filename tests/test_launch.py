"""Components and `recsys launch`, rendered and run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launchers.train import ddp
from recsys.cli import main
from recsys.launching import components
from recsys.sharding.plan import Plan
from tests.distributed.jobs import free_port

ROOT = Path(__file__).parents[1]
FOLLOW = ("status", "log", "cancel")
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
    assert command.startswith("-c torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --rdzv")
    assert role.max_retries == 2
    assert role.image == "image"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-j", "1x16", "-r", "h100x8"], "-j 1x16: 16 ranks on nodes of 8 GPUs; a rank needs one of its own"),
        (["-j", "2x3"], "-j 2x3: --train.batch-size 64 cannot be shared by 6 ranks equally; 66 can"),
        (["-j", "2:5x2"], "-j 2:5x2: --train.batch-size 64 cannot be shared by 10 ranks equally; 60 can"),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_anything_is_sent(
    options: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "train", "--dryrun", *options, "--", "synthetic", *OPTIONS]) == 2
    assert reason in capfd.readouterr().err


def test_the_component_of_the_launchers_is_the_one_of_recsys_launch() -> None:
    assert ddp("synthetic", j="1:2x4", gpu=4) == components.train("synthetic", j="1:2x4", gpu=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torchx", "run", "-s", "local_cwd", "launchers/train.py:ddp", "-j", "1x2"],
        ["recsys", "launch", "train", "-s", "local_cwd", "-j", "2x1"],
    ],
    ids=["1x2 by torchx", "2x1 by recsys launch"],
)
def test_two_processes_of_this_machine_train(prepared: Path, tmp_path: Path, launcher: list[str]) -> None:
    program, *options = launcher
    out = tmp_path / "run"
    port = ["--rdzv_port" if program == "torchx" else "--rdzv-port", str(free_port())]
    trained = ["criteo_kaggle", "--data", f"{prepared}", "--out", f"{out}", *OPTIONS]
    done = run(f"{BIN}/{program}", *options, *port, "--", *trained)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("local_cwd://torchx/recsys-train-")
    assert "validation" in done.stderr
    plan = Plan.load(out / "plan.json")
    assert {rank for table in plan.tables.values() for rank in table.ranks} == {0, 1}
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-00000004"]


def test_a_job_that_fails_is_told_and_its_output_shown(tmp_path: Path) -> None:
    job = ["prepare", "-s", "local_cwd", "--", "criteo_kaggle", "missing.tsv", "--out", f"{tmp_path}/data"]
    done = run(f"{BIN}/recsys", "launch", *job)
    assert done.returncode == 1
    assert f"{ROOT}/missing.tsv" in done.stderr  # what the job itself said, of the place that launch filled in
    assert done.stderr.rstrip().endswith("FAILED")


def request(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `recsys launch ... --dryrun` prints."""
    verb, *rest = arguments
    assert main(["launch", verb, "--dryrun", *rest]) == 0
    return " ".join(capsys.readouterr().out.split())


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a launch that cannot work gets."""
    assert main(["launch", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start in, whose .torchxconfig is the only one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHXCONFIG", str(tmp_path / ".torchxconfig"))
    (tmp_path / ".torchxconfig").touch()
    return tmp_path


def test_places_of_this_machine_become_absolute_where_nodes_share_them(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = request(capsys, "train", "-s", "slurm", "--", "criteo_kaggle", "--data=there", "--out", "run")
    assert f"--data={here}/there --out {here}/run" in plain
    of_recipe = request(capsys, "train", "-s", "slurm", "--", "criteo_kaggle", "--data", "memory://bucket/data")
    assert f"--data memory://bucket/data --out {here}/runs/criteo_kaggle" in of_recipe
    (here / "b.tsv").touch()
    raw = request(capsys, "prepare", "-s", "slurm", "--", "criteo_kaggle", "b.tsv", "/a.tsv", "--out", "data")
    assert f"prepare criteo_kaggle {here}/b.tsv /a.tsv --out {here}/data" in raw
    study = request(capsys, "study", "-s", "slurm", "--", "merge", "criteo_kaggle", "--out", "s", "--data", "data")
    assert f"study merge criteo_kaggle --out {here}/s --data {here}/data" in study


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("--out=x raw.tsv", "--out={here}/x {here}/raw.tsv"),
        ("--dry-run raw.tsv --out x", "--dry-run {here}/raw.tsv --out {here}/x"),
        ("--out raw.tsv raw.tsv", "--out {here}/raw.tsv {here}/raw.tsv"),
        ("raw.tsv --work raw.tsv --out x", "{here}/raw.tsv --work {here}/raw.tsv --out {here}/x"),
    ],
)
def test_raw_files_become_absolute_wherever_they_stand(
    here: Path, capsys: pytest.CaptureFixture[str], given: str, sent: str
) -> None:
    (here / "raw.tsv").touch()
    text = request(capsys, "prepare", "-s", "slurm", "--", "criteo_kaggle", *given.split())
    assert f"prepare criteo_kaggle {sent.format(here=here)} exitcode" in text


def test_what_goes_to_stdout_is_no_place(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--", "criteo_kaggle", "--data", "/data", "--out", "/run", "--sinks.mlperf", "-"]
    for scheduler in (["slurm"], ["kubernetes", "--cfg", "queue=q"]):
        assert "--sinks.mlperf -" in request(capsys, "train", "-s", *scheduler, *job)


def test_a_container_of_this_machine_sees_the_folders_of_its_job(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mounts = ["--mounts", "type=volume,src=cache,dst=/cache"]
    job = ["--", "criteo_kaggle", "--data", "data", "--out", "runs/one"]
    text = request(capsys, "train", "-s", "local_docker", "-j", "1x2", *mounts, *job)
    assert f"ReadOnly: true Source: {here}/data Target: {here}/data Type: bind" in text
    assert f"ReadOnly: false Source: {here}/runs Target: {here}/runs Type: bind" in text
    assert "Source: cache Target: /cache Type: volume" in text
    assert not (here / "runs").exists()
    others = ["--checkpoints.folder", "kept/one", "--sinks.mlperf", "logs/mlperf.log"]
    text = request(capsys, "train", "-s", "local_docker", *job, *others)
    for folder in ("kept", "logs"):
        assert f"ReadOnly: false Source: {here}/{folder} Target: {here}/{folder} Type: bind" in text


def test_nodes_elsewhere_are_told_no_relative_place(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train", "-s", "kubernetes", "--cfg", "queue=q", "--dryrun", "--", "criteo_kaggle", "--out", "/runs/one"]
    line = refusal(capsys, *options)
    assert line.startswith("recsys: --data data/criteo_kaggle is relative to this machine's folder")
    assert main(["launch", *options, "--data", "memory://data"]) == 0
    (here / "c.json").write_text('{"data": "/data", "out": "/run"}')
    told = "the file c.json is relative to this machine's folder, which the nodes of kubernetes do not have"
    assert told in refusal(capsys, *options[:7], "c.json")


def test_an_environment_that_is_not_activated_is_found_on_this_machine_alone(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    job = ["--", "criteo_kaggle", "--data", "/data", "--out", "/run"]
    assert f"PATH={BIN}:/usr/bin:/bin" in request(capsys, "train", "-s", "slurm", *job)
    assert str(BIN) not in request(capsys, "train", "-s", "kubernetes", "--cfg", "queue=q", *job)


def test_slurm_gets_its_script_and_the_user_what_follows_the_job(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = here / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/bash\ncp "${{@: -1}}" {here}/script\necho 1234\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    assert main(["launch", "study", "-s", "slurm", "--", "merge", "synthetic", "--out", "study"]) == 0
    handle = "slurm://torchx/1234"
    assert capsys.readouterr().out.splitlines() == [handle, *(f"torchx {verb} {handle}" for verb in FOLLOW)]
    assert f"python -m recsys study merge synthetic --out {here}/study" in (here / "script").read_text()


def test_ray_gets_a_job_of_its_own_api(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}

    class Client:
        """Stands for Ray's own, which talks to a cluster."""

        def __init__(self, address: str) -> None:
            sent["address"] = address

        def submit_job(self, *, submission_id: str, entrypoint: str, runtime_env: dict[str, str]) -> str:
            folder = Path(runtime_env["working_dir"])
            sent["entrypoint"], sent["folder"] = entrypoint, folder
            sent["actors"] = json.loads(json.loads((folder / "actors.json").read_text()))
            sent["files"] = sorted(path.name for path in folder.iterdir())
            return submission_id

    monkeypatch.setattr("torchx.schedulers.ray_scheduler.JobSubmissionClient", Client)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = ["-s", "ray", "-j", "1:2x4", "--gpu", "4", "--cfg", "dashboard_address=head:8265"]
    job = ["--", "criteo_kaggle", "--data", "/data", "--out", "/run"]
    assert main(["launch", "train", *options, *job]) == 0
    assert capsys.readouterr().out.startswith("ray://torchx/head:8265-recsys-train-")
    assert (sent["address"], sent["entrypoint"]) == ("http://head:8265", "python3 ray_driver.py")
    assert sent["files"] == ["actors.json", "ray_common.py", "ray_driver.py"]
    assert [(actor["num_gpus"], actor["min_replicas"]) for actor in sent["actors"]] == [(4, 1)] * 2
    assert not sent["folder"].exists()


@pytest.mark.filterwarnings("ignore:(?s).*Volcano:UserWarning")
def test_torchxconfig_says_what_the_command_does_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / ".torchxconfig").write_text(
        "[cli:run]\nscheduler = kubernetes\n[kubernetes]\nqueue = nightly\n"
        "[component:recsys.train]\nj = 4x8\nh = h200x8\nmax_retries = 2\n"
    )
    job = ["--", "criteo_kaggle", "--data", "/data", "--out", "/run"]
    text = request(capsys, "train", "--image", "mine:1", *job)
    assert "queue: nightly" in text
    assert "--nnodes 4 --nproc_per_node 8" in text
    assert "cpu: 184000m" in text
    assert "--resume auto" in text
    other = request(capsys, "train", "-j", "1x2", "--max-retries", "0", *job)
    assert "--nnodes 1 --nproc_per_node 2" in other
    assert "--resume" not in other


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("hh = a100x8", "unknown name 'hh'; "),
        ("max_retries = many", "argument --max_retries: invalid int value: 'many'"),
        ("j = four", "launch train: Invalid format for -j, usage example"),
    ],
)
def test_a_wrong_line_of_torchxconfig_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, told: str
) -> None:
    (here / ".torchxconfig").write_text(f"[component:recsys.train]\n{line}\n")
    assert told in refusal(capsys, "train", "-s", "slurm", "--dryrun", "--", "synthetic")


def test_a_stopped_launch_stops_its_job(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    slow = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(100)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)  # which the job's interpreter runs first
    job = ["prepare", "-s", "local_cwd", "--env", f"PYTHONPATH={tmp_path}", "--", "criteo_kaggle", "log.tsv"]
    command = [f"{BIN}/recsys", "launch", *job, "--out", f"{tmp_path}/data"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in told
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "-s", "slum"], "after --, say what would follow `recsys train`"),
        (["train", "-s", "slum", "--", "synthetic"], "unknown scheduler 'slum'; did you mean slurm"),
        (["train", "-j", "4x1", "-s", "slurm", "--", "synthetic", "--train.num-step", "3"], None),
        (["train", "-j", "8", "--", "synthetic"], "-j '8' is no shape; write NODESxRANKS (4x8) or LEAST:MOSTxRANKS"),
        (["train", "-s", "slurm", "--env", "A=1", "NCCL_SOCKET_IFNAME=a,b", "--", "synthetic"], "srun splits values"),
        (["train", "--", "sinthetic"], "unknown recipe 'sinthetic'; did you mean synthetic"),
        (["train", "-j", "4:2x8", "--", "synthetic"], "-j '4:2x8' is no shape; write NODESxRANKS"),
        (["prepare", "-j", "2x2", "--", "criteo_kaggle", "a", "--out", "b"], "-j 2x2: prepare is one process"),
        (["train", "-r", "h100x9", "--", "synthetic"], "No named resource found for `h100x9`. Did you mean `h100x8`?"),
        (["train", "-s", "slurm", "--cfg", "time=5,partitoin=a", "--", "synthetic"], "did you mean partition"),
        (["train", "-s", "slurm", "--cfg", "partition", "--", "synthetic"], "cfg 'partition' is no NAME=VALUE"),
        (["train", "-s", "kubernetes", "--", "synthetic", "--data", "/d", "--out", "/o"], "needs --cfg queue="),
        (["train", "-s", "slurm", "--", "synthetic"], "scheduler slurm: sbatch is not on PATH"),
        (["train", "--mounts", "src=a", "-s", "slurm", "--", "synthetic"], "type must be specified first"),
        (["study", "--", "merg", "synthetic"], "unknown study 'merg'; did you mean merge"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_is_told_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str | None
) -> None:
    if told is None:  # the job's own options are read before anything is sent
        with pytest.raises(SystemExit) as stop:
            main(["launch", *arguments])
        assert stop.value.code == 2
        assert "--train.num-step" in capsys.readouterr().err
    else:
        assert told in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("scheduler", "package", "mends"),
    [
        ("kubernetes", "kubernetes", "'recsys[kubernetes]'"),
        ("aws_batch", "boto3", "'recsys[aws]'"),
        ("ray", "ray", "'recsys[ray]'"),
    ],
)
def test_a_scheduler_whose_package_is_missing_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scheduler: str, package: str,
    mends: str,
) -> None:  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr("recsys.launching.launch.find_spec", lambda name: None if name == package else find(name))
    line = refusal(capsys, "train", "-s", scheduler, "--dryrun", "--", "synthetic")
    assert (
        line
        == f"recsys: scheduler {scheduler} needs the package {package}, which is not installed; pip install {mends}"
    )


def test_a_docker_daemon_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    job = ["--", "criteo_kaggle", f"{tmp_path}/log.tsv", "--out", f"{tmp_path}/new/data"]
    mounts = ["--mounts", "type=volume,src=cache,dst=/cache"]
    done = run(f"{BIN}/recsys", "launch", "prepare", "-s", "local_docker", *mounts, *job)
    assert (tmp_path / "new").is_dir()  # else the daemon makes it, as its own
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("recsys: local_docker does not take the job (")


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
