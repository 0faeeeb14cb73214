"""Parse raw rows into typed columns, fast where all is well, and name every malformed row where it is not."""

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from recsys.config import InputError
from recsys.data.formats import DTYPES, Column, Kind, RawFormat
from recsys.data.raw import count, fields_of

_DIGITS = b"0123456789abcdefABCDEF-\n"
_BOM = b"\xef\xbb\xbf"  # polars drops it from the first field of a chunk


@dataclass(frozen=True)
class Malformed:
    """One row that does not fit its format."""

    path: Path
    row: int
    """Counted from 1, headers left out."""
    problem: str

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}: {self.problem}"


def parse(raw: RawFormat, lines: bytes) -> pl.DataFrame | None:
    """Parse whole lines into typed columns (see `formats.DTYPES`); an empty field is null.

    Returns None when any row is malformed; `malformed_rows` then says which and why. A wrong number of fields is seen
    by counting separators: polars refuses rows that are too long, and only rows that are too short make the total
    differ. Where all fields are digits, the alphabet keeps out what polars would take and we do not: spaces, plus
    signs, CR LF, byte order marks. Elsewhere every number is held against its pattern.
    """
    try:
        frame = _as_text(raw, lines)
        columns = [column for column in raw.columns if column.kind != "unused"]
        return pl.DataFrame([_typed(column, frame[column.name], raw.is_numeric) for column in columns])
    except (_MalformedError, pl.exceptions.PolarsError):
        return None


class _MalformedError(Exception):
    """Some row does not fit."""


def _as_text(raw: RawFormat, lines: bytes) -> pl.DataFrame:
    """Columns as polars reads them: text where the type needs a closer look."""
    num_rows = count(lines, "\n")
    if _count_separators(raw, lines) != num_rows * (len(raw.columns) - 1):
        raise _MalformedError
    if raw.is_numeric:
        as_text: tuple[str, ...] = ("label", "hex32", "hour", "unused")
        is_strange = bool(lines.translate(None, _DIGITS + raw.separator.encode()))
    else:
        as_text = (*DTYPES, "unused")
        is_strange = b"\r" in lines or b"\0" in lines or lines.startswith(_BOM) or b"\n" + _BOM in lines
    if is_strange:
        raise _MalformedError
    kinds = {c.name: pl.String() if c.kind in as_text else DTYPES[c.kind]() for c in raw.columns}
    frame = pl.read_csv(lines, separator=raw.separator, has_header=False, schema=kinds, quote_char=raw.quote or None)
    if frame.height != num_rows:
        raise _MalformedError
    return frame


def _count_separators(raw: RawFormat, lines: bytes) -> int:
    if not raw.quote or raw.quote.encode() not in lines:
        return count(lines, raw.separator)
    text = np.frombuffer(lines, dtype=np.uint8)
    is_quote = text == ord(raw.quote)
    is_outside = ~np.logical_xor.accumulate(is_quote)
    if not (is_outside[text == ord("\n")].all() and _stand_around_fields(raw, text, np.flatnonzero(is_quote))):
        return -1
    return int(np.count_nonzero((text == ord(raw.separator)) & is_outside))


def _stand_around_fields(raw: RawFormat, text: np.ndarray, quotes: np.ndarray) -> bool:
    """Whether quotes, as many as are closed, enclose whole fields, or are doubled within them."""
    neighbours = [ord(raw.separator), ord("\n"), ord(raw.quote)]
    before, after = text[quotes[0::2] - 1], text[quotes[1::2] + 1]  # what stands before the first is the last newline
    return bool(np.isin(before, neighbours).all() and np.isin(after, neighbours).all())


def _typed(column: Column, values: pl.Series, is_trusted: bool) -> pl.Series:
    """Turn text into the column's type. Trusted text is made of digits and minus signs."""
    kind = column.kind
    if kind == "label":
        if values.is_in(["0", "1"]).sum() != len(values):
            raise _MalformedError
        return values.cast(pl.UInt8)
    if kind == "hex32" and is_trusted and (found := _hex32(values)) is not None:
        return found
    if values.dtype == pl.String:
        values = values.replace("", None)
        if not values.str.contains(f"^(?:{_PATTERNS[kind]})$").all():
            raise _MalformedError
    if kind == "hex32":
        typed = values.str.to_integer(base=16, dtype=pl.UInt32, strict=False)
    else:
        typed = values.cast(DTYPES[kind], strict=False)
    num_missing = 0 if kind in _REQUIRED else values.null_count()
    if (
        typed.null_count() != num_missing
        or (kind == "float" and not typed.cast(pl.Float32).is_finite().all())
        or (kind == "hour" and not all(_is_hour(text.encode()) for text in values.drop_nulls().unique()))
    ):
        raise _MalformedError
    return typed


