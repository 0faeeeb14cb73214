"""Parsing: the fast way and the slow one agree, and what is malformed is named."""

import datetime
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from recsys.config import InputError
from recsys.data.formats import Column, Kind, RawFormat
from recsys.data.parse import malformed_rows, parse, typed_table
from tests.logs import AVAZU, BAD_LINES, CRITEO, GOOD, KDD12, SHOP, Row, line, make_rows

LOG = Path("log")
CR_LF = "the line ends in CR LF; only LF is read"


def good_row(fmt: RawFormat) -> Row:
    return {column.name: "14102100" if column.kind == "hour" else "1" for column in fmt.columns}


def problems(fmt: RawFormat, lines: bytes) -> list[str]:
    """What the slow way tells, having checked that the fast way refuses the same."""
    good, bad = malformed_rows(fmt, LOG, lines, 1)
    assert (parse(fmt, lines) is None) == bool(bad), lines
    if good:
        assert parse(fmt, good) is not None, good
    return [f"{each.row}: {each.problem}" for each in bad]


# ---- fast and slow agree

ALPHABETS = {
    "criteo_kaggle": (CRITEO, "0123456789" * 9 + "abF-" * 3 + "+. g\r\n\t\0\u00e9"),
    "avazu": (AVAZU, "0123456789" * 9 + "abF-" * 3 + "+. g\r\n\t,\0\u00e9"),
    "kdd12": (KDD12, "0123456789" * 9 + "abF-" * 3 + "+. g\r\n\t\0\u00e9"),
    "shop": (SHOP, "0123456789" * 5 + "abF-" * 2 + '+.eE g\r\n,""""\0\u00e9'),
}
FLOATS = ["inf", "nan", "1e400", "-1e-400", "1.", ".", ".5", "+.5e+3", "1e", "0x10", "1_0", "Infinity", "-0.0", "1E5"]


def strange_fields(kind: Kind, alphabet: str, rng: random.Random) -> Iterator[str]:
    while True:
        field = "".join(rng.choices(alphabet, k=rng.choice([0, 1, 2, 3, 8, 9, 19])))
        if kind == "hour" and rng.random() < 0.7:
            field = "".join(rng.choices("01239", k=8))
        elif kind == "float" and rng.random() < 0.5:
            field = rng.choice(FLOATS)
        elif '"' in alphabet and rng.random() < 0.3:
            field = "".join(rng.choices('""",a1', k=rng.randint(2, 7)))
        yield field


@pytest.mark.parametrize("name", ALPHABETS)
def test_fast_and_slow_parse_agree_on_what_is_malformed(name: str) -> None:
    fmt, alphabet = ALPHABETS[name]
    rng = random.Random(1)
    fields = {column.name: strange_fields(column.kind, alphabet, rng) for column in fmt.columns}
    good, num_bad = good_row(fmt), 0
    for _ in range(200):
        column = rng.choice(fmt.columns)
        strange = good | {column.name: next(fields[column.name])}
        middle = fmt.separator.join(strange.values()).encode() + b"\n"
        if rng.random() < 0.05:
            middle = b"\xff" + middle
        num_bad += bool(problems(fmt, line(good, fmt) + middle + line(good, fmt)))
    assert 40 < num_bad < 160


@pytest.mark.parametrize("fmt", [CRITEO, AVAZU, KDD12, SHOP], ids=lambda fmt: fmt.name)
def test_well_formed_rows_have_their_values(fmt: RawFormat) -> None:
    rows = make_rows(200, fmt=fmt)
    lines = b"".join(line(row, fmt) for row in rows)
    parsed = parse(fmt, lines)
    assert parsed is not None
    assert parsed.columns == [column.name for column in fmt.columns if column.kind != "unused"]
    for column in fmt.columns:
        read: Any = {"float": float, "text": str, "hex32": lambda text: int(text, 16)}.get(column.kind, int)
        if column.kind != "unused":
            expected = [read(row[column.name]) if row[column.name] else None for row in rows]
            assert parsed[column.name].to_list() == expected
    assert malformed_rows(fmt, LOG, lines, 1) == (lines, [])


# ---- Criteo's lines


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_malformed_row_is_named(kind: str) -> None:
    bad, problem = BAD_LINES[kind]
    for row in (1, 3, 5):
        lines = [line(GOOD)] * 5
        lines[row - 1] = bad
        (told,) = problems(CRITEO, b"".join(lines))
        assert told.startswith(f"{row}: {problem}")


def test_a_row_too_long_does_not_make_up_for_one_too_short() -> None:
    short, long = BAD_LINES["too few fields"][0], BAD_LINES["too many fields"][0]
    for lines in (short + long, long + short, line(GOOD) * 9 + long + b"\n" + line(GOOD) * 9):
        assert sum("fields instead of 40" in told for told in problems(CRITEO, lines)) == 2


