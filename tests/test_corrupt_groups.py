"""Row groups whose bytes were damaged after they were prepared: fatal and named, or left out and counted."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.groups import CorruptGroupError
from recsys.data.loader import Loader, LoaderConfig
from recsys.data.schema import Schema
from recsys.data.verify import verify
from tests.tiny_log import BATCH, SCHEMA, columns_of, loader, rows, write

DAMAGED = ("part-2.parquet", 3)
ITS_ROWS = range(300, 340)
"""Rows of that row group, by tests.tiny_log.FILES."""
SKIP = LoaderConfig(on_corrupt="skip")


def damage(path: Path, group: int, column: str = "c") -> None:
    """Overwrite the middle of a column of a row group; the footer stays as it is."""
    metadata = pq.read_metadata(path)
    chunk = metadata.row_group(group).column(metadata.schema.to_arrow_schema().names.index(column))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data")
    damage(tmp_path / "data" / "train" / DAMAGED[0], DAMAGED[1])
    return tmp_path / "data"


@pytest.mark.parametrize("read", [lambda made: made.epoch(0), Loader.stream, Loader.once])
def test_it_is_fatal_and_named_unless_asked_otherwise(folder: Path, read: Any) -> None:
    with pytest.raises(InputError) as told:
        list(read(loader(folder)))
    assert str(told.value).startswith(f"{folder}/train/part-2.parquet, row group 3: cannot decode it (")
    assert str(told.value).endswith("or train without such groups by --loader.on-corrupt skip")
    assert "\n" not in str(told.value)


def shares(folder: Path, world_size: int, **options: Any) -> list[list[Batch]]:
    """Batches of every rank."""
    return [list(loader(folder, rank=rank, world_size=world_size, **options).epoch(0)) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("options", [{}, {"shuffle": False, "tail": "pad"}], ids=["train", "valid"])
def test_left_out_its_rows_have_weight_0_and_all_else_stays(
    folder: Path, tmp_path: Path, world_size: int, options: dict[str, Any]
) -> None:
    write(tmp_path / "whole")
    whole = shares(tmp_path / "whole", world_size, **options)
    left = shares(folder, world_size, config=SKIP, **options)
    assert [len(batches) for batches in left] == [len(batches) for batches in whole]
    missing = 0
    for before, now in zip(itertools.chain(*whole), itertools.chain(*left), strict=True):
        gone = torch.tensor([int(row) in ITS_ROWS for row in before.dense[:, 0]]) & (before.weights > 0)
        missing += int(gone.sum())
        assert rows(now) == [row for row in rows(before) if row not in ITS_ROWS]
        assert now.dense.equal(before.dense.masked_fill(gone[:, None], 0))
        assert now.labels.equal(before.labels.masked_fill(gone, 0))
        assert now.weights.equal(before.weights.masked_fill(gone, 0))
        ids = before.sparse.values().view(-1, len(gone)).masked_fill(gone, 0)
        assert now.sparse.values().view_as(ids).equal(ids)
    assert missing > 30  # but for what the tail drops


def test_left_out_groups_are_counted_and_told_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder / "train" / "part-0.parquet", 0, "row")
    made = loader(folder, config=LoaderConfig(on_corrupt="skip", workers=2))
    assert not made.skipped
    for epoch in range(2):
        list(made.epoch(epoch))
    where = {f"{folder}/train/part-2.parquet, row group 3", f"{folder}/train/part-0.parquet, row group 0"}
    assert made.skipped == dict.fromkeys(where, 40)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(line.startswith("recsys: ") and line.endswith(": its 40 rows get weight 0") for line in told)


def test_a_weight_of_the_data_is_0_too(tmp_path: Path) -> None:
    write(tmp_path)
    Schema(**{**vars(SCHEMA), "weight": "weight"}).save(tmp_path)
    damage(tmp_path / "train" / DAMAGED[0], DAMAGED[1])
    for batch in loader(tmp_path, config=SKIP).epoch(0):
        numbers = batch.dense[:, 0].long()
        left_out = (numbers == 0) & (batch.dense[:, 1] == 0)  # row 0 has weight 0 anyway
        weights = torch.from_numpy(columns_of(numbers.numpy())["weight"])
        assert batch.weights.equal(weights.masked_fill(left_out, 0))


def test_an_id_that_the_schema_rules_out_is_damage_as_well(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train" / "part-1.parquet"
    table = pq.read_table(path)
    wrong = columns_of(np.arange(133, 180)) | {"a": np.full(47, 7, np.int32)}
    wrong_table = table.set_column(table.schema.names.index("a"), "a", [wrong["a"]])
    pq.write_table(wrong_table, path, write_statistics=False)  # which would tell at once
    with pytest.raises(CorruptGroupError, match=r"part-1.parquet, row group 0, row 0: column a holds id 7, but"):
        list(loader(tmp_path).epoch(0))
    made = loader(tmp_path, config=SKIP)
    list(made.epoch(0))
    assert made.skipped == {f"{path}, row group 0": 47}


def test_a_page_that_has_a_checksum_is_compared_with_it(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train" / "part-1.parquet"
    flat = {"compression": "none", "use_dictionary": False}
    for checksum in (False, True):
        pq.write_table(pq.read_table(path), path, write_page_checksum=checksum, **flat)
        good = path.read_bytes()
        at = good.index(np.arange(140, 144, dtype=np.float32).tobytes())
        path.write_bytes(good[:at] + b"\x01" + good[at + 1 :])
        made = loader(tmp_path, config=SKIP)
        list(made.epoch(0))
        assert len(made.skipped) == checksum  # without, nothing tells
        path.write_bytes(good)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), FileNotFoundError(2, "gone")])
def test_a_disk_that_fails_is_no_damaged_group(folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    made = loader(folder, config=SKIP)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(InputError, match="not a whole Parquet file"):
        list(made.epoch(0))
    assert not made.skipped


def test_a_file_without_its_footer_is_no_damaged_group(folder: Path) -> None:
    path = folder / "train" / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"part-0.parquet: not a whole Parquet file"):
        loader(folder, config=SKIP)


def test_verify_names_the_group(prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "data")
    name = sorted(path.name for path in (folder / "train").iterdir())[0]
    damage(folder / "train" / name, 0, "I1")
    told = verify(folder, show_progress=False)
    assert any(line.startswith(f"train/{name}, row group 0, column I1: cannot decode it (") for line in told), told


def test_a_batch_of_nothing_else_is_still_a_batch(tmp_path: Path) -> None:
    write(tmp_path, files=((BATCH,), (BATCH,)))
    damage(tmp_path / "train" / "part-0.parquet", 0)
    batches = list(loader(tmp_path, config=SKIP, shuffle=False).epoch(0))
    assert [int(batch.weights.sum()) for batch in batches] == [0, BATCH]
