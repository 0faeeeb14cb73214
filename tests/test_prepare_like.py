"""A log prepared like another: with the ids of a prepared folder, so that what was trained on that predicts it."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.cli import main
from recsys.data import estimate as estimates
from recsys.data import prepare, remap
from recsys.data.formats import FORMATS, RawFormat
from recsys.data.prepare import PrepareConfig
from recsys.data.schema import SPLITS, Schema
from recsys.data.verify import verify
from recsys.place import place
from tests.logs import (
    AVAZU,
    CRITEO,
    KDD12,
    SHOP,
    SHOP_YAML,
    Row,
    all_files,
    command,
    data_files,
    in_small_parts,
    make_rows,
    partial,
    read,
    rejection,
    run,
    text,
    write,
)
from tests.slow_prepare import slow_dense, slow_keys, slow_splits

Capsys = pytest.CaptureFixture[str]


def slow_like(folder: Path, fmt: RawFormat, rows: list[Row], integers: str) -> list[tuple[float, ...]]:
    """Rows of label, dense features and ids, these by the vocabulary files of a prepared folder."""
    schema = Schema.load(folder)
    paths = {name: folder / "vocabulary" / f"{name}.parquet" for name in schema.sparse}
    ids = {name: dict(pl.read_parquet(path).select("key", "id").rows()) for name, path in paths.items()}
    made = []
    for row in rows:
        keys = slow_keys(fmt, row, integers)
        label = int(int(row[fmt.label]) > 0)
        made.append((label, *slow_dense(fmt, row, integers), *(ids[name].get(keys[name], 0) for name in ids)))
    return made


def assert_rows(out: Path, split: str, expected: list[tuple[float, ...]]) -> None:
    frame, schema = read(out, split), Schema.load(out)
    assert frame.columns == [*schema.labels, *schema.dense, *schema.sparse]
    assert frame.select(schema.sparse.keys()).rows() == [row[-len(schema.sparse) :] for row in expected]
    np.testing.assert_allclose(frame.to_numpy(), np.array(expected), rtol=1e-6)


def assert_like(out: Path, folder: Path) -> None:
    """Whatever a model depends on is the same."""
    assert verify(out, show_progress=False) == []
    shared = {"schema.json", *(f"vocabulary/{name}.parquet" for name in Schema.load(folder).sparse)}
    assert {name: data_files(out)[name] for name in shared} == {name: data_files(folder)[name] for name in shared}
    assert {name for name in data_files(out) if name.startswith(("schema", "vocabulary"))} == shared


@pytest.fixture
def yesterday(tmp_path: Path) -> Path:
    """A prepared folder."""
    run(tmp_path / "yesterday", write(tmp_path / "yesterday.tsv", text(make_rows(200, seed=1))), threshold=3)
    return tmp_path / "yesterday"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Another log, of some of its values."""
    return write(tmp_path / "log.tsv", text(make_rows(150, seed=2)))


# ---- ids


@pytest.mark.parametrize(
    ("fmt", "settings"),
    [
        (CRITEO, {"integers": "log3", "threshold": 2}),
        (CRITEO, {"integers": "log_squared_bucket", "max_ids": (6,)}),
        (AVAZU, {"threshold": 3}),
        (KDD12, {"threshold": 1}),
        (SHOP, {}),
    ],
)
def test_ids_are_those_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: RawFormat, settings: dict[str, Any]
) -> None:
    name = str(write(tmp_path / "shop.yaml", SHOP_YAML.encode())) if fmt is SHOP else fmt.name
    in_small_parts(monkeypatch, rows=150)
    yesterday, out = tmp_path / "yesterday", tmp_path / "out"
    run(yesterday, write(tmp_path / "yesterday.log", text(make_rows(300, seed=1, fmt=fmt), fmt)), fmt=name, **settings)
    rows = make_rows(250, seed=2, fmt=fmt)
    logs = [write(tmp_path / f"{i}.log", text(part, fmt)) for i, part in enumerate((rows[:160], rows[160:]))]
    manifest = run(out, *logs, fmt=name, like=yesterday)
    assert [manifest["splits"][split]["num_rows"] for split in SPLITS] == [0, 0, 250]
    expected = slow_like(yesterday, fmt, rows, settings.get("integers", "log1p"))
    assert_rows(out, "test", expected)
    assert_like(out, yesterday)
    # What is prepared so has all that it takes to prepare another like it.
    run(tmp_path / "again", *logs, fmt=name, like=out)
    assert data_files(tmp_path / "again") == data_files(out)
    # Values that the folder left out are among them, and values that it knows.
    ids = np.array(expected)[:, -len(Schema.load(out).sparse) :]
    assert (ids == 0).any()
    assert (ids > 1).any()


