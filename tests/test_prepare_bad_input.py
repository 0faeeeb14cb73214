"""What preparing refuses: one clear line, nothing under the final name, and it goes on once the cause is mended."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from recsys.data import ingest, prepare, raw
from recsys.data import vocabulary as vocabularies
from recsys.data.settings import NOT_RAW
from tests.logs import (
    BAD_LINES,
    GOOD,
    assert_goes_on,
    command,
    data_files,
    in_small_parts,
    interrupt,
    line,
    make_rows,
    packed,
    partial,
    rejection,
    run,
    text,
    write,
)

Capsys = pytest.CaptureFixture[str]


# ---- rows


def test_a_malformed_row_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    in_small_parts(monkeypatch, rows=4, chunk_bytes=300)
    first = write(tmp_path / "first.tsv", line(GOOD) * 10)
    for kind, (bad, problem) in {name: BAD_LINES[name] for name in ("label 2", "blank line", "CR LF")}.items():
        second = write(tmp_path / kind, line(GOOD) * 6 + bad + line(GOOD) * 3)
        message = rejection(capsys, tmp_path / f"{kind}.out", first, second)
        assert message.startswith(f"{second}, row 7: {problem}")
        assert message.endswith("(at most 0 malformed rows are tolerated: --max-malformed N leaves out N)")
        write(second, line(GOOD) * 11)
        assert_goes_on(tmp_path / f"{kind}.out", first, second)


def test_mixed_line_endings_and_nul_bytes_are_told(tmp_path: Path, capsys: Capsys) -> None:
    lines = [line(row) for row in make_rows(20)]
    lines[4] = lines[4].replace(b"\n", b"\r\n")
    lines[9] = b"\0" + lines[9]
    log = write(tmp_path / "log.tsv", b"".join(lines))
    message = rejection(capsys, tmp_path / "out", log)
    assert message.startswith(f"{log}, row 5: column C26: the line ends in CR LF; only LF is read")
    assert f"; {log}, row 10: column label: '\\x00" in message
    assert_goes_on(tmp_path / "out", log, options=("--max-malformed", "2"))


def test_the_rows_of_a_windows_file_are_named_too(tmp_path: Path, capsys: Capsys) -> None:
    lines = [*text(make_rows(9)).splitlines(keepends=True), BAD_LINES["label 2"][0]]
    log = write(tmp_path / "log.tsv", raw.BOM + b"".join(lines).replace(b"\n", b"\r\n"))
    assert rejection(capsys, tmp_path / "out", log).startswith(f"{log}, row 10: {BAD_LINES['label 2'][1]}")


@pytest.mark.parametrize("chunk_bytes", [300, 32 << 20])
def test_malformed_rows_are_left_out_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys, chunk_bytes: int
) -> None:
    rows = make_rows(60)
    lines = [line(row) for row in rows]
    bad = {2: "label 2", 30: "blank line", 31: "CR within a line", 32: "too many fields", 60: "nine digits"}
    for row, kind in bad.items():
        lines[row - 1] = BAD_LINES[kind][0]
    good = [row for i, row in enumerate(rows, start=1) if i not in bad]
    run(tmp_path / "expected", write(tmp_path / "good.tsv", text(good)))
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
    log = write(tmp_path / "log.tsv", b"".join(lines).removesuffix(b"\n"))
    out = tmp_path / "out"
    assert command(out, log, options=["--max-malformed", "5"]) == 0
    assert f"left out 5 malformed rows; {out}/manifest.json names the first" in capsys.readouterr().out
    assert data_files(out) == data_files(tmp_path / "expected")
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["num_rows"], manifest["num_malformed"]) == (55, 5)
    reported = zip(manifest["malformed"], bad.items(), strict=True)
    assert all(told.startswith(f"{log}, row {row}: {BAD_LINES[kind][1]}") for told, (row, kind) in reported)


@pytest.mark.parametrize("chunk_bytes", [100, 32 << 20])
def test_more_malformed_rows_than_tolerated_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys, chunk_bytes: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
    log = write(tmp_path / "log.tsv", (line(GOOD) + b"\n") * 3 + line(GOOD))
    message = rejection(capsys, tmp_path / "out", log, options=["--max-malformed", "2"])
    assert [f"row {row}:" in message for row in (2, 4, 6)] == [True] * 3
    assert "(at most 2 malformed rows are tolerated" in message
    assert command(tmp_path / "out", log, options=["--max-malformed", "3"]) == 0


def test_malformed_rows_of_all_files_count_together(tmp_path: Path, capsys: Capsys) -> None:
    logs = [write(tmp_path / f"{i}.tsv", line(GOOD) + b"\n" * 2) for i in range(3)]
    message = rejection(capsys, tmp_path / "out", *logs, options=["--max-malformed", "5"])
    assert "row 2" in message
    assert "(at most 5 malformed rows are tolerated" in message


def test_the_manifest_names_ten_malformed_rows_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "PART_ROWS", 4)
    log = write(tmp_path / "log.tsv", line(GOOD) + b"\n" * 12)
    manifest = run(tmp_path / "out", log, max_malformed=100)
    assert manifest["num_malformed"] == 12
    assert [told.split(": ")[0] for told in manifest["malformed"]] == [f"{log}, row {row}" for row in range(2, 12)]


def test_a_log_of_malformed_rows_alone_is_refused(tmp_path: Path, capsys: Capsys) -> None:
    log = write(tmp_path / "log.tsv", b"\n" * 5)
    message = rejection(capsys, tmp_path / "out", log, options=["--max-malformed", "9"])
    assert message == f"{log}: no well-formed row in it"


def test_a_column_of_one_value_is_no_problem(tmp_path: Path) -> None:
    manifest = run(tmp_path / "out", write(tmp_path / "log.tsv", line(GOOD) * 50))
    assert manifest["files"]["vocabulary/C1.parquet"]["num_rows"] == 1


def test_ids_beyond_int32_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    log = write(tmp_path / "log.tsv", text([GOOD | {"C7": f"{i:x}"} for i in range(90)]))
    with monkeypatch.context() as patch:
        patch.setattr(vocabularies, "MAX_NUM_IDS", 50)
        message = rejection(capsys, tmp_path / "out", log, options=["--threshold", "1"])
    assert message.startswith("column C7: 7")
    assert "more ids than int32 holds; raise --threshold or set --max-ids" in message
    assert_goes_on(tmp_path / "out", log, options=("--threshold", "1"))


# ---- files


def corrupt(content: bytes) -> bytes:
    """Flip bytes in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x5A for byte in content[middle : middle + 8]) + content[middle + 8 :]