@pytest.mark.parametrize("value", ["-9223372036854775808", "9223372036854775807", "-0", "007", "0" * 30 + "5"])
def test_what_fits_64_bits_is_an_integer(value: str) -> None:
    parsed = parse(CRITEO, line(GOOD | {"I2": value}))
    assert parsed is not None
    assert parsed["I2"].to_list() == [int(value)]
    assert problems(CRITEO, line(GOOD | {"I2": value})) == []


# ---- a comma-separated format with quotes


def shop(**fields: str) -> bytes:
    """One line whose fields are written as they are given."""
    return ",".join((good_row(SHOP) | fields).values()).encode("utf-8", "surrogateescape") + b"\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ('"a,b"', "a,b"),
        ('"say ""a"""', 'say "a"'),
        ('""""', '"'),
        ('""', None),
        ("", None),
        (" a ", " a "),
        ("na\u00efve", "na\u00efve"),
        ("nan", "nan"),
        ("\ufeff", "\ufeff"),
    ],
)
def test_a_text_is_read_as_it_stands(field: str, value: str | None) -> None:
    assert problems(SHOP, shop(product=field)) == []
    parsed = parse(SHOP, shop(product=field))
    assert parsed is not None
    assert parsed["product"].to_list() == [value]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"product": '"a'}, '1: a quote " is not closed within the line, or does not enclose a whole field'),
        ({"product": '"a\nb"'}, "1: a quote"),
        ({"product": 'a "b" c'}, "1: a quote"),
        ({"product": '"a" b'}, "1: a quote"),
        ({"product": 'a"b,c"d'}, "1: a quote"),
        ({"product": "a,b"}, "1: 10 fields instead of 9 (',' separated: bought, then the columns)"),
        ({"product": "a\0b"}, "1: column product: 'a\\x00b' holds a NUL byte or a carriage return"),
        ({"product": "a\rb"}, "1: column product: 'a\\rb' holds a NUL byte or a carriage return"),
        ({"product": "\udcff"}, "1: column product: '\\\\xff' is not UTF-8 text"),
        ({"note": "\udcff"}, "1: column note: '\\\\xff' is not UTF-8 text"),
        ({"note": "a\r"}, f"1: column note: {CR_LF}"),
        ({"note": '"a"\r'}, f"1: column note: {CR_LF}"),
        ({"bought": "\ufeff1"}, "1: column bought: '\\ufeff1' begins with a byte order mark"),
        ({"bought": '"\ufeff1"'}, "1: column bought: '\\ufeff1' is not 0 or 1"),
        ({"bought": ""}, "1: column bought: '' is not 0 or 1"),
        ({"price": "nan"}, "1: column price: 'nan' is not a finite decimal number"),
        ({"price": "-inf"}, "1: column price: '-inf' is not a finite decimal number"),
        ({"price": "1e400"}, "1: column price: '1e400' is not a finite decimal number"),
        ({"price": "1,5"}, "1: 10 fields"),
        ({"price": " 1"}, "1: column price: ' 1' is not a finite decimal number"),
        ({"age": "1.0"}, "1: column age: '1.0' is not a 64-bit integer"),
        ({"user": str(2**63)}, f"1: column user: '{2**63}' is not a 64-bit integer"),
        ({"session": "-1"}, "1: column session: '-1' is not an unsigned 64-bit integer"),
        ({"session": str(2**64)}, f"1: column session: '{2**64}' is not an unsigned 64-bit integer"),
        ({"page": "123456789"}, "1: column page: '123456789' is not a 32-bit hexadecimal category (1 to 8 digits)"),
        ({"at": "14130100"}, "1: column at: '14130100' is not an hour as YYMMDDHH"),
        ({"at": "15022900"}, "1: column at: '15022900' is not an hour as YYMMDDHH"),
        ({"at": "14102124"}, "1: column at: '14102124' is not an hour as YYMMDDHH"),
        ({"at": "1410210"}, "1: column at: '1410210' is not an hour as YYMMDDHH"),
    ],
)
def test_what_is_malformed_is_told(fields: dict[str, str], problem: str) -> None:
    told = problems(SHOP, shop(**fields))
    assert told[0].startswith(problem)
    assert problems(SHOP, shop() + shop() + shop(**fields) + shop())[0] == told[0].replace("1: ", "3: ", 1)


def test_the_edges_of_64_bits_fit() -> None:
    lines = shop(user=str(-(2**63)), session=str(2**64 - 1)) + shop(user=str(2**63 - 1), session="0")
    parsed = parse(SHOP, lines)
    assert parsed is not None
    assert parsed["user"].to_list() == [-(2**63), 2**63 - 1]
    assert parsed["session"].to_list() == [2**64 - 1, 0]


def test_line_endings_may_not_be_mixed() -> None:
    lines = shop() + shop().replace(b"\n", b"\r\n") + shop()
    assert [told.split(": ")[0] for told in problems(SHOP, lines)] == ["2"]
    assert CR_LF in problems(SHOP, lines)[0]
    assert len(problems(CRITEO, line(GOOD).replace(b"\n", b"\r\n") * 4 + line(GOOD))) == 4


