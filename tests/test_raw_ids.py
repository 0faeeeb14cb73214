"""Raw ids: prepared as the log's own values, loaded, verified and shown."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from recsys.config import InputError
from recsys.data import encode
from recsys.data.formats import BUCKET_RULES, FORMATS
from recsys.data.loader import LoaderConfig
from recsys.data.manifest import Manifest
from recsys.data.multihot_files import MultiHotConfig, store_multi_hot
from recsys.data.profile import profile
from recsys.data.raw_ids import ID_OF_ZERO, raw_ids
from recsys.data.schema import RAW, SPLITS, Schema
from recsys.data.settings import PrepareConfig
from recsys.data.verify import verify
from tests import tiny_log
from tests.logs import CRITEO, SHOP, SHOP_YAML, all_files, in_small_parts, make_rows, read, run, text, write

LEAST, LARGEST = -(2**63), 2**63 - 1


def hashed(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little", signed=True)


# ---- the id of a value


@pytest.mark.parametrize(
    ("kind", "values", "ids"),
    [
        (pa.uint32(), [7, 2**32 - 1, None, 0], [7, 2**32 - 1, 0, ID_OF_ZERO]),
        (pa.int64(), [7, LEAST, LARGEST, -1, None, 0], [7, LEAST, LARGEST, -1, 0, ID_OF_ZERO]),
        (pa.uint64(), [7, 2**63, 2**64 - 1, None, 0], [7, LEAST, -1, 0, ID_OF_ZERO]),
        (pa.int8(), [-3, None, 0], [-3, 0, ID_OF_ZERO]),
        (pa.string(), ["a", "", None, "é"], [hashed("a"), hashed(""), 0, hashed("é")]),
        (pa.large_string(), ["a", None], [hashed("a"), 0]),
        (pa.int64(), [], []),
        (pa.string(), [], []),
    ],
)
def test_the_id_is_the_value_itself_and_missing_alone_is_0(kind: pa.DataType, values: list, ids: list[int]) -> None:
    found = raw_ids(pa.array(values, type=kind))
    assert found.dtype == np.int64
    assert found.tolist() == ids


def test_the_id_of_zero_is_no_32_bit_number() -> None:
    assert not -(2**31) <= ID_OF_ZERO < 2**32
    assert ID_OF_ZERO == 0x9E3779B97F4A7C15 - 2**64


# ---- prepare


def slow_id(kind: str, field: str) -> int:
    if not field:
        return 0
    if kind == "text":
        return hashed(field) or ID_OF_ZERO
    number = int(field, 16 if kind == "hex32" else 10)
    return ((number + 2**63) % 2**64 - 2**63) or ID_OF_ZERO


def test_prepared_ids_are_the_log_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_parts(monkeypatch)
    rows = make_rows(250)
    out = tmp_path / "out"
    run(out, write(tmp_path / "log.tsv", text(rows)), split="time", vocabulary="raw")
    log = pl.concat([read(out, name) for name in SPLITS])
    for name in CRITEO.named("hex32"):
        assert log[name].dtype == pl.Int64
        assert log[name].to_list() == [slow_id("hex32", row[name]) for row in rows]
    schema = Schema.load(out)
    assert schema.sparse == dict.fromkeys(CRITEO.named("hex32"), RAW)
    assert schema.raw == CRITEO.named("hex32")
    assert not (out / "vocabulary").exists()
    assert "vocabulary" not in json.loads((out / "timings.json").read_text())
    assert verify(out, show_progress=False) == []


def test_every_kind_of_category_has_raw_ids(tmp_path: Path) -> None:
    rows = make_rows(200, fmt=SHOP)
    (tmp_path / "shop.yaml").write_text(SHOP_YAML)
    out = tmp_path / "out"
    run(out, write(tmp_path / "log", text(rows, SHOP)), fmt=str(tmp_path / "shop.yaml"), split="time", vocabulary="raw")
    log = pl.concat([read(out, name) for name in SPLITS])
    kinds = {column.name: column.kind for column in SHOP.columns}
    for name in SHOP.named("hex32", "int64", "uint64", "text"):
        assert log[name].to_list() == [slow_id(kinds[name], row[name]) for row in rows]
    assert set(log["is_weekend"].unique()) <= {0, 1, ID_OF_ZERO}
    assert set(SHOP.named("int64", "uint64", "text")) <= set(kinds)
    assert verify(out, show_progress=False) == []


def test_bucketised_integers_have_raw_ids(tmp_path: Path) -> None:
    rows = make_rows(120)
    out = tmp_path / "out"
    run(out, write(tmp_path / "log.tsv", text(rows)), split="time", vocabulary="raw", integers="log_squared_bucket")
    numbers = pl.DataFrame({"I2": [int(row["I2"]) if row["I2"] else None for row in rows]}, schema={"I2": pl.Int64})
    expected = numbers.select(BUCKET_RULES["log_squared_bucket"](pl.col("I2")))["I2"].to_list()
    found = pl.concat([read(out, name) for name in SPLITS])["I2"].to_list()
    assert found == [0 if value is None else value or ID_OF_ZERO for value in expected]


def test_the_same_log_gives_the_same_bytes(tmp_path: Path) -> None:
    log = write(tmp_path / "log.tsv", text(make_rows(300)))
    for name in ("one", "other"):
        run(tmp_path / name, log, vocabulary="raw")
    one, other = all_files(tmp_path / "one"), all_files(tmp_path / "other")
    assert one == other


def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_parts(monkeypatch)
    log, write_file, calls = write(tmp_path / "log.tsv", text(make_rows(250))), encode._write, []
    run(tmp_path / "whole", log, vocabulary="raw")

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write_file(*arguments)

    monkeypatch.setattr(encode, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", log, vocabulary="raw")
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", log, vocabulary="raw")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 3}, "--threshold means nothing to --vocabulary raw, which keeps every value; leave it out"),
        ({"max_ids": (9,)}, "--max-ids means nothing to --vocabulary raw, which keeps every value; leave it out"),
    ],
)
def test_what_a_vocabulary_would_need_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    log = write(tmp_path / "log.tsv", text(make_rows(5)))
    with pytest.raises(InputError, match=message):
        PrepareConfig(format="criteo_kaggle", paths=(log,), out=tmp_path / "out", vocabulary="raw", **changes)


def test_a_format_s_own_caps_are_left_aside(tmp_path: Path) -> None:
    assert FORMATS["criteo_1tb"].columns[14].max_ids
    days = [write(tmp_path / f"day_{i}", text(make_rows(60, seed=i))) for i in range(2)]
    run(tmp_path / "out", *days, fmt="criteo_1tb", vocabulary="raw")
    assert set(Schema.load(tmp_path / "out").sparse.values()) == {RAW}


# ---- what schema, verify and show make of them


def test_ids_are_raw_of_all_features_or_of_none() -> None:
    schema = Schema(name="s", dense=(), sparse={"a": RAW, "b": RAW}, labels=("y",))
    assert schema.raw == ("a", "b")
    assert dataclasses.replace(schema, sparse={"a": 2**31 - 1, "b": 2}).raw == ()
    with pytest.raises(ValueError, match="ids of 'a' are raw, those of 'b' are not; all or none must be"):
        dataclasses.replace(schema, sparse={"b": 3, "a": RAW})
    for num_ids in (2**31, 2**63, 2**64 - 1, 2**64 + 1):
        with pytest.raises(ValueError, match=rf"'a' has {num_ids} ids; 2,147,483,647 at most, or 2\^64 \(raw\)"):
            dataclasses.replace(schema, sparse={"a": num_ids})


@pytest.fixture
def prepared_raw(tmp_path: Path) -> Path:
    run(tmp_path / "out", write(tmp_path / "log.tsv", text(make_rows(400))), vocabulary="raw")
    return tmp_path / "out"


def test_verify_finds_what_is_no_raw_id(prepared_raw: Path) -> None:
    name = next(file for file in Manifest.load(prepared_raw).files if file.startswith("train/"))
    frame = pl.read_parquet(prepared_raw / name)
    frame.with_columns(pl.col("C3").cast(pl.Int32, strict=False)).write_parquet(prepared_raw / name)
    assert any("column C3 is int32, expected int64" in problem for problem in verify(prepared_raw, show_progress=False))


def test_show_counts_raw_ids(prepared_raw: Path) -> None:
    found = profile(prepared_raw, split="train", max_rows=10**6, show_progress=False)
    train = read(prepared_raw, "train")["C4"]
    (feature,) = (each for each in found.sparse if each.name == "C4")
    assert feature.rare_share == pytest.approx((train == 0).mean())
    counts = train.filter(train != 0).value_counts(sort=True)
    assert feature.top[0].key == f"id {feature.top[0].id}"
    assert feature.top[0].share == pytest.approx(counts["count"][0] / len(train))


def test_multi_hot_ids_need_a_vocabulary(prepared_raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ids of feature 'C1' are raw; multi-hot ids are drawn from those of a vocab"):
        store_multi_hot(MultiHotConfig(data=prepared_raw, out=tmp_path / "hot"))
    with pytest.raises(InputError, match="ids of feature 'C1' are raw"):
        tiny_log.Loader(prepared_raw, "train", batch_size=8, config=LoaderConfig(multi_hot="uniform"))


# ---- the loader


def with_raw_ids(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, dense: tuple[str, ...], weight: str | None
) -> Schema:
    """The tiny log, its ids spread over all 64 bits."""
    schema = dataclasses.replace(
        tiny_log.SCHEMA, dense=dense, weight=weight, sparse=dict.fromkeys(tiny_log.SCHEMA.sparse, RAW)
    )
    monkeypatch.setattr(tiny_log, "SCHEMA", schema)
    ids = tiny_log.columns_of(np.arange(tiny_log.NUM_ROWS))
    tiny_log.write(folder, columns={name: spread(ids[name]) for name in schema.sparse})
    return schema


def spread(ids: np.ndarray) -> np.ndarray:
    return ids.astype(np.int64) * np.int64(0x1E3779B97F4A7C15)


@pytest.mark.parametrize("dense", [("row",), ("row", "half")])
@pytest.mark.parametrize("weight", [None, "weight"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 8])  # 3 rows a rank: an odd number
def test_loaded_ids_are_those_of_the_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dense: tuple[str, ...],
    weight: str | None,
    shuffle: bool,
    world_size: int,
) -> None:
    schema = with_raw_ids(tmp_path / "data", monkeypatch, dense=dense, weight=weight)
    seen = 0
    options = {"rank": world_size - 1, "world_size": world_size, "shuffle": shuffle, "tail": "drop"}
    for batch in tiny_log.loader(tmp_path / "data", **options).epoch(1):
        columns = tiny_log.columns_of(batch.dense[:, 0].numpy().astype(np.int64))
        np.testing.assert_array_equal(batch.dense, np.stack([columns[name] for name in dense], axis=1))
        np.testing.assert_array_equal(batch.labels, columns["label"])
        np.testing.assert_array_equal(batch.weights, columns["weight"] if weight else np.ones(len(batch.labels)))
        assert batch.sparse.values().dtype == torch.int64
        sparse = batch.sparse.to_dict()
        for name in schema.sparse:
            np.testing.assert_array_equal(sparse[name].values(), spread(columns[name]))
            assert sparse[name].lengths().tolist() == [1] * len(batch.labels)
        seen += len(batch.labels)
    assert seen == tiny_log.STEPS * tiny_log.BATCH // world_size


def test_padding_has_id_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_raw_ids(tmp_path / "data", monkeypatch, dense=("row",), weight=None)
    batch = list(tiny_log.loader(tmp_path / "data", tail="pad").epoch(0))[-1]
    padding = batch.weights == 0
    assert padding.any()
    assert all(not batch.sparse[name].values()[padding].any() for name in ("a", "b", "c"))


def test_ids_of_a_vocabulary_stay_int32(tmp_path: Path) -> None:
    tiny_log.write(tmp_path / "data")
    assert next(tiny_log.loader(tmp_path / "data").epoch(0)).sparse.values().dtype == torch.int32