@pytest.mark.parametrize("split", ["random", "time"])
def test_any_rule_splits_it(tmp_path: Path, yesterday: Path, log: Path, split: str) -> None:
    rows = make_rows(150, seed=2)
    run(tmp_path / "out", log, like=yesterday, split=split, seed=5)
    splits = slow_splits(split, 5, [rows], [slow_keys(CRITEO, row, "log1p") for row in rows])
    made = slow_like(yesterday, CRITEO, rows, "log1p")
    for i, name in enumerate(SPLITS):
        assert_rows(tmp_path / "out", name, [row for row, at in zip(made, splits, strict=True) if at == i])
    assert_like(tmp_path / "out", yesterday)


def test_weights_and_expanded_impressions_are_those_of_the_folder(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.tsv", text(make_rows(80, seed=i, fmt=KDD12), KDD12)) for i in range(2)]
    for impressions in ("weight", "expand"):
        yesterday, out = tmp_path / f"{impressions}.0", tmp_path / f"{impressions}.1"
        run(yesterday, files[0], fmt="kdd12", impressions=impressions, threshold=1)
        manifest = run(out, files[1], fmt="kdd12", like=yesterday)
        assert manifest["config"]["impressions"] == impressions
        assert_like(out, yesterday)
        counted = run(tmp_path / f"{impressions}.2", files[1], fmt="kdd12", impressions=impressions, threshold=1)
        assert manifest["num_rows"] == counted["num_rows"]


def test_neither_memory_nor_cores_leave_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"C1": f"{i % 700:x}"} for i, row in enumerate(make_rows(1000))]
    yesterday, out = tmp_path / "yesterday", tmp_path / "out"
    run(yesterday, write(tmp_path / "yesterday.tsv", text(rows)), threshold=1)
    later = [row | {"C1": f"{i * 7 % 1100:x}"} for i, row in enumerate(make_rows(900, seed=3))]
    log = write(tmp_path / "log.tsv", text(later))
    in_small_parts(monkeypatch, rows=300)
    made = []
    # 1000 values are all that fit at last: blocks of 250 keys, batches of a part each.
    for cores, memory, bytes_per_key in ((1, "4GiB", 96), (4, "900MB", 96), (2, "1GiB", 1 << 40)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setattr(remap, "BYTES_PER_ENTRY", bytes_per_key)
        run(out, log, like=yesterday, memory=memory)
        made.append(all_files(out))
        assert_rows(out, "test", slow_like(yesterday, CRITEO, later, "log1p"))
        out.rename(tmp_path / f"{cores} cores")
    assert made[0] == made[1] == made[2]


def test_a_column_without_a_known_value_has_id_0_alone(tmp_path: Path) -> None:
    rows = [row | {"C5": ""} for row in make_rows(60)]
    yesterday, out = tmp_path / "yesterday", tmp_path / "out"
    run(yesterday, write(tmp_path / "yesterday.tsv", text(rows)), threshold=2)
    later = make_rows(60, seed=4)
    run(out, write(tmp_path / "log.tsv", text(later)), like=yesterday)
    assert set(read(out, "test")["C5"]) == {0}
    assert_rows(out, "test", slow_like(yesterday, CRITEO, later, "log1p"))
    assert_like(out, yesterday)


def test_how_a_file_is_written_may_differ(tmp_path: Path) -> None:
    shop, parquet = (tmp_path / f"{name}.yaml" for name in ("shop", "parquet"))
    *head, note = SHOP_YAML.partition("separator:")[0].splitlines()
    write(shop, SHOP_YAML.encode())
    # Other order, no column that is unused, and another kind of file.
    write(parquet, "\n".join([*head[:2], *reversed(head[2:]), "file: parquet", "threshold: 9\n"]).encode())
    assert "unused" in note
    rows = make_rows(120, seed=6, fmt=SHOP)
    types = {"bought": pl.UInt8, "price": pl.Float64, "age": pl.Int32, "user": pl.Int64, "session": pl.UInt64}
    columns = {column.name: [row[column.name] or None for row in rows] for column in SHOP.columns[:-1]}
    frame = pl.DataFrame(columns).with_columns(pl.col(name).cast(kind) for name, kind in types.items())
    frame.write_parquet(tmp_path / "log.parquet")
    run(tmp_path / "yesterday", write(tmp_path / "0.csv", text(make_rows(150, fmt=SHOP), SHOP)), fmt=str(shop))
    run(tmp_path / "csv", write(tmp_path / "1.csv", text(rows, SHOP)), fmt=str(shop), like=tmp_path / "yesterday")
    run(tmp_path / "out", tmp_path / "log.parquet", fmt=str(parquet), like=tmp_path / "yesterday")
    assert data_files(tmp_path / "out") == data_files(tmp_path / "csv")


def test_the_folder_may_be_on_an_object_store(tmp_path: Path, yesterday: Path, log: Path) -> None:
    store = place("memory://like/yesterday")
    for name, content in all_files(yesterday).items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(content)
    assert command(tmp_path / "out", log, options=["--like", str(store)]) == 0
    run(tmp_path / "expected", log, like=yesterday)
    assert data_files(tmp_path / "out") == data_files(tmp_path / "expected")


def test_the_manifest_tells_the_folder(tmp_path: Path, log: Path) -> None:
    first = write(tmp_path / "first.tsv", text(make_rows(200, seed=1)))
    yesterday = tmp_path / "yesterday"
    run(yesterday, first, integers="log3", threshold=3, max_ids=(50,), seed=7)
    config = run(tmp_path / "out", log, like=yesterday)["config"]
    del config["raw_format"], config["vocabulary_hash"]
    assert config == {
        "format": "criteo_kaggle",
        "paths": [str(log)],
        "like": str(yesterday),
        "threshold": 3,
        "max_ids": [50],
        "vocabulary": "count",
        "integers": "log3",
        "impressions": "feature",
        "split": "test",
        "seed": 2021,
        "max_malformed": 0,
    }


@pytest.mark.parametrize("vocabulary", ["raw", "hash"])
def test_what_needs_no_vocabulary_is_all_test_too(tmp_path: Path, log: Path, vocabulary: str) -> None:
    caps: dict[str, Any] = {"max_ids": (9,)} if vocabulary == "hash" else {}
    run(tmp_path / "expected", log, vocabulary=vocabulary, split="time", **caps)
    run(tmp_path / "out", log, vocabulary=vocabulary, split="test", **caps)
    expected = pl.concat([read(tmp_path / "expected", name) for name in SPLITS])
    assert read(tmp_path / "out", "test").equals(expected)
    assert list((tmp_path / "out/train").iterdir()) == []


def test_an_estimate_takes_the_vocabulary_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yesterday: Path, capsys: Capsys
) -> None:
    rows = text(make_rows(150, seed=2))
    sample, log = write(tmp_path / "sample.tsv", rows), write(tmp_path / "log.tsv", rows * 10)
    run(tmp_path / "made", sample, like=yesterday, split="random")  # as a sample is split
    made, known = (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in (tmp_path / "made", yesterday / "vocabulary")
    )
    monkeypatch.setattr(prepare, "make_vocabulary", None)
    monkeypatch.setattr(estimates, "SAMPLE_BYTES", len(rows))
    config = PrepareConfig(format="criteo_kaggle", paths=(log,), out=tmp_path / "out", like=yesterday)
    assert estimates.estimate(config).data_bytes == pytest.approx((made - known) * 10 + known, rel=0.02)
    assert command(tmp_path / "out", log, options=["--like", str(yesterday), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("from the first 150 rows:")
    assert not (tmp_path / "out").exists()


# ---- interruptions


@pytest.mark.parametrize("kernel", ["ingest", "take_vocabulary", "encode"])
def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys, yesterday: Path, log: Path, kernel: str
) -> None:
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda _: {0})  # one job at a time
    in_small_parts(monkeypatch, rows=40)
    out, options = tmp_path / "out", ["--like", str(yesterday)]
    logs = (log, log.with_name("yesterday.tsv"))
    assert command(out, *logs, options=options) == 0
    expected = all_files(out)
    out.rename(tmp_path / "undisturbed")
    original, calls = getattr(prepare, kernel), Counter[str]()

    def spy(job: Any, advance: Any) -> Any:
        calls[kernel] += 1
        if calls[kernel] == 2:
            raise KeyboardInterrupt
        return original(job, advance)

    monkeypatch.setattr(prepare, kernel, spy)
    assert command(out, *logs, options=options) == 130
    # It is not finished with another vocabulary, nor without.
    shutil.copytree(yesterday, tmp_path / "copy")
    message = rejection(capsys, out, *logs, options=["--like", str(tmp_path / "copy")])
    assert message.startswith(f"{partial(out)}: an unfinished preparation with like {yesterday} instead of ")
    assert f"with like {yesterday} instead of None" in rejection(capsys, out, *logs)
    yesterday.rename(tmp_path / "aside")
    run(yesterday, write(tmp_path / "other.tsv", text(make_rows(200, seed=9))), threshold=3)
    assert "an unfinished preparation with vocabulary_hash " in rejection(capsys, out, *logs, options=options)
    shutil.rmtree(yesterday)
    assert rejection(capsys, out, *logs, options=options).startswith(f"{yesterday}: no such folder")
    (tmp_path / "aside").rename(yesterday)
    calls[kernel] = 2
    assert command(out, *logs, options=options) == 0
    jobs = {"ingest": 2, "take_vocabulary": 26, "encode": 9}[kernel]
    assert jobs - 2 <= calls[kernel] - 2 < jobs  # the one after the second may have been done
    assert all_files(out) == expected
    assert not partial(out).exists()