PACKED = packed(text(make_rows(200)))

BAD_FILES = {
    "empty": (b"", "the file is empty; expected one click a line"),
    "empty gzip": (packed(b""), "the file is empty; expected one click a line"),
    "truncated gzip": (PACKED[: len(PACKED) // 2], "the gzip stream is truncated"),
    "gzip without its last byte": (PACKED[:-1], "the gzip stream is truncated"),
    "gzip header alone": (PACKED[:10], "the gzip stream is truncated"),
    "truncated second member": (PACKED + PACKED[:-20], "the gzip stream is truncated"),
    "corrupt gzip": (corrupt(PACKED), "the gzip stream is corrupt"),
    "wrong checksum": (PACKED[:-8] + bytes(4) + PACKED[-4:], "the gzip stream is corrupt"),
    "newline alone": (b"\n", "1 fields instead of 40"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys, kind: str) -> None:
    content, problem = BAD_FILES[kind]
    in_small_parts(monkeypatch, rows=30, chunk_bytes=2000)
    good, bad = write(tmp_path / "good.tsv", line(GOOD) * 20), write(tmp_path / "bad", content)
    message = rejection(capsys, tmp_path / "out", good, bad)
    assert message.startswith(f"{bad}")
    assert problem in message


@pytest.mark.parametrize("how", ["flipped bytes", "wrong checksum"])
def test_a_day_corrupt_in_the_middle_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys, how: str
) -> None:
    in_small_parts(monkeypatch, rows=1000, chunk_bytes=100_000)
    out = tmp_path / "out"
    day = packed(text(make_rows(250)) * 60)
    day = corrupt(day) if how == "flipped bytes" else day[:-8] + bytes(4) + day[-4:] + day
    good, bad = write(tmp_path / "day_0", packed(line(GOOD) * 20)), write(tmp_path / "day_1", day)
    message = rejection(capsys, out, good, bad)
    # Flipped bytes may unpack to garbage before the checksum tells.
    told = (
        "(: the gzip stream is corrupt past |, row )"
        if how == "flipped bytes"
        else ": the gzip stream is corrupt past "
    )
    assert re.match(re.escape(str(bad)) + told, message)
    assert (partial(out) / "work/ingest/0000.json").exists()
    assert list((partial(out) / "work/ingest").glob("0001-*.arrow"))
    # Parts of the corrupt file are not kept, not even for one that begins otherwise.
    write(bad, packed(text(make_rows(1300, seed=5))))
    assert_goes_on(out, good, bad)


def test_a_file_that_cannot_be_read_is_named_before_any_work(tmp_path: Path, capsys: Capsys) -> None:
    malformed = write(tmp_path / "log.tsv", b"\n")
    missing, folder = tmp_path / "missing.gz", tmp_path / "folder"
    folder.mkdir()
    message = rejection(capsys, tmp_path / "out", malformed, missing)
    assert message == f"{missing}: cannot read it (No such file or directory)"
    others = f"names that begin with . or _ or end in {', '.join(NOT_RAW)}"
    message = rejection(capsys, tmp_path / "out", malformed, folder)
    assert message == f"{folder}: no raw file in this folder ({others} do not count)"
    assert not partial(tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read whatever its mode says")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, capsys: Capsys) -> None:
    log = write(tmp_path / "log.tsv", line(GOOD))
    log.chmod(0)
    assert rejection(capsys, tmp_path / "out", log) == f"{log}: cannot read it (Permission denied)"


def test_a_file_that_changes_between_stages_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    in_small_parts(monkeypatch)
    content = text(make_rows(150))
    logs = [write(tmp_path / f"{i}.tsv", content) for i in range(2)]
    before = logs[1].stat()
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "make_vocabulary", interrupt)
        assert command(tmp_path / "out", *logs) == 130
    write(logs[1], content + line(GOOD))
    message = rejection(capsys, tmp_path / "out", *logs)
    assert message.startswith(f"{logs[1]}: the file changed since it was ingested; restore it, or delete ")
    os.utime(write(logs[1], content), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_goes_on(tmp_path / "out", *logs)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    in_small_parts(monkeypatch)
    log = write(tmp_path / "log.tsv", text(make_rows(300)))
    save_part = ingest._save_part

    def append(path: Path, *rest: Any) -> None:
        save_part(path, *rest)
        with log.open("ab") as file:
            file.write(line(GOOD))

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_save_part", append)
        message = rejection(capsys, tmp_path / "out", log)
    assert message == f"{log}: the file changed while it was read; run the same command once it is complete"
    assert_goes_on(tmp_path / "out", log)
