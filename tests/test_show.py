"""What `recsys data show` tells of columns, against what was put into them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.config import InputError
from recsys.data import sample as sampling
from recsys.data.manifest import Manifest
from recsys.data.profile import Buckets, DenseProfile, Profile, SparseProfile, profile
from recsys.data.sample import Sample
from recsys.data.schema import Schema
from recsys.place import place
from tests.prepared_folder import SCHEMA, change_column, make_folder, write_manifest

TRAIN = "train/part-00000.parquet", "train/part-00001.parquet"


def put(path: Path, column: str, values: list) -> None:
    change_column(path, column, lambda _: values)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty rows of train whose columns are known: ten labels are 1, those of the odd rows."""
    folder = make_folder(tmp_path_factory.mktemp("show") / "data")
    columns: dict[str, list] = {
        "label": [0, 1] * 10,
        "I1": [float(row) for row in range(20)],
        "I2": [0.5] * 20,
        "C1": [2] * 10 + [1, 3] * 4 + [0, 0],
        "C2": [0] * 20,
        "C3": [[4, 4]] * 20,
    }
    for name, values in columns.items():
        put(folder / TRAIN[0], name, values[:10])
        put(folder / TRAIN[1], name, values[10:])
    write_manifest(folder)
    return folder


def profile_of(folder: Path, *, split: str = "train", max_rows: int = 1000) -> Profile:
    return profile(folder, split=split, max_rows=max_rows, show_progress=False)


@pytest.fixture(scope="session")
def shown(folder: Path) -> Profile:
    return profile_of(folder)


def dense(shown: Profile, name: str) -> DenseProfile:
    return next(column for column in shown.dense if column.name == name)


def sparse(shown: Profile, name: str) -> SparseProfile:
    return next(feature for feature in shown.sparse if feature.name == name)


def test_a_folder_is_named(shown: Profile) -> None:
    assert (shown.name, shown.schema_hash, shown.num_rows, shown.num_malformed) == ("small", SCHEMA.hash, 40, 3)
    assert (shown.split, shown.num_sampled, shown.label_mean) == ("train", 20, 0.5)
    assert [column.name for column in shown.dense] == ["weight", "I1", "I2"]
    assert [feature.name for feature in shown.sparse] == ["C1", "C2", "C3"]


def test_a_dense_column(shown: Profile) -> None:
    column = dense(shown, "I1")
    assert (column.kind, column.null_share) == ("dense", 0.25)
    assert (column.min, column.mean, column.p50, column.max) == (0, 9.5, 9.5, 19)
    assert column.p99 == pytest.approx(18.81)
    assert column.lift == 1.0  # rows 18 and 19: one label of two, as everywhere
    assert sum(column.buckets.counts) == 20
    assert column.buckets.label_means[0] == 0
    assert column.buckets.label_means[-1] == 1


def test_a_constant_column_has_no_top(shown: Profile) -> None:
    column = dense(shown, "I2")
    assert (column.min, column.max, column.lift) == (0.5, 0.5, None)
    assert sum(column.buckets.counts) == 20
    assert dense(shown, "weight").kind == "weight"


@pytest.mark.parametrize("values", [[0.5] * 9 + [7.0], [0.5, 7.0] * 5], ids=["fewer than a tenth", "more"])
def test_equal_values_are_in_the_top_together(folder: Path, tmp_path: Path, values: list[float]) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "data"))
    put(changed / TRAIN[1], "I2", values)
    write_manifest(changed)
    assert dense(profile_of(changed), "I2").lift == 2.0


def test_a_sparse_feature(shown: Profile) -> None:
    feature = sparse(shown, "C1")
    assert (feature.num_ids, feature.hotness, feature.null_share) == (6, 1, 0.125)
    assert feature.rare_share == pytest.approx(0.1)
    assert [(top.id, top.key, top.share, top.lift) for top in feature.top] == [
        (2, "be589b51", 0.5, 1.0),
        (1, "68fd1e64", 0.2, 0.0),
        (3, "05db9164", 0.2, 2.0),
    ]
    entropy = -(0.5 * math.log(0.5) + 2 * 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert feature.effective_ids == pytest.approx(math.exp(entropy))
    assert feature.buckets == Buckets(edges=[1, 2, 3, 4], counts=[10, 4, 4], label_means=[0.5, 0.0, 1.0])


def test_a_feature_that_is_always_missing(shown: Profile) -> None:
    feature = sparse(shown, "C2")
    assert (feature.rare_share, feature.effective_ids, feature.top) == (1.0, 1.0, [])
    assert feature.null_share is None


def test_a_multi_hot_feature_without_a_vocabulary(shown: Profile) -> None:
    feature = sparse(shown, "C3")
    assert feature.hotness == 2
    assert [(top.key, top.share, top.lift) for top in feature.top] == [("id 4", 1.0, 1.0)]


def test_an_object_store_is_shown_as_a_disk_is(folder: Path, shown: Profile) -> None:
    stored = place("memory://show/data")
    for path in folder.rglob("*"):
        if path.is_file():
            copy = stored / path.relative_to(folder).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert profile_of(stored) == shown


@pytest.mark.parametrize(
    ("max_rows", "max_files", "rows"),
    [
        (20, 1, list(range(20))),
        (1000, 64, list(range(20))),
        (10, 64, [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]),
        (16, 64, [*range(8), *range(10, 18)]),
        (3, 64, [0, 10]),
        (1, 64, [0]),
        (8, 1, list(range(8))),
    ],
)
def test_a_sample_is_spread_over_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_rows: int, max_files: int, rows: list[int]
) -> None:
    monkeypatch.setattr(sampling, "MAX_FILES", max_files)
    with Sample(folder, "train", Schema.load(folder), Manifest.load(folder), max_rows) as sample:
        assert sample.read("I1").tolist() == rows
        assert len(sample.read("C3")) == 2 * len(rows)