# ---- what is refused


def test_a_folder_that_cannot_be_taken_is_named(tmp_path: Path, capsys: Capsys, yesterday: Path, log: Path) -> None:
    out = tmp_path / "out"

    def refused(folder: Path, **options: Any) -> str:
        told = rejection(capsys, out, log, options=["--like", str(folder)], **options)
        assert not partial(out).exists()
        return told

    assert refused(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such folder")
    assert refused(tmp_path).startswith(f"{tmp_path}: no schema.json in it, so it was not made by `recsys prepare`")
    message = refused(yesterday, fmt="avazu")
    assert message == f"--like {yesterday}: it was prepared from format criteo_kaggle, not avazu"
    for vocabulary, again in (("raw", "--vocabulary raw"), ("hash", "--vocabulary hash with its --max-ids")):
        caps: dict[str, Any] = {"max_ids": (9,)} if vocabulary == "hash" else {}
        run(tmp_path / vocabulary, log, vocabulary=vocabulary, **caps)
        assert refused(tmp_path / vocabulary) == (
            f"--like {tmp_path / vocabulary}: it has no vocabulary, for its ids are those of --vocabulary "
            f"{vocabulary}; leave out --like: {again} --split test gives any log the same ids"
        )
    sizes = ["--sizes", *["2"] * 26]
    assert main(["multihot", str(yesterday), "--out", str(tmp_path / "multihot"), *sizes]) == 0
    assert refused(tmp_path / "multihot").startswith(f"--like {tmp_path / 'multihot'}: its features are multi-hot; ")
    manifest = yesterday / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: value for name, value in values.items() if name != "config"}))
    assert refused(yesterday) == f"{manifest}: it does not say how the folder was prepared; prepare that again"
    del values["files"]["vocabulary/C7.parquet"]
    manifest.write_text(json.dumps(values))
    assert refused(yesterday).startswith(f"--like {yesterday}: its schema is not that of its manifest; `recsys data ")
    manifest.unlink()
    assert refused(yesterday) == f"{manifest}: cannot read it (No such file or directory); prepare again"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("kind: int64", "kind: uint64"), "had int64 column 'user', this one has uint64"),
        (("name: page", "name: site"), "had hex32 column 'page', this one has none"),
        (("kind: unused", "kind: text"), "had no column 'note', this one has text"),
    ],
)
def test_a_format_of_other_columns_is_refused(
    tmp_path: Path, capsys: Capsys, change: tuple[str, str], problem: str
) -> None:
    own = write(tmp_path / "shop.yaml", SHOP_YAML.encode())
    log = write(tmp_path / "log.csv", text(make_rows(50, fmt=SHOP), SHOP))
    run(tmp_path / "yesterday", log, fmt=str(own))
    write(own, SHOP_YAML.replace(*change).encode())
    message = rejection(capsys, tmp_path / "out", log, fmt=str(own), options=["--like", str(tmp_path / "yesterday")])
    assert message == f"--like {tmp_path / 'yesterday'}: its format shop {problem}"


