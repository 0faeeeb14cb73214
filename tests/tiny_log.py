"""A prepared folder of a few hundred rows whose every value tells its row, and what its loaders yield."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.batch import Batch
from recsys.data.loader import Loader
from recsys.data.schema import Schema

# Neither the schema nor the files have their columns in alphabetical order, nor both in the same order.
SCHEMA = Schema(name="tiny", dense=("row", "half"), sparse={"c": 1000, "a": 7, "b": 50}, labels=("label",))
FILES = ((40, 40, 40, 13), (40, 7), (40, 40, 40, 40, 40, 3))  # Rows of every row group of every file.
GROUP_ENDS = np.cumsum(list(itertools.chain(*FILES)))
NUM_ROWS = int(GROUP_ENDS[-1])
BATCH = 24  # 16 slots do not divide it, nor do the 48 that are the default.
STEPS = NUM_ROWS // BATCH


def columns_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """All columns as a function of the row number, which is one of them."""
    return {
        "b": (rows * rows % 50).astype(np.int32),
        "row": rows.astype(np.float32),
        "c": (rows % 1000).astype(np.int32),
        "label": (rows % 3 == 0).astype(np.uint8),
        "a": (rows % 7).astype(np.int32),
        "half": (-rows / 2).astype(np.float32),
        "weight": (rows % 4 / 2).astype(np.float32),
    }


def stored(values: np.ndarray) -> pa.Array:
    """A column as Arrow has it: of several values a row, a fixed-size list."""
    if values.ndim == 1:
        return pa.array(values)
    field = pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=False)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=pa.list_(field, values.shape[1]))


def write(
    folder: Path,
    split: str = "train",
    files: Sequence[Sequence[int]] = FILES,
    columns: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a split; `columns` [NUM_ROWS, ...] replace those of `columns_of`."""
    (folder / split).mkdir(parents=True)
    SCHEMA.save(folder)
    first = 0
    for index, groups in enumerate(files):
        tables = []
        for size in groups:
            rows = np.arange(first, first + size)
            values = columns_of(rows) | {name: column[rows] for name, column in (columns or {}).items()}
            arrays = {name: stored(column) for name, column in values.items()}
            fields = [pa.field(name, array.type, nullable=False) for name, array in arrays.items()]
            tables.append(pa.table(list(arrays.values()), schema=pa.schema(fields)))
            first += size
        path = folder / split / f"part-{index}.parquet"
        with path.open("wb") as file, pq.ParquetWriter(file, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)


def loader(folder: Path, **options: Any) -> Loader:
    """A loader of the training rows."""
    return Loader(folder, "train", **{"batch_size": BATCH} | options)


def rows(batch: Batch) -> list[int]:
    """Row numbers of a batch, without those that only fill it up; where no row has weight 0."""
    return [int(row) for row in batch.dense[batch.weights > 0, 0]]


def global_batches(folder: Path, world_size: int, epoch: int = 0, **options: Any) -> list[list[int]]:
    """Rows of every step of an epoch, those of rank 0 first."""
    ranks = [loader(folder, rank=rank, world_size=world_size, **options).epoch(epoch) for rank in range(world_size)]
    return [[row for batch in step for row in rows(batch)] for step in zip(*ranks, strict=True)]


def flat(lists: list[list[int]]) -> list[int]:
    """One list of all elements."""
    return list(itertools.chain(*lists))
