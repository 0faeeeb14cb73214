"""Vocabularies against a count in plain Python; what outgrows the memory is the same to the byte."""

import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from recsys.config import InputError
from recsys.data import vocabulary as vocabularies
from recsys.data.ingest import SPLIT, PartOfLog
from recsys.data.vocabulary import VocabularyJob, hash_ids, make_vocabulary

PLENTY, LITTLE = 1 << 30, 0
Value = int | str | None

TYPES: dict[str, tuple[pa.DataType, Callable[[random.Random, int], Value]]] = {
    "uint32": (pa.uint32(), lambda rng, n: rng.choice([rng.randrange(n), 2**32 - 1 - rng.randrange(n)])),
    "int64": (pa.int64(), lambda rng, n: rng.choice([rng.randrange(-n, n), rng.randrange(n) - 2**63])),
    "uint64": (pa.uint64(), lambda rng, n: rng.choice([rng.randrange(n), 2**64 - 1 - rng.randrange(n)])),
    "text": (
        pa.string(),
        lambda rng, n: rng.choice(["", "na\u00efve ", "\U0001f600", "Z" * 20]) + str(rng.randrange(n)),
    ),
}


def write_parts(
    folder: Path, kind: pa.DataType, parts: Sequence[Sequence[Value]], splits: Any
) -> tuple[PartOfLog, ...]:
    """Write a column in parts; its split is a column of them (lists) or an interval (pairs)."""
    made = []
    for i, (values, split) in enumerate(zip(parts, splits, strict=True)):
        column = pa.array(values, kind).dictionary_encode(null_encoding="encode")
        columns = {"C": column}
        if isinstance(split, list):
            columns[SPLIT] = pa.array(split, pa.uint8())
        batch = pa.RecordBatch.from_pydict(columns)
        path = folder / f"{i}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        bounds = None if isinstance(split, list) else split
        sizes = {"C": len(column.dictionary)}
        made.append(PartOfLog(path=path, num_rows=len(values), bounds=bounds, num_values=sizes))
    return tuple(made)


def make(folder: Path, parts: tuple[PartOfLog, ...], **settings: Any) -> tuple[bytes, bytes, int]:
    """Bytes of the vocabulary and of the remap, and the number of ids."""
    folder.mkdir()
    given: dict[str, Any] = {
        "threshold": 1,
        "max_ids": None,
        "hashed": False,
        "memory": PLENTY,
        "weight": None,
    } | settings
    ticks: list[int] = []
    job = VocabularyJob(feature="C", parts=parts, folder=folder, out=folder, **given)
    facts = make_vocabulary(job, ticks.append)
    assert sum(ticks) == len(parts)
    assert json.loads((folder / "C.json").read_text()) == facts == {"feature": "C", "num_ids": facts["num_ids"]}
    found = folder / "C.parquet"
    assert {path.name for path in folder.iterdir()} == {"C.json", "C.remap", *([] if job.hashed else [found.name])}
    return b"" if job.hashed else found.read_bytes(), job.remap.read_bytes(), facts["num_ids"]


def slow(
    parts: Sequence[Sequence[Value]], splits: Sequence[Sequence[int]], threshold: int, max_ids: int | None
) -> list[tuple[Value, int, int]]:
    rows = zip(sum(map(list, parts), []), sum(map(list, splits), []), strict=True)  # noqa: RUF017
    counts = Counter(value for value, split in rows if split == 0 and value is not None)
    kept: list[Any] = [(value, times) for value, times in counts.items() if times >= threshold]
    kept.sort(key=lambda entry: (-entry[1], entry[0].encode() if isinstance(entry[0], str) else entry[0]))
    return [(value, i, times) for (value, times), i in zip(kept, count(1)) if i < (max_ids or 2**31)]


def slow_remap(parts: Sequence[Sequence[Value]], entries: Sequence[tuple[Value, int, int]]) -> list[int]:
    ids = {value: i for value, i, _ in entries}
    return [ids.get(value, 0) for part in parts for value in dict.fromkeys(part)]


