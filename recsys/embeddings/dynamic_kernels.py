"""Machine code of the dynamic map: where ids are found, counted, admitted and evicted.

The ids of a feature are cut into buckets by their hash. Each bucket is a hash table of its own, with open addressing,
and has rows of its own to give. A rank holds some consecutive buckets, L of them with C places each, as `entries`,
int64 [L, C, 2]: an id, 0 where the place is empty, and its mark, state * 2^32 + score. The state is 0 for an id that is
counted, 1 for one that was seen often enough and waits for a row, else the row that it has. The score is how often the
id was seen, or (unless it is still counted) the step at which it was seen last.
"""

import numpy as np

from recsys.compiled import compiled, inlined, prefetch

MISSING_ROW, UNSEEN_ROW, RESERVED = 0, 1, 2
"""Row of id 0, row of all ids that have none of their own, and the first of the others."""
COUNTED, WAITING = 0, 1
LARGEST_SCORE = 2**31 - 1
AHEAD = 32
"""Ids from fetching a place to looking at it; a power of two. Without it `find` takes twice as long."""


@inlined
def _mixed(key: int) -> np.uint64:
    """SplitMix64's output function (Steele et al., 2014)."""
    word = np.uint64(key) + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@inlined
def _bucket(word: np.uint64, num_buckets: int) -> int:
    """By the upper half of the hash."""
    return np.int64(((word >> np.uint64(32)) * np.uint64(num_buckets)) >> np.uint64(32))  # type: ignore[return-value]


@inlined
def _start(word: np.uint64, num_places: int) -> int:
    """Where the search in a bucket begins, by the lower half of the hash."""
    lower = word & np.uint64(0xFFFFFFFF)
    return np.int64((lower * np.uint64(num_places)) >> np.uint64(32))  # type: ignore[return-value]


@inlined
def _search(key: int, begin: int, place: int, num_places: int, words: np.ndarray) -> int:
    """Where the bucket that begins at `begin` has an id, or the empty place that it would get; it is never full.

    Places are counted in `words`, the entries of all buckets in one row, two a place.
    """
    while words[2 * (begin + place)] != key and words[2 * (begin + place)] != 0:
        place = place + 1 if place + 1 < num_places else 0
    return begin + place


@inlined
def _ahead(key: int, num_buckets: int, first: int, num_places: int, words: np.ndarray) -> tuple[int, int]:
    """Where an id's bucket begins, and where to begin in it; has that place fetched."""
    word = _mixed(key)
    begin, place = (_bucket(word, num_buckets) - first) * num_places, _start(word, num_places)
    if key != 0:
        prefetch(words, 2 * (begin + place))
    return begin, place


@compiled
def owners(ids: np.ndarray, num_buckets: int, buckets_a_rank: int, ranks: np.ndarray) -> None:
    """Write to `ranks` which rank has an id's bucket; rank 0 for id 0, which has none."""
    for i in range(len(ids)):
        key = np.int64(ids[i])
        ranks[i] = _bucket(_mixed(key), num_buckets) // buckets_a_rank if key != 0 else 0


@compiled
def find(ids: np.ndarray, num_buckets: int, first: int, entries: np.ndarray, rows: np.ndarray) -> None:
    """Write the row of each id, changing nothing.

    Args:
        ids: int32 or int64, all in this rank's buckets.
        num_buckets: of all ranks.
        first: number of this rank's first bucket.
        entries: see the module.
        rows: int32, as long as `ids`.
    """
    words, num_places = entries.reshape(-1), entries.shape[1]
    begins, starts = np.empty(AHEAD, dtype=np.int64), np.empty(AHEAD, dtype=np.int64)
    for i in range(-AHEAD, len(ids)):
        turn = i & (AHEAD - 1)
        if i >= 0:
            key = np.int64(ids[i])
            rows[i] = MISSING_ROW
            if key != 0:
                place = _search(key, begins[turn], starts[turn], num_places, words)
                state = words[2 * place + 1] >> 32  # 0 in an empty place too
                rows[i] = state if state >= RESERVED else UNSEEN_ROW
        if i + AHEAD < len(ids):
            begins[turn], starts[turn] = _ahead(np.int64(ids[i + AHEAD]), num_buckets, first, num_places, words)


