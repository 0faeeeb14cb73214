"""Row groups of a prepared split: which there are, and one decoded to a block of int32.

A block holds n rows column by column: label, weight, dense, then sparse in the schema's order. A float32 column keeps
its bits, and a multi-hot feature is one column of n * hotness values, row after row; a raw id takes two int32. Blocks
of row groups and those of batches are laid out alike, so a batch is put together by few copies, and its ids stand as a
KeyedJaggedTensor has them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import InputError
from recsys.data.checks import one_line
from recsys.data.schema import RAW, Schema
from recsys.place import is_local


class CorruptGroupError(InputError):
    """A row group whose bytes are not those that were written. It is made with where it stands, and what is wrong."""

    def __str__(self) -> str:
        return f"{self.args[0]}; prepare again, or train without such groups by --loader.on-corrupt skip"

    @property
    def problem(self) -> str:
        """Where, and what is wrong."""
        return str(self.args[0])


@dataclass(frozen=True)
class RowGroup:
    """One row group of a split, and where it stands in the order of its files."""

    path: Path
    index: int
    num_rows: int


@dataclass(frozen=True)
class Run:
    """Neighbouring columns of a block that have equally many values a row."""

    begin: int
    """Values a row of all columns before."""
    num_columns: int
    width: int
    """Values a row of each column."""


class Layout:
    """Where the columns of a schema stand in a block."""

    def __init__(self, schema: Schema) -> None:
        self.floats = [schema.labels[0], schema.weight, *schema.dense]
        self.num_dense = len(schema.dense)
        self.ids = np.dtype(np.int64 if schema.raw else np.int32)
        if schema.raw and len(self.floats) % 2:
            self.floats.append(None)  # so that ids of 8 bytes stand at multiples of 8
        self.sparse = {feature: schema.hotness.get(feature, 1) for feature in schema.sparse}
        self.num_ids = schema.sparse
        self.num_floats = len(self.floats)
        words = {feature: hotness * self.ids.itemsize // 4 for feature, hotness in self.sparse.items()}
        self.width = self.num_floats + sum(words.values())
        self.runs: list[Run] = []
        begin = 0
        for width, columns in groupby([1] * self.num_floats + list(words.values())):
            num_columns = len(list(columns))
            self.runs.append(Run(begin, num_columns, width))
            begin += num_columns * width

    def views(self, blocks: np.ndarray) -> list[np.ndarray]:
        """View blocks [..., width * n] as one [..., columns, n * width of the run] a run."""
        num_rows = blocks.shape[-1] // self.width
        return [
            blocks[..., run.begin * num_rows :][..., : run.num_columns * run.width * num_rows].reshape(
                *blocks.shape[:-1], run.num_columns, run.width * num_rows
            )
            for run in self.runs
        ]

    def decode(self, group: RowGroup, order: np.ndarray | None, memory: np.ndarray) -> np.ndarray:
        """Decode a row group to a block [width * n] in `memory`, its rows in `order`, or as they stand in the file.

        Raises:
            CorruptGroupError: its bytes cannot be decoded, or hold ids beyond the schema's sizes.
            InputError: the file cannot be read, or a column in it does not hold what the schema says.
        """
        names = [name for name in (*self.floats, *self.sparse) if name is not None]
        with _opened(group.path) as file:
            table = _read(file, group, names)
        block = memory[: self.width * group.num_rows]
        at = 0
        for name, hotness in [*((name, 1) for name in self.floats), *self.sparse.items()]:
            kind = self.ids if name in self.sparse else np.dtype(np.float32)
            column = block[at : at + hotness * group.num_rows * kind.itemsize // 4]
            at += len(column)
            if name is None:
                column.view(np.float32)[:] = 1.0
                continue
            column = column.view(kind)
            values = _values(group, name, table.column(name))
            if len(values) != len(column):
                raise InputError(f"{group.path}: column {name!r} has not {hotness} values in every row; prepare again")
            if name in self.sparse:
                _check_values(group, name, values, self.num_ids[name])
            values = values.astype(kind, copy=False)
            if order is None:
                column[:] = values
            elif hotness == 1:
                # The mode "raise" would write to a buffer first; no index is out of range.
                np.take(values, order, out=column, mode="clip")
            else:
                rows = (group.num_rows, hotness)
                np.take(values.reshape(rows), order, axis=0, out=column.reshape(rows), mode="clip")
        return block


def _read(file: pq.ParquetFile, group: RowGroup, names: list[str]) -> pa.Table:
    try:
        return file.read_row_group(group.index, columns=names, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system: a disk or a network that fails; what fails to be decoded has no number
        raise CorruptGroupError(
            f"{group.path}, row group {group.index}: cannot decode it ({one_line(error)})"
        ) from None


def _values(group: RowGroup, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """All values of a column, without a copy where it is whole and has no nulls."""
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_fixed_size_list(chunk.type):
        chunk = chunk.flatten()
    if chunk.null_count:
        raise InputError(f"{group.path}, row group {group.index}: column {name!r} has rows without a value")
    return chunk.to_numpy()


def _check_values(group: RowGroup, feature: str, ids: np.ndarray, num_ids: int) -> None:
    """Look at every id: a file may have no statistics, or wrong ones."""
    if ids.dtype.kind not in "iu":
        raise InputError(
            f"{group.path}, row group {group.index}: column {feature} holds {ids.dtype}, not ids; prepare again"
        )
    if num_ids == RAW or not len(ids):
        return
    if ids.dtype.itemsize < 4:
        ids = ids.astype(np.int32)
    # Read as unsigned, an id below 0 is one above all that there can be, so one pass finds both.
    if ids.view(np.uint32 if ids.dtype.itemsize == 4 else np.uint64).max() < num_ids:
        return
    at = int(((ids < 0) | (ids >= num_ids)).argmax())
    raise CorruptGroupError(
        f"{group.path}, row group {group.index}, row {at * group.num_rows // len(ids)}: column {feature} holds id "
        f"{ids[at]}, but schema.json gives it {num_ids:,} ids"
    )


@lru_cache(maxsize=64)
def _footer(path: Path, modified_ns: int) -> pq.FileMetaData:
    """Footer of a local file as it was then: parsing one takes a twentieth of the time of decoding a row group."""
    return pq.read_metadata(path)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file for one read: threads share none, and thousands are never open at once."""
    try:
        if is_local(path):
            footer = _footer(path, path.stat().st_mtime_ns)
            with pq.ParquetFile(path, metadata=footer, memory_map=True, page_checksum_verification=True) as file:
                yield file
        else:  # a request a column would take long
            with (
                path.open("rb") as source,
                pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True) as file,
            ):
                yield file
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a whole Parquet file ({error}); prepare again") from None


