"""Reading raw files: whole lines and batches in order, from any place, and what is not a whole file is named."""

import io
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from recsys.config import InputError
from recsys.data import raw
from recsys.data.formats import Column, RawFormat
from recsys.data.raw import Chunk, check_readable, count, cut, read_chunks, read_lines
from recsys.place import place
from tests.logs import AVAZU, CRITEO, make_rows, packed, text, write

CONTENT = b"a\nbcd\n\n" + b"x" * 100 + b"\nlast"
PARQUET = RawFormat(
    name="own",
    columns=(Column(name="y", kind="label"), Column(name="c", kind="text"), Column(name="not", kind="unused")),
    file="parquet",
)


def assert_read(path: Path, content: bytes) -> None:
    """Chunks of whole lines that together are the content; offsets rise to the size of the file."""
    chunks = list(read_lines(path))
    assert b"".join(lines for lines, _ in chunks) == content
    assert all(lines.endswith(b"\n") for lines, _ in chunks)
    offsets = [offset for _, offset in chunks]
    assert offsets == sorted(offsets)
    assert offsets[0] > 0
    assert offsets[-1] == path.stat().st_size


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_chunks_are_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
    assert_read(write(tmp_path / "log", CONTENT), CONTENT + b"\n")
    assert_read(write(tmp_path / "log.gz", packed(CONTENT)), CONTENT + b"\n")
    members = packed(CONTENT[:5]) + packed(b"") + packed(CONTENT[5:50]) + packed(CONTENT[50:])
    assert_read(write(tmp_path / "members", members), CONTENT + b"\n")


def test_a_large_file_is_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", 100_000)
    content = b"".join(b"%d\n" % random.Random(i).getrandbits(256) for i in range(40_000))
    log = write(tmp_path / "log", content)
    chunks = list(read_lines(log))
    assert [offset for _, offset in chunks][:-1] == [100_000 * i for i in range(1, len(chunks))]
    assert_read(write(tmp_path / "log.gz", packed(content)), content)


@pytest.mark.parametrize("packs", [False, True])
def test_an_object_store_is_read_like_a_disk(monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", 50)
    path = place(f"memory://raw-{packs}/log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(CONTENT) if packs else CONTENT)
    check_readable(path)
    assert_read(path, CONTENT + b"\n")


def test_an_object_that_is_not_there_is_named() -> None:
    path = place("memory://raw-none/log")
    for read in (check_readable, lambda missing: list(read_lines(missing))):
        with pytest.raises(InputError, match=r"^memory://raw-none/log: cannot read it"):
            read(path)


def test_characters_are_counted() -> None:
    assert count(CONTENT, "\n") == CONTENT.count(b"\n")
    assert count(b"", "\n") == 0
    assert count("\u00e9,\u00e9,".encode(), ",") == 2


# ---- headers


def test_a_header_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(20, fmt=AVAZU)
    content = text(rows, AVAZU)
    for chunk_bytes in (10, 1 << 20):
        monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
        chunks = list(read_chunks(AVAZU, write(tmp_path / "log", content)))
        assert b"".join(chunk.content for chunk in chunks) == content.partition(b"\n")[2]
        assert sum(chunk.num_rows for chunk in chunks) == 20
        assert chunks[-1].offset == len(content)


@pytest.mark.parametrize("chunk_bytes", [1, 10, 1 << 20])
def test_windows_lines_and_a_byte_order_mark_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
    for fmt in (AVAZU, CRITEO):
        content = text(make_rows(20, fmt=fmt), fmt)
        expected = content.partition(b"\n")[2] if fmt.header else content
        windows = content.replace(b"\n", b"\r\n")
        for written in (
            windows,
            windows[:-1],
            windows[:-2],
            raw.BOM + content,
            raw.BOM + windows,
            content.replace(b"\n", b"\r\n", 1),  # the first line alone
            packed(raw.BOM + windows),
        ):
            chunks = list(read_chunks(fmt, write(tmp_path / "log", written)))
            assert b"".join(chunk.content for chunk in chunks) == expected
            assert sum(chunk.num_rows for chunk in chunks) == 20
            assert chunks[-1].offset == len(written)


def test_one_windows_line_among_others_stays_as_it_is(tmp_path: Path) -> None:
    first, second, *rest = text(make_rows(5)).splitlines(keepends=True)
    content = b"".join([first, second.replace(b"\n", b"\r\n"), raw.BOM, *rest])
    (chunk,) = read_chunks(CRITEO, write(tmp_path / "log", content))
    assert chunk.content == content


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    chunks = list(read_chunks(AVAZU, write(tmp_path / "log", text([], AVAZU))))
    assert [chunk.num_rows for chunk in chunks] == [0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda header: header.replace("hour", "time"), "column 3 is 'time' instead of 'hour'"),
        (lambda header: header.removesuffix(",C21"), "23 columns instead of 24"),
        (lambda header: header + ",C22", "25 columns instead of 24"),
        (lambda header: "\ufeff\ufeff" + header, "column 1 is '\\ufeffid' instead of 'id'"),
        (lambda header: header.replace(",", "\t"), "column 1 is 'id\\tclick"),
        (lambda _: "1,0,14102100,1005", "column 1 is '1' instead of 'id'"),
    ],
)
def test_a_header_that_does_not_fit_is_named(tmp_path: Path, change: Any, problem: str) -> None:
    header, _, rows = text(make_rows(3, fmt=AVAZU), AVAZU).decode().partition("\n")
    log = write(tmp_path / "log", f"{change(header)}\n{rows}".encode())
    with pytest.raises(InputError) as told:
        list(read_chunks(AVAZU, log))
    assert str(told.value).startswith(f"{log}: the header does not fit format avazu: {problem}")


