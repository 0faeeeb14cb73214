"""Prepare: raw click logs to Parquet and schema.json, in bounded memory.

Three stages. Ingest parses raw text once into typed parts and notes what is malformed. The vocabulary counts each
column over training rows. Encode turns parts into ids and dense features, written by split in row groups of one size.
All of it happens in a folder beside `out` that takes its name only at the end, so a prepared folder is always a whole
one.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tyro.conf import Positional

from recsys.config import InputError, dump, nearest
from recsys.data import vocabulary
from recsys.data.formats import BUCKET_RULES, DENSE_RULES, FORMATS, RawFormat
from recsys.data.raw import Malformed, is_gzip, malformed_rows, parse, read_lines
from recsys.data.schema import SPLITS, Schema
from recsys.data.split import TRAIN, split_of
from recsys.progress import progress

PART_ROWS = 1_000_000
MAX_EXAMPLES = 10
# A loader holds a few row groups open at once and copies whole ones: 64k rows fit its cache, and small data still gets
# enough groups to shuffle.
MIN_GROUP_ROWS, MAX_GROUP_ROWS, TARGET_GROUPS = 1024, 65_536, 64


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which raw log to prepare, and how."""

    format: Positional[str]
    """Format of the raw log: criteo_kaggle."""
    paths: Positional[tuple[Path, ...]]
    """Raw files, plain or gzip, in time order."""
    out: Path
    """Folder to make; it must not exist yet."""
    threshold: int = 5
    """A value keeps an id of its own when it occurs at least this often in training rows; rarer ones share id 0."""
    integers: str = "log1p"
    """Rule for integer columns: log1p gives dense features, log_squared_bucket gives categories."""
    split: str = "random"
    """random (8:1:1) or time (first 80 % train, next 10 % validate, last 10 % test)."""
    seed: int = 2021
    """Seed of the random split."""
    max_malformed: int = 0
    """Malformed rows to leave out before giving up."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"unknown format {self.format!r}; {nearest(self.format, FORMATS)}")
        rules = {**DENSE_RULES, **BUCKET_RULES}
        if self.integers not in rules:
            raise InputError(f"unknown rule --integers {self.integers!r}; {nearest(self.integers, rules)}")
        if self.split not in ("random", "time"):
            raise InputError(f"unknown --split {self.split!r}; {nearest(self.split, ('random', 'time'))}")
        if self.threshold < 1:
            raise InputError(f"--threshold {self.threshold} must be at least 1 (1 keeps every value)")
        if self.seed < 0 or self.max_malformed < 0:
            raise InputError("--seed and --max-malformed must not be negative")
        if not self.paths:
            raise InputError("no raw file named")


@dataclass
class Ingested:
    """What ingest found: typed parts on disk, and the facts of the raw log."""

    parts: list[Path] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    nulls: Counter[str] = field(default_factory=Counter)
    malformed: list[Malformed] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Well-formed rows in all."""
        return sum(self.rows)


