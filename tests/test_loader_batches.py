"""What a batch holds: each column in its place, weights, one id or several a feature."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.data.loader import LoaderConfig
from recsys.data.multihot import MultiHot
from recsys.data.schema import Schema
from recsys.place import place
from tests.batches import batch_of
from tests.tiny_log import BATCH, NUM_ROWS, SCHEMA, STEPS, columns_of, loader, rows, write

any_ranks = pytest.mark.parametrize("world_size", [1, 2, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    return path


@any_ranks
def test_every_column_arrives_in_its_place(folder: Path, world_size: int) -> None:
    for batch in loader(folder, rank=world_size - 1, world_size=world_size).epoch(0):
        expected = columns_of(np.array(rows(batch)))
        sparse = batch.sparse.to_dict()
        np.testing.assert_array_equal(batch.dense, np.stack([expected["row"], expected["half"]], axis=1))
        np.testing.assert_array_equal(batch.labels, expected["label"])
        for name in SCHEMA.sparse:
            np.testing.assert_array_equal(sparse[name].values(), expected[name])
        assert batch.dense.dtype == batch.labels.dtype == batch.weights.dtype == torch.float32


def test_features_come_in_schema_order_with_one_id_a_row(folder: Path) -> None:
    sparse = next(loader(folder, world_size=2).epoch(0)).sparse
    assert sparse.keys() == list(SCHEMA.sparse)
    assert sparse.stride() == BATCH // 2
    assert sparse.lengths().tolist() == [1] * (3 * BATCH // 2)
    assert sparse.offsets().tolist() == list(range(3 * BATCH // 2 + 1))
    assert sparse.length_per_key() == [BATCH // 2] * 3


def test_padding_has_weight_0_and_harmless_values(folder: Path) -> None:
    batches = list(loader(folder, tail="pad").epoch(0))
    padding = torch.cat([batch.weights == 0 for batch in batches])
    assert padding.sum() == (STEPS + 1) * BATCH - NUM_ROWS
    assert not torch.cat([batch.dense for batch in batches])[padding].any()
    assert not torch.cat([batch.labels for batch in batches])[padding].any()
    for name in SCHEMA.sparse:
        assert not torch.cat([batch.sparse[name].values() for batch in batches])[padding].any()


def test_columns_of_other_number_types_are_converted(tmp_path: Path) -> None:
    write(tmp_path)
    for path in (tmp_path / "train").iterdir():
        wide = {"row": pa.float64(), "half": pa.int64(), "a": pa.int64(), "b": pa.uint8(), "label": pa.float32()}
        table = pq.read_table(path)
        for name, kind in wide.items():
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind, safe=False))
        pq.write_table(table, path)
    for batch in loader(tmp_path).epoch(0):
        expected = columns_of(np.array(rows(batch)))
        np.testing.assert_array_equal(batch.dense[:, 1], np.trunc(expected["half"]))
        np.testing.assert_array_equal(batch.sparse["a"].values(), expected["a"])
        np.testing.assert_array_equal(batch.sparse["b"].values(), expected["b"])
        np.testing.assert_array_equal(batch.labels, expected["label"])


def test_a_log_without_dense_columns(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(folder / "train")
    Schema(name="tiny", dense=(), sparse={"c": 1000}, labels=("label",)).save(tmp_path)
    batches = list(loader(tmp_path, tail="pad").epoch(0))
    assert {tuple(batch.dense.shape) for batch in batches} == {(BATCH, 0)}
    ids = [int(row) for batch in batches for row in batch.sparse["c"].values()[batch.weights > 0]]
    assert sorted(ids) == list(range(NUM_ROWS))


def test_a_moved_batch_keeps_everything(folder: Path) -> None:
    batch = list(loader(folder, tail="pad").epoch(0))[-1]
    for moved, device in ((batch.to(torch.device(name)), name) for name in ("cpu", "meta")):
        assert moved.sparse.keys() == batch.sparse.keys()
        pairs = [(getattr(moved, name), getattr(batch, name)) for name in ("dense", "labels", "weights")]
        pairs += [(getattr(moved.sparse, name)(), getattr(batch.sparse, name)()) for name in ("values", "lengths")]
        for there, here in pairs:
            assert there.device.type == device
            assert (there.shape, there.dtype) == (here.shape, here.dtype)
            assert device == "meta" or torch.equal(there, here)


def test_batch_of_lays_out_ids_as_the_loader_does(folder: Path) -> None:
    batch = next(loader(folder).epoch(0))
    ids = {name: batch.sparse[name].values() for name in SCHEMA.sparse}
    made = batch_of(batch.dense, ids, batch.labels)
    assert made.sparse.keys() == batch.sparse.keys()
    assert torch.equal(made.sparse.values(), batch.sparse.values())
    assert torch.equal(made.sparse.lengths(), batch.sparse.lengths())
    assert torch.equal(made.weights, batch.weights)


# Weights


def test_without_a_column_of_weights_every_row_counts_once(folder: Path) -> None:
    for batch in loader(folder, world_size=2).epoch(0):
        assert batch.weights.tolist() == [1.0] * (BATCH // 2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_are_those_of_the_column(tmp_path: Path, world_size: int) -> None:
    write(tmp_path)
    dataclasses.replace(SCHEMA, weight="weight").save(tmp_path)
    total = 0.0
    for rank in range(world_size):
        for batch in loader(tmp_path, rank=rank, world_size=world_size, tail="pad").epoch(0):
            expected = columns_of(batch.dense[:, 0].numpy().astype(np.int64))
            np.testing.assert_array_equal(batch.weights, expected["weight"])
            np.testing.assert_array_equal(batch.sparse["a"].values(), expected["a"])
            total += float(batch.weights.sum())
    assert total == columns_of(np.arange(NUM_ROWS))["weight"].sum()


# Several ids a feature

SEVERAL = {name: np.random.default_rng(0).integers(0, 7, (NUM_ROWS, size)) for name, size in (("a", 3), ("b", 2))}


@pytest.mark.parametrize("filled_bytes", [1, 4_000, 8_000_000])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_stored_multi_hot_ids_arrive_by_feature_then_by_row(
    tmp_path: Path, world_size: int, shuffle: bool, filled_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.data.loader.FILLED_BYTES", filled_bytes)
    write(tmp_path, columns={name: ids.astype(np.int32) for name, ids in SEVERAL.items()})
    dataclasses.replace(SCHEMA, hotness={"a": 3, "b": 2}).save(tmp_path)
    for rank in range(world_size):
        for batch in loader(tmp_path, rank=rank, world_size=world_size, shuffle=shuffle, tail="pad").epoch(0):
            number = rows(batch)
            for name, expected in {"c": np.arange(NUM_ROWS)[:, None], **SEVERAL}.items():
                found = batch.sparse[name].values().numpy().reshape(BATCH // world_size, -1)
                np.testing.assert_array_equal(found[batch.weights > 0], expected[number])
                assert not found[batch.weights == 0].any()
            assert batch.sparse.length_per_key() == [size * len(batch.labels) for size in (1, 3, 2)]


def test_of_a_stored_multi_hot_feature_too_large_an_id_is_named(tmp_path: Path) -> None:
    write(tmp_path, columns={"a": np.full((NUM_ROWS, 3), 7, dtype=np.int32)})
    dataclasses.replace(SCHEMA, hotness={"a": 3}).save(tmp_path)
    with pytest.raises(ValueError, match=r"column a holds ids 7 to 7, but .* gives it 7 ids"):
        loader(tmp_path)


@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
def test_ids_are_expanded_on_the_fly(folder: Path, distribution: Literal["uniform", "pareto"]) -> None:
    sizes = (1, 4, 2)
    config = LoaderConfig(multi_hot=distribution, multi_hot_sizes=sizes, seed=3)
    expand = MultiHot(SCHEMA, sizes, distribution, 3).expand
    plain = loader(folder, tail="pad", config=LoaderConfig(seed=3)).epoch(0)
    for batch, one_each in zip(loader(folder, tail="pad", config=config).epoch(0), plain, strict=True):
        ids = one_each.sparse.values().numpy().reshape(len(SCHEMA.sparse), BATCH)
        np.testing.assert_array_equal(batch.sparse.values(), expand(ids))
        np.testing.assert_array_equal(batch.sparse["a"].values().reshape(BATCH, 4)[:, 0], one_each.sparse["a"].values())
        assert torch.equal(batch.dense, one_each.dense)


def test_lengths_and_offsets_of_expanded_ids_fit_each_other(folder: Path) -> None:
    config = LoaderConfig(multi_hot="uniform", multi_hot_sizes=(1, 4, 2))
    ids = next(loader(folder, world_size=2, config=config).epoch(0)).sparse
    lengths = [1] * (BATCH // 2) + [4] * (BATCH // 2) + [2] * (BATCH // 2)
    assert ids.lengths().tolist() == lengths
    assert ids.offsets().tolist() == np.cumsum([0, *lengths]).tolist()
    assert ids.length_per_key() == [BATCH // 2, 2 * BATCH, BATCH]
    assert ids.offset_per_key() == [0, BATCH // 2, BATCH // 2 + 2 * BATCH, BATCH // 2 + 3 * BATCH]
    assert ids.lengths().dtype == ids.offsets().dtype == ids.values().dtype == torch.int32


# Where it lies


def test_a_folder_of_an_object_store_gives_the_same_batches(folder: Path) -> None:
    store = place("memory://tiny-log/data")
    for path in folder.rglob("*"):
        if path.is_file():
            copy = store / path.relative_to(folder).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert Schema.load(store) == SCHEMA
    config = LoaderConfig(workers=2)
    here, there = (list(loader(place_, tail="pad", config=config).epoch(0)) for place_ in (folder, store))
    assert [rows(batch) for batch in there] == [rows(batch) for batch in here]
    assert sum(len(rows(batch)) for batch in there) == NUM_ROWS
