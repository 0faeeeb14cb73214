"""What `recsys launch` asks of each scheduler, compared with requests that were read through and kept.

After a change that is meant, RECSYS_UPDATE_GOLDEN=1 pytest tests/test_launch_requests.py writes them anew: read them.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.schedulers import ids

from recsys.cli import main

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "launch"
SCHEDULERS = {
    "local_cwd": ["--cfg", "log_dir=/logs"],
    "local_docker": [],
    "slurm": ["--cfg", "partition=gpu", "time=1-00:00:00"],
    "kubernetes": ["--cfg", "queue=training"],
    "aws_batch": ["--cfg", "queue=training", "user=owner"],
    "ray": ["--cfg", "dashboard_address=head:8265"],
}
TRAINED = ["criteo_kaggle", "--data", "/data/kaggle", "--out", "/runs/kaggle", "--members", "dcnv2*2"]
JOBS = {
    "train": ["train", "-j", "2x8", "-r", "h100x8", "--max-retries", "3", "--env", "NCCL_DEBUG=INFO", "--", *TRAINED],
    "elastic": ["train", "-j", "1:4x8", "-r", "a100x8", "--image", "registry/recsys:1", "--", *TRAINED],
    "prepare": ["prepare", "-r", "cpu_large", "--", "criteo_1tb", "/raw/criteo", "--out", "/data/criteo"],
    "study": ["study", "--cpu", "8", "--max-retries", "1", "--", "merge", "criteo_kaggle", "--out", "/studies/merge"],
}


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(ids, "random_uint64", lambda: 2**60)
    monkeypatch.setenv("TORCHXCONFIG", str(ROOT / ".torchxconfig"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LOGLEVEL", raising=False)
    monkeypatch.chdir("/")
    yield
    for number, handler in handlers.items():  # torchx sets its own for local_cwd
        signal.signal(number, handler)


def test_every_request_that_is_kept_is_compared() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {f"{name}-{job}" for name in SCHEDULERS for job in JOBS}


@pytest.mark.filterwarnings("ignore:(?s).*Volcano:UserWarning", "ignore:Cannot determine resource:UserWarning")
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_request_is_the_one_that_was_read(scheduler: str, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *rest = JOBS[job]
    assert main(["launch", verb, "-s", scheduler, "--dryrun", *SCHEDULERS[scheduler], *rest]) == 0
    folder = re.compile(r"working_dir='([^']*)'")
    request = capsys.readouterr().out
    assert not any(Path(made).exists() for made in folder.findall(request))  # what ray would be sent is gone again
    request = folder.sub("working_dir='FOLDER'", request)
    path = GOLDEN / f"{scheduler}-{job}.txt"
    if os.environ.get("RECSYS_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(request)
    assert request == path.read_text()


@pytest.mark.parametrize("job", JOBS)
def test_variables_of_slurm_are_split_at_commas_into_pairs(job: str) -> None:
    request = (GOLDEN / f"slurm-{job}.txt").read_text()
    exports = re.findall(r"--export=ALL,(\S*)", request)
    assert exports
    assert all("=" in pair for export in exports for pair in export.split(","))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_restarts_need_is_in_every_request(scheduler: str) -> None:
    request = (GOLDEN / f"{scheduler}-train.txt").read_text()
    flat = re.sub(r"'?\s+'?", " ", request)
    assert "--nnodes 2 --nproc_per_node 8" in flat
    assert re.search(r"PET_MAX_RESTARTS\W+(value: )?'?3", flat)
    assert re.search(r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE\W+(value: )?'?1", flat)
    assert "--resume auto" in flat
    assert re.search(r"--signals-to-handle\W+SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", flat)
    assert "--resume" not in (GOLDEN / f"{scheduler}-elastic.txt").read_text()  # no retries
    assert "--nnodes 1:4" in re.sub(r"'?\s+'?", " ", (GOLDEN / f"{scheduler}-elastic.txt").read_text())
