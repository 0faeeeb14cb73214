"""Raw text in, typed rows out: whole lines by the chunk, and every malformed row named."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recsys.config import InputError
from recsys.data.formats import RawFormat

CHUNK_BYTES = 32 << 20
GZIP_MAGIC = b"\x1f\x8b"
_ALPHABET = b"0123456789abcdefABCDEF-\t\n"
_INTEGER = re.compile(rb"(-?)0*([0-9]{1,19})")
_INT64 = range(-(2**63), 2**63)
_HEXADECIMAL = re.compile(rb"[0-9a-fA-F]{1,8}")


@dataclass(frozen=True)
class Malformed:
    """One row that does not fit its format."""

    path: Path
    row: int
    """Counted from 1."""
    problem: str

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}: {self.problem}"


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the text of a plain or gzip file in chunks of whole lines, the last line closed by a newline.

    Raises:
        InputError: the file is missing, empty, or its gzip stream is truncated or corrupt.
    """
    rest = b""
    num_bytes = 0
    for block in _read_blocks(path):
        num_bytes += len(block)
        end = block.rfind(b"\n") + 1
        if end:
            yield rest + block[:end]
            rest = block[end:]
        else:
            rest += block
    if rest:
        yield rest + b"\n"
    if not num_bytes:
        raise InputError(f"{path}: the file is empty; expected one click a line")


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip, told by its first bytes.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot read it ({error.strerror})")


def _read_blocks(path: Path) -> Iterator[bytes]:
    if is_gzip(path):
        yield from _read_gzip(path)
        return
    try:
        with path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                yield block
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_gzip(path: Path) -> Iterator[bytes]:
    from isal import igzip_threaded, isal_zlib  # noqa: PLC0415  (plain text does not need it)

    num_bytes = 0
    try:
        with igzip_threaded.open(path, "rb") as file:
            while block := file.read(CHUNK_BYTES):
                num_bytes += len(block)
                yield block
    except EOFError:
        raise InputError(
            f"{path}: the gzip stream is truncated (it breaks off past {num_bytes:,} bytes of text)"
        ) from None
    except (OSError, isal_zlib.error) as error:  # type: ignore[misc]  # its stub gives an instance
        raise InputError(f"{path}: the gzip stream is corrupt past {num_bytes:,} bytes of text ({error})") from None


def parse(raw: RawFormat, lines: bytes) -> pl.DataFrame | None:
    """Parse whole lines into typed columns: label UInt8, integers Int64, categories UInt32; an empty field is null.

    Returns None when any row is malformed; `malformed_rows` then says which and why. A wrong number of fields is seen
    by counting tabs: polars refuses rows that are too long, and only rows that are too short make the total differ.
    The alphabet keeps out what polars would take and we do not: spaces, plus signs, CR LF, byte order marks.
    """
    num_rows = lines.count(b"\n")
    if lines.count(b"\t") != num_rows * (len(raw.columns) - 1) or lines.translate(None, _ALPHABET):
        return None
    kinds = {name: pl.Int64() if name in raw.integers else pl.String() for name in raw.columns}
    try:
        frame = pl.read_csv(lines, separator="\t", has_header=False, schema=kinds, quote_char=None)
    except pl.exceptions.PolarsError:
        return None
    if frame[raw.label].is_in(["0", "1"]).sum() != num_rows:
        return None
    category = pl.col(raw.categories)
    parsed = frame.with_columns(
        pl.when(category.str.len_bytes() <= 8).then(category.str.to_integer(base=16, dtype=pl.UInt32, strict=False)),
        pl.col(raw.label).cast(pl.UInt8),
    )
    return parsed if parsed.null_count().row(0) == frame.null_count().row(0) else None


def malformed_rows(raw: RawFormat, path: Path, lines: bytes, first_row: int) -> tuple[bytes, list[Malformed]]:
    """Separate well-formed lines from malformed ones: the slow, exact way, used only where `parse` gave up."""
    good, bad = [], []
    for row, line in enumerate(lines.removesuffix(b"\n").split(b"\n"), start=first_row):
        problem = _problem(raw, line.split(b"\t"))
        if problem is None:
            good.append(line + b"\n")
        else:
            bad.append(Malformed(path, row, problem))
    return b"".join(good), bad


def _problem(raw: RawFormat, fields: list[bytes]) -> str | None:
    if len(fields) != len(raw.columns):
        return f"{len(fields)} fields instead of {len(raw.columns)} (tab separated: {raw.label}, then the columns)"
    if fields[-1].endswith(b"\r"):
        return f"column {raw.columns[-1]}: the line ends in CR LF; only LF is read (`dos2unix` mends it)"
    for name, field in zip(raw.columns, fields, strict=True):
        shown = repr(field.decode(errors="backslashreplace"))
        if name == raw.label:
            if field not in (b"0", b"1"):
                return f"column {name}: {shown} is not 0 or 1"
        elif not field:
            continue
        elif name in raw.integers:
            digits = _INTEGER.fullmatch(field)
            if not digits or int(b"".join(digits.groups())) not in _INT64:
                return f"column {name}: {shown} is not a 64-bit integer"
        elif not _HEXADECIMAL.fullmatch(field):
            return f"column {name}: {shown} is not a 32-bit hexadecimal category (1 to 8 digits)"
    return None
