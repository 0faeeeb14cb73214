"""Prepare against a slow reference in plain Python, and every kind of bad input."""

import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.data import raw
from recsys.data.formats import FORMATS, log1p, log_squared_bucket
from recsys.data.prepare import PrepareConfig, prepare
from recsys.data.raw import malformed_rows, parse, read_lines
from recsys.data.schema import SPLITS, Schema
from recsys.data.split import TEST, TRAIN, VALID, _splitmix64, split_of

CRITEO = FORMATS["criteo_kaggle"]
Row = dict[str, str]


def make_rows(num_rows: int, seed: int = 0) -> list[Row]:
    """Rows with few distinct values (ties, rare and frequent ones), missing fields and negative integers."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        row = {"label": rng.choice("0001")}
        for name in CRITEO.integers:
            row[name] = rng.choice(["", "0", "-2", str(int(rng.expovariate(0.05))), str(rng.randrange(10**6))])
        for name in CRITEO.categories:
            value = int(rng.expovariate(0.1))
            row[name] = rng.choice(["", f"{value:08x}", f"{value:X}", f"{2**32 - 1 - value:x}"])
        rows.append(row)
    return rows


def line(row: Row) -> bytes:
    return "\t".join(row[name] for name in CRITEO.columns).encode() + b"\n"


def text(rows: Sequence[Row]) -> bytes:
    return b"".join(map(line, rows))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def run(out: Path, *paths: Path, **settings: Any) -> dict:
    return prepare(PrepareConfig(format="criteo_kaggle", paths=paths, out=out, **settings))


def read(out: Path, split: str) -> pl.DataFrame:
    return pl.read_parquet(out / split / "part-00000.parquet")


def data_files(out: Path) -> dict[str, bytes]:
    """Bytes of all that was prepared but for the manifest, which names the raw files."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


# ---- the slow reference


def splitmix64(counter: int) -> int:
    word = counter * 0x9E3779B97F4A7C15 % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def slow_split(row: int, rule: str, seed: int, num_rows: int) -> int:
    share = splitmix64((seed << 40) + row) / 2**64 if rule == "random" else row / num_rows
    return TRAIN if share < 0.8 else VALID if share < 0.9 else TEST


def slow_bucket(value: int) -> int:
    return math.floor(math.log(value) ** 2) if value > 2 else value


def slow_keys(row: Row, integers: str) -> dict[str, int | None]:
    keys: dict[str, int | None] = {}
    if integers == "log_squared_bucket":
        keys = {name: slow_bucket(int(row[name])) if row[name] else None for name in CRITEO.integers}
    return keys | {name: int(row[name], 16) if row[name] else None for name in CRITEO.categories}


class Slow(NamedTuple):
    vocabularies: dict[str, list[tuple[int, int, int]]]
    """Of each feature: (key, id, count)."""
    splits: list[list[tuple[float, ...]]]
    """Of each split: rows of label, dense features, ids."""


def slow_prepare(rows: list[Row], threshold: int, integers: str, split: str, seed: int) -> Slow:
    keys = [slow_keys(row, integers) for row in rows]
    splits = [slow_split(i, split, seed, len(rows)) for i in range(len(rows))]
    vocabularies: dict[str, list[tuple[int, int, int]]] = {}
    ids: dict[str, dict[int | None, int]] = {}
    for name in keys[0]:
        counts = Counter(key[name] for key, at in zip(keys, splits, strict=True) if at == TRAIN)
        kept = [(key, count) for key, count in counts.items() if key is not None and count >= threshold]
        kept.sort(key=lambda entry: (-entry[1], entry[0]))
        vocabularies[name] = [(key, i, count) for i, (key, count) in enumerate(kept, start=1)]
        ids[name] = {key: i for key, i, _ in vocabularies[name]}
    made: list[list[tuple[float, ...]]] = [[] for _ in SPLITS]
    for row, key, at in zip(rows, keys, splits, strict=True):
        dense = [math.log1p(max(int(row[name] or 0), 0)) for name in CRITEO.integers if name not in ids]
        made[at].append((int(row["label"]), *dense, *(ids[name].get(value, 0) for name, value in key.items())))
    return Slow(vocabularies, made)


