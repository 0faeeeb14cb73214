"""Ingest, the first stage: one scan of a raw file, to typed parts on disk.

A part holds `PART_ROWS` raw rows as one Arrow file: label, dense features in their final form, and every category as
codes into the part's own dictionary of distinct values. Whatever comes later (counting, ids) works on the dictionaries,
and touches rows only through their codes.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from recsys.config import InputError, write_whole
from recsys.data.formats import BUCKET_RULES, CATEGORY_KINDS, DENSE_RULES, RawFormat, hour_features
from recsys.data.parse import Malformed, malformed_rows, parse, typed_table
from recsys.data.raw import Chunk, cut, read_chunks
from recsys.data.split import split_by_key, split_of
from recsys.place import whole

T = TypeVar("T")

SPLIT = ".split"
"""A part's column of split indices; no feature's name begins with a dot."""

PART_ROWS = 2**19
PART_BYTES = 192 << 20
"""Of a part's text, and of its columns at 8 bytes a value: long or wide rows make parts of fewer."""
MAX_EXAMPLES = 10
MAX_EXPANSION = 20
"""Rows that a raw row may become on average over a chunk (KDD Cup 2012 has 1.6)."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How typed columns become features, the same for every file of a log."""

    raw: RawFormat
    integers: str
    impressions: str
    split: str
    seed: int
    max_malformed: int

    @property
    def keys(self) -> dict[str, pl.Expr]:
        """Categorical features in field order, each as an expression over typed columns."""
        keys: dict[str, pl.Expr] = {}
        for column in self.raw.columns:
            if column.kind == "integer" and self.integers in BUCKET_RULES:
                keys[column.name] = BUCKET_RULES[self.integers](pl.col(column.name))
            elif column.kind == "hour":
                keys |= hour_features(column.name)
            elif column.kind in CATEGORY_KINDS or (column.kind == "impressions" and self.impressions == "feature"):
                keys[column.name] = pl.col(column.name)
        return keys

    @property
    def dense(self) -> tuple[str, ...]:
        """Dense features in column order."""
        return self.raw.named("integer", "float") if self.integers in DENSE_RULES else self.raw.named("float")

    @property
    def weight(self) -> str | None:
        """Name of the column of weights, where rows have them."""
        return "weight" if self.raw.named("impressions") and self.impressions == "weight" else None

    @property
    def splits_early(self) -> bool:
        """Whether a row's split is known while it is parsed."""
        return self.split == "random" or self.split.startswith("hash:")