@compiled
def count(
    ids: np.ndarray,
    num_buckets: int,
    first: int,
    entries: np.ndarray,
    used: np.ndarray,
    limit: int,
    step: int,
    places: np.ndarray,
) -> None:
    """Count ids, entering new ones while their bucket has room, and write the place of each in `entries`, or -1.

    Beside what `find` takes: `used`, the entries of each bucket, int64; `limit`, how many it can have, less than its
    places; `step`, the score of ids that are scored by when they were seen last, 0 where they are by how often;
    `places`, int64, as long as `ids`.
    """
    words, num_places = entries.reshape(-1), entries.shape[1]
    begins, starts = np.empty(AHEAD, dtype=np.int64), np.empty(AHEAD, dtype=np.int64)
    for i in range(-AHEAD, len(ids)):
        turn = i & (AHEAD - 1)
        if i >= 0:
            key, place = np.int64(ids[i]), np.int64(-1)
            if key != 0:
                place = _search(key, begins[turn], starts[turn], num_places, words)
                if words[2 * place] == 0:
                    at = begins[turn] // num_places
                    if used[at] < limit:
                        used[at] += 1
                        words[2 * place] = key
                    else:
                        place = np.int64(-1)
            if place >= 0:
                mark = words[2 * place + 1]
                if step > 0 and mark >> 32 != COUNTED:
                    words[2 * place + 1] = ((mark >> 32) << 32) | step
                elif mark & 0xFFFFFFFF < LARGEST_SCORE:
                    words[2 * place + 1] = mark + 1
            places[i] = place
        if i + AHEAD < len(ids):
            begins[turn], starts[turn] = _ahead(np.int64(ids[i + AHEAD]), num_buckets, first, num_places, words)


@compiled
def admit(
    ids: np.ndarray,
    places: np.ndarray,
    entries: np.ndarray,
    free: np.ndarray,
    num_free: np.ndarray,
    admission: int,
    step: int,
    rows: np.ndarray,
) -> None:
    """Give rows to ids that were seen more than `admission` times, and write the row of each.

    Beside what `find` takes, and `places` and `step` as `count` wrote and took them: `free`, int32 [L, rows of a
    bucket], the free rows of each bucket, the next one to give last, and `num_free`, how many those are.
    """
    num_places = entries.shape[1]
    marks = entries.reshape(-1, 2)
    for i in range(len(places)):
        if places[i] < 0:
            rows[i] = MISSING_ROW if ids[i] == 0 else UNSEEN_ROW
            continue
        mark = marks[places[i], 1]
        state, score = mark >> 32, mark & 0xFFFFFFFF
        if state == COUNTED and score > admission:
            at = places[i] // num_places
            state = WAITING
            if num_free[at] > 0:
                num_free[at] -= 1
                state = np.int64(free[at, num_free[at]])
            marks[places[i], 1] = (state << 32) | (step if step > 0 else score)
        rows[i] = state if state >= RESERVED else UNSEEN_ROW


@inlined
def _rank(score: int, place: int, num_places: int, step: int) -> int:
    """Order by score; equal ones by place, counted from another one each time, so that nobody always comes last."""
    return (score << 31) | ((place + step) % num_places)


@inlined
def _place_of(rank: int, num_places: int, step: int) -> int:
    return ((rank & 0x7FFFFFFF) - step) % num_places


@inlined
def _rebuild(bucket: np.ndarray) -> int:
    """Enter what has a mark of at least 0 anew, and nothing else; returns how many those are."""
    num_places = len(bucket)
    kept = np.empty((num_places, 2), dtype=np.int64)
    size = 0
    for place in range(num_places):
        if bucket[place, 0] != 0 and bucket[place, 1] >= 0:
            kept[size, 0], kept[size, 1] = bucket[place, 0], bucket[place, 1]
            size += 1
    bucket[:] = 0
    for i in range(size):
        key = kept[i, 0]
        place = _search(key, 0, _start(_mixed(key), num_places), num_places, bucket.reshape(-1))
        bucket[place, 0], bucket[place, 1] = key, kept[i, 1]
    return size


