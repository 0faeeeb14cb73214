"""A small prepared folder, written with pyarrow alone, and hands that change it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.manifest import MANIFEST, TIMINGS
from recsys.data.schema import SPLITS, Schema

Change = Callable[[Path], Any]
"""What may be done to a prepared folder."""

PART = "train/part-00001.parquet"
GROUP_ROWS = 5
PART_ROWS = 10
PARTS = {"train": 2, "valid": 1, "test": 1}
SCHEMA = Schema(
    name="small",
    dense=("I1", "I2"),
    sparse={"C1": 6, "C2": 4, "C3": 200_000},
    labels=("label",),
    weight="weight",
    hotness={"C3": 2},
)
PAIR = pa.list_(pa.field("element", pa.int32(), nullable=False), 2)
COLUMNS = pa.schema(
    [
        pa.field("label", pa.uint8(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("I1", pa.float32(), nullable=False),
        pa.field("I2", pa.float32(), nullable=False),
        pa.field("C1", pa.int32(), nullable=False),
        pa.field("C2", pa.int32(), nullable=False),
        pa.field("C3", PAIR, nullable=False),
    ]
)
VOCABULARIES = {
    "C1": pa.table(
        {
            "key": pa.array([0x68FD1E64, 0xBE589B51, 0x05DB9164, 0x8CF07265, 0xF], pa.uint32()),
            "id": pa.array(range(1, 6), pa.int32()),
            "count": pa.array([9, 4, 4, 2, 1], pa.uint32()),
        }
    ),
    "C2": pa.table({"key": ["[red]", "b", "c"], "id": pa.array(range(1, 4), pa.int32()), "count": [8, 6, 6]}),
}


def make_folder(folder: Path) -> Path:
    """Write two parts to train, one to valid and one to test, each of two row groups."""
    rng = np.random.default_rng(0)
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        for part in range(PARTS[split]):
            columns = {
                "label": rng.integers(2, size=PART_ROWS),
                "weight": np.ones(PART_ROWS),
                "I1": np.linspace(0, 1, PART_ROWS),
                "I2": rng.normal(size=PART_ROWS),
                "C1": rng.integers(6, size=PART_ROWS),
                "C2": rng.integers(4, size=PART_ROWS),
                "C3": [[row, 123_456] for row in range(PART_ROWS)],
            }
            arrays = [pa.array(columns[field.name], field.type) for field in COLUMNS]
            write_table(pa.table(arrays, schema=COLUMNS), folder / split / f"part-{part:05d}.parquet")
    (folder / "vocabulary").mkdir()
    for feature, vocabulary in VOCABULARIES.items():
        write_table(vocabulary, folder / "vocabulary" / f"{feature}.parquet")
    SCHEMA.save(folder)
    (folder / TIMINGS).write_text("{}")
    write_manifest(folder)
    return folder


def write_table(table: pa.Table, path: Path, **options: Any) -> None:
    """Write a Parquet file of small row groups."""
    pq.write_table(table, path, row_group_size=GROUP_ROWS, **options)


def change_column(path: Path, name: str, change: Callable[[list], list], **options: Any) -> None:
    """Rewrite a Parquet file with other values in one column."""
    table = pq.read_table(path)
    at = table.schema.get_field_index(name)
    values = pa.array(change(table[name].to_pylist()), table.schema.types[at])
    write_table(table.set_column(at, table.schema.field(at), values), path, **options)


def change_json(path: Path, change: Callable[[dict], Any]) -> None:
    """Rewrite a JSON file that holds a mapping."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files that are there."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, TIMINGS):
            files[path.relative_to(folder).as_posix()] = _facts(path)
    splits = {}
    for split in SPLITS:
        facts = [file for name, file in files.items() if name.startswith(f"{split}/")]
        num_rows = sum(file["num_rows"] for file in facts)
        label_sum = sum(file["label_sum"] for file in facts)
        splits[split] = {"num_rows": num_rows, "label_mean": label_sum / max(num_rows, 1)}
    manifest = {
        "schema_hash": Schema.load(folder).hash,
        "config": {"format": "small"},
        "num_rows": sum(split["num_rows"] for split in splits.values()),
        "splits": splits,
        "null_share": {"I1": 0.25, "C1": 0.125},
        "num_malformed": 3,
        "malformed": ["log.tsv, row 7: 12 fields"],
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        facts["num_rows"] = file.metadata.num_rows
        if "label" in file.schema_arrow.names:
            facts["label_sum"] = sum(filter(None, file.read(columns=["label"])["label"].to_pylist()))
    return facts


def in_manifest(change: Callable[[dict], Any]) -> Change:
    """Change the manifest alone."""
    return lambda folder: change_json(folder / MANIFEST, change)


def with_value(column: str, row: int, new: Any, file: str = PART, **options: Any) -> Change:
    """Put another value into a column; `options` are those of Parquet's writer."""

    def change(values: list) -> list:
        return [*values[:row], new, *values[row + 1 :]]

    return lambda folder: change_column(folder / file, column, change, **options)


def with_table(change: Callable[[pa.Table], pa.Table], file: str = PART, **options: Any) -> Change:
    """Change all rows of a file together."""
    return lambda folder: write_table(change(pq.read_table(folder / file)), folder / file, **options)


def with_type(name: str, kind: pa.DataType, *, nullable: bool = False, first: Any = None, **options: Any) -> Change:
    """Write a column as another type, perhaps with another first value."""

    def change(rows: pa.Table) -> pa.Table:
        values = rows[name].to_pylist()
        values[0] = values[0] if first is None and not nullable else first
        at = rows.schema.get_field_index(name)
        return rows.set_column(at, pa.field(name, kind, nullable), pa.array(values, kind))

    return with_table(change, **options)


def flip_bit(path: Path) -> None:
    """Flip a bit that no reader looks at: the first of all."""
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def break_page(path: Path) -> None:
    """Overwrite the header of the first page of I1."""
    at = pq.read_metadata(path).row_group(0).column(2).dictionary_page_offset
    content = path.read_bytes()
    path.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])


def lie_in_statistics(path: Path) -> None:
    """Raise the largest id of C3 in the footer alone."""
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    truth, lie = (np.int32(largest).tobytes() for largest in (123_456, 300_000))
    path.write_bytes(content[:footer] + content[footer:].replace(truth, lie))
