"""Multi-hot files: prepared data stored once with several ids a row and feature."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tyro.conf import Positional

from recsys.config import InputError
from recsys.data.encode import file_facts
from recsys.data.multihot import MLPERF_SIZES, MultiHot
from recsys.data.schema import SPLITS, Schema
from recsys.progress import progress


@dataclass(frozen=True, kw_only=True)
class MultiHotConfig:
    """Which prepared data to store multi-hot, and how."""

    data: Positional[Path]
    """Prepared folder, with one id a row and feature."""
    out: Path
    """Folder to make; it must not exist yet."""
    distribution: Literal["uniform", "pareto"] = "uniform"
    """Of the ids beside the logged one: all alike, or small ids in most lists."""
    seed: int = 0
    """Seed of the ids beside the logged one."""
    sizes: tuple[int, ...] = MLPERF_SIZES
    """Ids a row of each sparse feature, in the schema's order; MLPerf's fit the 26 of Criteo."""


def store_multi_hot(config: MultiHotConfig) -> dict[str, Any]:
    """Copy prepared data with the ids that `MultiHot` gives it, and return the manifest.

    Features of several ids become fixed-size lists; files, row groups and all other columns stay as they are. No more
    than one row group is held in memory, and `out` takes its name at the end.

    Raises:
        InputError: `out` exists or cannot be made, the sizes do not fit, or the data is not as prepared.
    """
    schema = Schema.load(config.data)
    multi_hot = MultiHot(schema, config.sizes, config.distribution, config.seed)
    if config.out.exists():
        raise InputError(f"{config.out}: exists already; name another --out, or delete it first")
    manifest = _manifest(config.data)
    rows = {path: _num_rows(path) for split in SPLITS for path in sorted((config.data / split).glob("*.parquet"))}
    if not rows:
        raise InputError(f"{config.data}: no Parquet file in {', '.join(SPLITS)}; prepare again")
    partial = config.out.with_name(f".{config.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split in SPLITS:
            (partial / split).mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{config.out}: cannot make it ({error.strerror})") from None
    try:
        with progress("multihot", total=sum(rows.values()), unit="rows") as advance:
            written = {}
            for path in rows:
                name = path.relative_to(config.data).as_posix()
                _expand_file(path, partial / name, schema, multi_hot, advance)
                written[name] = file_facts(partial / name)
        _save_rest(config, schema, manifest, written, partial)
        partial.rename(config.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); prepare again") from None


def _num_rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole Parquet file ({error}); prepare again") from None


def _expand_file(path: Path, target: Path, schema: Schema, multi_hot: MultiHot, advance: Callable[..., None]) -> None:
    """Write one file's row groups with lists in place of the features of several ids."""
    with pq.ParquetFile(path) as file:
        columns = file.schema_arrow
        for feature, size in zip(schema.sparse, multi_hot.sizes, strict=True):
            index = columns.get_field_index(feature)
            if index < 0 or columns.field(index).type != pa.int32():
                raise InputError(f"{path}: column {feature!r} of schema.json is not in it as int32; prepare again")
            if size > 1:
                ids = pa.list_(pa.field("element", pa.int32(), nullable=False), size)
                columns = columns.set(index, pa.field(feature, ids, nullable=False))
        with pq.ParquetWriter(target, columns, compression="lz4", write_page_checksum=True) as writer:
            for group in range(file.num_row_groups):
                try:
                    table = _expand_table(file.read_row_group(group), columns, schema, multi_hot)
                except ValueError as error:
                    raise InputError(f"{path}, row group {group}: {error}") from None
                writer.write_table(table, row_group_size=max(table.num_rows, 1))
                advance(table.num_rows, path.name)


def _expand_table(table: pa.Table, columns: pa.Schema, schema: Schema, multi_hot: MultiHot) -> pa.Table:
    ids_FB = np.stack([table[feature].to_numpy() for feature in schema.sparse])
    if ids_FB.dtype != np.int32:  # what pyarrow makes of nulls
        raise ValueError("a sparse feature has nulls; prepare again")
    values = multi_hot.expand(ids_FB)
    arrays = dict(zip(table.column_names, table.columns, strict=True))
    at = 0
    for feature, size in zip(schema.sparse, multi_hot.sizes, strict=True):
        own = values[at : at + table.num_rows * size]
        at += len(own)
        if size > 1:
            arrays[feature] = pa.FixedSizeListArray.from_arrays(pa.array(own), type=columns.field(feature).type)
    return pa.Table.from_arrays(list(arrays.values()), schema=columns)


def _save_rest(
    config: MultiHotConfig, schema: Schema, manifest: dict[str, Any], written: dict[str, dict[str, Any]], folder: Path
) -> None:
    """Write schema, vocabulary and manifest, which is the source's with `written`: size and hash of the new parts."""
    sizes = dict(zip(schema.sparse, config.sizes, strict=True))
    expanded = replace(schema, hotness={feature: size for feature, size in sizes.items() if size > 1})
    expanded.save(folder)
    if (config.data / "vocabulary").exists():
        shutil.copytree(config.data / "vocabulary", folder / "vocabulary", copy_function=_link)
    changed = written | {"schema.json": file_facts(folder / "schema.json")}
    if "files" in manifest:
        manifest["files"] = {name: facts | changed.get(name, {}) for name, facts in manifest["files"].items()}
    manifest["schema_hash"] = expanded.hash
    manifest["multi_hot"] = {
        "distribution": config.distribution,
        "seed": config.seed,
        "sizes": sizes,
        "source_schema_hash": schema.hash,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _link(source: str, target: str) -> None:
    """Give a file a second name; where the two lie on different file systems, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
