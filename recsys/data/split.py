"""Split rules: which rows train, validate and test.

Two kinds. What a row decides itself (random, hash:COLUMN) is known while it is parsed. What the whole log decides
(time, file, test) is known once all rows are counted, and is an interval of rows.
"""

import zlib
from collections.abc import Sequence

import polars as pl

from recsys.config import InputError, nearest
from recsys.data.schema import SPLITS

TRAIN, VALID, TEST = range(len(SPLITS))
TRAIN_SHARE, VALID_SHARE = 0.8, 0.1
RULES = ("random", "time", "file", "hash:COLUMN", "test")


def check_rule(rule: str, columns: Sequence[str]) -> None:
    """Accept the rules that there are.

    Raises:
        InputError: an unknown rule, or the hash of a column that the format does not have.
    """
    name, _, column = rule.partition(":")
    if name == "hash":
        if column not in columns:
            raise InputError(f"--split {rule}: no such column to hash; {nearest(column, columns)}")
    elif rule not in RULES:
        raise InputError(f"unknown --split {rule!r}; {nearest(rule, RULES)}")


def split_of(row: pl.Expr, rule: str, *, seed: int, num_rows: int, file: int = 0) -> pl.Expr:
    """Give each row of a log the index of its split in `SPLITS`, as UInt8.

    Args:
        row: UInt64 row numbers: of the random rule within the row's file, of the time rule within the log.
        rule: "random" (8:1:1, a hash of seed, file and row number, so it needs no pass over the data and no memory) or
            "time" (first 80 % of rows, next 10 %, last 10 %).
        seed: of the random rule.
        num_rows: rows of the whole log, for the time rule.
        file: index of the row's file, for the random rule.
    """
    if rule == "random":
        return _by_share(_splitmix64(row, (seed << 40) + _mix(file)))
    share = row.cast(pl.Float64) / num_rows
    return _at(share)


def split_by_key(keys: pl.Series, seed: int) -> pl.Series:
    """Split rows 8:1:1 by a hash of a column's values, so that all rows of a value are on one side; UInt8.

    Texts are hashed by CRC-32 first; missing is a value as any other.
    """
    if keys.dtype == pl.String:
        texts = keys.drop_nulls().unique()
        words = [zlib.crc32(text.encode()) for text in texts]
        keys = keys.replace_strict(texts, words, default=None, return_dtype=pl.UInt64)
    elif keys.dtype == pl.Int64:
        keys = keys.reinterpret(signed=False)
    frame = keys.cast(pl.UInt64).fill_null(0).to_frame("key")
    return frame.select(_by_share(_splitmix64(pl.col("key"), seed << 40))).to_series()


def intervals(rule: str, rows_of_files: Sequence[int]) -> tuple[int, int]:
    """Rows of the log at which validation and test begin, by a rule that the whole log decides.

    time: after 80 % and 90 % of the rows. file: the last file is halved into validation and test (days 0 to 22 of
    Criteo Terabyte train; the first half of day 23, rounded up, is MLPerf's validation set). test: all rows test.
    """
    num_rows = sum(rows_of_files)
    if rule == "test":
        return 0, 0
    if rule == "file":
        last = rows_of_files[-1]
        return num_rows - last, num_rows - last // 2
    return _first_at(TRAIN_SHARE, num_rows), _first_at(TRAIN_SHARE + VALID_SHARE, num_rows)


def _first_at(share: float, num_rows: int) -> int:
    row = int(share * num_rows)
    while row / num_rows >= share:
        row -= 1
    while row / num_rows < share:
        row += 1
    return row


def _by_share(word: pl.Expr) -> pl.Expr:
    return _at((word // 2**11).cast(pl.Float64) / 2.0**53)


def _at(share: pl.Expr) -> pl.Expr:
    valid_from, test_from = TRAIN_SHARE, TRAIN_SHARE + VALID_SHARE
    return pl.when(share < valid_from).then(TRAIN).when(share < test_from).then(VALID).otherwise(TEST).cast(pl.UInt8)


def _splitmix64(row: pl.Expr, start: int) -> pl.Expr:
    """SplitMix64's output function (Steele et al., 2014) at counter start + row; arithmetic wraps at 2^64."""
    word = (row + _u64(start)) * _u64(0x9E3779B97F4A7C15)
    word = (word ^ (word // 2**30)) * _u64(0xBF58476D1CE4E5B9)
    word = (word ^ (word // 2**27)) * _u64(0x94D049BB133111EB)
    return word ^ (word // 2**31)


def _mix(value: int) -> int:
    return int(pl.select(_splitmix64(_u64(value), 0)).item())


def _u64(value: int) -> pl.Expr:
    return pl.lit(value % 2**64, dtype=pl.UInt64)
