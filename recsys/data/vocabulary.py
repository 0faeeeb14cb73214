"""Vocabulary, the second stage: which values of a category get an id of their own.

One column at a time. Counts of a column's values are gathered over training rows, part by part; whatever outgrows the
memory is spilled as sorted runs and merged again by intervals of values, so that neither rows nor distinct values need
to fit. Ids start at 1, most frequent first, ties by value, so that they depend on the data alone; id 0 is left for
missing and rare values. Beside the vocabulary stands the remap: the id of every entry of every part's dictionary.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from recsys.config import InputError, write_whole
from recsys.data.ingest import SPLIT, PartOfLog, read_part
from recsys.data.remap import ColumnJob, entries_of, write_remap
from recsys.data.schema import MAX_NUM_IDS
from recsys.data.split import TRAIN
from recsys.place import whole

RUN_GROUP_ROWS = 65_536
BLOCK_ROWS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class VocabularyJob(ColumnJob):
    """One category to count."""

    threshold: int
    max_ids: int | None
    """Cap of the ids, id 0 included: the most frequent values keep theirs."""
    hashed: bool
    """Give ids by value modulo `max_ids` instead: no counting, no vocabulary, collisions."""
    weight: str | None = None
    """Column of weights; a row of weight 3 counts three times."""


class Interval(NamedTuple):
    """Keys of [low, high), and what is known of them. Intervals stand in order of their keys."""

    low: Any
    """None for the first interval."""
    high: Any
    """None for the last one."""
    kept: Path
    """Parquet file of (key, count), by count, then key: those that are frequent enough."""

    def holds(self) -> pl.Expr:
        """Whether a key lies in it."""
        key = pl.col("key")
        above = pl.lit(True) if self.low is None else key >= self.low
        return above if self.high is None else above & (key < self.high)


def make_vocabulary(job: VocabularyJob, advance: Callable[[int], None]) -> dict[str, Any]:
    """Count a column, write its vocabulary (key, id, count) and its remap, and return its facts, which are saved too.

    Args:
        job: the column.
        advance: called with the number of parts that were counted since the last call.

    Raises:
        InputError: more ids than int32 holds.
    """
    if job.hashed:
        num_ids = job.max_ids or 0
        with whole(job.remap) as remap:
            write_remap(job, remap, lambda _, keys: keys.select("at", id=hash_ids(keys["key"], num_ids)))
        advance(len(job.parts))
    else:
        num_ids = _count_vocabulary(job, advance)
    facts = {"feature": job.feature, "num_ids": num_ids}
    write_whole(job.folder / f"{job.feature}.json", json.dumps(facts))
    return facts


def hash_ids(keys: pl.Series, num_ids: int) -> pl.Series:
    """1 + key mod (num_ids - 1), Int32; missing gives 0. Texts are hashed by CRC-32 first."""
    if keys.dtype == pl.String:
        keys = pl.Series([None if text is None else zlib.crc32(text.encode()) for text in keys], dtype=pl.UInt64)
    elif keys.dtype == pl.Int64:
        keys = keys.reinterpret(signed=False)
    return (keys.cast(pl.UInt64) % (num_ids - 1) + 1).fill_null(0).cast(pl.Int32)


def _count_vocabulary(job: VocabularyJob, advance: Callable[[int], None]) -> int:
    for left in job.folder.glob(f".{escape(job.feature)}.*"):
        (shutil.rmtree if left.is_dir() else Path.unlink)(left)  # by a job that was killed
    with TemporaryDirectory(dir=job.folder, prefix=f".{job.feature}.") as scratch:
        intervals: list[Interval] = []
        for low, high, counted in _count(job, Path(scratch), advance):
            interval = Interval(low, high, Path(scratch) / f"{len(intervals)}.kept.parquet")
            kept = counted.filter(pl.col("count") >= job.threshold).sort("count", "key", descending=[True, False])
            kept.write_parquet(interval.kept, compression="lz4", row_group_size=RUN_GROUP_ROWS)
            intervals.append(interval)
            del counted, kept
        sizes = _give_ids(intervals)
        total = int(sizes.sum())
        if total >= MAX_NUM_IDS and not job.max_ids:
            raise InputError(
                f"column {job.feature}: {total:,} values occur at least {job.threshold} times, more ids than int32 "
                f"holds; raise --threshold or set --max-ids"
            )
        num_ids = min(total + 1, job.max_ids or MAX_NUM_IDS)
        with whole(job.out / f"{job.feature}.parquet") as path:
            _write_vocabulary(path, intervals, sizes, num_ids)
        with whole(job.remap) as remap:
            _write_counted_remap(job, remap, intervals, num_ids)
    return num_ids


# ---- counting


def _count(
    job: VocabularyJob, scratch: Path, advance: Callable[[int], None]
) -> Iterator[tuple[Any, Any, pl.DataFrame]]:
    """Count values over training rows; yields (low, high, frame of key and count) by intervals of keys.

    One interval for what fits. Else sorted runs go to disk, and each interval is merged from its slices of all runs.
    """
    runs: list[Path] = []
    samples: list[pl.Series] = []
    num_spilled = 0
    waiting: list[pl.DataFrame] = []

    def spill(run: pl.DataFrame) -> None:
        nonlocal num_spilled
        run = run.sort("key")
        runs.append(scratch / f"{len(runs)}.run.parquet")
        run.write_parquet(runs[-1], compression="lz4", row_group_size=RUN_GROUP_ROWS)
        samples.append(run["key"].gather_every(max(run.height // 1024, 1)))
        num_spilled += run.height
        waiting.clear()

    for part in job.parts:
        waiting.append(_count_part(part, job.feature, job.weight))
        if sum(frame.height for frame in waiting) > job.capacity // 2:
            merged = _merge(pl.concat(waiting).lazy())
            waiting[:] = [merged]
            if merged.height > job.capacity // 4:
                spill(merged)
            del merged
        advance(1)
    if not runs:
        yield None, None, _merge(pl.concat(waiting).lazy())
        return
    if waiting:
        spill(_merge(pl.concat(waiting).lazy()))
    sample = pl.concat(samples).sort()
    num_intervals = -(-num_spilled // (job.capacity // 4))
    edges = [None, *sample.gather_every(max(len(sample) // num_intervals, 1))[1:].unique(maintain_order=True), None]
    for low, high in pairwise(edges):
        inside = Interval(low, high, scratch).holds()
        yield low, high, _merge(pl.scan_parquet(runs).filter(inside))


def _count_part(part: PartOfLog, feature: str, weight: str | None) -> pl.DataFrame:
    from recsys.data.dictionary import sums_by_code  # noqa: PLC0415  (numba)

    batch = read_part(part.path, [feature, SPLIT, *([weight] if weight else [])])
    column = batch.column(feature)
    trains = part.split(batch) == TRAIN
    times = np.where(trains, batch.column(weight).to_numpy(), 0).astype(np.int64) if weight else trains
    counts = sums_by_code(column.indices.to_numpy(), times, len(column.dictionary))
    counted = pl.DataFrame({"key": pl.Series(column.dictionary), "count": counts.astype(np.uint64)})
    return counted.filter(pl.col("key").is_not_null() & (pl.col("count") > 0))


def _merge(counted: pl.LazyFrame) -> pl.DataFrame:
    return counted.group_by("key").agg(pl.col("count").sum()).collect()


# ---- ids


def _give_ids(intervals: Sequence[Interval]) -> np.ndarray:
    """Add a column of ids to the kept values: by count, then by interval, then by key within it.

    That is the order by (count, key) of all, since intervals stand in order of their keys.

    Returns the number of values of each count (descending) in each interval, int64 [counts, intervals].
    """
    tallies = []
    for interval in intervals:
        counts = pl.read_parquet(interval.kept, columns=["count"])["count"].to_numpy().astype(np.int64)
        tallies.append(np.unique(counts, return_counts=True))
    descending = np.unique(np.concatenate([-counts for counts, _ in tallies]))
    sizes = np.zeros((len(descending), len(intervals)), dtype=np.int64)
    for i, (counts, num_values) in enumerate(tallies):
        sizes[np.searchsorted(descending, -counts), i] = num_values
    starts = 1 + sizes.cumsum().reshape(sizes.shape) - sizes
    for i, interval in enumerate(intervals):
        own = sizes[:, i]
        within = np.arange(own.sum()) - np.repeat(own.cumsum() - own, own)
        ids = pl.Series("id", np.repeat(starts[:, i], own) + within, dtype=pl.Int64)
        kept = pl.read_parquet(interval.kept).with_columns(ids)
        kept.write_parquet(interval.kept, compression="lz4", row_group_size=RUN_GROUP_ROWS)
    return sizes


def _write_vocabulary(path: Path, intervals: Sequence[Interval], sizes: np.ndarray, num_ids: int) -> None:
    """Write key, id (Int32) and count in order of id, in row groups of one size, however many intervals there were."""
    empty = _vocabulary_frame(pl.DataFrame(schema=pl.read_parquet_schema(intervals[0].kept)), 0)
    with pq.ParquetWriter(path, empty.to_arrow().schema, compression="lz4") as writer:
        waiting = empty
        for block in _in_order_of_ids(intervals, sizes):
            waiting = pl.concat([waiting, _vocabulary_frame(block, num_ids)])
            whole_groups = waiting.height // RUN_GROUP_ROWS * RUN_GROUP_ROWS
            if whole_groups:
                writer.write_table(waiting[:whole_groups].rechunk().to_arrow(), row_group_size=RUN_GROUP_ROWS)
                waiting = waiting[whole_groups:]
        if waiting.height:
            writer.write_table(waiting.rechunk().to_arrow(), row_group_size=RUN_GROUP_ROWS)


def _in_order_of_ids(intervals: Sequence[Interval], sizes: np.ndarray) -> Iterator[pl.DataFrame]:
    """Merge the kept values of all intervals, a block of counts at a time."""
    ends = sizes.sum(axis=1).cumsum()
    read = np.zeros(len(intervals), dtype=np.int64)
    begin = 0
    while begin < len(ends):
        written = ends[begin - 1] if begin else 0
        end = max(int(np.searchsorted(ends, written + BLOCK_ROWS, side="right")), begin + 1)
        slices = []
        for i, num_rows in enumerate(sizes[begin:end].sum(axis=0)):
            slices += [
                pl.scan_parquet(intervals[i].kept).slice(int(at), min(BLOCK_ROWS, int(read[i] + num_rows - at)))
                for at in range(read[i], read[i] + num_rows, BLOCK_ROWS)
            ]
            read[i] += num_rows
        if end == begin + 1:
            # Values of one count follow one another interval by interval: however many there are, none is sorted.
            yield from (part.collect() for part in slices)
        else:
            yield pl.concat(slices).sort("id").collect()
        begin = end


def _vocabulary_frame(frame: pl.DataFrame, num_ids: int) -> pl.DataFrame:
    return frame.filter(pl.col("id") < num_ids).select("key", pl.col("id").cast(pl.Int32), "count")


# ---- the remap


def _write_counted_remap(job: VocabularyJob, path: Path, intervals: Sequence[Interval], num_ids: int) -> None:
    """Write the remap by the kept values; with many intervals, each looks up only the entries that lie in it."""

    def ids_of(interval: Interval) -> pl.DataFrame:
        return pl.read_parquet(interval.kept, columns=["key", "id"]).filter(pl.col("id") < num_ids)

    if len(intervals) == 1:
        ids = ids_of(intervals[0])
        write_remap(job, path, lambda _, keys: keys.join(ids, on="key"))
        return
    scratch = intervals[0].kept.parent
    num_batches = 0
    for batch, (first, last) in enumerate(job.batches()):
        keys = entries_of(job, first, last).sort("key")
        edges = [0, *(keys["key"].search_sorted(interval.low) for interval in intervals[1:]), keys.height]
        for i, (begin, end) in enumerate(pairwise(edges)):
            keys[begin:end].write_parquet(scratch / f"{i}.{batch}.entries.parquet", compression="lz4")
        num_batches += 1
    for i, interval in enumerate(intervals):
        ids = ids_of(interval)
        for batch in range(num_batches):
            entries = scratch / f"{i}.{batch}.entries.parquet"
            found = pl.read_parquet(entries).join(ids, on="key").select("at", "id")
            found.write_parquet(scratch / f"{batch}.{i}.ids.parquet", compression="lz4")
            entries.unlink()
    write_remap(
        job,
        path,
        lambda batch, _: pl.concat(
            pl.read_parquet(scratch / f"{batch}.{i}.ids.parquet", memory_map=False) for i in range(len(intervals))
        ),
    )
