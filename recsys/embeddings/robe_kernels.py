"""Machine code of ROBE: lookups in an array of shared parameters, their gradient, and Adagrad on what it touches.

Shapes: B rows, F fields, D embedding dimension, J blocks of Z elements that cover D, L ids of the batch, m floats in
the array. A bag is what one row has of one field; ids come as TorchRec has them, bags of a field one after another,
and everything here goes in the order of rows, in which the output lies in memory. `starts_LJ` is all that a lookup
leaves for its gradient: where each block starts, s, or ~s where it counts negative. Nothing is as large as B x F x D
but the output.

Threads divide lookups by rows, and gradients by stretches of the array: no two write to one place, and each element's
gradient is summed in the order of rows, so the number of threads changes no bit. Indices are unsigned, because numba
asks of signed ones whether they count from the end.
"""

from typing import Any, NamedTuple

import numpy as np

from recsys.compiled import compiled, inlined, prefetch
from recsys.embeddings.robe_hash import P

TILE_ROWS = 64
"""Rows whose starts, and ids, stay in the nearest caches between being computed and being used."""
AHEAD = 32
"""Blocks, or lines, from fetching to using one. Without it a lookup in 26 MB takes 1.7 times as long."""
FOUND = 2048
"""Blocks whose gradients are added at a time."""
LINE = 16
"""Floats of a cache line, the unit of what a gradient is known to have touched."""
U, FLOAT = np.uint64, np.float32


class Hash(NamedTuple):
    """A RobeHash, as machine code takes it."""

    first_rows_F: np.ndarray
    """int64: o mod P of each field."""
    places: tuple[int, int, int]
    """a, b, c."""
    steps_J: np.ndarray
    """int64: b j mod P."""
    signs: tuple[int, int, int]
    sign_steps_J: np.ndarray
    """Empty where there are no signs."""
    block_size: int
    """Z."""


class Ids(NamedTuple):
    """Bags of a batch."""

    ids_L: np.ndarray
    """int, bags of a feature one after another."""
    offsets: np.ndarray
    """int: where those bags begin and end."""
    columns_F: np.ndarray
    """int64: the place of each field among the batch's features."""
    ends: np.ndarray
    """int32 [B * F + 1]: where the ids of bag (b, f) stand when rows come first: ends[b * F + f] to the next."""


@compiled
def order(ids: Ids) -> None:
    """Fill `ids.ends`."""
    num_fields = ids.columns_F.size
    num_rows = (ids.ends.size - 1) // num_fields
    for first in range(0, num_rows, TILE_ROWS):
        for f in range(num_fields):
            bag = ids.columns_F[f] * num_rows
            for b in range(first, min(first + TILE_ROWS, num_rows)):
                ids.ends[U(b * num_fields + f + 1)] = ids.offsets[U(bag + b + 1)] - ids.offsets[U(bag + b)]
    ids.ends[0] = 0
    total = np.int64(0)
    for bag in range(1, ids.ends.size):
        total += ids.ends[U(bag)]
        ids.ends[U(bag)] = total


@compiled
def look_up(
    array_m: np.ndarray, ids: Ids, robe: Hash, starts_LJ: np.ndarray, out_BFD: np.ndarray, stretch: tuple[int, int]
) -> None:
    """Fill `starts_LJ`, int32, and `out_BFD`, float32, with the sums of bags, for rows of a `stretch`."""
    starts, out = starts_LJ.reshape(-1), out_BFD.reshape(-1)
    num_starts = np.uint32(array_m.size - robe.block_size + 1)
    for first in range(stretch[0], stretch[1], TILE_ROWS):
        last = min(first + TILE_ROWS, stretch[1])
        _find(ids, robe, num_starts, starts, first, last)
        _sum(array_m, ids, robe, starts, out, out_BFD.shape[2], first, last)


@inlined
def _find(ids: Ids, robe: Hash, num_starts: np.uint32, starts: np.ndarray, first: int, last: int) -> None:
    """Where the blocks of some rows start, see RobeHash. In the order of ids: nearly each of theirs is in one line."""
    num_fields, num_blocks = ids.columns_F.size, robe.steps_J.size
    num_rows = (ids.ends.size - 1) // num_fields
    for f in range(num_fields):
        for b in range(first, last):
            at = np.int64(ids.ends[U(b * num_fields + f)]) * num_blocks
            bag = ids.columns_F[f] * num_rows + b
            for n in range(ids.offsets[U(bag)], ids.offsets[U(bag + 1)]):
                row = _plus(U(ids.ids_L[U(n)]) % U(P), U(robe.first_rows_F[f]))
                key = (U(robe.places[0]) * row + U(robe.places[2])) % U(P)
                sign_key = (U(robe.signs[0]) * row + U(robe.signs[2])) % U(P)
                for j in range(num_blocks):
                    start = np.int64(np.uint32(_plus(key, U(robe.steps_J[j]))) % num_starts)
                    if robe.sign_steps_J.size and _plus(sign_key, U(robe.sign_steps_J[j])) & U(1):
                        start = ~start
                    starts[U(at + j)] = start
                at += num_blocks


