"""Multi-hot files: the lists are those of the loader's route, all else is kept, and what cannot work is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.data.multihot import DISTRIBUTIONS, MLPERF_SIZES, MultiHot
from recsys.data.multihot_files import MultiHotConfig, store_multi_hot
from recsys.data.schema import SPLITS, Schema

SCHEMA = Schema(
    name="test",
    dense=("I1", "I2"),
    sparse={f"C{i}": 3 + i * i for i in range(1, 27)},
    labels=("label",),
    weight="weight",
)
GROUPS = {
    "train/part-00000.parquet": [100, 100, 57],
    "train/part-00001.parquet": [80],
    "valid/part-00000.parquet": [33],
    "test/part-00000.parquet": [],
}


def rows(num_rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "label": rng.integers(0, 2, num_rows).astype(np.uint8),
            **{name: rng.normal(size=num_rows).astype(np.float32) for name in SCHEMA.dense},
            **{name: rng.integers(0, size, num_rows).astype(np.int32) for name, size in SCHEMA.sparse.items()},
            "weight": rng.random(num_rows).astype(np.float32),
        }
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as `recsys prepare` makes it: several files and row groups, and a split without a row."""
    folder = tmp_path / "data"
    for seed, (name, groups) in enumerate(GROUPS.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, rows(0, seed).schema) as writer:
            for group, num_rows in enumerate(groups):
                writer.write_table(rows(num_rows, 10 * seed + group))
    SCHEMA.save(folder)
    (folder / "vocabulary").mkdir()
    (folder / "vocabulary" / "C1.parquet").write_bytes(b"values of C1")
    files = {name: facts(folder / name) for name in [*GROUPS, "schema.json", "vocabulary/C1.parquet"]}
    files["valid/part-00000.parquet"]["label_sum"] = 12
    manifest = {"schema_hash": SCHEMA.hash, "num_rows": 370, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def facts(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_stored_lists_are_those_that_a_loader_makes(data: Path, tmp_path: Path, distribution: Any) -> None:
    out = tmp_path / "out"
    store_multi_hot(MultiHotConfig(data=data, out=out, distribution=distribution, seed=7))
    schema = Schema.load(out)
    assert schema.sparse == SCHEMA.sparse
    assert schema.hotness == {f: s for f, s in zip(SCHEMA.sparse, MLPERF_SIZES, strict=True) if s > 1}
    multi_hot = MultiHot(SCHEMA, MLPERF_SIZES, distribution, 7)
    for name, groups in GROUPS.items():
        before, after = pq.ParquetFile(data / name), pq.ParquetFile(out / name)
        assert after.num_row_groups == len(groups)
        assert after.schema_arrow.names == before.schema_arrow.names
        for group, num_rows in enumerate(groups):
            source, stored = before.read_row_group(group), after.read_row_group(group)
            assert stored.num_rows == num_rows
            ids = np.stack([source[feature].to_numpy() for feature in SCHEMA.sparse])
            assert ids.dtype == np.int32
            flat = [
                stored[feature].combine_chunks().flatten() if feature in schema.hotness else stored[feature]
                for feature in SCHEMA.sparse
            ]
            np.testing.assert_array_equal(np.concatenate([f.to_numpy() for f in flat]), multi_hot.expand(ids))
            kept = [c for c in source.column_names if c not in schema.hotness]
            assert stored.select(kept).equals(source.select(kept))


def test_features_of_several_ids_are_fixed_size_lists_without_nulls(data: Path, tmp_path: Path) -> None:
    store_multi_hot(MultiHotConfig(data=data, out=tmp_path / "out"))
    columns = pq.read_schema(tmp_path / "out" / "train" / "part-00001.parquet")
    assert columns.field("C3") == pa.field("C3", pa.int32())
    list_of_three = pa.list_(pa.field("element", pa.int32(), nullable=False), 3)
    assert columns.field("C1") == pa.field("C1", list_of_three, nullable=False)


def test_all_else_comes_along(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    sizes = [2] + 25 * [1]
    assert main(["multihot", str(data), "--out", str(out), "--seed", "4", "--sizes", *map(str, sizes)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{out}: 27 ids a row of 26 features, uniform but for the first\n"
    assert told.err.startswith("multihot: 370 rows, ")
    manifest = json.loads((out / "manifest.json").read_text())
    files = manifest.pop("files")
    assert files.pop("valid/part-00000.parquet") == {**facts(out / "valid/part-00000.parquet"), "label_sum": 12}
    assert files == {name: facts(out / name) for name in files}
    assert manifest == {
        "schema_hash": Schema.load(out).hash,
        "num_rows": 370,
        "multi_hot": {
            "distribution": "uniform",
            "seed": 4,
            "sizes": dict(zip(SCHEMA.sparse, sizes, strict=True)),
            "source_schema_hash": SCHEMA.hash,
        },
    }
    assert (out / "vocabulary" / "C1.parquet").read_bytes() == b"values of C1"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}


def test_the_choices_are_the_distributions() -> None:
    assert get_type_hints(MultiHotConfig)["distribution"].__args__ == tuple(DISTRIBUTIONS)


as_int64 = pa.schema([(f.name, pa.int64() if f.type == pa.int32() else f.type) for f in rows(0, 0).schema])


def make_multi_hot(data: Path) -> None:
    Schema(name="test", dense=(), sparse=SCHEMA.sparse, labels=("label",), hotness={"C2": 4}).save(data)


def make_nulls(data: Path) -> None:
    table = rows(10, 0)
    nulls = pa.array([None] + 9 * [1], type=pa.int32())
    pq.write_table(table.set_column(table.column_names.index("C5"), "C5", nulls), data / "train/part-00001.parquet")


def make_large_ids(data: Path) -> None:
    table = rows(10, 0)
    large = pa.array(10 * [500], type=pa.int32())
    pq.write_table(table.set_column(table.column_names.index("C5"), "C5", large), data / "train/part-00001.parquet")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda data: (data / "schema.json").unlink(), "", "{data}: no schema.json in it"),
        (lambda data: (data.parent / "out").mkdir(), "", "{data}/../out: exists already; name another --out"),
        (
            lambda data: None,
            "--sizes 1 2",
            "2 sizes for 26 sparse features; name one size a feature, in this order: C1",
        ),
        (lambda data: None, f"--sizes {'1 ' * 25}0", "size 0 of feature 'C26' must be at least 1"),
        (make_multi_hot, "", "feature 'C2' is multi-hot already, 4 ids a row; expand the data that it was made from"),
        (
            lambda data: [path.unlink() for path in data.glob("*/*-*.parquet")],
            "",
            "{data}: no Parquet file in train, valid, test; prepare again",
        ),
        (lambda data: (data / "manifest.json").write_text("{"), "", "{data}/manifest.json: not JSON (Expecting"),
        (
            lambda data: (data / "valid/part-00000.parquet").write_bytes(b"PAR1"),
            "",
            "{data}/valid/part-00000.parquet: not a whole Parquet file",
        ),
        (
            lambda data: pq.write_table(rows(3, 0).drop("C26"), data / "valid/part-00000.parquet"),
            "",
            "{data}/valid/part-00000.parquet: column 'C26' of schema.json is not in it as int32; prepare again",
        ),
        (
            lambda data: pq.write_table(rows(3, 0).cast(as_int64), data / "valid/part-00000.parquet"),
            "",
            "{data}/valid/part-00000.parquet: column 'C1' of schema.json is not in it as int32; prepare again",
        ),
        (make_nulls, "", "{data}/train/part-00001.parquet, row group 0: a sparse feature has nulls; prepare again"),
        (
            make_large_ids,
            "",
            "{data}/train/part-00001.parquet, row group 0: feature 'C5' has ids 500 to 500, but the schema gives it 28",
        ),
    ],
)
def test_what_cannot_work_is_told_in_one_line_and_leaves_nothing(
    data: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], options: str, message: str
) -> None:
    spoil(data)
    existed = sorted(data.parent.iterdir())
    assert main(["multihot", str(data), "--out", f"{data}/../out", *options.split()]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("recsys: " + message.format(data=data))
    assert sorted(data.parent.iterdir()) == existed


def test_a_folder_that_cannot_be_made(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data / "schema.json" / "out"
    assert main(["multihot", str(data), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"recsys: {out}: cannot make it (Not a directory)\n"


def test_the_splits_stay_apart(data: Path, tmp_path: Path) -> None:
    store_multi_hot(MultiHotConfig(data=data, out=tmp_path / "out"))
    stored = {
        split: sum(pq.read_metadata(p).num_rows for p in (tmp_path / "out" / split).iterdir()) for split in SPLITS
    }
    assert stored == {"train": 337, "valid": 33, "test": 0}