# ---- Parquet


def table_of(kind: Kind, values: Any) -> tuple[list[Any], list[str]]:
    """Values of a column of this kind in a table that starts at row 11, and what is malformed in it."""
    others: dict[str, Any] = {"shown": "impressions"} if kind == "clicks" else {"label": "label"}
    others = {"shown": "clicks"} if kind == "impressions" else {} if kind == "label" else others
    columns = [Column(name="x", kind=kind), *(Column(name=n, kind=k) for n, k in others.items())]
    fmt = RawFormat(name="own", columns=(*columns, Column(name="C", kind="int64")), file="parquet")
    array = values if isinstance(values, pa.Array) else pa.array(values)
    rows = dict.fromkeys([*others, "C"], pa.array([1] * len(array)))
    typed, malformed = typed_table(fmt, LOG, pa.table(rows | {"x": array, "unknown": array}), 11)
    return typed["x"].to_list(), [str(row) for row in malformed]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("label", [True, False], [1, 0]),
        ("label", [0.0, 1.0], [0, 1]),
        ("label", ["0", "1"], [0, 1]),
        ("integer", [1.0, None], [1, None]),
        ("integer", ["-7", ""], [-7, None]),
        ("float", [1, None], [1.0, None]),
        ("float", ["1.5", ""], [1.5, None]),
        ("hex32", ["FFFFFFFF", "a", None, ""], [2**32 - 1, 10, None, None]),
        ("hex32", [2**32 - 1, 0, None], [2**32 - 1, 0, None]),
        ("hex32", pa.array(["1f", "e"]).dictionary_encode(), [31, 14]),
        ("int64", [-(2**63)], [-(2**63)]),
        ("uint64", pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
        ("text", ["a", "", None], ["a", None, None]),
        ("text", [1, 2], ["1", "2"]),
        ("text", pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        ("text", [b"na\xc3\xafve"], ["na\u00efve"]),
        ("hour", [14102123, 7010100, None], [14102123, 7010100, None]),
        ("hour", ["14102123"], [14102123]),
        ("int64", pa.nulls(2), [None, None]),
    ],
)
def test_a_table_may_hold_other_types_of_the_same_values(kind: Kind, values: Any, expected: list) -> None:
    assert table_of(kind, values) == (expected, [])


@pytest.mark.parametrize(
    ("kind", "values", "problem"),
    [
        ("label", [0, 1, 2], "row 13: column x: 2 is not 0 or 1"),
        ("label", [0, None], "row 12: column x: None is not 0 or 1"),
        ("label", [0, 0.5], "row 12: column x: 0.5 is not 0 or 1"),
        ("label", ["01"], "row 11: column x: '01' is not 0 or 1"),
        ("clicks", [1, None], "row 12: column x: None is not a count below 2^32"),
        ("impressions", [-1], "row 11: column x: -1 is not a count below 2^32"),
        ("integer", [1.5], "row 11: column x: 1.5 is not a 64-bit integer"),
        ("integer", ["+7"], "row 11: column x: '+7' is not a 64-bit integer"),
        ("float", [1.0, float("inf")], "row 12: column x: inf is not a finite decimal number"),
        ("float", ["1e400"], "row 11: column x: '1e400' is not a finite decimal number"),
        ("hex32", ["0ffffffff"], "row 11: column x: '0ffffffff' is not a 32-bit hexadecimal category"),
        ("hex32", [2**32], f"row 11: column x: {2**32} is not a 32-bit hexadecimal category"),
        ("int64", pa.array([2**63], pa.uint64()), f"row 11: column x: {2**63} is not a 64-bit integer"),
        ("uint64", [-1], "row 11: column x: -1 is not an unsigned 64-bit integer"),
        ("int64", [datetime.datetime(2014, 10, 21)], "row 11: column x: datetime.datetime(2014, 10, 21, 0, 0) is not"),
        ("hour", [14102100, 14102124], "row 12: column x: 14102124 is not an hour as YYMMDDHH"),
        ("hour", [114102100], "row 11: column x: 114102100 is not an hour as YYMMDDHH"),
    ],
)
def test_a_value_of_a_table_that_does_not_fit_is_named(kind: Kind, values: Any, problem: str) -> None:
    rows, malformed = table_of(kind, values)
    assert [told.startswith(f"log, {problem}") for told in malformed] == [True], malformed
    assert len(rows) == len(values) - 1


@pytest.mark.parametrize(("kind", "values"), [("text", [[1]]), ("label", [[1]]), ("text", [b"\xff"])])
def test_a_column_of_a_type_that_cannot_be_read_is_named(kind: Kind, values: list) -> None:
    with pytest.raises(InputError, match=r"^log: column x: (List\(Int64\)|Binary) does not hold what is"):
        table_of(kind, values)