def prepare(config: PrepareConfig) -> dict:
    """Prepare a raw log and return its manifest.

    Raises:
        InputError: `out` exists or cannot be made, a file cannot be read, or more rows are malformed than
            `max_malformed`.
    """
    if config.out.exists():
        raise InputError(f"{config.out}: exists already; name another --out, or delete it first")
    for path in config.paths:
        is_gzip(path)  # a wrong name of the last file is told now, not after hours
    partial = config.out.with_name(f".{config.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts = partial / "parts"
    try:
        parts.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{config.out}: cannot make it ({error.strerror})") from None
    try:
        ingested = _ingest(config, parts)
        manifest = _encode(config, ingested, partial)
        shutil.rmtree(parts)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        partial.rename(config.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _ingest(config: PrepareConfig, folder: Path) -> Ingested:
    """Parse raw text into typed parts of about a million rows each."""
    found = Ingested()
    waiting: list[pl.DataFrame] = []

    def flush() -> None:
        frame = pl.concat(waiting, rechunk=False)
        found.parts.append(folder / f"{len(found.parts):06d}.parquet")
        found.rows.append(frame.height)
        frame.write_parquet(found.parts[-1], compression="lz4", statistics=False)
        waiting.clear()

    with progress("ingest", total=None, unit="rows") as advance:
        for path in config.paths:
            for frame in _parse_file(config, path, found):
                found.nulls.update(dict(zip(frame.columns, frame.null_count().row(0), strict=True)))
                waiting.append(frame)
                advance(frame.height, path.name)
                if sum(f.height for f in waiting) >= PART_ROWS:
                    flush()
        if waiting:
            flush()
        if not found.num_rows:
            raise InputError(f"{config.paths[0]}: no well-formed row in it")
    return found


def _parse_file(config: PrepareConfig, path: Path, found: Ingested) -> Iterator[pl.DataFrame]:
    raw = FORMATS[config.format]
    next_row = 1
    for chunk in read_lines(path):
        lines = chunk
        frame = parse(raw, lines)
        if frame is None:
            lines, bad = malformed_rows(raw, path, chunk, next_row)
            found.malformed += bad
            if len(found.malformed) > config.max_malformed:
                raise InputError(_too_many(config, found.malformed))
            frame = parse(raw, lines)
            assert frame is not None, f"{path}: a chunk at row {next_row} parses neither fast nor slowly"
        next_row += chunk.count(b"\n")
        yield frame


def _too_many(config: PrepareConfig, malformed: list[Malformed]) -> str:
    first = "; ".join(map(str, malformed[:3]))
    more = f"; and {len(malformed) - 3} more so far" if len(malformed) > 3 else ""
    return (
        f"{first}{more} (at most {config.max_malformed} malformed rows are tolerated: --max-malformed N leaves out N)"
    )


def _keys(config: PrepareConfig, raw: RawFormat) -> dict[str, pl.Expr]:
    """Categorical features in field order, each as an expression over typed columns."""
    keys = {}
    if config.integers in BUCKET_RULES:
        keys = {name: BUCKET_RULES[config.integers](pl.col(name)) for name in raw.integers}
    return keys | {name: pl.col(name) for name in raw.categories}


def _encode(config: PrepareConfig, ingested: Ingested, out: Path) -> dict:
    """Write splits, vocabularies and schema into `out`, and return the manifest."""
    raw = FORMATS[config.format]
    keys = _keys(config, raw)
    split = split_of(pl.col("row"), config.split, seed=config.seed, num_rows=ingested.num_rows)
    log = pl.scan_parquet(ingested.parts, row_index_name="row").with_columns(pl.col("row").cast(pl.UInt64))
    train = log.filter(split == TRAIN)
    vocabularies = {}
    with progress("vocabulary", total=len(keys), unit="columns") as advance:
        for name, key in keys.items():
            vocabularies[name] = vocabulary.count_values(train.select(key=key), threshold=config.threshold)
            advance(1, name)
    dense = {}
    if config.integers in DENSE_RULES:
        dense = {name: DENSE_RULES[config.integers](pl.col(name)) for name in raw.integers}
    sizes = {name: entries.height + 1 for name, entries in vocabularies.items()}
    schema = Schema(name=config.format, dense=tuple(dense), sparse=sizes, labels=(raw.label,))

    group_rows = min(max(ingested.num_rows // TARGET_GROUPS, MIN_GROUP_ROWS), MAX_GROUP_ROWS)
    writers = [SplitWriter(out / name, group_rows) for name in SPLITS]
    first_row = 0
    with progress("encode", total=ingested.num_rows, unit="rows") as advance:
        for path, num_rows in zip(ingested.parts, ingested.rows, strict=True):
            part = pl.read_parquet(path)
            numbers = pl.int_range(first_row, first_row + num_rows, dtype=pl.UInt64).alias("row")
            splits = part.select(numbers).select(split.alias("split"))["split"]
            ids = [
                vocabulary.encode(part.select(key=key), vocabularies[name]).alias(name) for name, key in keys.items()
            ]
            features = part.select(
                pl.col(raw.label), *(rule.cast(pl.Float32).alias(name) for name, rule in dense.items())
            ).hstack(ids)
            for index, writer in enumerate(writers):
                writer.append(features.filter(splits == index).to_arrow())
            first_row += num_rows
            advance(num_rows)
    for writer in writers:
        writer.close()
    vocabulary.save(vocabularies, out / "vocabulary")
    schema.save(out)
    return {
        "schema_hash": schema.hash,
        "config": dump(config) | {"out": None},
        "num_rows": ingested.num_rows,
        "splits": {
            name: {"num_rows": writer.num_rows, "label_mean": writer.label_sum / max(writer.num_rows, 1)}
            for name, writer in zip(SPLITS, writers, strict=True)
        },
        "null_share": {name: ingested.nulls[name] / ingested.num_rows for name in raw.columns},
        "num_malformed": len(ingested.malformed),
        "malformed": [str(row) for row in ingested.malformed[:MAX_EXAMPLES]],
    }


class SplitWriter:
    """Writes one split as one Parquet file of row groups that all have `group_rows` rows, but for the last."""

    def __init__(self, folder: Path, group_rows: int) -> None:
        folder.mkdir()
        self.path = folder / "part-00000.parquet"
        self.group_rows = group_rows
        self.num_rows = 0
        self.label_sum = 0
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._writer: pq.ParquetWriter | None = None

    def append(self, table: pa.Table) -> None:
        """Add rows; whole row groups are written at once."""
        self._writer = self._writer or pq.ParquetWriter(self.path, table.schema, compression="lz4")
        self.num_rows += table.num_rows
        self.label_sum += int(table[0].to_numpy().sum())
        self._waiting.append(table)
        self._num_waiting += table.num_rows
        if self._num_waiting >= self.group_rows:
            self._write(self._num_waiting // self.group_rows * self.group_rows)

    def _write(self, num_rows: int) -> None:
        assert self._writer is not None
        table = pa.concat_tables(self._waiting)
        self._writer.write_table(table.slice(0, num_rows).combine_chunks(), row_group_size=self.group_rows)
        self._waiting = [table.slice(num_rows)]
        self._num_waiting -= num_rows

    def close(self) -> None:
        """Write what is left and the file's footer."""
        if self._num_waiting:
            self._write(self._num_waiting)
        if self._writer:
            self._writer.close()