def test_what_the_folder_tells_is_not_said_again(tmp_path: Path, capsys: Capsys, yesterday: Path, log: Path) -> None:
    for name, value in {
        "--threshold": "3",
        "--max-ids": "9",
        "--vocabulary": "raw",
        "--integers": "log3",
        "--impressions": "weight",
    }.items():
        message = rejection(capsys, tmp_path / "out", log, options=["--like", str(yesterday), name, value])
        assert message == f"{name} is that of {yesterday} with --like; leave it out"
    assert not partial(tmp_path / "out").exists()
    assert command(tmp_path / "out", log, options=["--like", str(yesterday), "--integers", "log1p"]) == 0


def test_a_damaged_vocabulary_is_refused(tmp_path: Path, capsys: Capsys, yesterday: Path, log: Path) -> None:
    path, options = yesterday / "vocabulary/C3.parquet", ["--like", str(yesterday)]
    content = path.read_bytes()
    write(path, content[:90] + bytes([content[90] ^ 1]) + content[91:])
    message = rejection(capsys, tmp_path / "out", log, options=options)
    assert message == f"{path}: not what its manifest lists; `recsys data verify {yesterday}` tells more"
    path.unlink()
    message = rejection(capsys, tmp_path / "out", log, options=options)
    assert message == f"{path}: cannot read it (No such file or directory)"
    write(path, content)
    assert command(tmp_path / "out", log, options=options) == 0
    assert_like(tmp_path / "out", yesterday)