@pytest.mark.parametrize("integers", ["log1p", "log_squared_bucket"])
@pytest.mark.parametrize("split", ["random", "time"])
@pytest.mark.parametrize("threshold", [1, 4])
def test_prepare_is_the_slow_reference(tmp_path: Path, integers: str, split: str, threshold: int) -> None:
    rows = make_rows(400)
    out = tmp_path / "out"
    settings: dict[str, Any] = {"integers": integers, "split": split, "threshold": threshold}
    run(out, write(tmp_path / "log.tsv", text(rows)), seed=7, **settings)
    slow = slow_prepare(rows, seed=7, **settings)

    schema = Schema.load(out)
    assert schema.labels == ("label",)
    assert schema.dense == (CRITEO.integers if integers == "log1p" else ())
    assert schema.sparse == {name: len(entries) + 1 for name, entries in slow.vocabularies.items()}
    assert list(schema.sparse) == list(slow.vocabularies)
    for name, entries in slow.vocabularies.items():
        assert pl.read_parquet(out / "vocabulary" / f"{name}.parquet").rows() == entries
    for name, expected in zip(SPLITS, slow.splits, strict=True):
        frame = read(out, name)
        assert frame.columns == [*schema.labels, *schema.dense, *schema.sparse]
        assert frame.select(schema.sparse.keys()).rows() == [row[-len(schema.sparse) :] for row in expected]
        np.testing.assert_allclose(frame.to_numpy(), np.array(expected), rtol=1e-6)


# ---- rules


def test_integers_as_log1p() -> None:
    values = [None, -3, -1, 0, 1, 2, 3, 1000, 2**62]
    found = pl.DataFrame({"v": values}).select(log1p(pl.col("v")))["v"].to_list()
    assert found == pytest.approx([0.0, 0.0, 0.0, *(math.log1p(value) for value in [0, 1, 2, 3, 1000, 2**62])])


def test_integers_as_buckets() -> None:
    values = [*range(-5, 50_000), 2**31, 2**62]
    found = pl.DataFrame({"v": values}).select(log_squared_bucket(pl.col("v")))["v"].to_list()
    assert found == [slow_bucket(value) for value in values]
    assert pl.DataFrame({"v": [None, 1]}).select(log_squared_bucket(pl.col("v")))["v"].to_list() == [None, 1]


