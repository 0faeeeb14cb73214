"""Small raw logs of every format, how tests prepare them, and how they read what came of it."""

import gzip
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys.cli import main
from recsys.data import ingest, raw
from recsys.data.formats import FORMATS, Column, RawFormat
from recsys.data.manifest import MANIFEST, TIMINGS
from recsys.data.prepare import PrepareConfig, prepare

Row = dict[str, str]

CRITEO, AVAZU, KDD12 = FORMATS["criteo_kaggle"], FORMATS["avazu"], FORMATS["kdd12"]
NAMES = tuple(column.name for column in CRITEO.columns)
GOOD = dict.fromkeys(NAMES, "1")

# A format of one's own, with a column of every kind that a quoted file can hold.
SHOP = RawFormat(
    name="shop",
    columns=(
        Column(name="bought", kind="label"),
        Column(name="price", kind="float"),
        Column(name="age", kind="integer"),
        Column(name="product", kind="text"),
        Column(name="user", kind="int64", max_ids=9),
        Column(name="session", kind="uint64"),
        Column(name="page", kind="hex32"),
        Column(name="at", kind="hour"),
        Column(name="note", kind="unused"),
    ),
    separator=",",
    quote='"',
    header=True,
    threshold=2,
)
SHOP_YAML = """\
name: shop
columns:
  - {name: bought, kind: label}
  - {name: price, kind: float}
  - {name: age, kind: integer}
  - {name: product, kind: text}
  - {name: user, kind: int64, max_ids: 9}
  - {name: session, kind: uint64}
  - {name: page, kind: hex32}
  - {name: at, kind: hour}
  - {name: note, kind: unused}
separator: ","
quote: '"'
header: true
threshold: 2
"""


def make_rows(num_rows: int, seed: int = 0, fmt: RawFormat = CRITEO) -> list[Row]:
    """Rows with few distinct values (ties, rare and frequent ones), missing fields, and both ends of every range."""
    rng = random.Random(seed)
    return [{column.name: _field(column.kind, rng) for column in fmt.columns} for _ in range(num_rows)]


def _field(kind: str, rng: random.Random) -> str:
    value = int(rng.expovariate(0.1))
    fields = {
        "label": ["0", "0", "0", "1"],
        "clicks": ["0", "0", "1", "2"],
        "impressions": ["0", "1", "1", "2", "5"],
        "integer": ["", "0", "-2", str(int(rng.expovariate(0.05))), str(rng.randrange(10**6))],
        "float": ["", "0", "-1.5", "2e3", ".25", f"{rng.gauss(0, 9):.4f}"],
        "hex32": ["", f"{value:08x}", f"{value:X}", f"{2**32 - 1 - value:x}"],
        "int64": ["", str(value), str(-value), str(value - 2**63)],
        "uint64": ["", str(value), str(2**64 - 1 - value)],
        "text": ["", f"word {value}", f'{value}" screen, new', f"na\u00efve {value % 3}"],
        "hour": ["", "14102100", "14102113", "16022923", "14110109"],
        "unused": ["", "123"],
    }
    return rng.choice(fields[kind])


def line(row: Row, fmt: RawFormat = CRITEO) -> bytes:
    fields = [row[column.name] for column in fmt.columns]
    if fmt.quote:
        fields = [f'"{field.replace(QUOTE, QUOTE * 2)}"' if {",", QUOTE} & set(field) else field for field in fields]
    return fmt.separator.join(fields).encode() + b"\n"


QUOTE = '"'


def text(rows: Sequence[Row], fmt: RawFormat = CRITEO) -> bytes:
    """A whole file: header, if the format has one, and rows."""
    header = fmt.separator.join(column.name for column in fmt.columns).encode() + b"\n" if fmt.header else b""
    return header + b"".join(line(row, fmt) for row in rows)


