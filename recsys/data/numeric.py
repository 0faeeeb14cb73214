"""Parse lines whose fields are all numbers: one pass over the bytes checks them and writes typed columns."""

from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from recsys.data import scan
from recsys.data.formats import DTYPES, Kind, RawFormat
from recsys.data.raw import count


class _Rule(NamedTuple):
    """How fields of some kind are read."""

    notation: int
    limit: int = 0
    """The largest decimal number; the smallest is -limit - 1 where there is a sign."""
    is_signed: bool = False
    is_required: bool = False


_RULES: dict[Kind, _Rule] = {
    "label": _Rule(scan.LABEL, is_required=True),
    "clicks": _Rule(scan.DECIMAL, 2**32 - 1, is_required=True),
    "impressions": _Rule(scan.DECIMAL, 2**32 - 1, is_required=True),
    "integer": _Rule(scan.DECIMAL, 2**63 - 1, is_signed=True),
    "hex32": _Rule(scan.HEXADECIMAL),
    "int64": _Rule(scan.DECIMAL, 2**63 - 1, is_signed=True),
    "uint64": _Rule(scan.DECIMAL, 2**64 - 1),
    "hour": _Rule(scan.HOUR),
    "unused": _Rule(scan.UNUSED),
}


def parse_numbers(raw: RawFormat, lines: bytes) -> pl.DataFrame | None:
    """Parse whole lines of a numeric format into typed columns; an empty field is null, and 0 lies beneath it.

    Returns None when any row is malformed. Whether an hour is one of the calendar is not looked at.
    """
    wide = [column.name for column in raw.columns if column.kind in ("integer", "int64", "uint64")]
    narrow = [column.name for column in raw.columns if column.name not in wide]
    places = {name: place for names in (wide, narrow) for place, name in enumerate(names)}
    rules = np.array([(*_RULES[c.kind], c.name in wide, places[c.name]) for c in raw.columns], dtype=scan.RULE)
    if not lines.endswith(b"\n"):
        return None
    num_rows = count(lines, "\n")
    columns = (
        np.empty((len(wide), num_rows), dtype=np.uint64),
        np.empty((len(narrow), num_rows), dtype=np.uint32),
        np.empty((len(raw.columns), num_rows), dtype=np.bool_),
    )
    # A word may reach 8 bytes beyond a field, so the end of the text is parsed from a copy that has room behind it.
    begin = lines.rfind(b"\n", 0, max(len(lines) - scan.REACH, 0)) + 1
    row = 0
    for text, num_bytes in ((lines, begin), (lines[begin:] + bytes(scan.REACH), len(lines) - begin)):
        at = np.frombuffer(text, dtype=np.uint8).ctypes.data
        last, separator = np.uint64(at + num_bytes), np.uint64(ord(raw.separator))
        row = scan.read_rows(np.uint64(at), last, separator, rules, np.uint64(row), columns)
    if row < num_rows:
        return None
    values = dict(zip([*wide, *narrow], [*columns[0], *columns[1]], strict=True))
    return pl.DataFrame(
        [
            _series(column.name, column.kind, values[column.name], is_present)
            for column, is_present in zip(raw.columns, columns[2], strict=True)
            if column.kind != "unused"
        ]
    )


def _series(name: str, kind: Kind, values: np.ndarray, is_present: np.ndarray) -> pl.Series:
    """Wrap values without a copy."""
    if kind == "label":
        values = values.astype(np.uint8)
    bitmap = None if is_present.all() else pa.py_buffer(np.packbits(is_present, bitorder="little"))
    dtype = pl.Series(dtype=DTYPES[kind]).to_arrow().type
    return pl.Series(name, pa.Array.from_buffers(dtype, len(values), [bitmap, pa.py_buffer(values)]))
