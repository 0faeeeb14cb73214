"""Raw files: whole lines by the chunk from plain or gzip text, batches from Parquet, here or on an object store."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import InputError
from recsys.data.formats import RawFormat
from recsys.place import is_local

CHUNK_BYTES = 16 << 20  # of 2 to 256 MiB the fastest to parse
PARQUET_BATCH_ROWS = 65_536
MAX_LINE_BYTES = 32 << 20
COUNTED_BYTES = 64 << 10
GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some programs put before the first line."""


class Chunk(NamedTuple):
    """Consecutive rows of a raw file, not parsed yet."""

    content: bytes | pa.Table
    """Whole lines, or a table of a Parquet file's columns."""
    num_rows: int
    offset: int
    """Bytes of the file, as it lies on disk, that were read up to here."""


def read_chunks(raw: RawFormat, path: Path) -> Iterator[Chunk]:
    """Yield a raw file's rows in order, a few megabytes at a time; headers are checked and left out.

    Text whose first line ends in CR LF is read as if it ended its lines in LF.

    Raises:
        InputError: the file is missing, empty, truncated, corrupt, or its header is not the format's.
    """
    if raw.file == "parquet":
        yield from _read_parquet(raw, path)
        return
    is_crlf = False
    for i, (lines, offset) in enumerate(read_lines(path)):
        body = lines
        if i == 0:
            body = body.removeprefix(BOM)
            is_crlf = body[: body.index(b"\n")].endswith(b"\r")
        if is_crlf:
            body = body.replace(b"\r\n", b"\n")
        if raw.header and i == 0:
            header, _, body = body.partition(b"\n")
            _check_header(raw, path, header)
        yield Chunk(body, count(body, "\n"), offset)


def read_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the text of a plain or gzip file in chunks of whole lines, the last line closed by a newline.

    Beside each stands how many bytes of the file were read up to here.
    """
    rest = None
    offset = 0
    for block, offset in _read_blocks(path):
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join((rest or b"", memoryview(block)[:end])), offset
            rest = block[end:]
        else:
            rest = (rest or b"") + block
        if len(rest) > MAX_LINE_BYTES:
            raise InputError(f"{path}: no line ends within {len(rest):,} bytes; is it a text file, one click a line?")
    if rest is None:
        raise InputError(f"{path}: the file is empty; expected one click a line")
    if rest:
        yield rest + b"\n", offset


def count(text: bytes, character: str) -> int:
    """How often an ASCII character occurs; several times as fast as `bytes.count`."""
    characters = np.frombuffer(text, dtype=np.uint8)
    found = np.empty(COUNTED_BYTES, dtype=np.bool_)  # small: new pages cost more than the comparison
    num_found = 0
    for begin in range(0, len(characters), COUNTED_BYTES):
        block = characters[begin : begin + COUNTED_BYTES]
        num_found += int(np.count_nonzero(np.equal(block, ord(character), out=found[: len(block)])))
    return num_found


def check_readable(path: Path) -> None:
    """Open a file for a moment.

    Raises:
        InputError: it cannot be read.
    """
    with _open(path):
        pass


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror or error})") from None
    except Exception as error:
        if is_local(path) or isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot read it ({error})") from None  # stores have exceptions of their own


def _read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    with _open(path) as file:
        is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        if is_gzip:
            yield from _read_gzip(path, file)
        else:
            while block := file.read(CHUNK_BYTES):
                yield block, file.tell()


def _read_gzip(path: Path, file: Any) -> Iterator[tuple[bytes, int]]:
    from isal import igzip_threaded, isal_zlib  # noqa: PLC0415  (plain text does not need it)

    with igzip_threaded.open(file, "rb") as unpacked:
        try:
            while block := unpacked.read(CHUNK_BYTES):
                yield block, file.tell()
        except EOFError:
            # A block that breaks off is lost, but counted.
            raise InputError(
                f"{path}: the gzip stream is truncated (it breaks off past {unpacked.raw.tell():,} bytes of text)"
            ) from None
        except (OSError, isal_zlib.error) as error:  # type: ignore[misc]  # its stub gives an instance
            num_bytes = unpacked.raw.tell()
            raise InputError(f"{path}: the gzip stream is corrupt past {num_bytes:,} bytes of text ({error})") from None


def _check_header(raw: RawFormat, path: Path, header: bytes) -> None:
    fields = fields_of(raw, header) or [header]
    found = [field.decode(errors="backslashreplace") for field in fields]
    expected = [column.name for column in raw.columns]
    if found != expected:
        at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
        told = (
            f"{len(found)} columns instead of {len(expected)}"
            if at is None
            else f"column {at + 1} is {found[at]!r} instead of {expected[at]!r}"
        )
        raise InputError(f"{path}: the header does not fit format {raw.name}: {told}")


def _read_parquet(raw: RawFormat, path: Path) -> Iterator[Chunk]:
    names = [column.name for column in raw.columns if column.kind != "unused"]
    with _open(path) as file:
        size = file.seek(0, 2)
        try:
            source = pq.ParquetFile(file)
            missing = sorted(set(names) - set(source.schema_arrow.names))
            if missing:
                raise InputError(
                    f"{path}: no column {missing[0]!r} in it; it has {', '.join(source.schema_arrow.names)}"
                )
            num_rows, done = source.metadata.num_rows, 0
            for batch in source.iter_batches(PARQUET_BATCH_ROWS, columns=names):
                done += batch.num_rows
                yield Chunk(pa.Table.from_batches([batch]), batch.num_rows, size * done // num_rows)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a whole Parquet file ({error})") from None


def fields_of(raw: RawFormat, line: bytes) -> list[bytes] | None:
    """Cut a line into its fields, quotes taken off; None if a quote is not closed or does not enclose a whole field."""
    separator, quote = raw.separator.encode(), raw.quote.encode()
    if not quote or quote not in line:
        return line.split(separator)
    q, s = re.escape(quote), re.escape(separator)
    field = re.compile(rb"(?:%b((?:[^%b]|%b%b)*)%b|([^%b%b]*))(%b|\Z)" % (q, q, q, q, q, q, s, s))
    fields, at, ends = [], 0, separator
    while ends:
        if (found := field.match(line, at)) is None:
            return None
        quoted, plain, ends = found.groups()
        fields.append(plain if quoted is None else quoted.replace(quote * 2, quote))
        at = found.end()
    return fields


def cut(chunks: Iterator[Chunk], num_rows: int, num_bytes: int = sys.maxsize) -> Iterator[tuple[Chunk, bool]]:
    """Cut chunks into parts of `num_rows` rows, or of fewer where a chunk brings a part to `num_bytes` of content.

    Yields chunks and whether a part ends behind them.
    """
    room, held = num_rows, 0
    for chunk in chunks:
        rest = chunk
        while rest.num_rows >= room:
            head, rest = _cut_at(rest, room)
            yield head, True
            room, held = num_rows, 0
        if rest.num_rows:
            held += rest.content.nbytes if isinstance(rest.content, pa.Table) else len(rest.content)
            room -= rest.num_rows
            yield rest, held >= num_bytes
            if held >= num_bytes:
                room, held = num_rows, 0


def _cut_at(chunk: Chunk, row: int) -> tuple[Chunk, Chunk]:
    content = chunk.content
    if isinstance(content, pa.Table):
        head, tail = content.slice(0, row), content.slice(row)
    else:
        newlines = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
        head, tail = content[: newlines[row - 1] + 1], content[newlines[row - 1] + 1 :]
    return Chunk(head, row, chunk.offset), Chunk(tail, chunk.num_rows - row, chunk.offset)