# What is wrong with a line of Criteo's, and how it is told.
BAD_LINES = {
    "too few fields": (line(GOOD).replace(b"\t1\n", b"\n"), "39 fields instead of 40"),
    "too many fields": (line(GOOD).replace(b"\n", b"\t1\n"), "41 fields instead of 40"),
    "blank line": (b"\n", "1 fields instead of 40"),
    "fraction": (line(GOOD | {"I2": "1.5"}), "column I2: '1.5' is not a 64-bit integer"),
    "word": (line(GOOD | {"I13": "one"}), "column I13: 'one' is not a 64-bit integer"),
    "hexadecimal integer": (line(GOOD | {"I2": "1f"}), "column I2: '1f' is not a 64-bit integer"),
    "large integer": (line(GOOD | {"I2": str(2**63)}), f"column I2: '{2**63}' is not a 64-bit integer"),
    "small integer": (line(GOOD | {"I2": str(-(2**63) - 1)}), f"column I2: '{-(2**63) - 1}' is not a 64-bit integer"),
    "minus alone": (line(GOOD | {"I2": "-"}), "column I2: '-' is not a 64-bit integer"),
    "plus": (line(GOOD | {"I2": "+1"}), "column I2: '+1' is not a 64-bit integer"),
    "space": (line(GOOD | {"I2": " 1"}), "column I2: ' 1' is not a 64-bit integer"),
    "no hexadecimal": (line(GOOD | {"C3": "xyz"}), "column C3: 'xyz' is not a 32-bit hexadecimal category"),
    "nine digits": (line(GOOD | {"C26": "012345678"}), "column C26: '012345678' is not a 32-bit hexadecimal category"),
    "negative category": (line(GOOD | {"C3": "-1"}), "column C3: '-1' is not a 32-bit hexadecimal category"),
    "quotes": (line(GOOD | {"C3": '"1"'}), "column C3: '\"1\"' is not a 32-bit hexadecimal category"),
    "label 2": (line(GOOD | {"label": "2"}), "column label: '2' is not 0 or 1"),
    "label 01": (line(GOOD | {"label": "01"}), "column label: '01' is not 0 or 1"),
    "label -1": (line(GOOD | {"label": "-1"}), "column label: '-1' is not 0 or 1"),
    "no label": (line(GOOD | {"label": ""}), "column label: '' is not 0 or 1"),
    "CR LF": (line(GOOD).replace(b"\n", b"\r\n"), "column C26: the line ends in CR LF"),
    "CR LF after nothing": (line(GOOD | {"C26": ""}).replace(b"\n", b"\r\n"), "column C26: the line ends in CR LF"),
    "CR within a line": (line(GOOD | {"C3": "a\rb"}), "column C3: 'a\\rb' is not a 32-bit hexadecimal category"),
    "no UTF-8": (line(GOOD | {"C3": "@"}).replace(b"@", b"\xff"), "column C3: '\\\\xff' is not a 32-bit hexadecimal"),
    "no ASCII": (line(GOOD | {"I1": "\u0661"}), "column I1: '\u0661' is not a 64-bit integer"),
    "byte order mark": (line(GOOD | {"label": "\ufeff1"}), "column label: '\\ufeff1' begins with a byte order mark"),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def in_small_parts(monkeypatch: pytest.MonkeyPatch, rows: int = 100, chunk_bytes: int = 5_000) -> None:
    """Make parts of so many rows, read by so many bytes."""
    monkeypatch.setattr(ingest, "PART_ROWS", rows)
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)


def run(out: Path, *paths: Path, fmt: str = "criteo_kaggle", **settings: Any) -> dict:
    return prepare(PrepareConfig(format=fmt, paths=paths, out=out, **settings))


def read(out: Path, split: str) -> pl.DataFrame:
    """All rows of a split, in order; no row and no column where it has no file."""
    return pl.concat([pl.read_parquet(path) for path in sorted((out / split).iterdir())] or [pl.DataFrame()])


def data_files(out: Path) -> dict[str, bytes]:
    """Bytes of all that was prepared but for the manifest, which names the raw files, and the timings."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in (MANIFEST, TIMINGS)]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def all_files(out: Path) -> dict[str, bytes]:
    """Bytes of all that the same command makes again."""
    return data_files(out) | {MANIFEST: (out / MANIFEST).read_bytes()}


def partial(out: Path) -> Path:
    """The folder that an unfinished preparation works in."""
    return out.with_name(f".{out.name}.partial")


def command(out: Path, *paths: Path, fmt: str = "criteo_kaggle", options: Sequence[str] = ()) -> int:
    """Exit status of the command line."""
    return main(["prepare", fmt, *map(str, paths), "--out", str(out), *options])


def rejection(
    capsys: pytest.CaptureFixture[str],
    out: Path,
    *paths: Path,
    fmt: str = "criteo_kaggle",
    options: Sequence[str] = (),
) -> str:
    """Prepare what must be refused: 2, one line on stderr (beside stages that were done), nothing under the final name.

    Returns that line.
    """
    capsys.readouterr()
    status = command(out, *paths, fmt=fmt, options=options)
    stdout, stderr = capsys.readouterr()
    assert (status, stdout) == (2, ""), stderr
    *done, told, end = stderr.split("\n")
    assert end == ""
    assert told.startswith("recsys: ")
    assert all(re.match("(ingest|vocabulary|encode): .* done in ", each) for each in done), done
    assert not out.exists()
    return told.removeprefix("recsys: ")


def assert_goes_on(out: Path, *paths: Path, options: Sequence[str] = ()) -> None:
    """The same command finishes now, with the bytes of a run that nothing disturbed."""
    assert command(out, *paths, options=options) == 0
    assert not partial(out).exists()
    found = all_files(out)
    shutil.rmtree(out)
    assert command(out, *paths, options=options) == 0
    assert found == all_files(out)
    assert not list(out.rglob("*.partial"))


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt
