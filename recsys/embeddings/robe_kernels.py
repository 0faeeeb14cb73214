"""Machine code of ROBE: lookups in an array of shared parameters, their gradient, and Adagrad on what it touches.

Shapes: B rows, F fields, D embedding dimension, J blocks of Z elements that cover D, L ids of the batch, m floats in
the array. A bag is what one row has of one field; ids come as TorchRec has them, bags of a field one after another,
and everything here goes in the order of rows, in which the output lies in memory. `starts_LJ` is all that a lookup
leaves for its gradient: where each block starts, s, or ~s where it counts negative. Nothing is as large as B x F x D
but the output.

Threads divide lookups by rows, and gradients by stretches of the array: no two write to one place, and each element's
gradient is summed in the order of rows, so the number of threads changes no bit. Indices are unsigned, because numba
asks of signed ones whether they count from the end, and then makes no vector instructions of a loop.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from recsys.compiled import compiled, inlined
from recsys.embeddings.robe_hash import P

TILE_ROWS = 64
"""Rows whose starts, and ids, stay in the nearest caches between being computed and being used."""
AHEAD = 32
LOC = 3
LINE = 16
"""Floats of a cache line, the unit of what a gradient is known to have touched."""
U, FLOAT = np.uint64, np.float32


@intrinsic
def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Have the cache line of an array's element fetched, which will be needed soon."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, _ = signature.args
        data = context.make_array(array_type)(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        word = ir.IntType(32)
        name, shape = "llvm.prefetch.p0i8", ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        builder.call(
            cgutils.get_or_insert_function(builder.module, shape, name),
            [place, ir.Constant(word, 0), ir.Constant(word, LOC), ir.Constant(word, 1)],
        )
        return context.get_dummy_value()

    return types.void(array, index), code


@compiled
def order(offsets: np.ndarray, columns_F: np.ndarray, ends: np.ndarray) -> None:
    """Find where the ids of each bag stand when rows come first.

    Args:
        offsets: int, of bags in the order of fields, [number of fields in the batch * B + 1].
        columns_F: int64, the place of each field in the batch.
        ends: int32 [B * F + 1], filled: ids of bag (b, f) are ends[b * F + f] to ends[b * F + f + 1].
    """
    num_fields = columns_F.size
    num_rows = (ends.size - 1) // num_fields
    for first in range(0, num_rows, TILE_ROWS):
        for f in range(num_fields):
            bag = columns_F[f] * num_rows
            for b in range(first, min(first + TILE_ROWS, num_rows)):
                ends[U(b * num_fields + f + 1)] = offsets[U(bag + b + 1)] - offsets[U(bag + b)]
    ends[0] = 0
    total = np.int64(0)
    for bag in range(1, ends.size):
        total += ends[U(bag)]
        ends[U(bag)] = total


@compiled
def look_up(
    array_m: np.ndarray,
    ids_L: np.ndarray,
    offsets: np.ndarray,
    columns_F: np.ndarray,
    first_rows_F: np.ndarray,
    ends: np.ndarray,
    places: tuple,
    steps_J: np.ndarray,
    signs: tuple,
    sign_steps_J: np.ndarray,
    block_size: int,
    starts_LJ: np.ndarray,
    out_BFD: np.ndarray,
    stretch: tuple,
) -> None:
    """Sum the values of each bag, for rows of a `stretch`; see RobeHash for the formula.

    Args:
        array_m: float32.
        ids_L: int.
        offsets: as in `order`, like `columns_F` and `ends`.
        first_rows_F: int64, o of each field.
        places: a, b, c of the hash.
        steps_J: b j mod P.
        signs: the same for signs; `sign_steps_J` is empty where there are none.
        block_size: Z.
        starts_LJ: int32, filled.
        out_BFD: float32, filled.
        stretch: first row and the one after the last.
    """
    num_rows, num_fields, dim = out_BFD.shape
    out, starts = out_BFD.reshape(-1), starts_LJ.reshape(-1)
    num_blocks = steps_J.size
    num_starts = np.uint32(array_m.size - block_size + 1)
    for first in range(stretch[0], stretch[1], TILE_ROWS):
        last = min(first + TILE_ROWS, stretch[1])
        for f in range(num_fields):
            for b in range(first, last):
                at = np.int64(ends[U(b * num_fields + f)]) * num_blocks
                bag = columns_F[f] * num_rows + b
                for n in range(offsets[U(bag)], offsets[U(bag + 1)]):
                    row = (U(ids_L[U(n)]) + U(first_rows_F[f])) % U(P)
                    key = (U(places[0]) * row + U(places[2])) % U(P)
                    for j in range(num_blocks):
                        start = np.int64(np.uint32(_plus(key, U(steps_J[j]))) % num_starts)
                        if sign_steps_J.size:
                            sign = (U(signs[0]) * row + U(signs[2])) % U(P)
                            if _plus(sign, U(sign_steps_J[j])) & U(1):
                                start = ~start
                        starts[U(at + j)] = start
                    at += num_blocks
        known = np.int64(ends[U(last * num_fields)]) * num_blocks
        for bag in range(first * num_fields, last * num_fields):
            begin, end = np.int64(ends[U(bag)]), np.int64(ends[U(bag + 1)])
            if begin == end:
                for i in range(dim):
                    out[U(bag * dim + i)] = FLOAT(0)
            for n in range(begin, end):
                for j in range(num_blocks):
                    ahead = n * num_blocks + j + AHEAD
                    if ahead < known:
                        start, sign = _signed(starts[U(ahead)])
                        for i in range(0, min(block_size, dim) + LINE - 1, LINE):
                            _prefetch(array_m, start + i)
                    start, sign = _signed(starts[U(n * num_blocks + j)])
                    size = min(block_size, dim - j * block_size)
                    if n == begin:
                        _put(out, bag * dim + j * block_size, array_m, start, size, sign)
                    else:
                        _add(out, bag * dim + j * block_size, array_m, start, size, sign)


@compiled
def add_gradient(
    grad_m: np.ndarray,
    touched: np.ndarray,
    grad_BFD: np.ndarray,
    starts_LJ: np.ndarray,
    ends: np.ndarray,
    block_size: int,
    stretch: tuple,
) -> None:
    """Add the gradient of a lookup to that of the array, in one `stretch` of it.

    Args:
        grad_m: float32.
        touched: bool, set for each line of the array that got something; may be empty.
        grad_BFD: float32.
        starts_LJ: of the lookup, like `ends`.
        block_size: Z.
        stretch: first element and the one after the last; no line belongs to two.
    """
    lower, upper = stretch
    dim, num_blocks = grad_BFD.shape[2], starts_LJ.shape[1]
    grad, starts = grad_BFD.reshape(-1), starts_LJ.reshape(-1)
    width = min(block_size, dim)
    for bag in range(ends.size - 1):
        for n in range(ends[U(bag)], ends[U(bag + 1)]):
            for j in range(num_blocks):
                ahead = n * num_blocks + j + AHEAD
                if ahead < starts.size:
                    start, sign = _signed(starts[U(ahead)])
                    if lower <= start < upper:
                        for i in range(0, width + LINE - 1, LINE):
                            _prefetch(grad_m, start + i)
                start, sign = _signed(starts[U(n * num_blocks + j)])
                begin = max(start, lower)
                end = min(start + min(block_size, dim - j * block_size), upper)
                if begin < end:
                    _add(grad_m, begin, grad, bag * dim + j * block_size + begin - start, end - begin, sign)
                    if touched.size:
                        for line in range(begin // LINE, (end - 1) // LINE + 1):
                            touched[U(line)] = True


@compiled
def add_and_update(
    array_m: np.ndarray,
    sums_m: np.ndarray,
    grad_m: np.ndarray,
    touched: np.ndarray,
    grad_BFD: np.ndarray,
    starts_LJ: np.ndarray,
    ends: np.ndarray,
    block_size: int,
    lr: np.float32,
    eps: np.float32,
    stretch: tuple,
) -> None:
    """Update a `stretch` of the array by Adagrad, where the gradient of a lookup touches it.

    Elsewhere the gradient is 0, by which neither the array nor the sums would change. `grad_m` is zero before and
    after, `touched` false; the other arguments are those of `add_gradient`.
    """
    add_gradient(grad_m, touched, grad_BFD, starts_LJ, ends, block_size, stretch)
    line, last_line = stretch[0] // LINE, -(-stretch[1] // LINE)
    while line < last_line:
        first = line
        while line < last_line and touched[U(line)]:  # as long a loop as can be, below
            touched[U(line)] = False
            line += 1
            if line + AHEAD < touched.size and touched[U(line + AHEAD)]:
                at = (line + AHEAD) * LINE
                _prefetch(array_m, at)
                _prefetch(sums_m, at)
                _prefetch(grad_m, at)
        for at in range(first * LINE, min(line * LINE, stretch[1])):
            grad = grad_m[U(at)]
            total = sums_m[U(at)] + grad * grad
            sums_m[U(at)] = total
            array_m[U(at)] -= lr * (grad / (np.sqrt(total) + eps))
            grad_m[U(at)] = FLOAT(0)
        line += 1


@inlined
def _plus(key: np.uint64, step: np.uint64) -> np.uint64:
    """(key + step) mod P, of numbers below P."""
    total = key + step
    return total - U(P) if total >= U(P) else total


@inlined
def _signed(start: int) -> tuple[int, np.float32]:
    """Where a block starts, and what it counts."""
    start = np.int64(start)
    return (~start, FLOAT(-1)) if start < 0 else (start, FLOAT(1))


@inlined
def _put(out: np.ndarray, to: int, values: np.ndarray, start: int, size: int, sign: np.float32) -> None:
    for i in range(size):
        out[U(to + i)] = sign * values[U(start + i)]


@inlined
def _add(out: np.ndarray, to: int, values: np.ndarray, start: int, size: int, sign: np.float32) -> None:
    for i in range(size):
        out[U(to + i)] += sign * values[U(start + i)]
