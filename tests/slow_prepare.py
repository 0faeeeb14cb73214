"""The slow reference of prepare: plain Python over rows of text, one value at a time."""

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from recsys.data.formats import RawFormat
from recsys.data.schema import SPLITS, Schema
from tests.logs import Row, read

TRAIN, VALID, TEST = range(3)
Key = int | str | None


def splitmix64(counter: int) -> int:
    word = counter * 0x9E3779B97F4A7C15 % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def slow_share(share: float) -> int:
    return TRAIN if share < 0.8 else VALID if share < 0.9 else TEST


def slow_word(key: Key) -> int:
    """A category's value as an unsigned 64-bit number."""
    return zlib.crc32(key.encode()) if isinstance(key, str) else (key or 0) % 2**64


def slow_splits(rule: str, seed: int, files: Sequence[Sequence[Any]], keys: Sequence[dict[str, Key]]) -> list[int]:
    """Split of every row of a log, file after file."""
    sizes = [len(rows) for rows in files]
    total = sum(sizes)
    if rule == "random":
        starts = [(seed << 40) + splitmix64(i) for i in range(len(files))]
        return [slow_share(splitmix64(starts[i] + row) / 2**64) for i, size in enumerate(sizes) for row in range(size)]
    if rule == "time":
        return [slow_share(row / total) for row in range(total)]
    if rule == "file":
        return [TRAIN] * (total - sizes[-1]) + [VALID] * -(-sizes[-1] // 2) + [TEST] * (sizes[-1] // 2)
    column = rule.removeprefix("hash:")
    return [slow_share(splitmix64((seed << 40) + slow_word(key[column])) / 2**64) for key in keys]


def slow_bucket(value: int) -> int:
    return math.floor(math.log(value) ** 2) if value > 2 else value


def slow_keys(fmt: RawFormat, row: Row, integers: str) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for column in fmt.columns:
        name, field = column.name, row[column.name]
        if column.kind == "integer" and integers == "log_squared_bucket":
            keys[name] = slow_bucket(int(field)) if field else None
        elif column.kind == "hex32":
            keys[name] = int(field, 16) if field else None
        elif column.kind in ("int64", "uint64", "impressions"):
            keys[name] = int(field) if field else None
        elif column.kind == "text":
            keys[name] = field or None
        elif column.kind == "hour":
            year, month, day, hour = (int(field[at : at + 2]) for at in (0, 2, 4, 6)) if field else (0, 1, 1, 0)
            weekday = date(2000 + year, month, day).isoweekday()
            features = {"hour": hour, "weekday": weekday, "is_weekend": int(weekday > 5)}
            keys |= features if field else dict.fromkeys(features)
    return keys


def slow_dense(fmt: RawFormat, row: Row, integers: str) -> list[float]:
    dense = []
    for column in fmt.columns:
        if column.kind == "float":
            dense.append(float(row[column.name] or 0))
        elif column.kind == "integer" and integers != "log_squared_bucket":
            value = int(row[column.name] or 0)
            dense.append(math.log(max(value, -2) + 3) if integers == "log3" else math.log1p(max(value, 0)))
    return dense


class Slow(NamedTuple):
    vocabularies: dict[str, list[tuple[Key, int, int]]]
    """Of each feature: (key, id, count)."""
    splits: list[list[tuple[float, ...]]]
    """Of each split: rows of label, dense features, ids."""


def slow_prepare(
    fmt: RawFormat,
    *files: Sequence[Row],
    threshold: int = 5,
    integers: str = "log1p",
    split: str = "random",
    seed: int = 2021,
) -> Slow:
    rows = [row for file in files for row in file]
    keys = [slow_keys(fmt, row, integers) for row in rows]
    splits = slow_splits(split, seed, files, keys)
    caps = {column.name: column.max_ids for column in fmt.columns}
    vocabularies: dict[str, list[tuple[Key, int, int]]] = {}
    ids: dict[str, dict[Key, int]] = {}
    for name in keys[0]:
        counts = Counter(key[name] for key, at in zip(keys, splits, strict=True) if at == TRAIN)
        kept: list[Any] = [(key, n) for key, n in counts.items() if key is not None and n >= threshold]
        kept.sort(key=lambda entry: (-entry[1], entry[0].encode() if isinstance(entry[0], str) else entry[0]))
        del kept[(caps.get(name) or 2**31) - 1 :]
        vocabularies[name] = [(key, i, n) for i, (key, n) in enumerate(kept, start=1)]
        ids[name] = {key: i for key, i, _ in vocabularies[name]}
    made: list[list[tuple[float, ...]]] = [[] for _ in SPLITS]
    for row, key, at in zip(rows, keys, splits, strict=True):
        label = int(int(row[fmt.label]) > 0)
        made[at].append((label, *slow_dense(fmt, row, integers), *(ids[n].get(value, 0) for n, value in key.items())))
    return Slow(vocabularies, made)


def assert_prepared(out: Path, slow: Slow) -> None:
    """A prepared folder is what the slow reference makes."""
    schema = Schema.load(out)
    assert schema.sparse == {name: len(entries) + 1 for name, entries in slow.vocabularies.items()}
    assert list(schema.sparse) == list(slow.vocabularies)
    for name, entries in slow.vocabularies.items():
        assert pl.read_parquet(out / "vocabulary" / f"{name}.parquet").rows() == entries
    for name, expected in zip(SPLITS, slow.splits, strict=True):
        frame = read(out, name)
        assert frame.height == len(expected)
        if expected:
            assert frame.columns == [*schema.labels, *schema.dense, *schema.sparse]
            assert frame.select(schema.sparse.keys()).rows() == [row[-len(schema.sparse) :] for row in expected]
            np.testing.assert_allclose(frame.to_numpy(), np.array(expected), rtol=1e-6)