def vocabulary_of(tmp_path: Path, values: Sequence[str], threshold: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Prepare a log with these values of C1, split by time; returns C1's vocabulary and its ids, row by row."""
    rows = [dict.fromkeys(CRITEO.columns, "") | {"label": "0", "C1": value} for value in values]
    out = tmp_path / "out"
    run(out, write(tmp_path / "log.tsv", text(rows)), split="time", threshold=threshold)
    ids = pl.concat([read(out, name) for name in SPLITS])["C1"].to_list()
    return pl.read_parquet(out / "vocabulary" / "C1.parquet").rows(), ids


def test_ids_go_by_count_then_value_and_0_is_missing_or_rare(tmp_path: Path) -> None:
    entries, ids = vocabulary_of(tmp_path, ["b", "a", "c", "", "c", "b", "a", "d", "a", "b"], threshold=2)
    assert entries == [(0xA, 1, 2), (0xB, 2, 2), (0xC, 3, 2)]
    assert ids == [2, 1, 3, 0, 3, 2, 1, 0, 1, 2]


def test_only_training_rows_count(tmp_path: Path) -> None:
    entries, ids = vocabulary_of(tmp_path, ["a"] * 8 + ["b", "b"], threshold=1)
    assert entries == [(0xA, 1, 8)]
    assert ids == [1] * 8 + [0, 0]


def test_a_value_is_the_number_and_not_its_text(tmp_path: Path) -> None:
    entries, ids = vocabulary_of(tmp_path, ["0a", "A", "0000000a", "a", "", "00000000", "0", "ffffffff"] + [""] * 2, 1)
    assert entries == [(0xA, 1, 4), (0, 2, 2), (0xFFFFFFFF, 3, 1)]
    assert ids == [1, 1, 1, 1, 0, 2, 2, 3, 0, 0]


# ---- splits


def splits_of(num_rows: int, rule: str, seed: int = 0) -> list[int]:
    rows = pl.select(row=pl.int_range(num_rows, dtype=pl.UInt64))
    return rows.select(split_of(pl.col("row"), rule, seed=seed, num_rows=num_rows)).to_series().to_list()


def test_the_hash_is_splitmix64() -> None:
    first_three = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # published, of seed 0
    assert [splitmix64(counter) for counter in (1, 2, 3)] == first_three
    for seed in (0, 2021, 2**24 - 1):
        found = pl.select(row=pl.int_range(1000, dtype=pl.UInt64)).select(_splitmix64(pl.col("row"), seed))
        assert found.to_series().to_list() == [splitmix64((seed << 40) + row) for row in range(1000)]


def test_random_splits_have_their_shares() -> None:
    counts = Counter(splits_of(100_000, "random", seed=3))
    sigma = math.sqrt(100_000 * 0.1 * 0.9)
    assert abs(counts[VALID] - 10_000) < 4 * sigma
    assert abs(counts[TEST] - 10_000) < 4 * sigma
    assert counts[TRAIN] == 100_000 - counts[VALID] - counts[TEST]


def test_another_seed_is_another_independent_split() -> None:
    one, other = splits_of(100_000, "random", seed=1), splits_of(100_000, "random", seed=2)
    both_held_out = sum(TRAIN not in pair for pair in zip(one, other, strict=True))
    assert both_held_out == pytest.approx(0.2 * 0.2 * 100_000, rel=0.07)


def test_splits_by_time_are_consecutive() -> None:
    assert splits_of(10, "time") == [TRAIN] * 8 + [VALID, TEST]
    assert splits_of(1000, "time") == [TRAIN] * 800 + [VALID] * 100 + [TEST] * 100


@pytest.mark.parametrize("split", ["random", "time"])
def test_every_row_is_in_one_split_in_order(tmp_path: Path, split: str) -> None:
    rows = [row | {"I1": str(i)} for i, row in enumerate(make_rows(500))]
    out = tmp_path / "out"
    run(out, write(tmp_path / "log.tsv", text(rows)), split=split)
    numbers = [np.expm1(read(out, name)["I1"].to_numpy()).round().astype(int).tolist() for name in SPLITS]
    assert all(part == sorted(part) for part in numbers)
    together = [number for part in numbers for number in part]
    assert sorted(together) == list(range(500))
    assert (together == list(range(500))) == (split == "time")


def test_a_log_too_short_for_all_splits_leaves_some_empty(tmp_path: Path) -> None:
    manifest = run(tmp_path / "out", write(tmp_path / "log.tsv", text(make_rows(3))), split="time")
    assert [manifest["splits"][name]["num_rows"] for name in SPLITS] == [3, 0, 0]
    assert manifest["splits"]["test"]["label_mean"] == 0
    assert read(tmp_path / "out", "test").height == 0


# ---- the prepared folder


def test_features_keep_the_contract(tmp_path: Path) -> None:
    out = tmp_path / "out"
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


def test_row_groups_have_one_size_but_for_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.data.prepare.MIN_GROUP_ROWS", 16)
    monkeypatch.setattr("recsys.data.prepare.PART_ROWS", 100)
    monkeypatch.setattr(raw, "CHUNK_BYTES", 10_000)
    out = tmp_path / "out"
    manifest = run(out, write(tmp_path / "log.tsv", text(make_rows(700))))
    for name in SPLITS:
        metadata = pq.ParquetFile(out / name / "part-00000.parquet").metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert sum(sizes) == manifest["splits"][name]["num_rows"]
        assert len(sizes) > 1
        assert set(sizes[:-1]) == {16}
        assert 0 < sizes[-1] <= 16


@pytest.mark.parametrize(("max_rows", "expected"), [(65_536, 20), (8, 8)])
def test_row_groups_grow_with_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_rows: int, expected: int
) -> None:
    monkeypatch.setattr("recsys.data.prepare.MIN_GROUP_ROWS", 1)
    monkeypatch.setattr("recsys.data.prepare.MAX_GROUP_ROWS", max_rows)
    monkeypatch.setattr("recsys.data.prepare.TARGET_GROUPS", 10)
    run(tmp_path / "out", write(tmp_path / "log.tsv", text(make_rows(200))))
    assert pq.ParquetFile(tmp_path / "out/train/part-00000.parquet").metadata.row_group(0).num_rows == expected


