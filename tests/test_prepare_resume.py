"""Whatever ends a preparation, at whatever moment: the same command goes on, and ends with the same bytes."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recsys.data import prepare
from recsys.data.verify import verify
from recsys.place import place
from tests.logs import all_files, command, in_small_parts, make_rows, packed, partial, text, write

IN_SMALL_PARTS = """
import sys
from recsys.data import ingest, raw
ingest.PART_ROWS, raw.CHUNK_BYTES = 1500, 300_000
from recsys.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(out: Path, *logs: Path) -> subprocess.Popen:
    options = ["--out", str(out), "--threshold", "1", "--split", "time"]
    return subprocess.Popen(
        [sys.executable, "-c", IN_SMALL_PARTS, "prepare", "criteo_kaggle", *map(str, logs), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(out: Path, *logs: Path) -> None:
    process = start(out, *logs)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def hashes(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in all_files(out).items()}


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    block = make_rows(4000)
    logs = [write(tmp_path / f"day_{i}.gz", packed(text(block[i * 500 :]) * 4)) for i in range(2)]
    out = tmp_path / "out"
    started = time.perf_counter()
    finish(out, *logs)
    took = time.perf_counter() - started
    assert verify(out, show_progress=False) == []
    expected = hashes(out)
    rng = random.Random(0)
    reached: Counter[str] = Counter()
    for i in range(5):
        out.rename(tmp_path / f"out_{i}")
        for _ in range(2):  # killed once, and again while it goes on
            process = start(out, *logs)
            try:
                process.communicate(timeout=took * rng.uniform(0.2, 0.9))
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                folders = [path.name for path in (partial(out) / "work").glob("[a-z]*") if path.is_dir()]
                reached[max(folders, default="nothing", key=STAGES.index)] += 1
        if not out.exists():
            finish(out, *logs)
        assert hashes(out) == expected
        assert not partial(out).exists()
    assert len(reached) >= 2, reached


STAGES = ["nothing", "ingest", "vocabulary", "encode"]
KERNELS = {"ingest": "ingest", "make_vocabulary": "vocabulary", "encode": "encode"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_finished_jobs_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda _: {0})  # one job at a time
    in_small_parts(monkeypatch)
    rows = make_rows(600)
    logs = [write(tmp_path / f"{i}.tsv", text(rows[i * 150 : (i + 1) * 150])) for i in range(4)]
    out = tmp_path / "out"
    assert command(out, *logs) == 0
    expected = all_files(out)
    out.rename(tmp_path / "undisturbed")
    num_jobs = {"ingest": 4, "make_vocabulary": 26, "encode": 8}

    calls: Counter[str] = Counter()
    stop_at = {kernel: 3}
    for name in KERNELS:
        original = getattr(prepare, name)

        def spy(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += 1
            if calls[name] >= stop_at.get(name, 1000):
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(prepare, name, spy)
    assert command(out, *logs) == 130
    assert not out.exists()
    before = list(KERNELS)[: list(KERNELS).index(kernel)]
    assert calls[kernel] >= 3  # the next one may have begun
    del calls[kernel]
    assert calls == {name: num_jobs[name] for name in before}

    calls.clear()
    stop_at.clear()
    assert command(out, *logs) == 0
    assert calls == {name: count for name, count in num_jobs.items() if name not in before} | {
        kernel: num_jobs[kernel] - 2
    }
    assert all_files(out) == expected
    assert not partial(out).exists()


def test_parts_of_an_unfinished_file_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recsys.data import ingest

    in_small_parts(monkeypatch)
    log, out = write(tmp_path / "log.tsv", text(make_rows(1000))), tmp_path / "out"
    assert command(out, log) == 0
    expected = all_files(out)
    out.rename(tmp_path / "undisturbed")
    save_part, saved = ingest._save_part, list[str]()

    limit = 4

    def save(path: Path, *rest: Any) -> None:
        if len(saved) == limit:
            raise KeyboardInterrupt
        save_part(path, *rest)
        saved.append(path.name)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_save_part", save)
        assert command(out, log) == 130
        assert [path.name for path in sorted((partial(out) / "work/ingest").glob("0000-*"))] == saved
        limit = 100
        assert command(out, log) == 0
    assert len(saved) == len(set(saved)) == 10
    assert all_files(out) == expected


@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_copy_to_another_place_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    log, undisturbed = write(tmp_path / "log.tsv", text(make_rows(100))), tmp_path / "undisturbed"
    out = tmp_path / "out" if where == "disk" else place("memory://copied/out")
    options = ["--work", str(tmp_path / "work")]
    assert command(undisturbed, log) == 0
    copy, copied = shutil.copyfileobj, list[str]()

    def copy_some(source: Any, target: Any, length: int) -> None:
        if len(copied) == 5:
            raise KeyboardInterrupt
        copied.append(source.name)
        copy(source, target, length)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", copy_some)
        assert command(out, log, options=options) == 130
    assert not (out / "manifest.json").exists()
    assert not (where == "disk" and out.exists())
    assert command(out, log, options=options) == 0
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files.pop("timings.json")
    assert files == all_files(undisturbed)
    assert list((tmp_path / "work").iterdir()) == []
    assert command(out, log, options=options) == 2  # it exists now


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_ends_the_last_stage_ends_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    def end(*_: Any, **__: Any) -> None:
        raise what

    log, out = write(tmp_path / "log.tsv", text(make_rows(50))), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "verify", end)
        if what is KeyboardInterrupt:
            assert command(out, log) == 130
        else:
            with pytest.raises(what):
                command(out, log)
    assert not out.exists()
    assert command(out, log) == 0
    assert verify(out, show_progress=False) == []
