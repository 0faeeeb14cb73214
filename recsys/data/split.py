"""Split rules: which rows train, validate and test, as a streaming polars expression of the row number."""

import polars as pl

from recsys.data.schema import SPLITS

TRAIN, VALID, TEST = range(len(SPLITS))
TRAIN_SHARE, VALID_SHARE = 0.8, 0.1


def split_of(row: pl.Expr, rule: str, *, seed: int, num_rows: int) -> pl.Expr:
    """Give each row of a log the index of its split in `SPLITS`, as UInt8.

    Args:
        row: UInt64 row numbers, counted over all well-formed rows of the log.
        rule: "random" (8:1:1, a hash of seed and row number, so it needs no pass over the data and no memory) or
            "time" (first 80 % of rows, next 10 %, last 10 %).
        seed: of the random rule.
        num_rows: rows of the whole log, for the time rule.
    """
    if rule == "random":
        share = (_splitmix64(row, seed) // 2**11).cast(pl.Float64) / 2.0**53
    else:
        share = row.cast(pl.Float64) / num_rows
    valid_from, test_from = TRAIN_SHARE, TRAIN_SHARE + VALID_SHARE
    return pl.when(share < valid_from).then(TRAIN).when(share < test_from).then(VALID).otherwise(TEST).cast(pl.UInt8)


def _splitmix64(row: pl.Expr, seed: int) -> pl.Expr:
    """SplitMix64's output function (Steele et al., 2014) at counter seed * 2^40 + row; arithmetic wraps at 2^64."""
    word = (row + _u64(seed << 40)) * _u64(0x9E3779B97F4A7C15)
    word = (word ^ (word // 2**30)) * _u64(0xBF58476D1CE4E5B9)
    word = (word ^ (word // 2**27)) * _u64(0x94D049BB133111EB)
    return word ^ (word // 2**31)


def _u64(value: int) -> pl.Expr:
    return pl.lit(value % 2**64, dtype=pl.UInt64)