def test_the_manifest_tells_the_facts(tmp_path: Path) -> None:
    rows = make_rows(300)
    path = write(tmp_path / "log.tsv", text(rows))
    out = tmp_path / "out"
    manifest = run(out, path, threshold=3, seed=5)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["schema_hash"] == Schema.load(out).hash
    assert manifest["config"] == {
        "format": "criteo_kaggle",
        "paths": [str(path)],
        "out": None,
        "threshold": 3,
        "integers": "log1p",
        "split": "random",
        "seed": 5,
        "max_malformed": 0,
    }
    assert manifest["num_rows"] == 300
    labels: dict[str, list[int]] = {name: [] for name in SPLITS}
    for i, row in enumerate(rows):
        labels[SPLITS[slow_split(i, "random", 5, 300)]].append(int(row["label"]))
    assert manifest["splits"] == {
        name: {"num_rows": len(values), "label_mean": sum(values) / len(values)} for name, values in labels.items()
    }
    shares = {name: sum(row[name] == "" for row in rows) / 300 for name in CRITEO.columns}
    assert manifest["null_share"] == pytest.approx(shares)
    assert (manifest["num_malformed"], manifest["malformed"]) == (0, [])


# ---- the same rows give the same bytes, however they come


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    log = write(tmp_path / "log.tsv", text(make_rows(500)))
    manifests = [run(tmp_path / name, log, threshold=1) for name in ("a", "b")]
    assert manifests[0] == manifests[1]
    assert data_files(tmp_path / "a") == data_files(tmp_path / "b")
    assert len(data_files(tmp_path / "a")) == 3 + 26 + 1


def packed(content: bytes) -> bytes:
    return gzip.compress(content)


def in_members(content: bytes) -> bytes:
    """Three gzip members, cut in the middle of lines, one of them empty."""
    return packed(content[:1001]) + packed(b"") + packed(content[1001:5003]) + packed(content[5003:])


@pytest.mark.parametrize("chunk_bytes", [1500, 32 << 20])
def test_however_a_log_comes_it_gives_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    rows = make_rows(120)
    whole = text(rows)
    head, tail = text(rows[:50]), text(rows[50:])
    run(tmp_path / "expected", write(tmp_path / "log.tsv", whole))
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
    ways = {
        "gzip": [packed(whole)],
        "members": [in_members(whole)],
        "no newline": [whole.removesuffix(b"\n")],
        "gzip, no newline": [packed(whole.removesuffix(b"\n"))],
        "two files": [head, tail],
        "plain, no newline, and gzip": [head.removesuffix(b"\n"), packed(tail)],
        "zeros after gzip": [packed(whole) + bytes(512)],
    }
    for way, contents in ways.items():
        paths = [write(tmp_path / f"{way} {i}", content) for i, content in enumerate(contents)]
        run(tmp_path / f"{way}.out", *paths)
        assert data_files(tmp_path / f"{way}.out") == data_files(tmp_path / "expected"), way


@pytest.mark.parametrize("integers", ["log1p", "log_squared_bucket"])
def test_parts_and_chunks_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, integers: str) -> None:
    log = write(tmp_path / "log.tsv", text(make_rows(1000)))
    manifest = run(tmp_path / "expected", log, integers=integers)
    monkeypatch.setattr("recsys.data.prepare.PART_ROWS", 70)
    monkeypatch.setattr("recsys.data.prepare.MIN_GROUP_ROWS", 1024)
    monkeypatch.setattr(raw, "CHUNK_BYTES", 5_000)
    assert len(list(read_lines(log))) > 30
    assert run(tmp_path / "out", log, integers=integers) == manifest
    assert data_files(tmp_path / "out") == data_files(tmp_path / "expected")


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_chunks_are_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
    content = b"a\nbcd\n\n" + b"x" * 100 + b"\nlast"
    chunks = list(read_lines(write(tmp_path / "log", content)))
    assert b"".join(chunks) == content + b"\n"
    assert all(chunk.endswith(b"\n") for chunk in chunks)


# ---- bad input


def rejection(capsys: pytest.CaptureFixture[str], out: Path, *paths: Path, options: Sequence[str] = ()) -> str:
    """Prepare what must be refused: 2, one line on stderr, which is returned, and nothing left behind."""
    status = main(["prepare", "criteo_kaggle", *map(str, paths), "--out", str(out), *options])
    stdout, stderr = capsys.readouterr()
    assert (status, stdout) == (2, "")
    assert stderr.startswith("recsys: ")
    assert stderr.count("\n") == 1
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return stderr.removeprefix("recsys: ").removesuffix("\n")


