"""What a loader cannot work with is named, and so is what would work."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import InputError
from recsys.data.loader import Loader, LoaderConfig
from recsys.data.schema import Schema
from tests.tiny_log import BATCH, NUM_ROWS, SCHEMA, loader, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    return path


def test_a_missing_split_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="valid: no Parquet file in it"):
        Loader(folder, "valid", batch_size=BATCH)


def test_a_column_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train" / "part-1.parquet"
    pq.write_table(pq.read_table(path).drop_columns("a"), path)
    with pytest.raises(InputError, match=r"part-1.parquet: column 'a' of schema.json is not in it"):
        loader(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train" / "part-2.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"part-2.parquet: not a whole Parquet file"):
        loader(tmp_path)


@pytest.mark.parametrize(("batch_size", "world_size", "right"), [(25, 4, 24), (3, 4, 4), (0, 2, 2), (1, 3, 3)])
def test_a_batch_that_ranks_cannot_share_equally(folder: Path, batch_size: int, world_size: int, right: int) -> None:
    with pytest.raises(InputError, match=rf"batch size {batch_size} .* {world_size} ranks equally; {right} can"):
        loader(folder, batch_size=batch_size, world_size=world_size)
    loader(folder, batch_size=right, world_size=world_size)


def test_fewer_rows_than_a_batch(folder: Path) -> None:
    with pytest.raises(InputError, match=f"has {NUM_ROWS} rows, fewer than one global batch of {NUM_ROWS + 1}"):
        loader(folder, batch_size=NUM_ROWS + 1)
    assert loader(folder, batch_size=NUM_ROWS).steps_per_epoch == 1
    assert loader(folder, batch_size=NUM_ROWS + 1, tail="pad").steps_per_epoch == 1


def test_slots_that_ranks_cannot_share_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"48 slots cannot be shared by 5 ranks .* --loader.slots 50"):
        Loader(folder, "train", batch_size=25, world_size=5)


def test_an_id_beyond_the_schema_is_named(folder: Path) -> None:
    schema = Schema.load(folder)
    feature = next(iter(schema.sparse))
    dataclasses.replace(schema, sparse=schema.sparse | {feature: 2}).save(folder)
    with pytest.raises(InputError, match=rf"row group 0: column {feature} holds ids \d+ to \d+, but .* gives it 2 ids"):
        Loader(folder, "train", batch_size=BATCH)
    schema.save(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": 0}, "slots 0"),
        ({"seed": -1}, "seed -1"),
        ({"workers": 0}, "workers 0"),
        ({"multi_hot_sizes": (2, 1, 1)}, "name uniform or pareto"),
    ],
)
def test_loader_config_names_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**fields)


def test_a_column_of_weights_that_the_file_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(folder / "train")
    dataclasses.replace(SCHEMA, weight="importance").save(tmp_path)
    with pytest.raises(InputError, match=r"column 'importance' of schema.json is not in it"):
        loader(tmp_path)


def test_lists_of_another_size_than_the_schema_says_are_named(tmp_path: Path) -> None:
    write(tmp_path, columns={"a": np.zeros((NUM_ROWS, 3), dtype=np.int32)})
    dataclasses.replace(SCHEMA, hotness={"a": 2}).save(tmp_path)
    with pytest.raises(InputError, match="column 'a' has not 2 values in every row"):
        next(loader(tmp_path).epoch(0))


def test_rows_without_a_value_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train" / "part-1.parquet"
    table = pq.read_table(path).drop_columns("b")
    pq.write_table(table.append_column("b", pa.array([None] * 3 + [1] * (len(table) - 3), pa.int32())), path)
    with pytest.raises(InputError, match=r"part-1.parquet, row group 0: column 'b' has rows without a value"):
        list(loader(tmp_path).epoch(0))


def test_sizes_that_do_not_fit_the_features_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="26 sizes for 3 sparse features"):
        loader(folder, config=LoaderConfig(multi_hot="uniform"))
