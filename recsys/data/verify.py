"""Verify a prepared folder: is it what its schema and its manifest say.

Sizes, footers and statistics tell much in no time. What they cannot tell (a flipped bit, statistics that lie) takes
reading every byte: each file is hashed, and decoded one row group and one column at a time, files in parallel.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tyro.conf import Positional

from recsys.data import checks
from recsys.data.manifest import MANIFEST, TIMINGS, FileFacts, Manifest
from recsys.data.schema import SPLITS, Schema
from recsys.place import Place
from recsys.progress import progress

MAX_PROBLEMS_A_FILE = 100


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Which prepared folder to verify, and how thoroughly."""

    folder: Positional[Place]
    """Prepared folder."""
    decode: bool = True
    """Hash and decode every file; without, only what sizes, footers and statistics tell, in no time."""


def verify(folder: Path, *, show_progress: bool = True, decode: bool = True) -> list[str]:
    """Compare a prepared folder with its schema and its manifest.

    Args:
        folder: on disk or on an object store.
        show_progress: tell of rows per second and time left.
        decode: hash and decode every file; False believes footers and statistics.

    Returns:
        Problems, a line each: where (file, row group, column), what, and what was expected. Of each file the first
        hundred, so that memory stays bounded however bad the data is.

    Raises:
        InputError: there is no readable schema or manifest to compare with.
    """
    schema, manifest = Schema.load(folder), Manifest.load(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    problems = [*_check_manifest(manifest, schema), *_check_listing(manifest, present)]
    names = [name for name in manifest.files if name in present]
    total = sum(manifest.files[name].num_rows or 0 for name in names)
    lock = threading.Lock()
    with progress("verify", total=total, unit="rows", show=show_progress) as advance, ThreadPoolExecutor() as threads:

        def tick(num_rows: int) -> None:
            with lock:
                advance(num_rows)

        check = _FileCheck(folder=folder, schema=schema, manifest=manifest, decode=decode, tick=tick)
        for found in threads.map(check, names):
            problems += found
    return problems


def _check_manifest(manifest: Manifest, schema: Schema) -> Iterator[str]:
    """Where the manifest contradicts the schema or itself."""
    if manifest.schema_hash != schema.hash:
        yield f"schema.json: its hash is {schema.hash}, expected {manifest.schema_hash} of the manifest"
    if set(manifest.splits) != set(SPLITS):
        yield f"{MANIFEST}: splits are {', '.join(manifest.splits)}, expected {', '.join(SPLITS)}"
    for split, facts in manifest.splits.items():
        parts = [file for name, file in manifest.files.items() if name.startswith(f"{split}/")]
        num_rows = sum(part.num_rows or 0 for part in parts)
        label_mean = sum(part.label_sum or 0 for part in parts) / max(num_rows, 1)
        if num_rows != facts.num_rows:
            yield f"{MANIFEST}: {split} has {facts.num_rows:,} rows, expected {num_rows:,}, the sum of its files"
        elif not math.isclose(label_mean, facts.label_mean, rel_tol=1e-9):
            yield f"{MANIFEST}: label mean of {split} is {facts.label_mean}, expected {label_mean} by its files"
    num_rows = sum(facts.num_rows for facts in manifest.splits.values())
    if num_rows != manifest.num_rows:
        yield f"{MANIFEST}: {manifest.num_rows:,} rows in all, expected {num_rows:,}, the sum of its splits"


def _check_listing(manifest: Manifest, present: set[str]) -> Iterator[str]:
    """Files that the folder lacks, or has besides those of the manifest."""
    if "schema.json" not in manifest.files:
        yield f"{MANIFEST}: schema.json is not among its files"
    for name in sorted(set(manifest.files) - present):
        yield f"{name}: missing; the manifest lists it"
    for name in sorted(present - {*manifest.files, MANIFEST, TIMINGS, "schema.json"}):
        yield f"{name}: not expected; the manifest does not list it"


@dataclass(frozen=True, kw_only=True)
class _FileCheck:
    """Checks files by name, each in any thread."""

    folder: Path
    schema: Schema
    manifest: Manifest
    decode: bool
    tick: Callable[[int], None]

    def __call__(self, name: str) -> list[str]:
        """Problems of one file: the first ones, if there are many."""
        return list(islice(self._check(name, self.manifest.files[name]), MAX_PROBLEMS_A_FILE))

    def _check(self, name: str, facts: FileFacts) -> Iterator[str]:
        path = self.folder / name
        try:
            size = path.stat().st_size
            if size != facts.bytes:
                yield f"{name}: {size:,} bytes, expected {facts.bytes:,}"
            elif self.decode and (digest := _sha256(path)) != facts.sha256:
                yield f"{name}: sha256 is {digest}, expected {facts.sha256}"
            if name.endswith(".parquet"):
                with checks.open_parquet(path) as file:
                    yield from self._check_parquet(name, file, facts)
        except (OSError, pa.ArrowException) as error:
            yield f"{name}: cannot read it ({checks.one_line(error)}), expected a whole Parquet file"

    def _check_parquet(self, name: str, file: pq.ParquetFile, facts: FileFacts) -> Iterator[str]:
        if file.metadata.num_rows != facts.num_rows:
            yield f"{name}: {file.metadata.num_rows} rows, expected {facts.num_rows}"
        folder, _, base = name.rpartition("/")
        feature = base.removesuffix(".parquet")
        if folder in SPLITS:
            yield from self._check_part(name, file, facts)
        elif folder == "vocabulary" and feature in self.schema.sparse:
            yield from self._check_vocabulary(name, file, self.schema.sparse[feature])
        else:
            yield f"{name}: not expected; neither a part of a split nor the vocabulary of a sparse feature"

    def _check_part(self, name: str, file: pq.ParquetFile, facts: FileFacts) -> Iterator[str]:
        rules, label = checks.rules_of(self.schema), self.schema.labels[0]
        wanted = {column: rule.types for column, rule in rules.items()}
        yield from checks.check_columns(name, file.schema_arrow, wanted, nullable=False)
        columns = checks.readable(file.schema_arrow, wanted)
        leaves = checks.leaves_of(file.metadata)
        label_sum = 0
        for group in range(file.num_row_groups):
            footer = file.metadata.row_group(group)
            for column in columns:
                problems: list[str] = []
                if self.decode:
                    values, problems = checks.decode(file, group, column, rules[column])
                    label_sum += int(values.sum()) if column == label else 0
                # Statistics are wrong on their own account, or for what is told already.
                problems = problems or list(checks.check_statistics(footer.column(leaves[column]), rules[column]))
                yield from (f"{name}, row group {group}, column {column}: {problem}" for problem in problems)
            self.tick(footer.num_rows)
        if self.decode and label in columns and label_sum != facts.label_sum:
            yield f"{name}, column {label}: sums to {label_sum}, expected {facts.label_sum}"

    def _check_vocabulary(self, name: str, file: pq.ParquetFile, num_ids: int) -> Iterator[str]:
        num_keys = file.metadata.num_rows
        if num_keys + 1 != num_ids:
            yield f"{name}: {num_keys:,} keys and id 0, expected {num_ids:,} ids in all by schema.json"
        problems = list(checks.check_columns(name, file.schema_arrow, checks.VOCABULARY_COLUMNS, nullable=True))
        if self.decode and not problems:
            problems = [*checks.check_order(name, file), *checks.check_keys(name, file)]
        yield from problems or checks.check_vocabulary_statistics(name, file)
        self.tick(num_keys)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