GOOD = dict.fromkeys(CRITEO.columns, "1")

BAD_LINES = {
    "too few fields": (line(GOOD).replace(b"\t1\n", b"\n"), "39 fields instead of 40"),
    "too many fields": (line(GOOD).replace(b"\n", b"\t1\n"), "41 fields instead of 40"),
    "blank line": (b"\n", "1 fields instead of 40"),
    "fraction": (line(GOOD | {"I2": "1.5"}), "column I2: '1.5' is not a 64-bit integer"),
    "word": (line(GOOD | {"I13": "one"}), "column I13: 'one' is not a 64-bit integer"),
    "hexadecimal integer": (line(GOOD | {"I2": "1f"}), "column I2: '1f' is not a 64-bit integer"),
    "large integer": (line(GOOD | {"I2": str(2**63)}), f"column I2: '{2**63}' is not a 64-bit integer"),
    "small integer": (line(GOOD | {"I2": str(-(2**63) - 1)}), f"column I2: '{-(2**63) - 1}' is not a 64-bit integer"),
    "minus alone": (line(GOOD | {"I2": "-"}), "column I2: '-' is not a 64-bit integer"),
    "plus": (line(GOOD | {"I2": "+1"}), "column I2: '+1' is not a 64-bit integer"),
    "space": (line(GOOD | {"I2": " 1"}), "column I2: ' 1' is not a 64-bit integer"),
    "no hexadecimal": (line(GOOD | {"C3": "xyz"}), "column C3: 'xyz' is not a 32-bit hexadecimal category"),
    "nine digits": (line(GOOD | {"C26": "012345678"}), "column C26: '012345678' is not a 32-bit hexadecimal category"),
    "negative category": (line(GOOD | {"C3": "-1"}), "column C3: '-1' is not a 32-bit hexadecimal category"),
    "quotes": (line(GOOD | {"C3": '"1"'}), "column C3: '\"1\"' is not a 32-bit hexadecimal category"),
    "label 2": (line(GOOD | {"label": "2"}), "column label: '2' is not 0 or 1"),
    "label 01": (line(GOOD | {"label": "01"}), "column label: '01' is not 0 or 1"),
    "label -1": (line(GOOD | {"label": "-1"}), "column label: '-1' is not 0 or 1"),
    "no label": (line(GOOD | {"label": ""}), "column label: '' is not 0 or 1"),
    "CR LF": (line(GOOD).replace(b"\n", b"\r\n"), "column C26: the line ends in CR LF"),
    "CR LF after nothing": (line(GOOD | {"C26": ""}).replace(b"\n", b"\r\n"), "column C26: the line ends in CR LF"),
    "CR within a line": (line(GOOD | {"C3": "a\rb"}), "column C3: 'a\\rb' is not a 32-bit hexadecimal category"),
    "no UTF-8": (line(GOOD | {"C3": "@"}).replace(b"@", b"\xff"), "column C3: '\\\\xff' is not a 32-bit hexadecimal"),
    "no ASCII": (line(GOOD | {"I1": "\u0661"}), "column I1: '\u0661' is not a 64-bit integer"),
    "byte order mark": (line(GOOD | {"label": "\ufeff1"}), "column label: '\\ufeff1' is not 0 or 1"),
}


@pytest.mark.parametrize("row", [1, 3, 5])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_malformed_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, row: int) -> None:
    lines = [line(GOOD)] * 5
    lines[row - 1], problem = BAD_LINES[kind]
    log = write(tmp_path / "log.tsv", b"".join(lines))
    message = rejection(capsys, tmp_path / "out", log)
    assert message.startswith(f"{log}, row {row}: {problem}")
    assert message.endswith("(at most 0 malformed rows are tolerated: --max-malformed N leaves out N)")


def test_a_row_too_long_does_not_make_up_for_one_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = BAD_LINES["too few fields"][0], BAD_LINES["too many fields"][0]
    for i, lines in enumerate([short + long, long + short, line(GOOD) * 9 + long + b"\n" + line(GOOD) * 9]):
        log = write(tmp_path / f"log{i}.tsv", lines)
        message = rejection(capsys, tmp_path / "out", log)
        assert message.count("fields instead of 40") == 2