_VIEW = np.dtype({"names": ["length", "text"], "formats": ["<u4", "<u8"], "offsets": [0, 4], "itemsize": 16})


def _hex32(values: pl.Series) -> pl.Series | None:
    """Read 8 hexadecimal digits at once: three times as fast as digit by digit. None when a field has fewer or others.

    Arrow's string views keep texts of up to 12 bytes within 16-byte records, so 8 digits are one 64-bit word. Each byte
    of it becomes its digit's value; three rounds of shift and mask put the eight together.
    """
    views = values.to_arrow(compat_level=pl.CompatLevel.newest())
    found = np.frombuffer(views.buffers()[1], dtype=_VIEW, count=len(views) + views.offset)[views.offset :]
    is_null = views.is_null().to_numpy(zero_copy_only=False) if views.null_count else None
    is_right = found["length"] == 8
    word = found["text"].copy()
    marks = word >> np.uint64(2)
    marks |= word
    marks &= _each(0x10)
    is_right &= marks == _each(0x10)  # of the alphabet only "-" has neither bit 4 (digits) nor bit 6 (letters)
    if not (is_right.all() if is_null is None else (is_right | is_null).all()):
        return None
    letters = (word >> np.uint64(6)) & _each(0x01)
    word &= _each(0x0F)
    word += letters * np.uint64(9)
    for bits, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF)):
        word = ((word << np.uint64(bits)) | (word >> np.uint64(2 * bits))) & np.uint64(mask)
    word = (word << np.uint64(16)) | (word >> np.uint64(32))
    numbers = pa.array(word.astype(np.uint32), mask=is_null)
    return pl.Series(values.name, numbers)


def _each(byte: int) -> np.uint64:
    return np.uint64(byte * 0x0101010101010101)


# ---- malformed rows


def malformed_rows(raw: RawFormat, path: Path, lines: bytes, first_row: int) -> tuple[bytes, list[Malformed]]:
    """Separate well-formed lines from malformed ones: the slow, exact way, used only where `parse` gave up."""
    good, bad = [], []
    for row, line in enumerate(lines.removesuffix(b"\n").split(b"\n"), start=first_row):
        problem = _problem(raw, line)
        if problem is None:
            good.append(line + b"\n")
        else:
            bad.append(Malformed(path, row, problem))
    return b"".join(good), bad


def _problem(raw: RawFormat, line: bytes) -> str | None:
    fields = fields_of(raw, line.removesuffix(b"\r"))
    if fields is None:
        return f"a quote {raw.quote} is not closed within the line, or does not enclose a whole field"
    if len(fields) != len(raw.columns):
        by = "tab" if raw.separator == "\t" else repr(raw.separator)
        first = raw.columns[0].name
        return f"{len(fields)} fields instead of {len(raw.columns)} ({by} separated: {first}, then the columns)"
    if line.endswith(b"\r"):
        return f"column {raw.columns[-1].name}: the line ends in CR LF; only LF is read (`dos2unix` mends it)"
    if line.startswith(_BOM):
        return f"column {raw.columns[0].name}: {_shown(fields[0])} begins with a byte order mark"
    problems = (_problem_of_field(raw, column, field) for column, field in zip(raw.columns, fields, strict=True))
    return next(filter(None, problems), None)


def _problem_of_field(raw: RawFormat, column: Column, field: bytes) -> str | None:
    if b"\0" in field or (b"\r" in field and not raw.is_numeric):
        return f"column {column.name}: {_shown(field)} holds a NUL byte or a carriage return"
    if column.kind == "unused" or not (field or column.kind in _REQUIRED):
        is_right = not field.translate(None, _DIGITS) if raw.is_numeric else _fits("text", field)
        expected = "made of digits" if raw.is_numeric else _EXPECTED["text"]
    else:
        is_right, expected = _fits(column.kind, field), _EXPECTED[column.kind]
    return None if is_right else f"column {column.name}: {_shown(field)} is not {expected}"