# ---- files that are not whole


@pytest.mark.parametrize("content", [b"", packed(b"")])
def test_an_empty_file_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"log: the file is empty; expected one click a line"):
        list(read_lines(write(tmp_path / "log", content)))


def test_what_stands_before_a_break_is_yielded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", 1 << 20)
    content = b"".join(b"%d\n" % random.Random(i).getrandbits(256) for i in range(60_000))
    whole = packed(content)
    middle = len(whole) // 2
    flipped = bytes(byte ^ 0x5A for byte in whole[middle : middle + 200])
    breaks = {
        "truncated": whole[:middle],
        "truncated ": whole + packed(content)[:-1],
        "corrupt": whole[:-8] + bytes(4) + whole[-4:],
        "corrupt ": whole[:middle] + flipped + whole[middle + 200 :],
    }
    for problem, broken in breaks.items():
        pieces: list[bytes] = []
        with pytest.raises(InputError, match=f"log: the gzip stream is {problem.strip()} .*past [0-9,]+ bytes of text"):
            pieces.extend(lines for lines, _ in read_lines(write(tmp_path / "log", broken)))
        read = b"".join(pieces)
        assert len(read) > 1_000_000, problem
        assert problem == "corrupt " or (content * 2).startswith(read)


def test_how_far_a_small_broken_file_was_read_is_told(tmp_path: Path) -> None:
    content = b"".join(b"%d\n" % random.Random(i).getrandbits(256) for i in range(60_000))
    whole = packed(content)
    for broken in (whole[: len(whole) * 3 // 4], whole[:-8] + bytes(4) + whole[-4:]):
        assert len(content) < raw.CHUNK_BYTES  # no block of it is read to its end
        with pytest.raises(InputError) as told:
            list(read_lines(write(tmp_path / "log", broken)))
        found = re.search("past ([0-9,]+) bytes of text", str(told.value))
        assert found
        num_bytes = int(found[1].replace(",", ""))
        assert len(content) * len(broken) / len(whole) - (2 << 20) < num_bytes <= len(content)
        assert num_bytes > 1_000_000


@pytest.mark.parametrize("problem", ["No such file or directory", "Is a directory"])
def test_what_cannot_be_opened_is_named(tmp_path: Path, problem: str) -> None:
    path = tmp_path if "directory" in problem and "such" not in problem else tmp_path / "missing"
    for read in (check_readable, lambda path: list(read_lines(path))):
        with pytest.raises(InputError) as told:
            read(path)
        assert str(told.value) == f"{path}: cannot read it ({problem})"


# ---- Parquet


def parquet(num_rows: int, **columns: list) -> bytes:
    frame = pl.DataFrame(
        {"c": [f"text {i}" for i in range(num_rows)], "y": [i % 2 for i in range(num_rows)], **columns}
    )
    file = io.BytesIO()
    frame.write_parquet(file, row_group_size=300)
    return file.getvalue()


@pytest.mark.parametrize("where", ["disk", "store"])
def test_parquet_comes_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(raw, "PARQUET_BATCH_ROWS", 128)
    content = parquet(1000, other=list(range(1000)))
    path = tmp_path / "log" if where == "disk" else place("memory://raw-parquet/log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    chunks = list(read_chunks(PARQUET, path))
    tables = [chunk.content for chunk in chunks]
    assert all(isinstance(table, pa.Table) and set(table.column_names) == {"y", "c"} for table in tables)
    assert pa.concat_tables(tables)["c"].to_pylist() == [f"text {i}" for i in range(1000)]
    assert max(chunk.num_rows for chunk in chunks) == 128
    offsets = [chunk.offset for chunk in chunks]
    assert offsets == sorted(offsets)
    assert offsets[-1] == len(content)


def test_a_parquet_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    content = parquet(1000)
    damaged = content[:200] + bytes(400) + content[600:]
    without = io.BytesIO()
    pl.DataFrame({"y": [1], "d": [2]}).write_parquet(without)
    for broken, problem in {
        content[:-50]: "not a whole Parquet file",
        content[:500]: "not a whole Parquet file",
        damaged: "not a whole Parquet file",
        b"y,c\n": "not a whole Parquet file",
        b"": "not a whole Parquet file",
        without.getvalue(): "no column 'c' in it; it has y, d",
    }.items():
        with pytest.raises(InputError, match=problem):
            list(read_chunks(PARQUET, write(tmp_path / "log", broken)))
    with pytest.raises(InputError, match=r"missing: cannot read it \(No such file or directory\)"):
        list(read_chunks(PARQUET, tmp_path / "missing"))


# ---- parts


def chunks_of(sizes: list[int], as_table: bool) -> Iterator[Chunk]:
    row = 0
    for i, size in enumerate(sizes):
        numbers = range(row, row + size)
        lines = b"".join(b"%d\n" % n for n in numbers)
        yield Chunk(pa.table({"n": list(numbers)}) if as_table else lines, size, i)
        row += size


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize("part_rows", [1, 3, 10, 100])
def test_parts_end_every_so_many_rows(part_rows: int, as_table: bool) -> None:
    for sizes in ([10, 10, 10], [1, 0, 7, 25, 3], [30], [0], [9, 1, 11]):
        parts: list[list[int]] = [[]]
        for chunk, ends in cut(chunks_of(sizes, as_table), part_rows, 1 << 20):
            content: Any = chunk.content
            numbers = content["n"].to_pylist() if as_table else list(map(int, content.split()))
            assert len(numbers) == chunk.num_rows > 0
            parts[-1] += numbers
            if ends:
                parts.append([])
        assert sum(parts, []) == list(range(sum(sizes)))  # noqa: RUF017
        assert all(len(part) == part_rows for part in parts[:-1])
        assert len(parts[-1]) < part_rows


def test_offsets_of_criteo_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", 3000)
    content = text(make_rows(100))
    ends = [
        chunk.offset for chunk, ends in cut(read_chunks(CRITEO, write(tmp_path / "log", content)), 30, 1 << 20) if ends
    ]
    assert len(ends) == 3
    assert 0 < ends[0] < ends[1] < ends[2] <= len(content)
