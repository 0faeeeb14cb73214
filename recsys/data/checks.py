"""Checks of one open Parquet file of a prepared folder. Each yields problems: a line each, beginning with where."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.schema import RAW, Schema
from recsys.place import is_local

Types = tuple[pa.DataType, ...]

VOCABULARY_COLUMNS: dict[str, Types] = {
    "key": (pa.uint32(), pa.uint64(), pa.int64(), pa.string(), pa.large_string()),
    "id": (pa.int32(),),
    "count": (pa.uint32(), pa.uint64(), pa.int64()),
}


@dataclass(frozen=True)
class Rule:
    """What a column of a split must hold."""

    types: Types
    """Any of these."""
    wrong: Callable[[np.ndarray], np.ndarray]
    """Which values are wrong, as a mask."""
    words: str
    """What to call the wrong ones."""


def rules_of(schema: Schema) -> dict[str, Rule]:
    """The rule of each column of a split."""
    rules = dict.fromkeys(schema.labels, Rule((pa.uint8(),), lambda values: values > 1, "labels other than 0 and 1"))
    if schema.weight:
        rules[schema.weight] = Rule((pa.float32(),), _wrong_weights, "weights that are negative or not finite")
    rules |= dict.fromkeys(schema.dense, Rule((pa.float32(),), _not_finite, "values that are not finite"))
    for feature, num_ids in schema.sparse.items():
        if num_ids == RAW:
            rules[feature] = Rule((pa.int64(),), _none, "")
            continue
        types: Types = (pa.int32(),)
        if hotness := schema.hotness.get(feature):
            types = tuple(pa.list_(pa.field("element", pa.int32(), nullable), hotness) for nullable in (False, True))
        rules[feature] = Rule(types, partial(_outside, num_ids), f"ids outside [0, {num_ids:,})")
    return rules


def _none(values: np.ndarray) -> np.ndarray:
    return np.zeros(len(values), dtype=bool)


def _wrong_weights(values: np.ndarray) -> np.ndarray:
    return _not_finite(values) | (values < 0)


def _not_finite(values: np.ndarray) -> np.ndarray:
    return ~np.isfinite(values)


def _outside(num_ids: int, ids: np.ndarray) -> np.ndarray:
    return (ids < 0) | (ids >= num_ids)


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of this machine or of an object store."""
    if is_local(path):
        with pq.ParquetFile(path) as file:
            yield file
    else:
        with path.open("rb") as stream:
            yield pq.ParquetFile(stream)


def one_line(error: Exception) -> str:
    """The text of an error of Arrow's, which may have several lines."""
    return " ".join(str(error).split())


def check_columns(name: str, found: pa.Schema, wanted: dict[str, Types], *, nullable: bool) -> Iterator[str]:
    """Columns that are missing, too many, of another type, or nullable though they must not be."""
    for column, types in wanted.items():
        if column not in found.names:
            yield f"{name}: column {column} is missing"
            continue
        field = found.field(found.names.index(column))
        if field.type not in types:
            yield f"{name}: column {column} is {field.type}, expected {' or '.join(map(str, types))}"
        if field.nullable and not nullable:
            yield f"{name}: column {column} is nullable, expected not null"
    for column in Counter(found.names) - Counter(list(wanted)):
        yield f"{name}: column {column} is one too many; expected {', '.join(wanted)}"


def readable(found: pa.Schema, wanted: dict[str, Types]) -> list[str]:
    """Columns that are there, once, and of the right type."""
    return [name for name, types in wanted.items() if found.names.count(name) == 1 and found.field(name).type in types]


def decode(file: pq.ParquetFile, group: int, column: str, rule: Rule) -> tuple[np.ndarray, list[str]]:
    """The values of one column of one row group, and what is wrong with them."""
    try:
        rows = file.read_row_group(group, columns=[column], use_threads=False)[column]
    except (OSError, pa.ArrowException) as error:
        return np.empty(0), [f"cannot decode it ({one_line(error)})"]
    num_rows = file.metadata.row_group(group).num_rows
    nulls = rows.null_count
    values = rows
    if pa.types.is_fixed_size_list(rows.type):
        values = pc.list_flatten(rows)
        nulls += values.null_count
    values = values.drop_null().to_numpy()
    problems = []
    if len(rows) != num_rows:
        problems.append(f"{len(rows):,} rows, expected {num_rows:,}")
    if nulls:
        problems.append(f"nulls: {nulls:,}, expected none")
    wrong = rule.wrong(values)
    if wrong.any():
        first = int(wrong.argmax())
        problems.append(f"{rule.words}: {np.count_nonzero(wrong):,}, the first is {values[first]} at {first:,}")
    return values, problems