def row_groups(folder: Path, split: str, schema: Schema) -> list[RowGroup]:
    """List the row groups of a split in file order, having checked that its columns are the schema's.

    Raises:
        InputError: no file, no row, a broken file, a missing column, or ids beyond the schema's sizes.
    """
    paths = sorted((folder / split).glob("*.parquet"), key=str)
    if not paths:
        raise InputError(f"{folder / split}: no Parquet file in it; prepare again, or with another split rule")
    groups = []
    for path in paths:
        with _opened(path) as file:
            metadata, columns = file.metadata, file.schema_arrow.names
        expected = (*schema.labels, *([schema.weight] if schema.weight else []), *schema.dense, *schema.sparse)
        missing = [column for column in expected if column not in columns]
        if missing:
            raise InputError(f"{path}: column {missing[0]!r} of schema.json is not in it; prepare again")
        _check_ids(path, metadata, schema)
        groups += [RowGroup(path, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
    if not sum(group.num_rows for group in groups):
        raise InputError(f"{folder / split}: no row in it; prepare a longer log, or with another split rule")
    return groups


def _check_ids(path: Path, metadata: pq.FileMetaData, schema: Schema) -> None:
    """Compare the largest id of each column, which Parquet notes per row group, with the schema's size.

    Nothing else would tell: TorchRec maps an id beyond a table's end to row 0.
    """
    # A list's values are a column `name.list.element`.
    columns = {metadata.schema.column(i).path.split(".")[0]: i for i in range(metadata.num_columns)}
    for feature, num_ids in schema.sparse.items():
        if num_ids == RAW:
            continue
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(columns[feature]).statistics
            if (
                statistics is not None
                and statistics.has_min_max
                and not 0 <= statistics.min <= statistics.max < num_ids
            ):
                raise InputError(
                    f"{path}, row group {group}: column {feature} holds ids {statistics.min} to {statistics.max}, "
                    f"but schema.json gives it {num_ids} ids; prepare again"
                )