@dataclass(frozen=True, kw_only=True)
class IngestJob:
    """One raw file to ingest."""

    rules: Rules
    path: Path
    file: int
    """Its index in the log."""
    folder: Path
    """Where parts go."""
    threads: int

    @property
    def part_rows(self) -> int:
        """Raw rows of a part."""
        return max(min(PART_ROWS, PART_BYTES // (8 * len(self.rules.raw.columns))), 1)


@dataclass
class PartFacts:
    """What is known of a part; saved within it."""

    num_rows: int = 0
    num_raw_rows: int = 0
    """Well-formed rows of the raw file; an expanded row counts once."""
    num_values: dict[str, int] = field(default_factory=dict)
    """Size of each category's dictionary, null included."""
    nulls: Counter[str] = field(default_factory=Counter)
    num_malformed: int = 0
    malformed: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PartOfLog:
    """A part and its place in the log, once all files are ingested."""

    path: Path
    num_rows: int
    bounds: tuple[int, int] | None
    """Its rows at which validation and test begin, where the split is an interval of the log; else a column tells."""
    num_values: dict[str, int]

    def split(self, batch: pa.RecordBatch) -> np.ndarray:
        """Index in `SPLITS` of each row, uint8 [num_rows]."""
        if self.bounds is None:
            return batch.column(SPLIT).to_numpy()
        split = np.zeros(self.num_rows, dtype=np.uint8)
        for bound in self.bounds:
            split[bound:] += 1
        return split


class Rows(NamedTuple):
    """A parsed chunk."""

    features: pl.DataFrame
    raw_rows: np.ndarray | None
    """Of each row the chunk's row that it comes from; None where they are the same."""
    facts: PartFacts


def part_path(folder: Path, file: int, part: int) -> Path:
    """Where a part lies."""
    return folder / f"{file:04d}-{part:05d}.arrow"


def fingerprint(path: Path) -> list[int]:
    """Size and time of change of a raw file (of an object on a store, size alone)."""
    found = path.stat()
    return [int(found.st_size), int(getattr(found, "st_mtime_ns", 0))]


def ingest(job: IngestJob, advance: Callable[[int, int], None]) -> dict[str, Any]:
    """Ingest one raw file and return its facts, which are also saved beside its parts.

    Parts that an earlier, interrupted call left are kept: the file is read past them without parsing.

    Args:
        job: the file.
        advance: called with the bytes of the file and the rows that were done since the last call.

    Raises:
        InputError: the file cannot be read, changes meanwhile, or has too many malformed rows.
    """
    found = fingerprint(job.path)
    _forget_other_file(job, found)
    parts: list[PartFacts] = []
    offset = first_row = 0
    with ThreadPoolExecutor(job.threads) as pool:
        for rows, end in _parsed(job, pool):
            path = part_path(job.folder, job.file, len(parts))
            facts = _write_part(job, path, rows, first_row, pool) if rows else read_facts(path)
            assert facts, f"{path}: gone since it was looked at"
            first_row += facts.num_raw_rows
            parts.append(facts)
            advance(end - offset, facts.num_rows)
            offset = end
            _check_malformed(job, parts)
    if fingerprint(job.path) != found:
        raise InputError(f"{job.path}: the file changed while it was read; run the same command once it is complete")
    facts_of_file = {"path": str(job.path), "fingerprint": found, "parts": [vars(part) for part in parts]}
    write_whole(job.folder / f"{job.file:04d}.json", json.dumps(facts_of_file))
    return facts_of_file


def _forget_other_file(job: IngestJob, found: list[int]) -> None:
    """Remove the parts of an interrupted ingest if the file has changed since, as it does when it is mended."""
    begun = job.folder / f"{job.file:04d}.begun"
    if not begun.exists() or json.loads(begun.read_text()) != found:
        for path in job.folder.glob(f"{job.file:04d}-*"):
            path.unlink()
    write_whole(begun, json.dumps(found))


def _parsed(job: IngestJob, pool: ThreadPoolExecutor) -> Iterator[tuple[list[Rows], int]]:
    """Yield the parsed chunks of each part, none for a part that stands already, and the file's offset behind it."""

    def submitted() -> Iterator[tuple[int, Future[Rows] | None, int]]:
        part, row, begins, stands = 0, 1, True, False
        for chunk, ends in cut(read_chunks(job.rules.raw, job.path), job.part_rows, PART_BYTES):
            if begins:
                stands = read_facts(part_path(job.folder, job.file, part)) is not None
            yield part, None if stands else pool.submit(_rows, job, chunk, row), chunk.offset
            row, part, begins = row + chunk.num_rows, part + ends, ends

    for _, chunks in groupby(_ahead(submitted(), job.threads), key=itemgetter(0)):
        parsed, offset = [], 0
        for _, future, offset in chunks:  # noqa: B007
            if future:
                parsed.append(future.result())
        yield parsed, offset


def _ahead(items: Iterator[T], num_items: int) -> Iterator[T]:
    """Yield items, having taken `num_items` more than were yielded."""
    window: deque[T] = deque()
    for item in items:
        window.append(item)
        if len(window) > num_items:
            yield window.popleft()
    yield from window


def _rows(job: IngestJob, chunk: Chunk, first_row: int) -> Rows:
    """Parse a chunk and make its features."""
    raw, content = job.rules.raw, chunk.content
    malformed: list[Malformed] = []
    if isinstance(content, pa.Table):
        typed: pl.DataFrame | None
        typed, malformed = typed_table(raw, job.path, content, first_row)
    else:
        typed = parse(raw, content)
        if typed is None:
            lines, malformed = malformed_rows(raw, job.path, content, first_row)
            typed = parse(raw, lines) if lines else None
            assert typed is not None or not lines, f"{job.path}, row {first_row}: parses neither fast nor slowly"
    facts = PartFacts(num_malformed=len(malformed), malformed=[str(row) for row in malformed[:MAX_EXAMPLES]])
    if typed is None:
        return Rows(pl.DataFrame(), None, facts)
    facts.nulls.update(dict(zip(typed.columns, typed.null_count().row(0), strict=True)))
    facts.num_raw_rows = typed.height
    typed, raw_rows = _expand(job.rules, typed, job.path)
    return Rows(_features(job.rules, typed), raw_rows, facts)


def _expand(rules: Rules, typed: pl.DataFrame, path: Path) -> tuple[pl.DataFrame, np.ndarray | None]:
    """Turn clicks and impressions into labels: one row, or as many rows (or as much weight) as impressions."""
    if not rules.raw.named("impressions"):
        return typed, None
    clicks_name, impressions_name = rules.raw.label, rules.raw.named("impressions")[0]
    if rules.impressions == "feature":
        return typed.with_columns((pl.col(clicks_name) > 0).cast(pl.UInt8)), None
    clicks, impressions = (typed[name].cast(pl.Int64).to_numpy() for name in (clicks_name, impressions_name))
    times = np.stack([clicks, np.maximum(impressions - clicks, 0)], axis=1).reshape(-1)
    counts = times if rules.impressions == "expand" else np.minimum(times, 1)
    if counts.sum() > MAX_EXPANSION * typed.height + PART_ROWS:
        raise InputError(
            f"{path}: its impressions expand {typed.height:,} rows to {counts.sum():,}; --impressions weight keeps "
            f"them in two rows each"
        )
    at = np.repeat(np.arange(len(times)), counts)
    rows = typed[at // 2].with_columns(pl.Series(clicks_name, (at % 2 == 0).astype(np.uint8)))
    if rules.weight:
        rows = rows.with_columns(pl.Series(rules.weight, times[at].astype(np.float32)))
    return rows, at // 2


def _features(rules: Rules, typed: pl.DataFrame) -> pl.DataFrame:
    columns = [typed[rules.raw.label]]
    if rules.weight:
        columns.append(typed[rules.weight])
    for name in rules.dense:
        values = typed[name].fill_null(0).to_numpy()
        is_integer = typed[name].dtype.is_integer()
        columns.append(
            pl.Series(name, (DENSE_RULES[rules.integers](values) if is_integer else values).astype(np.float32))
        )
    keys = typed.select(**rules.keys)
    if rules.split.startswith("hash:"):
        hashed = typed[rules.split.partition(":")[2]]
        columns.append(split_by_key(hashed, rules.seed).alias(SPLIT))
    return pl.DataFrame([*columns, *keys])


def _write_part(job: IngestJob, path: Path, chunks: list[Rows], first_row: int, pool: ThreadPoolExecutor) -> PartFacts:
    facts = PartFacts()
    splits = []
    for rows in chunks:
        if job.rules.split == "random":
            within = np.arange(rows.facts.num_raw_rows) if rows.raw_rows is None else rows.raw_rows
            numbers = pl.DataFrame({"row": within.astype(np.uint64) + np.uint64(first_row + facts.num_raw_rows)})
            split = split_of(pl.col("row"), "random", seed=job.rules.seed, num_rows=0, file=job.file)
            splits.append(numbers.select(split=split)["split"])
        facts.num_rows += rows.features.height
        facts.num_raw_rows += rows.facts.num_raw_rows
        facts.nulls.update(rows.facts.nulls)
        facts.num_malformed += rows.facts.num_malformed
        facts.malformed = [*facts.malformed, *rows.facts.malformed][:MAX_EXAMPLES]
    frames = [rows.features for rows in chunks if rows.features.height]
    chunks.clear()
    columns: dict[str, pa.ChunkedArray] = {}
    if frames:
        from recsys.data.dictionary import dictionary_of  # noqa: PLC0415  (numba)

        keys = list(job.rules.keys)
        for name in frames[0].columns:
            columns[name] = pa.chunked_array([frame[name].to_arrow() for frame in frames])
        if splits:
            columns[SPLIT] = pa.chunked_array([split.to_arrow() for split in splits if len(split)])
        frames.clear()
        for name, codes in zip(keys, pool.map(dictionary_of, (columns[name] for name in keys)), strict=True):
            columns[name] = codes
            facts.num_values[name] = len(codes.dictionary)
    _save_part(path, columns, facts)
    return facts


def _save_part(path: Path, columns: Mapping[str, pa.Array | pa.ChunkedArray], facts: PartFacts) -> None:
    arrays = [c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for c in columns.values()]
    batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
    batch = batch.replace_schema_metadata({"facts": json.dumps(vars(facts))})
    with whole(path) as partial, pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def read_part(path: Path, names: list[str] | None = None) -> pa.RecordBatch:
    """Map a part, or some of its columns, into memory."""
    source = pa.memory_map(str(path))
    if names is None:
        return pa.ipc.open_file(source).get_batch(0)
    have = pa.ipc.open_file(source).schema.names
    wanted = [have.index(name) for name in names if name in have]
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted)).get_batch(0)


def read_facts(path: Path) -> PartFacts | None:
    """What is known of a part; None if there is no whole one."""
    try:
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata
    except (OSError, pa.ArrowInvalid):
        return None
    values = json.loads(metadata[b"facts"])
    return PartFacts(**(values | {"nulls": Counter(values["nulls"])}))


def _check_malformed(job: IngestJob, parts: list[PartFacts]) -> None:
    num_malformed = sum(part.num_malformed for part in parts)
    if num_malformed > job.rules.max_malformed:
        raise InputError(
            too_many(job.rules.max_malformed, [told for part in parts for told in part.malformed], num_malformed)
        )


def too_many(max_malformed: int, examples: list[str], num_malformed: int) -> str:
    """Name the first malformed rows and the option that leaves them out."""
    more = f"; and {num_malformed - 3} more so far" if num_malformed > 3 else ""
    return (
        f"{'; '.join(examples[:3])}{more} "
        f"(at most {max_malformed} malformed rows are tolerated: --max-malformed N leaves out N)"
    )
