"""Parse raw rows into typed columns, fast where all is well, and name every malformed row where it is not."""

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from recsys.config import InputError
from recsys.data.formats import DIGITS, DTYPES, Column, Kind, RawFormat
from recsys.data.raw import BOM, count, fields_of


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

    Returns None when any row is malformed; `malformed_rows` then says which and why.
    """
    if raw.is_numeric:
        from recsys.data.numeric import parse_numbers  # noqa: PLC0415  (numba)

        typed = parse_numbers(raw, lines)
    else:
        typed = _parse_text(raw, lines)
    if typed is None or not all(_are_hours(typed[name]) for name in raw.named("hour")):
        return None
    return typed


def _are_hours(numbers: pl.Series) -> bool:
    return all(_is_hour(b"%08d" % number) for number in numbers.drop_nulls().unique())


class _MalformedError(Exception):
    """Some row does not fit."""


def _parse_text(raw: RawFormat, lines: bytes) -> pl.DataFrame | None:
    """Parse columns of any kind: polars reads them as text where their type needs a closer look.

    A wrong number of fields is seen by counting separators: polars refuses rows that are too long, and only rows that
    are too short make the total differ. It drops byte order marks from the first field of a chunk. Every number is held
    against its pattern.
    """
    num_rows = count(lines, "\n")
    is_strange = b"\r" in lines or b"\0" in lines or lines.startswith(BOM) or b"\n" + BOM in lines
    if is_strange or _count_separators(raw, lines) != num_rows * (len(raw.columns) - 1):
        return None
    schema = dict.fromkeys((column.name for column in raw.columns), pl.String())
    options: dict[str, Any] = {"separator": raw.separator, "quote_char": raw.quote or None}
    try:
        frame = pl.read_csv(lines, has_header=False, schema=schema, **options)
        if frame.height != num_rows:
            return None
        return pl.DataFrame([_typed(c.kind, frame[c.name]) for c in raw.columns if c.kind != "unused"])
    except (_MalformedError, pl.exceptions.PolarsError):
        return None


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


def _typed(kind: Kind, texts: pl.Series) -> pl.Series:
    texts = texts.replace("", None)
    if not texts.str.contains(f"^(?:{_PATTERNS[kind]})$").all():
        raise _MalformedError
    if kind == "hex32":
        typed = texts.str.to_integer(base=16, dtype=pl.UInt32, strict=False)
    else:
        typed = texts.cast(DTYPES[kind], strict=False)
    num_missing = 0 if kind in _REQUIRED else texts.null_count()
    if typed.null_count() != num_missing or (kind == "float" and not typed.cast(pl.Float32).is_finite().all()):
        raise _MalformedError
    return typed


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
        told = "only LF is read in a file whose first line ends in it (`dos2unix` mends it)"
        return f"column {raw.columns[-1].name}: the line ends in CR LF; {told}"
    if line.startswith(BOM):
        return f"column {raw.columns[0].name}: {_shown(fields[0])} begins with a byte order mark"
    problems = (_problem_of_field(raw, column, field) for column, field in zip(raw.columns, fields, strict=True))
    return next(filter(None, problems), None)


def _problem_of_field(raw: RawFormat, column: Column, field: bytes) -> str | None:
    if b"\0" in field or (b"\r" in field and not raw.is_numeric):
        return f"column {column.name}: {_shown(field)} holds a NUL byte or a carriage return"
    if column.kind == "unused" or not (field or column.kind in _REQUIRED):
        is_right = not field.translate(None, DIGITS) if raw.is_numeric else _fits("text", field)
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