def test_a_file_of_windows_lines_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log.tsv", text(make_rows(10)).replace(b"\n", b"\r\n"))
    message = rejection(capsys, tmp_path / "out", log)
    assert message.startswith(f"{log}, row 1: column C26: the line ends in CR LF")
    assert "; and 7 more so far (at most 0 " in message


def test_fast_and_slow_parse_agree_on_what_is_malformed() -> None:
    rng = random.Random(1)
    alphabet = "0123456789" * 9 + "abF-" * 3 + "+. g\r\n\t\0\u00e9"
    num_bad = 0
    for _ in range(1500):
        field = "".join(rng.choices(alphabet, k=rng.choice([0, 1, 2, 8, 9, 19])))
        lines = line(GOOD | {rng.choice(CRITEO.columns): field})
        good, bad = malformed_rows(CRITEO, Path("log"), lines, 1)
        parsed = parse(CRITEO, lines)
        assert (parsed is None) == bool(bad), field
        assert parsed is None or (good, parsed.height) == (lines, 1)
        num_bad += bool(bad)
    assert 300 < num_bad < 1200


@pytest.mark.parametrize("value", ["-9223372036854775808", "9223372036854775807", "-0", "007", "0" * 30 + "5"])
def test_what_fits_64_bits_is_an_integer(value: str) -> None:
    lines = line(GOOD | {"I2": value})
    parsed = parse(CRITEO, lines)
    assert parsed is not None
    assert parsed["I2"][0] == int(value)
    assert malformed_rows(CRITEO, Path("log"), lines, 1) == (lines, [])


# ---- malformed rows that are tolerated


@pytest.mark.parametrize("chunk_bytes", [300, 32 << 20])
def test_malformed_rows_are_left_out_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chunk_bytes: int
) -> None:
    rows = make_rows(60)
    lines = [line(row) for row in rows]
    bad = {2: "label 2", 30: "blank line", 31: "CR within a line", 32: "too many fields", 60: "nine digits"}
    for row, kind in bad.items():
        lines[row - 1] = BAD_LINES[kind][0]
    good = [row for i, row in enumerate(rows, start=1) if i not in bad]
    run(tmp_path / "expected", write(tmp_path / "good.tsv", text(good)))
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
    log = write(tmp_path / "log.tsv", b"".join(lines).removesuffix(b"\n"))
    out = tmp_path / "out"
    assert main(["prepare", "criteo_kaggle", str(log), "--out", str(out), "--max-malformed", "5"]) == 0
    assert f"left out 5 malformed rows; {out}/manifest.json names the first" in capsys.readouterr().out
    assert data_files(out) == data_files(tmp_path / "expected")
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["num_rows"], manifest["num_malformed"]) == (55, 5)
    reported = zip(manifest["malformed"], bad.items(), strict=True)
    assert all(told.startswith(f"{log}, row {row}: {BAD_LINES[kind][1]}") for told, (row, kind) in reported)


def test_rows_are_counted_anew_in_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "first.tsv", line(GOOD) * 10)
    second = write(tmp_path / "second.tsv", line(GOOD) * 2 + b"\n")
    assert rejection(capsys, tmp_path / "out", first, second).startswith(f"{second}, row 3: 1 fields")


@pytest.mark.parametrize("chunk_bytes", [100, 32 << 20])
def test_more_malformed_rows_than_tolerated_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chunk_bytes: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk_bytes)
    log = write(tmp_path / "log.tsv", (line(GOOD) + b"\n") * 3 + line(GOOD))
    message = rejection(capsys, tmp_path / "out", log, options=["--max-malformed", "2"])
    assert [f"row {row}:" in message for row in (2, 4, 6)] == [True] * 3
    assert "(at most 2 malformed rows are tolerated" in message
    run(tmp_path / "out", log, max_malformed=3)


def test_the_manifest_names_ten_malformed_rows_at_most(tmp_path: Path) -> None:
    log = write(tmp_path / "log.tsv", line(GOOD) + b"\n" * 12)
    manifest = run(tmp_path / "out", log, max_malformed=100)
    assert manifest["num_malformed"] == 12
    assert [told.split(": ")[0] for told in manifest["malformed"]] == [f"{log}, row {row}" for row in range(2, 12)]