def leaves_of(metadata: pq.FileMetaData) -> dict[str, int]:
    """Where the footer has each column."""
    return {metadata.schema.column(i).path.removesuffix(".list.element"): i for i in range(metadata.num_columns)}


def check_statistics(chunk: pq.ColumnChunkMetaData, rule: Rule) -> Iterator[str]:
    """What the footer tells of the values of one column of one row group."""
    statistics = chunk.statistics
    if statistics is None:
        return
    if statistics.has_null_count and statistics.null_count:
        yield f"nulls: {statistics.null_count:,} by its statistics, expected none"
    if statistics.has_min_max and rule.wrong(np.array([statistics.min, statistics.max])).any():
        yield f"{rule.words} by its statistics, which say {statistics.min} to {statistics.max}"


def check_vocabulary_statistics(name: str, file: pq.ParquetFile) -> Iterator[str]:
    """What the footer tells of a vocabulary's values."""
    num_keys = file.metadata.num_rows
    rules = {
        "key": Rule(VOCABULARY_COLUMNS["key"], _none, ""),
        "id": Rule(VOCABULARY_COLUMNS["id"], lambda ids: _outside(num_keys, ids - 1), f"ids outside [1, {num_keys:,}]"),
        "count": Rule(VOCABULARY_COLUMNS["count"], lambda counts: counts < 1, "counts less than 1"),
    }
    leaves = leaves_of(file.metadata)
    for group in range(file.num_row_groups):
        for column, rule in rules.items():
            for problem in check_statistics(file.metadata.row_group(group).column(leaves[column]), rule):
                yield f"{name}, row group {group}, column {column}: {problem}"


def check_order(name: str, file: pq.ParquetFile) -> Iterator[str]:
    """The first place where a vocabulary's ids do not run 1, 2, 3, ..., or its counts rise."""
    row, last_count = 0, math.inf
    for group in range(file.num_row_groups):
        where = f"{name}, row group {group}"
        table = file.read_row_group(group, columns=["id", "count"], use_threads=False)
        for column in ("id", "count"):
            if table[column].null_count:
                yield f"{where}, column {column}: nulls: {table[column].null_count:,}, expected none"
                return
        ids, counts = table["id"].to_numpy(), table["count"].to_numpy()
        out_of_order = np.flatnonzero(ids != np.arange(row + 1, row + 1 + len(ids)))
        if len(out_of_order):
            at = out_of_order[0]
            yield f"{where}, column id: {ids[at]} stands in row {row + at:,}, expected {row + at + 1} (1, 2, 3, ...)"
            return
        rising = np.flatnonzero(counts > np.concatenate(([last_count], counts[:-1])))
        if len(rising):
            at = rising[0]
            yield f"{where}, column count: {counts[at]:,} of id {ids[at]}, expected no more than the id before has"
            return
        row += len(ids)
        last_count = counts[-1] if len(counts) else last_count


def check_keys(name: str, file: pq.ParquetFile) -> Iterator[str]:
    """A vocabulary's keys that are missing or stand twice; the one check that holds a whole column in memory."""
    keys = file.read(columns=["key"], use_threads=False)["key"]
    if keys.null_count:
        yield f"{name}, column key: nulls: {keys.null_count:,}, expected none"
        keys = keys.drop_null()
    if pc.count_distinct(keys).as_py() < len(keys):
        tally = pc.value_counts(keys)
        doubled = tally.filter(pc.greater(tally.field("counts"), 1))
        first = doubled[0]["values"]
        yield f"{name}, column key: keys that stand more than once: {len(doubled):,}, the first is {first}"