def _shown(field: bytes) -> str:
    return repr(field.decode(errors="backslashreplace"))


_REQUIRED = ("label", "clicks", "impressions")
_PATTERNS = {
    "label": "[01]",
    "clicks": "0*[0-9]{1,10}",
    "impressions": "0*[0-9]{1,10}",
    "integer": "-?0*[0-9]{1,19}",
    "float": r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "hex32": "[0-9a-fA-F]{1,8}",
    "int64": "-?0*[0-9]{1,19}",
    "uint64": "0*[0-9]{1,20}",
    "text": r"[^\x00\r]*",
    "hour": "[0-9]{8}",
}
_EXPECTED = {
    "label": "0 or 1",
    "clicks": "a count below 2^32",
    "impressions": "a count below 2^32",
    "integer": "a 64-bit integer",
    "float": "a finite decimal number of float32",
    "hex32": "a 32-bit hexadecimal category (1 to 8 digits)",
    "int64": "a 64-bit integer",
    "uint64": "an unsigned 64-bit integer",
    "text": "UTF-8 text",
    "hour": "an hour as YYMMDDHH",
}
_RANGES = {
    "clicks": range(2**32),
    "impressions": range(2**32),
    "integer": range(-(2**63), 2**63),
    "int64": range(-(2**63), 2**63),
    "uint64": range(2**64),
}


def _fits(kind: str, field: bytes) -> bool:
    try:
        text = field.decode()
    except UnicodeDecodeError:
        return False
    if not re.fullmatch(_PATTERNS[kind], text):
        return False
    if kind in _RANGES:
        return int(text) in _RANGES[kind]
    if kind == "float":
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.float32(float(text))))
    return kind != "hour" or _is_hour(field)


def _is_hour(field: bytes) -> bool:
    year, month, day, hour = (int(field[at : at + 2]) for at in (0, 2, 4, 6))
    try:
        date(2000 + year, month, day)
    except ValueError:
        return False
    return hour < 24


def typed_table(raw: RawFormat, path: Path, table: pa.Table, first_row: int) -> tuple[pl.DataFrame, list[Malformed]]:
    """Turn a Parquet file's columns into the format's types, and leave out the rows that do not fit.

    Raises:
        InputError: a column's type does not hold what the format says.
    """
    typed: list[pl.Series] = []
    problems: dict[int, str] = {}
    for column in raw.columns:
        if column.kind == "unused":
            continue
        values = pl.Series(column.name, table[column.name])
        try:
            found, is_wrong = _from_table(column.kind, values)
        except pl.exceptions.PolarsError:
            problem = f"column {column.name}: {values.dtype} does not hold what is {_EXPECTED[column.kind]}"
            raise InputError(f"{path}: {problem}") from None
        for row in is_wrong.fill_null(False).arg_true():
            problems.setdefault(row, f"column {column.name}: {values[row]!r} is not {_EXPECTED[column.kind]}")
        typed.append(found)
    malformed = [Malformed(path, first_row + row, problems[row]) for row in sorted(problems)]
    frame = pl.DataFrame(typed)
    return frame.filter(~pl.int_range(pl.len()).is_in(list(problems))) if problems else frame, malformed


def _from_table(kind: Kind, values: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return values in the kind's type, and which of them do not fit it. Text fits where it would in a text file."""
    if not (values.dtype.is_numeric() or values.dtype in (pl.Boolean, pl.Null)):
        values = values.cast(pl.String).replace("", None)
    is_text = values.dtype == pl.String
    if kind == "hex32" and is_text:
        found = values.str.to_integer(base=16, dtype=pl.UInt32, strict=False)
    else:
        found = values.cast(DTYPES[kind], strict=False)
    is_wrong = found.is_null() if kind in _REQUIRED else found.is_null() & values.is_not_null()
    if is_text and kind != "text":
        is_wrong |= ~values.str.contains(f"^(?:{_PATTERNS[kind]})$")
    elif found.dtype.is_integer() and (values.dtype.is_float() or values.dtype.is_decimal()):
        is_wrong |= found != values
    if kind == "label":
        is_wrong |= found > 1
    elif kind == "float":
        is_wrong |= ~found.cast(pl.Float32).is_finite()
    elif kind == "hour":
        right = [hour for hour in found.drop_nulls().unique() if hour < 10**8 and _is_hour(b"%08d" % hour)]
        is_wrong |= ~found.is_in(right)
    return found, is_wrong