@inlined
def _sum(
    array_m: np.ndarray, ids: Ids, robe: Hash, starts: np.ndarray, out: np.ndarray, dim: int, first: int, last: int
) -> None:
    """Values of some rows. In the order of rows, so that they are written one after another."""
    num_fields, num_blocks = ids.columns_F.size, robe.steps_J.size
    width, known = min(robe.block_size, dim), np.int64(ids.ends[U(last * num_fields)]) * num_blocks
    for bag in range(first * num_fields, last * num_fields):
        begin, end = np.int64(ids.ends[U(bag)]), np.int64(ids.ends[U(bag + 1)])
        if begin == end:
            for i in range(bag * dim, bag * dim + dim):
                out[U(i)] = FLOAT(0)
        for n in range(begin, end):
            for j in range(num_blocks):
                ahead = n * num_blocks + j + AHEAD
                if ahead < known:
                    _prefetch_block(array_m, _signed(starts[U(ahead)])[0], width)
                start, sign = _signed(starts[U(n * num_blocks + j)])
                to, size = bag * dim + j * robe.block_size, min(robe.block_size, dim - j * robe.block_size)
                if n == begin:
                    for i in range(size):
                        out[U(to + i)] = sign * array_m[U(start + i)]
                else:
                    for i in range(size):
                        out[U(to + i)] += sign * array_m[U(start + i)]


class Sum(NamedTuple):
    """A gradient of the array, and which of its lines it touches."""

    grad_m: np.ndarray
    """float32."""
    touched: np.ndarray
    """bool, of each line; may be empty, if nobody asks."""


@compiled
def add_gradient(
    sums: Sum, grad_BFD: np.ndarray, starts_LJ: np.ndarray, ends: np.ndarray, block_size: int, stretch: tuple[int, int]
) -> None:
    """Add the gradient of a lookup to that of the array, in one `stretch` of it; no line belongs to two of them."""
    dim, num_blocks = grad_BFD.shape[2], starts_LJ.shape[1]
    grad, starts = grad_BFD.reshape(-1), starts_LJ.reshape(-1)
    # First found, then added: only so is it known which parts of `grad` to fetch.
    found, places, num_found = np.empty(FOUND, np.int32), np.empty(FOUND, np.int64), 0
    for bag in range(ends.size - 1):
        for n in range(ends[U(bag)], ends[U(bag + 1)]):
            for j in range(num_blocks):
                found[U(num_found)] = starts[U(n * num_blocks + j)]
                places[U(num_found)] = bag * dim + j * block_size
                start, _ = _signed(found[U(num_found)])
                num_found += start < stretch[1] and start + block_size > stretch[0]
                if num_found == FOUND:
                    _add(sums, grad, dim, found, places, block_size, stretch)
                    num_found = 0
    _add(sums, grad, dim, found[:num_found], places, block_size, stretch)


@inlined
def _add(
    sums: Sum,
    grad: np.ndarray,
    dim: int,
    found: np.ndarray,
    places: np.ndarray,
    block_size: int,
    stretch: tuple[int, int],
) -> None:
    """Add the gradient of blocks, which stand at `places` of `grad`."""
    width = min(block_size, dim)
    for e in range(found.size):
        if e + AHEAD < found.size:
            _prefetch_block(sums.grad_m, _signed(found[U(e + AHEAD)])[0], width)
            _prefetch_block(grad, places[U(e + AHEAD)], width)
        start, sign = _signed(found[U(e)])
        place = places[U(e)]
        begin = max(start, stretch[0])
        end = min(start + min(block_size, dim - place % dim), stretch[1])
        for i in range(begin, end):
            sums.grad_m[U(i)] += sign * grad[U(place - start + i)]
        if sums.touched.size:
            for line in range(begin // LINE, -(-end // LINE)):
                sums.touched[U(line)] = True


@compiled
def adagrad(
    array_m: np.ndarray, squares_m: np.ndarray, sums: Sum, lr: np.float32, eps: np.float32, stretch: tuple[int, int]
) -> None:
    """Update a `stretch` of the array by Adagrad; then the gradient is 0 and nothing is touched.

    Only touched lines, if it is known which these are: elsewhere the gradient is 0, by which nothing changes.
    """
    begin, end = stretch
    touched = sums.touched
    if not touched.size:
        _update(array_m, squares_m, sums.grad_m, lr, eps, begin, end)
    for line in range(begin // LINE, -(-end // LINE) if touched.size else 0):
        if line + AHEAD < touched.size and touched[U(line + AHEAD)]:
            at = (line + AHEAD) * LINE
            prefetch(array_m, at)
            prefetch(squares_m, at)
            prefetch(sums.grad_m, at)
        if touched[U(line)]:
            touched[U(line)] = False
            _update(array_m, squares_m, sums.grad_m, lr, eps, line * LINE, min(line * LINE + LINE, end))


@inlined
def _update(
    array_m: np.ndarray,
    squares_m: np.ndarray,
    grad_m: np.ndarray,
    lr: np.float32,
    eps: np.float32,
    begin: int,
    end: int,
) -> None:
    for at in range(begin, end):
        grad = grad_m[U(at)]
        total = squares_m[U(at)] + grad * grad
        squares_m[U(at)] = total
        # Unlike /, np.divide does not look whether it divides by 0, and so is done on vectors.
        array_m[U(at)] -= lr * np.divide(grad, np.sqrt(total) + eps)
        grad_m[U(at)] = FLOAT(0)


@inlined
def _prefetch_block(array: np.ndarray, start: int, width: int) -> None:
    for i in range(0, width + LINE - 1, LINE):
        prefetch(array, start + i)


@inlined
def _plus(key: np.uint64, step: np.uint64) -> np.uint64:
    """(key + step) mod P, of numbers below P."""
    total = key + step
    return total - U(P) if total >= U(P) else total


@inlined
def _signed(start: int) -> tuple[Any, np.float32]:
    """Where a block starts, and what it counts."""
    return (~np.int64(start), FLOAT(-1)) if start < 0 else (np.int64(start), FLOAT(1))
