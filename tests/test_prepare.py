"""Prepare from end to end, against a slow reference in plain Python."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.config import dump
from recsys.data import ingest, prepare, raw, remap
from recsys.data.formats import FORMATS
from recsys.data.schema import SPLITS, Schema
from recsys.data.verify import verify
from tests.logs import (
    AVAZU,
    CRITEO,
    NAMES,
    SHOP,
    SHOP_YAML,
    all_files,
    data_files,
    in_small_parts,
    line,
    make_rows,
    packed,
    read,
    run,
    text,
    write,
)
from tests.slow_prepare import assert_prepared, slow_prepare, slow_splits


def assert_verified(out: Path) -> None:
    assert verify(out, show_progress=False) == []


@pytest.mark.parametrize(
    ("integers", "split", "threshold"),
    [
        ("log1p", "random", 4),
        ("log1p", "time", 1),
        ("log3", "file", 1),
        ("log_squared_bucket", "random", 1),
        ("log_squared_bucket", "time", 4),
        ("log_squared_bucket", "hash:C1", 2),
    ],
)
def test_prepare_is_the_slow_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, integers: str, split: str, threshold: int
) -> None:
    rows = make_rows(401)
    settings: dict[str, Any] = {"integers": integers, "split": split, "threshold": threshold, "seed": 7}
    whole = write(tmp_path / "log.tsv", text(rows))
    if split != "file":
        run(tmp_path / "one", whole, **settings)
        assert_prepared(tmp_path / "one", slow_prepare(CRITEO, rows, **settings))
        assert_verified(tmp_path / "one")

    files = [rows[:50], rows[50:350], rows[350:]]
    paths = [write(tmp_path / f"day_{i}", text(file)) for i, file in enumerate(files)]
    in_small_parts(monkeypatch, rows=90)
    run(tmp_path / "three", *paths, **settings)
    assert len(list((tmp_path / "three/train").iterdir())) >= 4
    assert_prepared(tmp_path / "three", slow_prepare(CRITEO, *files, **settings))
    assert_verified(tmp_path / "three")


def test_a_csv_with_header_and_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [make_rows(250, seed=1, fmt=AVAZU), make_rows(150, seed=2, fmt=AVAZU)]
    paths = [write(tmp_path / f"{i}.csv.gz", packed(text(rows, AVAZU))) for i, rows in enumerate(files)]
    in_small_parts(monkeypatch)
    run(tmp_path / "out", *paths, fmt="avazu")
    slow = slow_prepare(AVAZU, *files, threshold=2)
    assert list(slow.vocabularies)[:3] == ["hour", "weekday", "is_weekend"]
    assert_prepared(tmp_path / "out", slow)
    assert_verified(tmp_path / "out")


@pytest.mark.parametrize("split", ["random", "hash:product", "hash:user", "hash:session", "hash:at"])
def test_a_format_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    rows = make_rows(400, fmt=SHOP)
    log = write(tmp_path / "log.csv", text(rows, SHOP))
    in_small_parts(monkeypatch)
    run(tmp_path / "out", log, fmt=str(write(tmp_path / "shop.yaml", SHOP_YAML.encode())), split=split)
    if split == "hash:at":  # the raw number is hashed, and the features are made of it
        for name, expected in zip(SPLITS, _rows_by_hour(rows), strict=True):
            assert read(tmp_path / "out", name).height == expected
    else:
        slow = slow_prepare(SHOP, rows, threshold=2, split=split)
        assert len(slow.vocabularies["user"]) == 8  # its cap
        assert_prepared(tmp_path / "out", slow)
    assert_verified(tmp_path / "out")


def _rows_by_hour(rows: Sequence[dict[str, str]]) -> list[int]:
    keys = [{"at": int(row["at"]) if row["at"] else None} for row in rows]
    splits = slow_splits("hash:at", 2021, [rows], keys)  # type: ignore[arg-type]
    return [splits.count(i) for i in range(3)]


def test_the_same_rows_as_csv_and_as_parquet_give_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(300, fmt=SHOP)
    columns = {column.name: [row[column.name] or None for row in rows] for column in SHOP.columns}
    types = {"bought": pl.UInt8, "price": pl.Float64, "age": pl.Int32, "user": pl.Int64, "session": pl.UInt64}
    frame = pl.DataFrame(columns).with_columns(pl.col(name).cast(kind) for name, kind in types.items())
    frame.select(reversed(frame.columns)).write_parquet(tmp_path / "log.parquet", row_group_size=70)
    in_small_parts(monkeypatch)
    described = write(tmp_path / "shop.yaml", SHOP_YAML.encode())
    run(tmp_path / "csv", write(tmp_path / "log.csv", text(rows, SHOP)), fmt=str(described))
    described = write(tmp_path / "parquet.yaml", SHOP_YAML.encode() + b"file: parquet\n")
    manifest = run(tmp_path / "parquet", tmp_path / "log.parquet", fmt=str(described))
    assert data_files(tmp_path / "parquet") == data_files(tmp_path / "csv")
    assert manifest["null_share"] == json.loads((tmp_path / "csv/manifest.json").read_text())["null_share"]


# ---- caps and hashes


def test_a_cap_keeps_the_most_frequent_values(tmp_path: Path) -> None:
    rows = make_rows(300)
    capped = dataclasses.replace(
        CRITEO, columns=(*CRITEO.columns[:14], *(dataclasses.replace(c, max_ids=7) for c in CRITEO.columns[14:]))
    )
    run(tmp_path / "out", write(tmp_path / "log.tsv", text(rows)), max_ids=(7,), threshold=1)
    assert_prepared(tmp_path / "out", slow_prepare(capped, rows, threshold=1))
    assert set(Schema.load(tmp_path / "out").sparse.values()) == {7}


def test_hashed_ids_need_no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(250)
    in_small_parts(monkeypatch)
    caps = tuple(range(2, 28))
    out = tmp_path / "out"
    run(out, write(tmp_path / "log.tsv", text(rows)), split="time", vocabulary="hash", max_ids=caps)
    assert Schema.load(out).sparse == dict(zip(CRITEO.named("hex32"), caps, strict=True))
    log = pl.concat([read(out, name) for name in SPLITS])
    for name, cap in zip(CRITEO.named("hex32"), caps, strict=True):
        assert log[name].to_list() == [1 + int(row[name], 16) % (cap - 1) if row[name] else 0 for row in rows]
    assert list((out / "vocabulary").iterdir()) == []
    assert_verified(out)


def test_terabyte_has_the_caps_of_mlperf(tmp_path: Path) -> None:
    rows = [make_rows(60, seed=seed) for seed in range(3)]
    days = [write(tmp_path / f"day_{i}", text(day)) for i, day in enumerate(rows)]
    run(tmp_path / "out", *days, fmt="criteo_1tb")
    assert_prepared(tmp_path / "out", slow_prepare(FORMATS["criteo_1tb"], *rows, threshold=1, split="file"))
    assert len(read(tmp_path / "out", "valid")) == len(read(tmp_path / "out", "test")) == 30


# ---- the prepared folder


@pytest.mark.parametrize("split", ["random", "time"])
def test_every_row_is_in_one_split_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    rows = [row | {"I1": str(i)} for i, row in enumerate(make_rows(500))]
    in_small_parts(monkeypatch)
    run(tmp_path / "out", write(tmp_path / "log.tsv", text(rows)), split=split)
    numbers = [np.expm1(read(tmp_path / "out", name)["I1"].to_numpy()).round().astype(int).tolist() for name in SPLITS]
    assert all(part == sorted(part) for part in numbers)
    together = [number for part in numbers for number in part]
    assert sorted(together) == list(range(500))
    assert (together == list(range(500))) == (split == "time")


def test_a_split_without_rows_has_no_file(tmp_path: Path) -> None:
    manifest = run(tmp_path / "out", write(tmp_path / "log.tsv", text(make_rows(3))), split="time")
    assert [manifest["splits"][name]["num_rows"] for name in SPLITS] == [3, 0, 0]
    assert manifest["splits"]["test"]["label_mean"] == 0
    assert list((tmp_path / "out/test").iterdir()) == []
    assert not [name for name in manifest["files"] if name.startswith(("valid/", "test/"))]
    assert_verified(tmp_path / "out")


def test_features_keep_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    in_small_parts(monkeypatch)
    run(out, write(tmp_path / "log.tsv", text(make_rows(600))), threshold=2)
    schema = Schema.load(out)
    log = pl.concat([read(out, name) for name in SPLITS])
    assert dict(log.schema) == (
        {"label": pl.UInt8} | dict.fromkeys(schema.dense, pl.Float32) | dict.fromkeys(schema.sparse, pl.Int32)
    )
    assert sum(log.null_count().row(0)) == 0
    assert log.select(pl.col(schema.dense).is_finite().all()).row(0) == (True,) * len(schema.dense)
    for feature, num_ids in schema.sparse.items():
        assert (log[feature].min(), log[feature].max()) == (0, num_ids - 1)
    fields = pq.ParquetFile(out / "train/part-00000.parquet").schema_arrow
    assert not any(field.nullable for field in fields)


@pytest.mark.parametrize(("max_rows", "expected"), [(65_536, 20), (8, 8)])
def test_row_groups_grow_with_the_log_and_have_even_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_rows: int, expected: int
) -> None:
    monkeypatch.setattr(prepare, "MIN_GROUP_ROWS", 1)
    monkeypatch.setattr(prepare, "MAX_GROUP_ROWS", max_rows)
    monkeypatch.setattr(prepare, "TARGET_GROUPS", 10)
    in_small_parts(monkeypatch)
    manifest = run(tmp_path / "out", write(tmp_path / "log.tsv", text(make_rows(200))))
    total = 0
    for path in sorted((tmp_path / "out/train").iterdir()):
        metadata = pq.ParquetFile(path).metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert len(sizes) == max(round(sum(sizes) / expected), 1)
        assert set(sizes[:-1]) == {-(-sum(sizes) // len(sizes))}
        assert 0 < sizes[-1] <= sizes[0]
        total += sum(sizes)
    assert total == manifest["splits"]["train"]["num_rows"]


def test_the_manifest_tells_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(300)
    path = write(tmp_path / "log.tsv", text(rows))
    out = tmp_path / "out"
    in_small_parts(monkeypatch)
    manifest = run(out, path, threshold=3, seed=5)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["schema_hash"] == Schema.load(out).hash
    assert manifest["config"] == {
        "format": "criteo_kaggle",
        "paths": [str(path)],
        "like": None,
        "threshold": 3,
        "max_ids": [],
        "vocabulary": "count",
        "integers": "log1p",
        "impressions": "feature",
        "split": "random",
        "seed": 5,
        "max_malformed": 0,
        "raw_format": dump(CRITEO),
    }
    assert manifest["num_rows"] == 300
    slow = slow_prepare(CRITEO, rows, threshold=3, seed=5)
    assert manifest["splits"] == {
        name: {"num_rows": len(own), "label_mean": sum(row[0] for row in own) / len(own)}
        for name, own in zip(SPLITS, slow.splits, strict=True)
    }
    shares = {name: sum(row[name] == "" for row in rows) / 300 for name in NAMES}
    assert manifest["null_share"] == pytest.approx(shares)
    assert (manifest["num_malformed"], manifest["malformed"]) == (0, [])
    assert set(manifest["files"]) == set(data_files(out))
    assert all(facts["bytes"] == len(data_files(out)[name]) for name, facts in manifest["files"].items())
    timings = json.loads((out / "timings.json").read_text())
    assert list(timings) == ["ingest", "vocabulary", "encode", "verify"]
    assert all(set(stage) == {"seconds", "cpu_seconds"} for stage in timings.values())


# ---- the same rows give the same bytes, however they come


def in_members(content: bytes) -> bytes:
    """Three gzip members, cut in the middle of lines, one of them empty."""
    return packed(content[:1001]) + packed(b"") + packed(content[1001:5003]) + packed(content[5003:])


def test_however_a_log_comes_it_gives_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text(make_rows(120))
    monkeypatch.setattr(ingest, "PART_ROWS", 50)
    run(tmp_path / "expected", write(tmp_path / "log.tsv", whole), split="time")
    monkeypatch.setattr(raw, "CHUNK_BYTES", 1500)
    ways = {
        "gzip": packed(whole),
        "members": in_members(whole),
        "no newline": whole.removesuffix(b"\n"),
        "gzip, no newline": packed(whole.removesuffix(b"\n")),
        "zeros after gzip": packed(whole) + bytes(512),
    }
    for way, content in ways.items():
        run(tmp_path / f"{way}.out", write(tmp_path / way, content), split="time")
        assert data_files(tmp_path / f"{way}.out") == data_files(tmp_path / "expected"), way


def test_a_csv_of_windows_gives_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = text(make_rows(120, fmt=SHOP), SHOP)
    described = str(write(tmp_path / "shop.yaml", SHOP_YAML.encode()))
    in_small_parts(monkeypatch, rows=50, chunk_bytes=700)
    run(tmp_path / "expected", write(tmp_path / "log.csv", content), fmt=described)
    for way, written in {
        "CR LF": content.replace(b"\n", b"\r\n"),
        "byte order mark": raw.BOM + content,
        "both, gzip": packed(raw.BOM + content.replace(b"\n", b"\r\n")),
    }.items():
        run(tmp_path / f"{way}.out", write(tmp_path / way, written), fmt=described)
        assert data_files(tmp_path / f"{way}.out") == data_files(tmp_path / "expected"), way


def test_a_log_in_several_files_gives_the_same_rows(tmp_path: Path) -> None:
    rows = make_rows(120)
    run(tmp_path / "one", write(tmp_path / "log.tsv", text(rows)), split="time")
    head, tail = text(rows[:50]).removesuffix(b"\n"), packed(text(rows[50:]))
    run(tmp_path / "two", write(tmp_path / "a", head), write(tmp_path / "b", tail), split="time")
    for name in SPLITS:
        assert read(tmp_path / "two", name).equals(read(tmp_path / "one", name))


def test_neither_memory_nor_cores_nor_chunks_leave_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"C1": f"{i:x}", "C2": f"{i // 2:x}"} for i, row in enumerate(make_rows(1500))]
    logs = [write(tmp_path / f"{i}.tsv", text(rows[i * 500 : (i + 1) * 500])) for i in range(3)]
    in_small_parts(monkeypatch, rows=300)
    out = tmp_path / "out"
    made = []
    for cores, memory, bytes_per_key, chunk_bytes in (
        (1, "4GiB", 96, 1 << 20),
        (4, "900MB", 96, 3000),
        (2, "1GiB", 1 << 40, 7777),  # so that 1000 values are all that fit
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setattr(remap, "BYTES_PER_ENTRY", bytes_per_key)
        monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
        run(out, *logs, memory=memory, threshold=1)
        made.append(all_files(out))
        out.rename(tmp_path / f"{cores} cores")
    assert made[0] == made[1]
    assert made[0] == made[2]
    assert len(made[0]) == 1 + 26 + 6 * 3 + 1


def test_the_work_can_stand_elsewhere(tmp_path: Path) -> None:
    log = write(tmp_path / "log.tsv", text(make_rows(100)))
    run(tmp_path / "out", log)
    run(tmp_path / "other", log, work=tmp_path / "work")
    assert data_files(tmp_path / "other") == data_files(tmp_path / "out")
    assert list((tmp_path / "work").iterdir()) == []
    assert_verified(tmp_path / "other")


def test_the_command_tells_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = write(tmp_path / "log.tsv", line(make_rows(1)[0]) * 10), tmp_path / "out"
    assert main(["prepare", "criteo_kaggle", str(log), "--out", str(out), "--split", "time"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [row.split(",")[0] for row in told] == [
        f"{out}/train: 8 rows",
        f"{out}/valid: 1 rows",
        f"{out}/test: 1 rows",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"log.tsv", "out"}
