"""Multi-hot ids: the formula against a slow one, their distributions, and that nothing but the seed decides them."""

import hashlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from recsys.config import InputError
from recsys.data import multihot
from recsys.data.formats import MLPERF_NUM_IDS
from recsys.data.multihot import DISTRIBUTIONS, MLPERF_SIZES, MultiHot
from recsys.data.schema import Schema

WORD = 2**64


def schema(*num_ids: int) -> Schema:
    sparse = {f"C{i}": n for i, n in enumerate(num_ids, start=1)}
    return Schema(name="test", dense=(), sparse=sparse, labels=("label",))


def lists(multi_hot: MultiHot, ids: list[list[int]]) -> list[list[list[int]]]:
    """Expand ids [F, B] to nested lists [F, B, sizes[f]]."""
    values = multi_hot.expand(np.array(ids, dtype=np.int32))
    cuts = np.cumsum([len(ids[0]) * size for size in multi_hot.sizes])
    per_feature = np.split(values, cuts[:-1])
    return [part.reshape(-1, size).tolist() for part, size in zip(per_feature, multi_hot.sizes, strict=True)]


def slow_list(feature: str, own_id: int, *, num_ids: int, size: int, distribution: str, seed: int) -> list[int]:
    """The list of one id, written out in Python's own numbers."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {feature}".encode()).digest()[:8], "little")
    found = [own_id]
    for j in range(1, size):
        word = (key + (own_id * size + j) * 0x9E3779B97F4A7C15) % WORD
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
        word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
        share = ((word ^ word >> 31) >> 11) / 2**53
        if distribution == "uniform":
            found.append(int(share * num_ids))
        else:
            tail = (1 - share) * (1 - share)
            value = int(1 / (tail * tail) - 1)
            found.append((value if value < 2**31 else -(2**31)) % num_ids)
    return found


def all_companions(num_ids: int, size: int, distribution: str, seed: int = 0) -> np.ndarray:
    ids = np.arange(num_ids, dtype=np.int32)
    return MultiHot(schema(num_ids), (size,), distribution, seed).expand(ids[None]).reshape(num_ids, size)[:, 1:]


def test_mlperf_counts_214_ids_a_row_and_204_million_in_all() -> None:
    assert len(MLPERF_SIZES) == len(MLPERF_NUM_IDS) == 26
    assert (sum(MLPERF_SIZES), sum(MLPERF_NUM_IDS)) == (214, 204_184_588)
    assert max(MLPERF_NUM_IDS) == 40_000_000


@pytest.mark.parametrize("table_bytes", [0, 2**26])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_lists_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, distribution: str, table_bytes: int) -> None:
    monkeypatch.setattr(multihot, "TABLE_BYTES", table_bytes)
    sizes = {"C1": 4, "C2": 1, "C3": 60, "C4": 2}
    num_ids = {"C1": 1_000, "C2": 7, "C3": 50, "C4": 40_000_000}
    ids = {"C1": [0, 999, 1, 999], "C2": [0, 6, 3, 3], "C3": [49, 0, 0, 7], "C4": [0, 39_999_999, 12, 5]}
    multi_hot = MultiHot(schema(*num_ids.values()), tuple(sizes.values()), distribution, seed=11)
    assert lists(multi_hot, list(ids.values())) == [
        [slow_list(f, i, num_ids=num_ids[f], size=sizes[f], distribution=distribution, seed=11) for i in ids[f]]
        for f in ids
    ]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_table_and_drawing_its_rows_give_the_same(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    num_ids, sizes = (5_000, 1, 3, 800), (3, 5, 1, 100)
    ids = np.random.default_rng(0).integers(0, np.array(num_ids)[:, None], (4, 1_000)).astype(np.int32)
    held = MultiHot(schema(*num_ids), sizes, distribution, 0).expand(ids)
    monkeypatch.setattr(multihot, "TABLE_BYTES", 0)
    monkeypatch.setattr(multihot, "BLOCK_DRAWS", 2_048)
    drawn = MultiHot(schema(*num_ids), sizes, distribution, 0).expand(ids)
    np.testing.assert_array_equal(held, drawn)


@pytest.mark.parametrize("table_bytes", [0, 2**26])
def test_it_writes_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch, table_bytes: int) -> None:
    monkeypatch.setattr(multihot, "TABLE_BYTES", table_bytes)
    multi_hot = MultiHot(schema(10, 20), (3, 1), "uniform", 0)
    block = np.arange(20, dtype=np.int32).reshape(4, 5)  # a batch's ids may be a part of a larger block
    memory = np.full(30, -1, dtype=np.int32)
    values = multi_hot.expand(block[:2], out=memory[5:25])
    assert np.shares_memory(values, memory)
    np.testing.assert_array_equal(memory[5:25], multi_hot.expand(block[:2]))
    assert set(memory[:5]) | set(memory[25:]) == {-1}


def test_no_rows_are_no_ids() -> None:
    assert MultiHot(schema(10, 20), (3, 1), "uniform", 0).expand(np.empty((2, 0), dtype=np.int32)).shape == (0,)


def test_uniform_companions_are_even_and_independent() -> None:
    """Counts of 100 cells lie as near their mean as chi-square with 99 degrees of freedom does, to six deviations."""
    companions = all_companions(10_000, 101, "uniform").astype(np.int64)
    bound = 99 + 6 * np.sqrt(2 * 99)
    tenth = companions // 1_000
    own = np.arange(10_000)[:, None] // 1_000
    for cells in (
        companions // 100,
        companions % 100,
        tenth[:, ::2] * 10 + tenth[:, 1::2],  # a companion and the next one
        tenth[::2] * 10 + tenth[1::2],  # those of an id and of the next one
        tenth * 10 + own,  # a companion and its own id
    ):
        counts = np.bincount(cells.ravel(), minlength=100)
        mean = cells.size / 100
        assert len(counts) == 100
        assert ((counts - mean) ** 2 / mean).sum() < bound


@pytest.mark.parametrize("num_ids", [7, 1_000, 30_000])
def test_pareto_companions_are_those_of_numpys_pareto(num_ids: int) -> None:
    """Against what the reference does: draw, cast to int32 (on x86, what does not fit becomes -2^31), take the rest."""
    companions = all_companions(num_ids, 300_000 // num_ids + 1, "pareto").ravel()
    draws = np.random.default_rng(0).pareto(0.25, 1_000_000)
    reference = np.where(draws < 2**31, draws, -(2**31)).astype(np.int64) % num_ids
    heavy = [*range(min(num_ids, 10)), -(2**31) % num_ids]
    assert np.bincount(companions, minlength=num_ids)[0] > 0.15 * companions.size  # P(u^-4 - 1 < 1) = .159
    edges = np.unique([0, *heavy, *(i + 1 for i in heavy), *np.geomspace(10, num_ids, 20).astype(int), num_ids])
    edges = edges[edges <= num_ids]
    found, _ = np.histogram(companions, bins=edges)
    expected, _ = np.histogram(reference, bins=edges)
    share = (found + expected) / (companions.size + reference.size)
    deviation = np.sqrt(share * (1 - share) * (1 / companions.size + 1 / reference.size))
    assert (np.abs(found / companions.size - expected / reference.size) <= 5 * deviation).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_ids", [1, 3, 40_000_000])
def test_every_id_lies_in_range(distribution: str, num_ids: int) -> None:
    ids = np.linspace(0, num_ids - 1, 2_000).astype(np.int32)
    values = MultiHot(schema(num_ids), (100,), distribution, 5).expand(ids[None])
    assert values.min() >= 0
    assert values.max() < num_ids
    if num_ids == 3:
        assert set(values) == {0, 1, 2}
    if num_ids == 40_000_000:
        assert values.max() > 39_990_000


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("word", [0, 1, 2**11 - 1, 2**63, 2**64 - 2**11, 2**64 - 1])
def test_the_outermost_draws_lie_in_range(distribution: str, word: int) -> None:
    for num_ids in (1, 2, 3, 40_000_000, 2**31 - 1):
        (drawn,) = DISTRIBUTIONS[distribution](np.array([word], dtype=np.uint64), num_ids).tolist()
        assert 0 <= drawn < num_ids


def test_forty_million_ids_of_a_hundred_need_no_table() -> None:
    ids = np.random.default_rng(0).integers(0, 40_000_000, (1, 4_096)).astype(np.int32)
    tracemalloc.start()
    try:
        values = MultiHot(schema(40_000_000), (100,), "pareto", 0).expand(ids)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes + 4 * 2**20


def test_another_process_finds_the_same() -> None:
    code = (
        "import numpy as np, sys\n"
        "from recsys.data.multihot import MultiHot\n"
        "from recsys.data.schema import Schema\n"
        "schema = Schema(name='test', dense=(), sparse={'C1': 500}, labels=('label',))\n"
        "values = MultiHot(schema, (9,), 'pareto', 3).expand(np.arange(500, dtype=np.int32)[None])\n"
        "sys.stdout.buffer.write(values.tobytes())\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    here = MultiHot(schema(500), (9,), "pareto", 3).expand(np.arange(500, dtype=np.int32)[None])
    assert there == here.tobytes()


def test_features_do_not_matter_to_one_another() -> None:
    alone = Schema(name="test", dense=(), sparse={"C2": 20}, labels=("label",))
    beside = MultiHot(schema(10, 20), (3, 4), "uniform", 0)
    assert lists(beside, [[0, 1], [7, 8]])[1] == lists(MultiHot(alone, (4,), "uniform", 0), [[7, 8]])[0]


def test_seeds_and_features_have_companions_of_their_own() -> None:
    first, second = (all_companions(1_000, 9, "uniform", seed) for seed in (0, 1))
    assert (first == second).mean() < 0.01
    both = MultiHot(schema(1_000, 1_000), (9, 9), "uniform", 0).expand(
        np.tile(np.arange(1_000, dtype=np.int32), (2, 1))
    )
    one, other = both.reshape(2, 1_000, 9)[:, :, 1:]
    assert (one == other).mean() < 0.01


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[9, 10], [0, 0]], "feature 'C1' has ids 9 to 10, but the schema gives it 10 ids; prepare again"),
        ([[0, 0], [19, -1]], "feature 'C2' has ids -1 to 19, but the schema gives it 20 ids; prepare again"),
    ],
)
def test_ids_outside_of_the_schema_are_refused(ids: list[list[int]], message: str) -> None:
    multi_hot = MultiHot(schema(10, 20), (3, 1), "uniform", 0)
    with pytest.raises(ValueError, match="^" + message + "$"):
        multi_hot.expand(np.array(ids, dtype=np.int32))


@pytest.mark.parametrize(
    ("sizes", "distribution", "message"),
    [
        ((3,), "uniform", "1 sizes for 2 sparse features; name one size a feature, in this order: C1 C2"),
        ((3, 0), "uniform", "size 0 of feature 'C2' must be at least 1, which is its own id alone"),
        ((3, 1), "unifrom", "unknown distribution 'unifrom'; did you mean uniform?"),
    ],
)
def test_what_cannot_work_is_named(sizes: tuple[int, ...], distribution: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        MultiHot(schema(10, 20), sizes, distribution, 0)
    assert str(error.value) == message
