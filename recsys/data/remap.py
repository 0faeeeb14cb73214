"""Remaps: the id of every entry of every part's dictionary, which encoding looks up."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from recsys.data.ingest import PartOfLog, read_part

BYTES_PER_ENTRY, COPIES_OF_KEY = 80, 4
"""What a value takes while it is counted, merged, sorted and looked up, beside its own bytes, and how often those."""


@dataclass(frozen=True, kw_only=True)
class ColumnJob:
    """One category whose values get ids."""

    feature: str
    parts: tuple[PartOfLog, ...]
    folder: Path
    """For the remap, and for what outgrows the memory."""
    out: Path
    """Folder of vocabularies."""
    memory: int
    """Bytes that the job may take."""

    @property
    def remap(self) -> Path:
        """Ids of all parts' dictionary entries, part after part, as raw little-endian int32."""
        return self.folder / f"{self.feature}.remap"

    @cached_property
    def capacity(self) -> int:
        """Keys that may be held at once."""
        keys = read_part(self.parts[0].path, [self.feature]).column(0).dictionary
        return max(self.memory // (BYTES_PER_ENTRY + COPIES_OF_KEY * keys.nbytes // len(keys)), 1000)

    def batches(self) -> Iterator[tuple[int, int]]:
        """Consecutive intervals of parts whose dictionaries fit together, at least one part each."""
        first = held = 0
        for i, part in enumerate(self.parts):
            size = part.num_values[self.feature]
            if held and held + size > self.capacity // 4:
                yield first, i
                first, held = i, 0
            held += size
        yield first, len(self.parts)


def write_remap(job: ColumnJob, path: Path, look_up: Callable[[int, pl.DataFrame], pl.DataFrame]) -> None:
    """Write ids of dictionary entries where `look_up` finds any, and 0 elsewhere.

    `look_up` takes the number of a batch and a frame of key and at (the place in the batch), and returns one of at and
    id.
    """
    with path.open("wb") as file:
        for batch, (first, last) in enumerate(job.batches()):
            found = look_up(batch, entries_of(job, first, last))
            ids = np.zeros(sum(part.num_values[job.feature] for part in job.parts[first:last]), dtype="<i4")
            ids[found["at"].to_numpy()] = found["id"].to_numpy()
            file.write(ids.data)  # `tofile` says nothing of a full disk


def entries_of(job: ColumnJob, first: int, last: int) -> pl.DataFrame:
    """Dictionary entries of some parts but null: key, and at, their place among them all."""
    keys = [
        pl.Series("key", read_part(part.path, [job.feature]).column(0).dictionary) for part in job.parts[first:last]
    ]
    return pl.concat(keys).to_frame("key").with_row_index("at").filter(pl.col("key").is_not_null())