@pytest.fixture
def num_intervals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In how many intervals of values each vocabulary was counted."""
    seen: list[int] = []
    give_ids = vocabularies._give_ids

    def spy(intervals: Sequence[vocabularies.Interval]) -> np.ndarray:
        seen.append(len(intervals))
        return give_ids(intervals)

    monkeypatch.setattr(vocabularies, "_give_ids", spy)
    return seen


@pytest.mark.parametrize("block_rows", [50, 1_000_000])
@pytest.mark.parametrize("kind", TYPES)
def test_it_is_the_slow_count_whatever_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_intervals: list[int], kind: str, block_rows: int
) -> None:
    monkeypatch.setattr(vocabularies, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(vocabularies, "RUN_GROUP_ROWS", 64)
    dtype, draw = TYPES[kind]
    spilled = 0
    for seed in range(6):
        rng = random.Random(seed)
        num_values = rng.choice([5, 300, 3000, 10**6])
        parts = [
            [None if rng.random() < 0.05 else draw(rng, num_values) for _ in range(rng.choice([1, 100, 700]))]
            for _ in range(rng.randint(1, 5))
        ]
        splits = [rng.choices([0, 1, 2], [8, 1, 1], k=len(part)) for part in parts]
        settings: dict[str, Any] = {"threshold": rng.choice([1, 1, 2]), "max_ids": rng.choice([None, None, 2, 90])}
        folder = tmp_path / str(seed)
        folder.mkdir()
        written = write_parts(folder, dtype, parts, splits)
        expected = slow(parts, splits, **settings)
        made = make(folder / "plenty", written, **settings)
        assert pl.read_parquet(folder / "plenty/C.parquet").rows() == expected
        assert np.frombuffer(made[1], "<i4").tolist() == slow_remap(parts, expected)
        assert made[2] == len(expected) + 1
        assert make(folder / "little", written, memory=LITTLE, **settings) == made, (seed, num_values, settings)
        assert num_intervals[-2] == 1
        spilled += num_intervals[-1] > 2
    assert spilled >= 2


@pytest.mark.parametrize("block_rows", [70, 1_000_000])
def test_values_of_one_count_are_the_same_whatever_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_intervals: list[int], block_rows: int
) -> None:
    monkeypatch.setattr(vocabularies, "BLOCK_ROWS", block_rows)
    values = random.Random(0).sample(range(10**6), 3000)
    parts = [values[:1000], values[1000:2000], values[2000:]]
    written = write_parts(tmp_path, pa.uint32(), parts, [[0] * 1000] * 3)
    made = make(tmp_path / "plenty", written)
    assert pl.read_parquet(tmp_path / "plenty/C.parquet").rows() == slow(parts, [[0] * 1000] * 3, 1, None)
    assert make(tmp_path / "little", written, memory=LITTLE) == made
    assert num_intervals == [1, num_intervals[1]]
    assert num_intervals[1] > 5


def test_what_is_spilled_is_removed_even_where_it_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_parts(tmp_path, pa.int64(), [list(range(3000))], [[0] * 3000])
    monkeypatch.setattr(vocabularies, "MAX_NUM_IDS", 2000)
    with pytest.raises(InputError, match=r"^column C: 3,000 values occur at least 1 times, more ids than int32 holds"):
        make(tmp_path / "work", written, memory=LITTLE)
    assert list((tmp_path / "work").iterdir()) == []


def test_ids_beyond_int32_are_refused_unless_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "MAX_NUM_IDS", 10)
    written = write_parts(tmp_path, pa.int64(), [list(range(10))], [[0] * 10])
    with pytest.raises(InputError, match=r"10 values .* raise --threshold or set --max-ids"):
        make(tmp_path / "refused", written)
    assert make(tmp_path / "capped", written, max_ids=10)[2] == 10
    written = write_parts(tmp_path, pa.int64(), [list(range(9))], [[0] * 9])
    assert make(tmp_path / "fits", written)[2] == 10


# ---- counts and order


def ids_of(tmp_path: Path, values: Sequence[Value], splits: Any, **settings: Any) -> tuple[list[tuple], list[int]]:
    """Vocabulary of a uint32 column in one part, and the id of every row."""
    written = write_parts(tmp_path, pa.uint32(), [values], [splits])
    _, remap, _ = make(tmp_path / "made", written, **settings)
    distinct = list(dict.fromkeys(values))
    ids = np.frombuffer(remap, "<i4")
    return pl.read_parquet(tmp_path / "made/C.parquet").rows(), [int(ids[distinct.index(value)]) for value in values]


def test_ids_go_by_count_then_value_and_0_is_missing_or_rare(tmp_path: Path) -> None:
    values = [0xB, 0xA, 0xC, None, 0xC, 0xB, 0xA, 0xD, 0xA, 0xB]
    entries, ids = ids_of(tmp_path, values, (8, 9), threshold=2)
    assert entries == [(0xA, 1, 2), (0xB, 2, 2), (0xC, 3, 2)]
    assert ids == [2, 1, 3, 0, 3, 2, 1, 0, 1, 2]


def test_only_training_rows_count(tmp_path: Path) -> None:
    assert ids_of(tmp_path, [5] * 8 + [6, 6], (8, 9)) == ([(5, 1, 8)], [1] * 8 + [0, 0])


def test_training_rows_are_those_of_the_split_column(tmp_path: Path) -> None:
    assert ids_of(tmp_path, [5, 6, 7, 7], [0, 1, 2, 0]) == ([(5, 1, 1), (7, 2, 1)], [1, 0, 2, 2])


def test_a_threshold_counts_rows_of_all_parts(tmp_path: Path) -> None:
    written = write_parts(tmp_path, pa.uint32(), [[1, 2], [2, 3], [3, 3]], [[0, 0]] * 3)
    make(tmp_path / "made", written, threshold=2)
    assert pl.read_parquet(tmp_path / "made/C.parquet").rows() == [(3, 1, 3), (2, 2, 2)]


def test_a_cap_keeps_the_most_frequent(tmp_path: Path) -> None:
    entries, ids = ids_of(tmp_path, [1, 2, 2, 3, 3, 3], [0] * 6, max_ids=3)
    assert entries == [(3, 1, 3), (2, 2, 2)]
    assert ids == [0, 2, 2, 1, 1, 1]


def test_a_row_counts_by_its_weight(tmp_path: Path) -> None:
    columns = {"C": pa.array([1, 2, 2, 3], pa.uint32()).dictionary_encode(null_encoding="encode")}
    batch = pa.RecordBatch.from_pydict(columns | {"weight": pa.array([5, 1, 2, 100], pa.float32())})
    with pa.OSFile(str(tmp_path / "0.arrow"), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    part = PartOfLog(path=tmp_path / "0.arrow", num_rows=4, bounds=(3, 4), num_values={"C": 3})
    make(tmp_path / "made", (part,), threshold=3, weight="weight")
    assert pl.read_parquet(tmp_path / "made/C.parquet").rows() == [(1, 1, 5), (2, 2, 3)]


def test_a_column_of_one_value(tmp_path: Path) -> None:
    assert ids_of(tmp_path, [9] * 4, [0] * 4) == ([(9, 1, 4)], [1] * 4)


@pytest.mark.parametrize("memory", [PLENTY, LITTLE])
def test_a_column_without_values_has_id_0_alone(tmp_path: Path, memory: int) -> None:
    written = write_parts(tmp_path, pa.string(), [[None] * 3, [None], ["b"]], [[0] * 3, [0], [1]])
    _, remap, num_ids = make(tmp_path / "made", written, memory=memory)
    assert num_ids == 1
    assert np.frombuffer(remap, "<i4").tolist() == [0, 0, 0]
    assert pl.read_parquet(tmp_path / "made/C.parquet").schema == {"key": pl.String, "id": pl.Int32, "count": pl.UInt64}


# ---- hashes


@pytest.mark.parametrize("memory", [PLENTY, LITTLE])
def test_hashed_ids_are_the_value_modulo_the_cap(tmp_path: Path, memory: int) -> None:
    values = [*range(3000), None, 2**32 - 1]
    parts = [values[:1500], values[1500:]]
    written = write_parts(tmp_path, pa.uint32(), parts, [[0] * 1500, [2] * 1502])
    _, remap, num_ids = make(tmp_path / "made", written, hashed=True, max_ids=101, memory=memory)
    assert num_ids == 101
    assert np.frombuffer(remap, "<i4").tolist() == [0 if value is None else 1 + value % 100 for value in values]


def test_numbers_and_texts_are_hashed_as_unsigned() -> None:
    signed = pl.Series([-1, -(2**63), 2**63 - 1, 0, None], dtype=pl.Int64)
    assert hash_ids(signed, 1000).to_list() == [1 + (2**64 - 1) % 999, 1 + 2**63 % 999, 1 + (2**63 - 1) % 999, 1, 0]
    unsigned = pl.Series([2**64 - 1, 0, None], dtype=pl.UInt64)
    assert hash_ids(unsigned, 2**31 - 1).to_list() == [1 + (2**64 - 1) % (2**31 - 2), 1, 0]
    texts = pl.Series(["", "na\u00efve", None])
    expected = [1, 1 + zlib.crc32("na\u00efve".encode()) % 999, 0]
    assert hash_ids(texts, 1000).to_list() == expected
    assert hash_ids(pl.Series([7, None], dtype=pl.UInt32), 2).to_list() == [1, 0]
