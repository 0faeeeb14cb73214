"""The map from ids to rows, against one of dictionaries, and what must hold whatever ids come."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import InputError
from recsys.embeddings.config import EmbeddingConfig, Owner
from recsys.embeddings.dynamic_kernels import LARGEST_SCORE, MISSING_ROW, UNSEEN_ROW
from recsys.embeddings.dynamic_map import RESERVED_ROWS, IdMap, MapRules, resized
from recsys.embeddings.dynamic_rows import check_caches
from recsys.members import parse_members

WORD = 2**64


def rules(**changes: Any) -> MapRules:
    values: dict[str, Any] = {"rows": 40, "admission": 0, "eviction": "lfu", "interval": 1, "buckets": 4}
    return MapRules(**(values | changes))


def whole(own: MapRules) -> IdMap:
    return IdMap(own, 0, own.buckets)


def bucket_of(key: int, num_buckets: int) -> int:
    word = (key + 0x9E3779B97F4A7C15) % WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return ((word ^ (word >> 31)) >> 32) * num_buckets >> 32


def in_bucket(number: int, count: int, num_buckets: int = 4) -> list[int]:
    """The first `count` ids of a bucket."""
    found = [key for key in range(1, 100 * count * num_buckets) if bucket_of(key, num_buckets) == number]
    return found[:count]


def learn(own: IdMap, ids: Any, step: int = 1) -> np.ndarray:
    ids = np.asarray(ids)
    rows = np.full(len(ids), -7, dtype=np.int32)
    own.learn(ids.astype(np.int64) if ids.dtype == np.int64 else ids, rows, step)
    return rows


def find(own: IdMap, ids: Any) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64)
    rows = np.full(len(ids), -7, dtype=np.int32)
    own.find(ids, rows)
    return rows


def contents(own: IdMap) -> dict[int, tuple[int, int]]:
    """Id to state and score."""
    entries = own.entries.reshape(-1, 2)
    return {key: (mark >> 32, mark & 0xFFFFFFFF) for key, mark in entries.tolist() if key}


class SlowMap:
    """The rules in dictionaries, for ids that are few enough to be all remembered, and no evictions."""

    def __init__(self, own: MapRules) -> None:
        self.rules = own
        self.counts: dict[int, int] = {}
        self.rows: dict[int, int] = {}
        bounds = [RESERVED_ROWS + bucket * own.rows // own.buckets for bucket in range(own.buckets + 1)]
        self.free = [list(range(low, high)) for low, high in pairwise(bounds)]

    def learn(self, ids: list[int]) -> list[int]:
        for key in ids:
            self.counts[key] = self.counts.get(key, 0) + 1
        for key in ids:
            free = self.free[bucket_of(key % WORD, self.rules.buckets)]
            if key and key not in self.rows and self.counts[key] > self.rules.admission and free:
                self.rows[key] = free.pop(0)
        return self.find(ids)

    def find(self, ids: list[int]) -> list[int]:
        return [self.rows.get(key, UNSEEN_ROW) if key else MISSING_ROW for key in ids]


# ---- learning and finding


@pytest.mark.parametrize("admission", [0, 1, 4])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("eviction", ["lfu", "lru", "none"])
def test_a_map_is_the_slow_one(admission: int, dtype: Any, eviction: Any) -> None:
    own = rules(rows=43, admission=admission, eviction=eviction)
    fast, slow = whole(own), SlowMap(own)
    rng = np.random.default_rng(0)
    bounds = np.iinfo(dtype)
    known = np.concatenate(([0, 1, -1, bounds.min, bounds.max], rng.integers(bounds.min, bounds.max, 70))).astype(dtype)
    for step in range(1, 30):
        ids = known[np.minimum(rng.geometric(0.08, size=17) - 1, len(known) - 1)]
        np.testing.assert_array_equal(learn(fast, ids, step), slow.learn(ids.tolist()))
        np.testing.assert_array_equal(find(fast, known), slow.find(known.tolist()))
    assert any(row == UNSEEN_ROW for row in slow.find(known.tolist())), "the map is never full"
    if eviction == "lfu":
        scores = {key: score for key, (_, score) in contents(fast).items()}
        assert scores == {key: count for key, count in slow.counts.items() if key}


def test_all_occurrences_in_a_batch_count_before_any_is_answered() -> None:
    own = whole(rules(admission=2))
    assert learn(own, [5, 5, 6, 5]).tolist()[2] == UNSEEN_ROW
    assert (find(own, [5]) >= RESERVED_ROWS).all()
    fresh = whole(rules(admission=2))
    rows = learn(fresh, [5, 5, 5])
    assert len(set(rows.tolist())) == 1
    assert rows[0] >= RESERVED_ROWS


def test_rows_of_buckets_are_shared_out_without_gaps() -> None:
    own = whole(rules(rows=43))
    ids = [key for bucket in range(4) for key in in_bucket(bucket, 20)]
    rows = learn(own, ids)
    assert sorted(rows[rows >= RESERVED_ROWS]) == list(range(RESERVED_ROWS, RESERVED_ROWS + 43))


def test_finding_changes_nothing() -> None:
    own = whole(rules(admission=1))
    learn(own, np.arange(60))
    learn(own, np.arange(20, 50), 2)
    before = own.entries.clone()
    find(own, np.arange(-100, 200))
    assert torch.equal(own.entries, before)
    assert (learn(own, np.arange(20, 50), 3) == find(own, np.arange(20, 50))).all()


def test_parts_of_a_map_are_the_whole() -> None:
    own = rules(rows=42, admission=1)
    rng = np.random.default_rng(1)
    everything, halves = whole(own), [IdMap(own, 0, 2), IdMap(own, 2, 2)]
    for step in range(1, 12):
        ids = rng.geometric(0.03, size=40)
        expected = learn(everything, ids, step)
        buckets = np.array([bucket_of(int(key), 4) for key in ids])
        for number, half in enumerate(halves):
            mine = buckets // 2 == number
            np.testing.assert_array_equal(learn(half, ids[mine], step), expected[mine])
        evicted = [half.settle(step) for half in halves]
        np.testing.assert_array_equal(np.concatenate(evicted), everything.settle(step))
    assert torch.equal(torch.cat([half.entries for half in halves]), everything.entries)


def test_counts_stop_at_the_largest_score() -> None:
    own = whole(rules())
    row = learn(own, [9])[0]
    own.entries[own.entries[..., 0] == 9] = torch.tensor([9, (int(row) << 32) | (LARGEST_SCORE - 1)])
    learn(own, [9, 9, 9])
    assert contents(own)[9] == (row, LARGEST_SCORE)


# ---- eviction


def test_lfu_gives_the_rows_of_the_least_seen_to_those_that_were_seen_more() -> None:
    ids = in_bucket(2, 14)
    residents, late = ids[:10], ids[10:]
    own = whole(rules())
    seen = {key: 1 + 2 * number for number, key in enumerate(residents)}  # 1, 3, 5, ...
    learn(own, np.repeat(residents, list(seen.values())))
    rows = find(own, residents)
    waiting = {late[0]: 4, late[1]: 2, late[2]: 1, late[3]: 30}
    assert (learn(own, np.repeat(late, list(waiting.values()))) == UNSEEN_ROW).all()
    # Highest first: 30 over 1, 4 over 3, then 2 is not over 5.
    assert own.settle(1).tolist() == rows[:2].tolist()
    assert find(own, [late[3], late[0]]).tolist() == rows[:2].tolist()
    assert (find(own, [*residents[:2], late[1], late[2]]) == UNSEEN_ROW).all()
    assert find(own, residents[2:]).tolist() == rows[2:].tolist()
    assert not set(residents[:2]) & set(contents(own)), "what is evicted is forgotten"
    assert own.settle(1).tolist() == []


def test_lru_gives_the_rows_of_those_that_were_not_seen_for_longest() -> None:
    ids = in_bucket(1, 12)
    own = whole(rules(eviction="lru"))
    for step, key in enumerate(ids[:10], start=1):
        learn(own, [key] * 20, step)
    learn(own, ids[:1], 11)  # the first is seen again
    rows = find(own, ids[:10])
    assert (learn(own, ids[10:], 12) == UNSEEN_ROW).all()
    assert sorted(own.settle(12)) == sorted(rows[1:3])
    assert (find(own, ids[1:3]) == UNSEEN_ROW).all()
    assert sorted(find(own, ids[10:])) == sorted(rows[1:3])


def test_lfu_in_a_large_bucket_is_a_sort() -> None:
    own = whole(rules(rows=300, buckets=1))
    rng = np.random.default_rng(8)
    residents, late = np.arange(1, 301), np.arange(301, 401)
    counts = dict(zip([*residents, *late], rng.permutation(np.arange(1, 401)), strict=True))
    for ids in (residents, late):
        learn(own, np.repeat(ids, [counts[key] for key in ids]))
    rows = dict(zip(residents, find(own, residents), strict=True))
    new = sorted(late, key=lambda key: -counts[key])
    old = sorted(residents, key=lambda key: counts[key])
    swaps = [(loser, winner) for loser, winner in zip(old, new, strict=False) if counts[loser] < counts[winner]]
    assert 20 < len(swaps) < 100
    assert own.settle(1).tolist() == [rows[loser] for loser, _ in swaps]
    assert find(own, [winner for _, winner in swaps]).tolist() == [rows[loser] for loser, _ in swaps]


@pytest.mark.parametrize("eviction", ["lfu", "lru"])
def test_equal_scores_leave_a_row_where_it_is(eviction: Any) -> None:
    ids = in_bucket(0, 12)
    own = whole(rules(eviction=eviction))
    rows = learn(own, ids)
    assert sorted(rows)[:2] == [UNSEEN_ROW, UNSEEN_ROW]
    assert own.settle(1).tolist() == []
    assert find(own, ids).tolist() == rows.tolist()


def test_none_evicts_nothing() -> None:
    ids = in_bucket(1, 12)
    own = whole(rules(eviction="none"))
    rows = learn(own, ids[:10])
    learn(own, ids[10:] * 100, 2)
    assert own.settle(3).tolist() == []
    assert find(own, ids).tolist() == [*rows, UNSEEN_ROW, UNSEEN_ROW]


@pytest.mark.parametrize("eviction", ["lfu", "lru", "none"])
@pytest.mark.parametrize("admission", [0, 2])
def test_whatever_comes_no_two_ids_share_a_row(eviction: Any, admission: int) -> None:
    own = rules(rows=50, admission=admission, eviction=eviction, buckets=3)
    fast = whole(own)
    rng = np.random.default_rng(3)
    num_evicted = 0
    for step in range(1, 60):
        ids = np.minimum(rng.zipf(1.2, size=50), 10**9) * rng.choice([1, -1], 50) * (1 + step // 20)
        before = {key: state for key, (state, _) in contents(fast).items() if state >= RESERVED_ROWS}
        rows = learn(fast, ids, step)
        np.testing.assert_array_equal(rows, find(fast, ids))
        known = contents(fast)
        taken = [state for state, _ in known.values() if state >= RESERVED_ROWS]
        assert len(set(taken)) == len(taken)
        assert all(RESERVED_ROWS <= row < RESERVED_ROWS + 50 for row in taken)
        assert all(known[key][0] == row for key, row in before.items()), "only settling takes a row away"
        evicted = fast.settle(step)
        now = {state: key for key, (state, _) in contents(fast).items()}
        was = {state: key for key, (state, _) in known.items()}
        assert sorted(evicted) == sorted(row for row in taken if now[row] != was[row])
        assert len(contents(fast)) <= 3 * fast.limit
        num_evicted += len(evicted)
    assert (num_evicted > 0) == (eviction != "none")


def test_what_has_no_row_is_forgotten_before_a_bucket_is_full() -> None:
    own = whole(rules(rows=400, admission=3))
    often, once = in_bucket(0, 20), in_bucket(0, 600)[20:]
    resident = once.pop()
    row = learn(own, [resident] * 4)[0]
    learn(own, often * 3)
    for number in range(0, len(once), 10):
        learn(own, once[number : number + 10], number)
    known = contents(own)
    assert len(known) <= own.limit
    assert known[resident] == (row, 4)
    assert all(known[key] == (0, 3) for key in often)
    assert (learn(own, often) >= RESERVED_ROWS).all()


def test_ids_that_wait_are_forgotten_after_those_that_are_counted() -> None:
    own = whole(rules(rows=400, admission=3, eviction="lru"))
    ids = in_bucket(1, 400)
    learn(own, ids[:100] * 4, 1)
    waiting, counted = ids[100:120], iter(ids[120:])
    learn(own, waiting * 4, 2)
    for step in range(3, 20):
        learn(own, [next(counted) for _ in range(10)] * 3, step)
    known = contents(own)
    assert len(known) < 100 + 20 + 170
    assert all(known[key] == (1, 2) for key in waiting)


def test_a_full_bucket_takes_no_more_and_loses_nothing() -> None:
    own = whole(rules(rows=40, admission=1))
    ids = in_bucket(3, 500)
    learn(own, ids)
    assert len(contents(own)) == own.limit == 20
    assert (learn(own, ids[:5] * 3) >= RESERVED_ROWS).sum() > 0


# ---- what is saved, and maps of other sizes


def after(own: MapRules, steps: int = 20) -> IdMap:
    made = whole(own)
    rng = np.random.default_rng(5)
    for step in range(1, steps):
        learn(made, rng.geometric(0.02, size=60) * 7919, step)
        made.settle(step)
    return made


@pytest.mark.parametrize("eviction", ["lfu", "lru", "none"])
def test_entries_are_all_that_a_map_needs_to_go_on(eviction: Any) -> None:
    own = rules(rows=48, admission=1, eviction=eviction)
    went_on, loaded = after(own), whole(own)
    learn(loaded, [1, 2, 3])
    loaded.entries.copy_(went_on.entries)
    loaded.changed()
    rng = np.random.default_rng(6)
    for step in range(20, 40):
        ids = rng.geometric(0.02, size=60) * 104729
        np.testing.assert_array_equal(learn(loaded, ids, step), learn(went_on, ids, step))
        np.testing.assert_array_equal(loaded.settle(step), went_on.settle(step))
    assert torch.equal(loaded.entries, went_on.entries)


@pytest.mark.parametrize("rows", [41, 48, 97, 1000])
def test_a_map_of_more_rows_keeps_every_id(rows: int) -> None:
    own = rules(rows=40, admission=1)
    before, after_ = after(own), whole(replace(own, rows=rows))
    entries, pairs = resized(before.entries, own, after_.rules)
    after_.entries.copy_(entries)
    after_.changed()
    old, new = contents(before), contents(after_)
    assert {key: score for key, (_, score) in old.items()} == {key: score for key, (_, score) in new.items()}
    has_row = [key for key, (state, _) in old.items() if state >= RESERVED_ROWS]
    assert dict(pairs.tolist()) == {old[key][0]: new[key][0] for key in has_row}
    assert len(set(pairs[:, 1].tolist())) == len(has_row) == len(pairs)
    waiting = [key for key, (state, _) in old.items() if state == 1]
    assert waiting
    after_.settle(30)
    if rows == 1000:
        assert (find(after_, waiting) >= RESERVED_ROWS).all(), "ids that waited have rows now"


def test_a_map_of_fewer_rows_keeps_those_with_the_highest_scores() -> None:
    own = rules(rows=40)
    before = whole(own)
    ids = {bucket: in_bucket(bucket, 12) for bucket in range(4)}
    for keys in ids.values():
        learn(before, np.repeat(keys, range(1, 13)))
    small = replace(own, rows=18)
    entries, pairs = resized(before.entries, own, small)
    made = whole(small)
    made.entries.copy_(entries)
    made.changed()
    old, new = contents(before), contents(made)
    for bucket, keys in ids.items():
        room = int(np.diff(made.bounds)[bucket])
        kept = [key for key in keys if new.get(key, (0, 0))[0] >= RESERVED_ROWS]
        had = sorted((key for key in keys if old[key][0] >= RESERVED_ROWS), key=lambda key: old[key][1])
        assert sorted(kept, key=lambda key: old[key][1]) == had[-room:]
        assert all(made.bounds[bucket] <= new[key][0] < made.bounds[bucket + 1] for key in kept)
    assert len(pairs) == 18
    assert (find(made, list(new)) == [max(state, UNSEEN_ROW) for state, _ in new.values()]).all()


def test_of_ids_without_a_row_those_that_wait_are_kept_in_fewer_rows() -> None:
    own = rules(rows=100, admission=3, eviction="lru", buckets=1)
    before, small = whole(own), replace(own, rows=10)
    ids = np.arange(1, 200)
    learn(before, np.repeat(ids[:100], 4), 1)
    learn(before, np.repeat(ids[100:108], 4), 2)  # they wait, seen at step 2
    learn(before, np.repeat(ids[108:150], 3), 3)  # these are counted, 3 times
    entries, _ = resized(before.entries, own, small)
    made = whole(small)
    made.entries.copy_(entries)
    states = [state for state, _ in contents(made).values()]
    assert states.count(1) == 8
    assert states.count(0) == 2


def test_a_feature_of_few_ids_gets_no_more_rows_than_it_can_use() -> None:
    own = rules(rows=1000, buckets=10)
    assert own.of_feature(3).rows == 30
    assert own.of_feature(2**64) == own
    made = whole(own.of_feature(3))
    assert (learn(made, [1, 2]) >= RESERVED_ROWS).all()


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows 0 must be at least 48, one a map_bucket"),
        ({"rows": 9, "map_buckets": 10}, "rows 9 must be at least 10, one a map_bucket"),
        ({"rows": 2**31}, "rows 2147483648 must be at most 2,147,483,645"),
        ({"admission": -1}, "admission -1 must be at least 0"),
        ({"eviction_interval": 0}, "eviction_interval 0 must be at least 1"),
        ({"map_buckets": 0}, "map_buckets 0 must be at least 1"),
        ({"eviction": "lfo"}, "unknown eviction 'lfo'; did you mean"),
    ],
)
def test_rules_that_cannot_be_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingConfig(**change)
    (name, value), *others = reversed(change.items())
    with pytest.raises(InputError, match=f"member 'dcnv2:.*{name}"):
        parse_members([f"dcnv2:{name}={value}"] if not others else ["dcnv2:rows=9,map_buckets=10"], 0)


@pytest.mark.parametrize("kernel", ["fused_uvm_caching", "key_value"])
def test_a_kernel_that_keeps_copies_of_rows_is_refused(kernel: str) -> None:
    owners = {
        kind: Owner(name=kind, seed="0", config=EmbeddingConfig(embeddings=kind)) for kind in ("dynamic", "tables")
    }
    check_caches({"tables/C1": kernel, "dynamic/C1": "fused", "dynamic/C2": "fused_uvm"}, owners)
    with pytest.raises(InputError, match=f"table dynamic/C2 of dynamic ids under the kernel {kernel}"):
        check_caches({"tables/C1": kernel, "dynamic/C2": kernel}, owners)
