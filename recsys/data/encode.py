"""Encode, the third stage: typed parts to Parquet, by split, ready to be loaded."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.config import write_whole
from recsys.data.ingest import PartOfLog, read_part
from recsys.data.raw_ids import raw_ids
from recsys.data.schema import SPLITS, Schema
from recsys.place import whole

HASH_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """One part to encode."""

    part: PartOfLog
    index: int
    """Of the part in the log; it numbers the files."""
    schema: Schema
    remaps: dict[str, tuple[Path, int, int]]
    """Of each feature: its remap, and where in it this part's entries begin and how many there are. Features whose ids
    are raw have none."""
    group_rows: int
    """Rows that a row group should have."""
    folder: Path
    """For the facts."""
    out: Path


def encode(job: EncodeJob, advance: Callable[[int], None]) -> dict[str, Any]:
    """Write a part's rows to `SPLIT/part-NNNNN.parquet` and return the facts of these files, which are saved too."""
    batch = read_part(job.part.path)
    split = job.part.split(batch)
    order = np.argsort(split, kind="stable")
    ends = np.cumsum(np.bincount(split, minlength=len(SPLITS)))
    is_sorted = bool((split[1:] >= split[:-1]).all())

    columns = {}
    for name in (job.schema.labels[0], *([job.schema.weight] if job.schema.weight else []), *job.schema.dense):
        columns[name] = batch.column(name)
    for name in job.schema.sparse:
        if name in job.remaps:
            path, begin, size = job.remaps[name]
            ids = np.fromfile(path, dtype="<i4", count=size, offset=4 * begin)
        else:
            ids = raw_ids(batch.column(name).dictionary)
        columns[name] = pc.take(pa.array(ids), batch.column(name).indices, boundscheck=False)
    if not is_sorted:
        rows = pa.array(order)
        columns = {name: pc.take(column, rows, boundscheck=False) for name, column in columns.items()}
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    table = pa.table(list(columns.values()), schema=pa.schema(fields))

    facts = {}
    for name, begin, end in zip(SPLITS, [0, *ends], ends, strict=False):
        if begin < end:
            path = job.out / name / f"part-{job.index:05d}.parquet"
            facts[f"{name}/{path.name}"] = _write(path, table.slice(begin, end - begin), job)
    write_whole(job.folder / f"{job.index:05d}.json", json.dumps(facts))
    advance(job.part.num_rows)
    return facts


def _write(path: Path, table: pa.Table, job: EncodeJob) -> dict[str, Any]:
    num_groups = max(round(table.num_rows / job.group_rows), 1)
    with whole(path) as partial:
        # Checksums tell a damaged page from one of other values: of 60 single bits that were flipped, 52 decoded.
        size = -(-table.num_rows // num_groups)
        pq.write_table(table, partial, row_group_size=size, compression="lz4", write_page_checksum=True)
    return {
        "num_rows": table.num_rows,
        "label_sum": int(pc.sum(table.column(0)).as_py()),
    } | file_facts(path)


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