def test_all_rows_test_only_where_nothing_is_counted(tmp_path: Path, capsys: Capsys, log: Path) -> None:
    message = rejection(capsys, tmp_path / "out", log, options=["--split", "test"])
    assert message.startswith("--split test leaves no row to count values on; name the prepared folder that knows them")
    assert not partial(tmp_path / "out").exists()


# ---- the file rule needs what it holds out, and others


def test_one_file_is_not_held_out(tmp_path: Path, capsys: Capsys) -> None:
    content = text(make_rows(30))
    log = write(tmp_path / "log.tsv", content)
    (tmp_path / "data/day=1").mkdir(parents=True)
    for i in range(2):
        write(tmp_path / f"data/day=1/{i}.tsv", content)
    for paths, only in (([log], log), ([tmp_path / "data"], tmp_path / "data/day=1")):
        message = rejection(capsys, tmp_path / "out", *paths, fmt="criteo_1tb")
        assert message == (
            "--split file holds the last raw file out, or the last folder day=..., and trains on those before; "
            f"{only} is the only one (--split random or time divides it)"
        )
        assert not partial(tmp_path / "out").exists()
    assert FORMATS["criteo_1tb"].split == "file"
    splits = run(tmp_path / "yesterday", log, tmp_path / "data", fmt="criteo_1tb")["splits"]
    assert [splits[name]["num_rows"] for name in SPLITS] == [30, 30, 30]
    assert run(tmp_path / "out", log, fmt="criteo_1tb", like=tmp_path / "yesterday")["splits"]["test"]["num_rows"] == 30