def test_a_log_of_malformed_rows_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log.tsv", b"\n" * 5)
    message = rejection(capsys, tmp_path / "out", log, options=["--max-malformed", "9"])
    assert message == f"{log}: no well-formed row in it"


# ---- files and options that cannot work


def corrupt(content: bytes) -> bytes:
    """Flip bytes in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x5A for byte in content[middle : middle + 8]) + content[middle + 8 :]


PACKED = packed(text(make_rows(200)))

BAD_FILES = {
    "empty": (b"", "the file is empty; expected one click a line"),
    "empty gzip": (packed(b""), "the file is empty; expected one click a line"),
    "truncated gzip": (PACKED[: len(PACKED) // 2], "the gzip stream is truncated"),
    "gzip without its last byte": (PACKED[:-1], "the gzip stream is truncated"),
    "gzip header alone": (PACKED[:10], "the gzip stream is truncated"),
    "truncated second member": (PACKED + PACKED[:-20], "the gzip stream is truncated"),
    "corrupt gzip": (corrupt(PACKED), "the gzip stream is corrupt"),
    "wrong checksum": (PACKED[:-8] + bytes(4) + PACKED[-4:], "the gzip stream is corrupt"),
    "newline alone": (b"\n", "1 fields instead of 40"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    content, problem = BAD_FILES[kind]
    good, bad = write(tmp_path / "good.tsv", line(GOOD) * 20), write(tmp_path / "bad", content)
    message = rejection(capsys, tmp_path / "out", good, bad)
    assert message.startswith(f"{bad}")
    assert problem in message


def test_a_file_that_cannot_be_read_is_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    malformed = write(tmp_path / "log.tsv", b"\n")
    missing, folder = tmp_path / "missing.gz", tmp_path / "folder"
    folder.mkdir()
    message = rejection(capsys, tmp_path / "out", malformed, missing)
    assert message == f"{missing}: cannot read it (No such file or directory)"
    assert rejection(capsys, tmp_path / "out", malformed, folder) == f"{folder}: cannot read it (Is a directory)"


def test_an_existing_folder_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = write(tmp_path / "log.tsv", line(GOOD)), tmp_path / "out"
    out.mkdir()
    write(out / "mine", b"")
    assert main(["prepare", "criteo_kaggle", str(log), "--out", str(out)]) == 2
    stderr = capsys.readouterr().err
    assert stderr == f"recsys: {out}: exists already; name another --out, or delete it first\n"
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log.tsv", line(GOOD))
    assert rejection(capsys, log / "out", log) == f"{log / 'out'}: cannot make it (Not a directory)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--integers", "log1"], "unknown rule --integers 'log1'; did you mean log1p?"),
        (["--split", "times"], "unknown --split 'times'; did you mean time?"),
        (["--threshold", "0"], "--threshold 0 must be at least 1 (1 keeps every value)"),
        (["--seed", "-1"], "--seed and --max-malformed must not be negative"),
        (["--max-malformed", "-1"], "--seed and --max-malformed must not be negative"),
    ],
)
def test_an_option_that_cannot_work_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    log = write(tmp_path / "log.tsv", line(GOOD))
    assert rejection(capsys, tmp_path / "out", log, options=options) == message


def test_an_unknown_format_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "criteo_kagle", "log.tsv", "--out", "out"]) == 2
    assert capsys.readouterr().err == "recsys: unknown format 'criteo_kagle'; did you mean criteo_kaggle?\n"


def test_a_log_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "criteo_kaggle", "--out", "out"]) == 2
    assert capsys.readouterr().err == "recsys: no raw file named\n"


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        assert (tmp_path / ".out.partial" / "train").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Schema, "save", interrupt)
    log = write(tmp_path / "log.tsv", line(GOOD))
    assert main(["prepare", "criteo_kaggle", str(log), "--out", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == [log]


def test_what_an_earlier_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "train").mkdir(parents=True)
    write(tmp_path / ".out.partial" / "stale", b"")
    run(tmp_path / "out", write(tmp_path / "log.tsv", line(GOOD)))
    assert not (tmp_path / "out" / "stale").exists()
    assert not (tmp_path / ".out.partial").exists()
