"""Engines: results in order, errors as one line, and what Ray does when a worker dies."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recsys.config import InputError
from recsys.data import engine
from recsys.data.engine import Advance, run
from recsys.data.prepare import prepare
from recsys.data.settings import PrepareConfig

# What Ray and the packages under it tell their own developers, and sockets that its shutdown leaves to the collector.
RAY_WARNINGS = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning")


def square(job: int, advance: Advance) -> dict[str, Any]:
    advance(job)
    return {"squared": job * job}


def test_results_are_in_order_of_the_jobs() -> None:
    told: list[float] = []
    results = run("local", square, range(50), told.append, workers=4)
    assert results == [{"squared": i * i} for i in range(50)]
    assert sorted(told) == list(range(50))


def test_no_job_is_no_result() -> None:
    assert run("local", square, [], lambda *_: None, workers=1) == []
    assert run("ray", square, [], lambda *_: None, workers=1) == []


def test_the_first_error_ends_the_stage_and_later_jobs_do_not_begin() -> None:
    begun: list[int] = []
    failed = threading.Event()

    def kernel(job: int, advance: Advance) -> dict[str, Any]:
        begun.append(job)
        if job == 1:
            failed.set()
            raise InputError("job 1 cannot work")
        failed.wait(10)
        return {}

    with pytest.raises(InputError, match="job 1 cannot work"):
        run("local", kernel, range(100), lambda *_: None, workers=2)
    assert len(begun) < 10


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--engine ray needs Ray: pip install 'recsys\[ray\]'"):
        run("ray", square, [1], lambda *_: None, workers=1)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two cores on this machine."""
    found = pytest.importorskip("ray", reason="Ray is not installed: pip install 'recsys[ray]'")
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), **engine.WORKER_ENVIRONMENT}
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield found
    found.shutdown()


def with_ray(test: Any) -> Any:
    """Mark a test as one of Ray: slow, and with the warnings that Ray gives."""
    for warning in RAY_WARNINGS:
        test = pytest.mark.filterwarnings(warning)(test)
    return pytest.mark.slow(pytest.mark.usefixtures("ray")(test))


@with_ray
def test_ray_gives_the_same_bytes(synthetic_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = synthetic_log.read_bytes().splitlines(keepends=True)
    halves = (tmp_path / "first.tsv", tmp_path / "second.tsv")
    for path, part in zip(halves, (lines[:3000], lines[3000:]), strict=True):
        path.write_bytes(b"".join(part))
    folders = {}
    for name in ("local", "ray"):
        out = tmp_path / name
        prepare(PrepareConfig(format="criteo_kaggle", paths=halves, out=out, engine=name, threshold=2, split="time"))
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "timings.json"]
        folders[name] = {str(path.relative_to(out)): path.read_bytes() for path in files}
    assert folders["ray"] == folders["local"]
    assert len(folders["ray"]) == 26 + 2 + 4


@with_ray
def test_ray_runs_the_job_of_a_killed_worker_again(tmp_path: Path) -> None:
    def kernel(job: int, advance: Advance) -> dict[str, Any]:
        tried = tmp_path / f"tried-{job}"
        if job == 2 and not tried.exists():
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        advance(1)
        return {"job": job, "pid": os.getpid()}

    told: list[float] = []
    results = run("ray", kernel, range(4), told.append, workers=1)
    assert [result["job"] for result in results] == [0, 1, 2, 3]
    assert os.getpid() not in {result["pid"] for result in results}
    assert told == [1, 1, 1, 1]
    assert (tmp_path / "tried-2").exists()


@with_ray
def test_bad_input_on_a_worker_is_one_line_here(tmp_path: Path, synthetic_log: Path) -> None:
    bad = tmp_path / "bad.tsv"
    bad.write_bytes(synthetic_log.read_bytes() + b"not a row\n")
    config = PrepareConfig(format="criteo_kaggle", paths=(synthetic_log, bad), out=tmp_path / "out", engine="ray")
    with pytest.raises(InputError, match=f"{bad}, row 8001: 1 fields instead of 40"):
        prepare(config)
    assert not (tmp_path / "out").exists()