def test_a_sample_is_spread_over_row_groups(folder: Path, tmp_path: Path) -> None:
    regrouped = Path(shutil.copytree(folder, tmp_path / "data"))
    pq.write_table(pq.read_table(regrouped / TRAIN[0]), regrouped / TRAIN[0], row_group_size=2)
    with Sample(regrouped, "train", Schema.load(folder), Manifest.load(folder), 8) as sample:
        assert sample.read("I1").tolist() == [0, 1, 4, 5, 10, 11, 12, 13]


def test_a_key_is_found_in_any_row_group(folder: Path, tmp_path: Path, shown: Profile) -> None:
    regrouped = Path(shutil.copytree(folder, tmp_path / "data"))
    path = regrouped / "vocabulary/C1.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=1)
    assert profile_of(regrouped) == shown


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("I1", math.nan, "row group 1, column I1: values that are not finite: 1, the first is nan at 4"),
        ("C1", 7, "row group 1, column C1: ids outside [0, 6): 1, the first is 7 at 4"),
    ],
)
def test_what_the_schema_forbids_is_not_shown(
    folder: Path, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "data"))
    change_column(broken / TRAIN[1], name, lambda values: [*values[:-1], value])
    with pytest.raises(InputError) as caught:
        profile_of(broken)
    assert str(caught.value) == f"{broken / TRAIN[1]}, {message}; `recsys data verify {broken}` tells all"


def test_a_file_that_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "data"))
    (broken / TRAIN[1]).write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-00001.parquet: cannot read it \(.*\); `recsys data verify "):
        profile_of(broken)
    pq.write_table(pa.table({"label": pa.array([1], pa.uint8())}), broken / TRAIN[1])
    with pytest.raises(InputError, match=r"part-00001.parquet: column weight is not as schema.json says; `recsys data"):
        profile_of(broken)


def test_a_vocabulary_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "data"))
    (broken / "vocabulary/C1.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"vocabulary/C1.parquet: cannot read it \("):
        profile_of(broken)


def test_the_verb_prints_tables_and_writes_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: Profile
) -> None:
    saved, picture = tmp_path / "columns.json", tmp_path / "columns.png"
    assert main(["data", "show", str(folder), "--json", str(saved), "--png", str(picture)]) == 0
    out = capsys.readouterr().out
    assert f"small: 40 rows, 3 malformed left out, schema {SCHEMA.hash}" in out
    assert "be589b51 50.0%  68fd1e64 20.0%  05db9164 20.0%" in out
    assert "C3 x2" in out
    assert "weight (weight)" in out
    told = json.loads(saved.read_text())
    assert told["sparse"][0]["top"][0] == {"id": 2, "key": "be589b51", "share": 0.5, "lift": 1.0}
    assert [column["kind"] for column in told["dense"] + told["sparse"]] == ["weight", *["dense"] * 2, *["sparse"] * 3]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"columns.json", "columns.png"}


def test_a_key_is_printed_as_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys may look like markup, and may be long."""
    changed = Path(shutil.copytree(folder, tmp_path / "data"))
    put(changed / TRAIN[0], "C2", [1] * 5 + [2] * 5)
    change_column(changed / "vocabulary/C2.parquet", "key", lambda keys: [keys[0], "long" * 9, keys[2]])
    write_manifest(changed)
    assert main(["data", "show", str(changed)]) == 0
    out = capsys.readouterr().out
    assert "[red] 25.0%  longlonglonglon… 25.0%" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--png", "{}/x.png"], "--png {}/x.png: not into {}, which holds its manifest's files and no others"),
        (["--json", "{}/valid/x"], "--json {}/valid/x: not into {}, which holds its manifest's files and no others"),
    ],
)
def test_options_that_cannot_work(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["data", "show", str(folder), *(option.format(folder) for option in options)]) == 2
    assert capsys.readouterr().err == f"recsys: {message.format(folder, folder)}\n"


def test_a_split_without_rows_is_named(folder: Path, tmp_path: Path) -> None:
    empty = Path(shutil.copytree(folder, tmp_path / "data"))
    (empty / "test/part-00000.parquet").unlink()
    write_manifest(empty)
    with pytest.raises(InputError) as caught:
        profile_of(empty, split="test")
    assert str(caught.value) == f"{empty / 'test'}: no row in it"


def test_without_positive_labels_there_is_no_lift(folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "data"))
    put(changed / "valid/part-00000.parquet", "label", [0] * 10)
    write_manifest(changed)
    shown = profile_of(changed, split="valid")
    assert dense(shown, "I1").lift is None
    assert {top.lift for feature in shown.sparse for top in feature.top} == {None}
    assert np.isfinite([feature.effective_ids for feature in shown.sparse]).all()