@compiled
def forget(entries: np.ndarray, used: np.ndarray, most: int, kept: int, step: int) -> None:
    """In buckets of more than `most` entries, forget ids without a row, lowest scores first, but `kept` of them.

    Those that wait outrank those that are counted.
    """
    num_places = entries.shape[1]
    ranks = np.empty(num_places, dtype=np.int64)
    for at in range(len(entries)):
        if used[at] <= most:
            continue
        bucket, size = entries[at], 0
        for place in range(num_places):
            state, score = bucket[place, 1] >> 32, bucket[place, 1] & 0xFFFFFFFF
            if bucket[place, 0] != 0 and state < RESERVED:
                ranks[size] = (state << 62) | _rank(score, place, num_places, step)
                size += 1
        if size <= kept:
            continue
        lowest = np.partition(ranks[:size], size - kept)[: size - kept]
        for i in range(size - kept):
            bucket[_place_of(lowest[i], num_places, step), 1] = -1
        used[at] = _rebuild(bucket)


@compiled
def settle(
    entries: np.ndarray,
    used: np.ndarray,
    free: np.ndarray,
    num_free: np.ndarray,
    evict: bool,
    step: int,
    evicted: np.ndarray,
) -> int:
    """Give rows to ids that wait, highest scores first: free ones, then those of residents with lower scores.

    Only with `evict` do residents lose their rows; then they are forgotten. Rows that change hands are written to
    `evicted`, int32; returns how many those are. The others are as above.
    """
    num_places, total = entries.shape[1], 0
    waiting = np.empty(num_places, dtype=np.int64)
    residents = np.empty(num_places, dtype=np.int64)
    for at in range(len(entries)):
        bucket, num_waiting, num_residents = entries[at], 0, 0
        for place in range(num_places):
            state, rank = bucket[place, 1] >> 32, _rank(bucket[place, 1] & 0xFFFFFFFF, place, num_places, step)
            if state == WAITING:
                waiting[num_waiting] = rank
                num_waiting += 1
            elif state >= RESERVED:
                residents[num_residents] = rank
                num_residents += 1
        if num_waiting == 0:
            continue
        waiting[:num_waiting].sort()
        while num_waiting > 0 and num_free[at] > 0:
            num_waiting -= 1
            num_free[at] -= 1
            place = _place_of(waiting[num_waiting], num_places, step)
            bucket[place, 1] = (np.int64(free[at, num_free[at]]) << 32) | (bucket[place, 1] & 0xFFFFFFFF)
        most = min(num_waiting, num_residents) if evict else 0
        if most == 0:
            continue
        lowest = np.partition(residents[:num_residents], most - 1)[:most]
        lowest.sort()
        num_evicted = 0
        while num_evicted < most and lowest[num_evicted] >> 31 < waiting[num_waiting - 1 - num_evicted] >> 31:
            loser = _place_of(lowest[num_evicted], num_places, step)
            winner = _place_of(waiting[num_waiting - 1 - num_evicted], num_places, step)
            evicted[total] = bucket[loser, 1] >> 32
            bucket[winner, 1] = ((bucket[loser, 1] >> 32) << 32) | (bucket[winner, 1] & 0xFFFFFFFF)
            bucket[loser, 1] = -1
            num_evicted += 1
            total += 1
        if num_evicted:
            used[at] = _rebuild(bucket)
    return total


@compiled
def enter(keys: np.ndarray, marks: np.ndarray, num_buckets: int, entries: np.ndarray) -> None:
    """Enter ids with their marks into the entries of all buckets."""
    for i in range(len(keys)):
        word = _mixed(keys[i])
        bucket = entries[_bucket(word, num_buckets)]
        place = _search(keys[i], 0, _start(word, entries.shape[1]), entries.shape[1], bucket.reshape(-1))
        bucket[place, 0], bucket[place, 1] = keys[i], marks[i]


@compiled
def free_rows(
    entries: np.ndarray, bounds: np.ndarray, used: np.ndarray, free: np.ndarray, num_free: np.ndarray
) -> None:
    """Write what follows from `entries`: how many each bucket has, and which of its rows are free, the lowest last.

    `bounds`, int64 [L + 1], says where each bucket's rows begin, and where the last one's end.
    """
    for at in range(len(entries)):
        low, high = bounds[at], bounds[at + 1]
        is_taken = np.zeros(high - low, dtype=np.bool_)
        used[at] = 0
        for place in range(entries.shape[1]):
            used[at] += entries[at, place, 0] != 0
            row = entries[at, place, 1] >> 32
            if row >= RESERVED:
                is_taken[row - low] = True
        num_free[at] = 0
        for row in range(high - 1, low - 1, -1):
            if not is_taken[row - low]:
                free[at, num_free[at]] = row
                num_free[at] += 1
