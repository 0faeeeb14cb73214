"""A part's categories as codes into the part's own dictionary of distinct values."""

import numpy as np
import pyarrow as pa

from recsys.compiled import compiled, inlined

_FIRST_ROOM = 2**11
"""Distinct values that a hash table is made for at first: while they are few, it stays in the CPU's cache."""


def dictionary_of(values: pa.ChunkedArray) -> pa.DictionaryArray:
    """Codes of the smallest type into the distinct values in order of appearance, null being one of them."""
    codes, dictionary = _of_integers(values) if pa.types.is_integer(values.type) else _of_texts(values)
    size = len(dictionary)
    kind = np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.int32
    return pa.DictionaryArray.from_arrays(codes.astype(kind, copy=False), dictionary)


def _of_texts(values: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    if values.type == pa.large_string():
        values = values.cast(pa.string())
    encoded = values.dictionary_encode(null_encoding="encode")
    codes = pa.concat_arrays([chunk.indices for chunk in encoded.chunks])
    return codes.to_numpy(), encoded.chunk(encoded.num_chunks - 1).dictionary


def _of_integers(values: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Three times as fast as Arrow's encoding."""
    unsigned = np.dtype(f"u{values.type.bit_width // 8}")
    codes, row = np.empty(len(values), dtype=np.int32), 0
    seen = np.array([0, -1])
    distinct, table = _more_room(np.empty(0, dtype=unsigned), seen)
    for chunk in values.chunks:
        keys = np.frombuffer(chunk.buffers()[1], unsigned, len(chunk), unsigned.itemsize * chunk.offset)
        is_null = chunk.is_null().to_numpy(zero_copy_only=False) if chunk.null_count else np.empty(0, dtype=np.bool_)
        begin = row
        while True:
            row += _encode(keys[row - begin :], is_null[row - begin :], distinct, table, seen, codes[row:])
            if row == begin + len(chunk):
                break
            distinct, table = _more_room(distinct, seen)
    size, null = seen
    is_null = np.arange(size) == null if null >= 0 else None
    return codes, pa.array(distinct[:size].view(values.type.to_pandas_dtype()), mask=is_null)


def _more_room(distinct: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copy distinct values to memory for more of them, and make the table anew; it is at most half full."""
    room = np.empty(max(4 * len(distinct), _FIRST_ROOM), dtype=distinct.dtype)
    room[: len(distinct)] = distinct
    table = np.full(2 * len(room), -1, dtype=np.int32)
    _fill(room, table, seen)
    return room, table


def sums_by_code(codes: np.ndarray, times: np.ndarray, size: int) -> np.ndarray:
    """How often each of `size` codes occurs, int64; a row counts as often as `times` says, bool or int64 [rows]."""
    sums = np.zeros(size, dtype=np.int64)
    _add(codes, times, sums)
    return sums


# ---- machine code


@inlined
def _place(key: int, table: np.ndarray) -> np.uint64:
    """Where the search for a key begins: two rounds, so that no regular distance of keys lets them meet."""
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32)) & np.uint64(len(table) - 1)


@inlined
def _next(place: np.uint64, table: np.ndarray) -> np.uint64:
    return (place + np.uint64(1)) & np.uint64(len(table) - 1)


@compiled
def _fill(distinct: np.ndarray, table: np.ndarray, seen: np.ndarray) -> None:
    """Enter the codes of values that were seen into an empty table."""
    size, null = seen
    for code in range(size):
        if code != null:
            place = _place(distinct[code], table)
            while table[place] >= 0:
                place = _next(place, table)
            table[place] = code


@compiled
def _encode(
    keys: np.ndarray,
    is_null: np.ndarray,
    distinct: np.ndarray,
    table: np.ndarray,
    seen: np.ndarray,
    codes: np.ndarray,
) -> int:
    """Write the code of each key; returns how many were written before `distinct` was full.

    Args:
        keys: unsigned [rows].
        is_null: [rows], or empty where no key is null.
        distinct: values by code.
        table: codes by hash, -1 where it is empty, twice as long as `distinct`.
        seen: how many distinct values there are, and the code of null, -1 before it is seen; brought up to date.
        codes: int32 [rows].
    """
    size, null = seen
    row = 0
    while row < len(keys):
        if len(is_null) and is_null[row]:
            if null < 0:
                if size == len(distinct):
                    break
                null = size
                distinct[size] = 0
                size += 1
            codes[row] = null
        else:
            key = keys[row]
            place = _place(key, table)
            code = table[place]
            while code >= 0 and distinct[code] != key:
                place = _next(place, table)
                code = table[place]
            if code < 0:
                if size == len(distinct):
                    break
                code = size
                table[place] = code
                distinct[size] = key
                size += 1
            codes[row] = code
        row += 1
    seen[0], seen[1] = size, null
    return row


@compiled
def _add(codes: np.ndarray, times: np.ndarray, sums: np.ndarray) -> None:
    for row in range(len(codes)):
        sums[codes[row]] += times[row]
