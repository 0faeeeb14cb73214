"""Full disks, folders, settings and options that preparing refuses, with one clear line; the same command goes on."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from recsys.cli import main
from recsys.data import encode, ingest, prepare
from recsys.data import vocabulary as vocabularies
from tests.logs import (
    GOOD,
    SHOP_YAML,
    assert_goes_on,
    command,
    interrupt,
    line,
    make_rows,
    partial,
    rejection,
    text,
    write,
)

Capsys = pytest.CaptureFixture[str]


# ---- a full disk


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "name"), [(ingest, "_save_part"), (vocabularies, "write_remap"), (encode.pq, "write_table")]
)
def test_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys, module: Any, name: str
) -> None:
    log, out = write(tmp_path / "log.tsv", text(make_rows(50))), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, no_space)
        message = rejection(capsys, out, log)
    assert message == (
        f"{partial(out)}: no space is left on its disk; make room and run the same command, which goes on from here"
    )
    assert_goes_on(out, log)


FULL_DISK = """
import pathlib, subprocess, sys
from recsys.cli import main
disk, log = map(pathlib.Path, sys.argv[1:])
mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True)
if mounted.returncode:
    sys.exit(77)
ballast = disk / "ballast"
try:
    for left in range(200, 6000, 400):  # KiB: so that every stage once finds the disk full
        ballast.write_bytes(bytes((16 << 20) - (left << 10)))
        status = main(["prepare", "criteo_kaggle", str(log), "--out", str(disk / "out"), "--threshold", "1"])
        print("status", status, flush=True)
        if not status:
            break
finally:
    subprocess.run(["umount", "-l", disk], check=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a small disk")
def test_a_small_disk_is_told_at_every_stage(tmp_path: Path) -> None:
    rows = [row | {f"C{c}": f"{i * c:x}" for c in range(1, 27)} for i, row in enumerate(make_rows(4000))]
    log, disk = write(tmp_path / "log.tsv", text(rows)), tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(disk), str(log)], capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("this system does not let root mount a small disk")
    told = [row for row in done.stdout.splitlines() if row.startswith("status")]
    errors = [row for row in done.stderr.splitlines() if " done in " not in row]
    expected = f"recsys: {disk}/.out.partial: no space is left on its disk; make room and run the same command, which"
    assert told[-1] == "status 0", done.stderr
    assert len(told) > 4
    assert told[:-1] == ["status 2"] * (len(told) - 1)
    assert [row[: len(expected)] for row in errors] == [expected] * (len(told) - 1)


# ---- folders, options and other processes


def test_an_existing_folder_is_never_overwritten(tmp_path: Path, capsys: Capsys) -> None:
    log, out = write(tmp_path / "log.tsv", line(GOOD)), tmp_path / "out"
    out.mkdir()
    write(out / "mine", b"")
    assert command(out, log) == 2
    stderr = capsys.readouterr().err
    assert stderr == f"recsys: {out}: exists already; name another --out, or delete it first\n"
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: Capsys) -> None:
    log = write(tmp_path / "log.tsv", line(GOOD))
    assert rejection(capsys, log / "out", log) == f"{log / 'out'}: cannot make it (Not a directory)"


def test_an_unfinished_preparation_keeps_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    log, out = write(tmp_path / "log.tsv", text(make_rows(60))), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode", interrupt)
        assert command(out, log) == 130
    message = rejection(capsys, out, log, options=["--seed", "3"])
    assert message == (
        f"{partial(out)}: an unfinished preparation with seed 2021 instead of 3; finish it with its own settings, or "
        f"delete that folder"
    )
    other = write(tmp_path / "other.tsv", text(make_rows(60)))
    assert "with paths ['" in rejection(capsys, out, log, other)
    assert_goes_on(out, log, options=("--memory", "1GiB"))


def test_a_description_that_changes_is_another_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    own = write(tmp_path / "shop.yaml", SHOP_YAML.encode())
    log = write(tmp_path / "log.csv", b"bought,price,age,product,user,session,page,at,note\n" + b"1,,,a,,,,,\n" * 9)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "make_vocabulary", interrupt)
        assert command(tmp_path / "out", log, fmt=str(own)) == 130
    write(own, SHOP_YAML.replace("kind: float", "kind: text").encode())
    assert "an unfinished preparation with " in rejection(capsys, tmp_path / "out", log, fmt=str(own))


def test_two_processes_never_work_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    log, out = write(tmp_path / "log.tsv", text(make_rows(60))), tmp_path / "out"
    begun, go_on = threading.Event(), threading.Event()
    run_whole = prepare.Preparation.run

    def wait(self: prepare.Preparation) -> Any:
        begun.set()
        assert go_on.wait(60)
        return run_whole(self)

    statuses: list[int] = []
    monkeypatch.setattr(prepare.Preparation, "run", wait)
    first = threading.Thread(target=lambda: statuses.append(command(out, log)))
    first.start()
    assert begun.wait(60)
    try:
        message = rejection(capsys, out, log)
    finally:
        go_on.set()
        first.join()
    assert message == f"{partial(out)}: another process prepares in it; wait for it, or name another --out"
    assert statuses == [0]
    assert (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--integers", "log1"], "unknown rule --integers 'log1'; did you mean log1p or log3?"),
        (["--split", "times"], "unknown --split 'times'; did you mean time or test?"),
        (["--split", "hash:C27"], "--split hash:C27: no such column "),
        (["--threshold", "0"], "--threshold 0 must be at least 1 (1 keeps every value)"),
        (["--seed", "-1"], "--seed and --max-malformed must not be negative"),
        (["--max-malformed", "-1"], "--seed and --max-malformed must not be negative"),
        (["--vocabulary", "hash"], "--vocabulary hash needs a cap for C1: --max-ids N, for one or all features"),
        (["--max-ids", "1"], "--max-ids 1 of C1 must lie between 2 and 2,147,483,647 (ids are int32)"),
        (["--max-ids", "5", "6"], "--max-ids takes one number or 26, one a feature; it has 2"),
        (["--memory", "much"], "--memory 'much' is no amount of memory; write it like 4GiB or 900MB"),
        (["--memory", "1MB"], "--memory 1MB is too little; "),
    ],
)
def test_an_option_that_cannot_work_is_named(tmp_path: Path, capsys: Capsys, options: list[str], message: str) -> None:
    log = write(tmp_path / "log.tsv", line(GOOD))
    assert rejection(capsys, tmp_path / "out", log, options=options).startswith(message)
    assert not partial(tmp_path / "out").exists()


def test_files_and_formats_are_checked(tmp_path: Path, capsys: Capsys) -> None:
    log, out = write(tmp_path / "log.tsv", line(GOOD)), tmp_path / "out"
    assert rejection(capsys, out) == "no raw file named"
    assert rejection(capsys, out, log, log) == f"{log} is named twice"
    assert rejection(capsys, out, log, fmt="criteo_kagle").startswith(
        "unknown format 'criteo_kagle'; did you mean criteo_kaggle"
    )
    assert main(["prepare", "criteo_kaggle", str(log), "--out", "memory://bucket/out"]) == 2
    assert "no folder of this machine" in capsys.readouterr().err
