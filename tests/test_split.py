"""Splits: the published hash, shares, and intervals of rows."""

import math
import random
import zlib
from collections import Counter, defaultdict
from typing import Any

import polars as pl
import pytest

from recsys.config import InputError
from recsys.data.split import TEST, TRAIN, VALID, _splitmix64, check_rule, intervals, split_by_key, split_of
from tests.slow_prepare import slow_share, slow_word, splitmix64


def splits_of(num_rows: int, rule: str = "random", seed: int = 0, file: int = 0) -> list[int]:
    rows = pl.select(row=pl.int_range(num_rows, dtype=pl.UInt64))
    found = rows.select(split_of(pl.col("row"), rule, seed=seed, num_rows=num_rows, file=file)).to_series()
    assert found.dtype == pl.UInt8
    return found.to_list()


# ---- random


def test_the_hash_is_splitmix64() -> None:
    first_three = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # published, of seed 0
    assert [splitmix64(counter) for counter in (1, 2, 3)] == first_three
    for seed in (0, 2021, 2**24 - 1):
        found = pl.select(row=pl.int_range(1000, dtype=pl.UInt64)).select(_splitmix64(pl.col("row"), seed << 40))
        assert found.to_series().to_list() == [splitmix64((seed << 40) + row) for row in range(1000)]


def test_the_first_file_is_counted_from_the_seed() -> None:
    expected = [slow_share(splitmix64((2021 << 40) + row) / 2**64) for row in range(2000)]
    assert splits_of(2000, seed=2021) == expected
    assert splits_of(2000, seed=2021, file=1) == [
        slow_share(splitmix64(((2021 << 40) + splitmix64(1) + row) % 2**64) / 2**64) for row in range(2000)
    ]


def test_random_splits_have_their_shares() -> None:
    for file in (0, 1, 23):
        counts = Counter(splits_of(100_000, seed=3, file=file))
        sigma = math.sqrt(100_000 * 0.1 * 0.9)
        assert abs(counts[VALID] - 10_000) < 4 * sigma
        assert abs(counts[TEST] - 10_000) < 4 * sigma
        assert counts[TRAIN] == 100_000 - counts[VALID] - counts[TEST]


@pytest.mark.parametrize("other", [{"seed": 2}, {"seed": 1, "file": 1}, {"seed": 1, "file": 2}])
def test_another_seed_or_file_is_another_independent_split(other: dict[str, int]) -> None:
    one, two = splits_of(100_000, seed=1), splits_of(100_000, **other)  # type: ignore[arg-type]
    both_held_out = sum(TRAIN not in pair for pair in zip(one, two, strict=True))
    assert both_held_out == pytest.approx(0.2 * 0.2 * 100_000, rel=0.07)


# ---- intervals


def test_splits_by_time_are_consecutive() -> None:
    assert splits_of(10, "time") == [TRAIN] * 8 + [VALID, TEST]
    assert splits_of(1000, "time") == [TRAIN] * 800 + [VALID] * 100 + [TEST] * 100


@pytest.mark.parametrize("sizes", [[1], [2], [3], [7, 3], [10], [99, 1], [1000], [333, 333, 333], [2**40, 12345]])
def test_time_takes_the_last_tenths_of_all_files(sizes: list[int]) -> None:
    valid, test = intervals("time", sizes)
    assert 0 <= valid <= test <= sum(sizes)
    if sum(sizes) < 10_000:
        rows = splits_of(sum(sizes), "time")
        assert rows == [TRAIN] * valid + [VALID] * (test - valid) + [TEST] * (sum(sizes) - test)
    else:
        assert (valid - 1) / sum(sizes) < 0.8 <= valid / sum(sizes)
        assert (test - 1) / sum(sizes) < 0.9 <= test / sum(sizes)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([5, 6, 10], (11, 16)),
        ([5, 6, 11], (11, 17)),  # validation takes the row that is over
        ([5, 1], (5, 6)),
        ([5, 0], (5, 5)),
        ([7], (0, 4)),
    ],
)
def test_the_last_file_is_halved(sizes: list[int], expected: tuple[int, int]) -> None:
    assert intervals("file", sizes) == expected


# ---- by the values of a column

KEYS: dict[str, tuple[Any, list]] = {
    "uint32": (pl.UInt32, [0, 1, 2**32 - 1, *range(10, 5000)]),
    "int64": (pl.Int64, [-1, -(2**63), 2**63 - 1, *range(-2500, 2500)]),
    "uint64": (pl.UInt64, [2**64 - 1, 2**63, *range(5000)]),
    "text": (pl.String, ["", "na\u00efve", *map(str, range(5000))]),
}


@pytest.mark.parametrize("name", KEYS)
def test_all_rows_of_a_value_are_on_one_side(name: str) -> None:
    dtype, distinct = KEYS[name]
    values = random.Random(0).choices([None, *distinct], k=20_000)
    found = split_by_key(pl.Series(values, dtype=dtype), 5)
    assert found.dtype == pl.UInt8
    sides = defaultdict(set)
    for value, split in zip(values, found, strict=True):
        sides[value].add(split)
    assert all(len(seen) == 1 for seen in sides.values())
    assert {value: seen.pop() for value, seen in sides.items()} == {
        value: slow_share(splitmix64((5 << 40) + slow_word(value)) / 2**64) for value in sides
    }
    shares = Counter(split_by_key(pl.Series(distinct, dtype=dtype), 5))
    sigma = math.sqrt(len(distinct) * 0.1 * 0.9)
    assert abs(shares[VALID] - len(distinct) / 10) < 4 * sigma
    assert abs(shares[TEST] - len(distinct) / 10) < 4 * sigma
    assert (
        split_by_key(pl.Series(distinct, dtype=dtype), 6).to_list()
        != split_by_key(pl.Series(distinct, dtype=dtype), 5).to_list()
    )


def test_a_column_without_values_is_on_one_side() -> None:
    for dtype, _ in KEYS.values():
        assert split_by_key(pl.Series([None] * 5, dtype=dtype), 1).n_unique() == 1
    assert slow_word("na\u00efve") == zlib.crc32("na\u00efve".encode())


# ---- rules


def test_a_rule_that_there_is_is_accepted() -> None:
    for rule in ("random", "time", "file", "hash:user"):
        check_rule(rule, ["user", "product"])


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("randon", "^unknown --split 'randon'; did you mean random"),
        ("day", "^unknown --split 'day'; "),
        ("hash:usr", "^--split hash:usr: no such column .*; did you mean user"),
        ("hash", "^--split hash: no such column "),
        ("hash:COLUMN", "^--split hash:COLUMN: no such column "),
        ("time:user", "^unknown --split 'time:user'; "),
    ],
)
def test_a_rule_that_there_is_not_is_named(rule: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_rule(rule, ["user", "product"])
