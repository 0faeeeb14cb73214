"""Numeric formats: the fast parser takes what the slow reference takes, and gives its values."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recsys.data.formats import DTYPES, Column, RawFormat
from recsys.data.parse import malformed_rows, parse
from tests.logs import AVAZU, CRITEO, GOOD, KDD12, SHOP, line, make_rows

LOG = Path("log")
READ: dict[str, Callable[[bytes], int]] = {"hex32": lambda field: int(field, 16)}

# Lines of four bytes: all that is read lies near the end of the text.
TINY = RawFormat(name="tiny", columns=(Column(name="y", kind="label"), Column(name="x", kind="int64")))
ALL_KINDS = RawFormat(
    name="all kinds",
    separator=";",
    columns=(
        Column(name="x", kind="hex32"),
        Column(name="at", kind="hour"),
        Column(name="i", kind="integer"),
        Column(name="note", kind="unused"),
        Column(name="clicks", kind="clicks"),
        Column(name="shown", kind="impressions"),
        Column(name="u", kind="uint64"),
    ),
)
FORMATS = [CRITEO, AVAZU, KDD12, TINY, ALL_KINDS]

EDGES = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64, 10**19, 10**20]
STRANGE = [
    *map(str, EDGES),
    *(f"-{edge}" for edge in EDGES),
    *(f"{edge:x}" for edge in EDGES),
    *(f"0{edge}" for edge in EDGES),
    *(
        "",
        "0",
        "1",
        "2",
        "00",
        "01",
        "-",
        "--1",
        "-0",
        "-1",
        "-00",
        "1-",
        "+1",
        " 1",
        "1 ",
        "1.0",
        "1e3",
        "0x1f",
        "1_0",
    ),
    *("1234567", "12345678", "-1234567", "-12345678", "123456789", "1234567a", "a", "F", "fFfFfFfF", "ffffffffg"),
    *("0" * 7 + "1", "0" * 8 + "1", "0" * 40 + "5", "-" + "0" * 40 + "5", "9" * 19, "9" * 20, "9" * 40),
    *(
        "@",
        "`",
        "g",
        "G",
        "/",
        ":",
        "?",
        "\x00",
        "\x7f",
        "\u0661",
        "\u00e9",
        "\ufeff1",
        '"1"',
        "1\r",
        "\r",
        "null",
        "nan",
    ),
    *("14102100", "14102124", "14130100", "15022900", "16022900", "00010100", "00000000", "1410210", "014102100"),
]
BYTES = [*b"0123456789abcdefABCDEF-\t,;\n", *b'\r\0 +."/:@G`g\x7f\x80\xb0\xb9\xe1\xff']


def check(fmt: RawFormat, lines: bytes) -> bool:
    """Compare the parser with the reference; returns whether any row is malformed."""
    good, bad = malformed_rows(fmt, LOG, lines, 1)
    assert (parse(fmt, lines) is None) == bool(bad), lines
    parsed = parse(fmt, good)
    assert (parsed is None) == (not good), good
    if parsed is not None:
        assert parsed.schema == {c.name: DTYPES[c.kind] for c in fmt.columns if c.kind != "unused"}
        rows = [row.split(fmt.separator.encode()) for row in good.splitlines()]
        for column, fields in zip(fmt.columns, zip(*rows, strict=True), strict=True):
            if column.kind != "unused":
                read = READ.get(column.kind, int)
                expected = [read(field) if field else None for field in fields]
                assert parsed[column.name].to_list() == expected, (column.name, good)
    return bool(bad)


def fields_of_rows(fmt: RawFormat, num_rows: int, rng: random.Random) -> list[list[str]]:
    return [list(row.values()) for row in make_rows(num_rows, seed=rng.randrange(2**32), fmt=fmt)]


def joined(fmt: RawFormat, rows: list[list[str]]) -> bytes:
    return b"".join(fmt.separator.join(fields).encode() + b"\n" for fields in rows)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_strange_fields_are_taken_or_refused_as_by_the_reference(fmt: RawFormat) -> None:
    rng = random.Random(1)
    num_bad = num_cases = 0
    for strange in STRANGE:
        for index in rng.sample(range(len(fmt.columns)), k=min(len(fmt.columns), 6)):
            rows = fields_of_rows(fmt, rng.choice([1, 2, 5]), rng)
            rng.choice(rows)[index] = strange
            num_bad += check(fmt, joined(fmt, rows))
            num_cases += 1
    assert 0.2 < num_bad / num_cases < 0.9


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_damaged_bytes_are_taken_or_refused_as_by_the_reference(fmt: RawFormat) -> None:
    rng = random.Random(2)
    num_bad = 0
    for _ in range(600):
        text = bytearray(joined(fmt, fields_of_rows(fmt, rng.choice([1, 2, 3]), rng)))
        for _ in range(rng.choice([1, 1, 2])):
            begin = rng.randrange(len(text) + 1)
            damage: Any = rng.choices(BYTES, k=rng.choice([0, 1, 1, 2]))
            text[begin : begin + rng.choice([0, 1, 1, 9])] = bytes(damage)
        num_bad += check(fmt, bytes(text).removesuffix(b"\n") + b"\n")
    assert 100 < num_bad < 590


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_well_formed_text_of_any_length_is_read(fmt: RawFormat) -> None:
    rng = random.Random(3)
    for num_rows in (1, 2, 3, 4, 5, 8, 300):
        assert not check(fmt, joined(fmt, fields_of_rows(fmt, num_rows, rng)))
    assert not check(TINY, b"0\t\n1\t1\n" * 9)


def test_only_whole_lines_are_read() -> None:
    whole = line(GOOD)
    assert parse(CRITEO, whole) is not None
    for lines in (b"", whole[:-1], whole + whole[:-1], whole + b"\0", whole + b"1", whole + b"1\t"):
        assert parse(CRITEO, lines) is None


@pytest.mark.parametrize("separator", ["-", "1", "a", "F"])
def test_a_separator_that_is_a_digit_makes_no_numeric_format(separator: str) -> None:
    fmt = RawFormat(name="odd", columns=TINY.columns, separator=separator)
    assert not fmt.is_numeric
    assert not check(fmt, f"0{separator}5\n0{separator}\n".encode())
    assert TINY.is_numeric
    assert not SHOP.is_numeric
