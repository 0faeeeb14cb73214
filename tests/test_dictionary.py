"""Codes of a part's categories into its own dictionary."""

import random
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from numba import njit

from recsys.compiled import compiled
from recsys.data.dictionary import dictionary_of, sums_by_code


def check(values: pa.ChunkedArray) -> pa.DictionaryArray:
    """Compare with a dict that counts up."""
    found = dictionary_of(values)
    expected: dict[Any, int] = {}
    codes = [expected.setdefault(value, len(expected)) for value in values.to_pylist()]
    assert found.indices.to_pylist() == codes
    assert found.dictionary.to_pylist() == list(expected)
    kind = pa.uint8() if len(expected) <= 2**8 else pa.uint16() if len(expected) <= 2**16 else pa.int32()
    assert found.indices.type == kind
    return found


def in_chunks(values: list, kind: pa.DataType, rng: random.Random) -> pa.ChunkedArray:
    """Chunks of several lengths, some of them slices of longer ones."""
    chunks = []
    while values:
        size = rng.choice([0, 1, 7, 1000, 30_000])
        skipped = rng.choice([0, 3])
        chunks.append(pa.array([None, *[1] * 9][:skipped] + values[:size], kind)[skipped:])
        values = values[size:]
    return pa.chunked_array(chunks, type=kind)


BOUNDS = {"uint32": (0, 2**32 - 1), "int64": (-(2**63), 2**63 - 1), "uint64": (0, 2**64 - 1)}


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("num_distinct", [1, 2, 255, 256, 257, 2047, 2048, 2049, 65_536, 65_537, 100_000])
def test_values_have_codes_in_order_of_appearance(kind: str, num_distinct: int) -> None:
    rng = random.Random(num_distinct)
    low, high = BOUNDS[kind]
    distinct = [low, high, *rng.sample(range(1, 2**31), k=num_distinct)][-num_distinct:]
    values = distinct + rng.choices(distinct, k=3000)
    found = check(in_chunks(values, pa.type_for_alias(kind), rng))
    assert found.dictionary.type == pa.type_for_alias(kind)
    assert found.dictionary.null_count == 0
    with_null = [None if i % 7 == 3 else value for i, value in enumerate(values)]
    check(in_chunks(with_null, pa.type_for_alias(kind), rng))


@pytest.mark.parametrize("step", [1, 2**12, 2**32, 2**40, 0xF1DE83E19937733D])
def test_values_at_regular_distances_do_not_collide(step: int) -> None:
    """The last step is the inverse of the factor that mixes keys: one round would put all keys in a row."""
    check(pa.chunked_array([pa.array([i * step % 2**64 for i in range(20_000)], pa.uint64())]))


@pytest.mark.parametrize("values", [[None], [None, None, 5, None], [5, None, 0, 5], [0, None]])
def test_null_is_a_value_of_its_own(values: list) -> None:
    for kind in (pa.uint32(), pa.int64()):
        check(pa.chunked_array([pa.array(values, kind)]))
        check(pa.chunked_array([pa.array([value], kind) for value in values]))


def test_texts() -> None:
    values = ["b", None, "a", "b", "", "\u00e9"]
    for kind in (pa.string(), pa.large_string()):
        check(pa.chunked_array([pa.array(values, kind), pa.array(values[::-1], kind)]))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_sums_by_code(kind: Any) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 200, 1000).astype(kind)
    for times in (rng.random(1000) < 0.8, rng.integers(0, 2**40, 1000)):
        expected = [int(times[codes == code].sum()) for code in range(210)]
        assert sums_by_code(codes, times, 210).tolist() == expected


def test_machine_code_is_made_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses_to_keep(**options: bool) -> Any:
        if options.get("cache"):
            return Mock(side_effect=RuntimeError("no folder can be written"))
        return njit(**options)

    monkeypatch.setattr("recsys.compiled.njit", refuses_to_keep)

    def twice(number: int) -> int:
        return 2 * number

    assert compiled(twice)(21) == 42
