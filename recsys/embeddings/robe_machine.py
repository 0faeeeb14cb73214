"""ROBE on a CPU: machine code on several threads."""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys.embeddings import robe_kernels as kernels
from recsys.embeddings.robe_hash import Bags, RobeHash

NOTHING = np.empty(0, np.bool_)
SHARE = 0.2
"""Of an array's lines: where a batch touches more, all are updated, one after another, which memory is fast at."""


class Lookup(NamedTuple):
    """What a lookup leaves for its gradient."""

    starts_LJ: np.ndarray
    """int32: where each block starts, s, or ~s where it counts negative; rows first, fields within them."""
    ends: np.ndarray
    """int32 [B * F + 1]: where the ids of each bag (b, f) stand in `starts_LJ`."""


class Rates(NamedTuple):
    """What Adagrad goes by."""

    squares_m: Tensor
    """float32: its state, sums of squared gradients."""
    lr: float
    eps: float


def look_up(array_m: Tensor, robe: RobeHash, bags: Bags) -> tuple[Tensor, Lookup]:
    """Look up a batch: x_BFD, and what `gradient` and `update` need."""
    num_fields = len(bags.columns_F)
    ids = kernels.Ids(
        ids_L=bags.ids_L.numpy(),
        offsets=bags.offsets.numpy(),
        columns_F=np.array(bags.columns_F, dtype=np.int64),
        ends=np.empty(bags.num_rows * num_fields + 1, np.int32),
    )
    kernels.order(ids)
    constants = kernels.Hash(
        first_rows_F=robe.first_rows_F,
        places=robe.places,
        steps_J=robe.steps(robe.places),
        signs=robe.signs or robe.places,
        sign_steps_J=robe.steps(robe.signs) if robe.signs else np.empty(0, np.int64),
        block_size=robe.block_size,
    )
    lookup = Lookup(np.empty((int(ids.ends[-1]), robe.num_blocks), np.int32), ids.ends)
    x_BFD = torch.empty(bags.num_rows, num_fields, robe.dim)
    _on_threads(
        kernels.look_up,
        (array_m.detach().numpy(), ids, constants, lookup.starts_LJ, x_BFD.numpy()),
        _stretches(bags.num_rows, kernels.TILE_ROWS),
    )
    return x_BFD, lookup


def gradient(robe: RobeHash, lookup: Lookup, grad_BFD: Tensor) -> Tensor:
    """Gradient of the whole array, from that of what was looked up."""
    grad_m = torch.zeros(robe.num_floats)
    sums = kernels.Sum(grad_m.numpy(), NOTHING)
    _on_threads(
        kernels.add_gradient,
        (sums, grad_BFD.contiguous().numpy(), *lookup, robe.block_size),
        _stretches(robe.num_floats, kernels.LINE),
    )
    return grad_m


def zero(robe: RobeHash) -> kernels.Sum:
    """What `update` needs beside the array: a gradient of 0, of which nothing is touched."""
    return kernels.Sum(np.zeros(robe.num_floats, np.float32), np.zeros(-(-robe.num_floats // kernels.LINE), np.bool_))


def update(array_m: Tensor, sums: kernels.Sum, robe: RobeHash, lookup: Lookup, grad_BFD: Tensor, rates: Rates) -> None:
    """Update the array by Adagrad: squares += g^2, array -= lr g / (sqrt(squares) + eps); `sums` is `zero` again."""
    stretches = _stretches(robe.num_floats, kernels.LINE)
    num_touched = lookup.starts_LJ.size * (min(robe.block_size, robe.dim) / kernels.LINE + 1)
    if num_touched > SHARE * sums.touched.size:
        sums = kernels.Sum(sums.grad_m, NOTHING)
    _on_threads(kernels.add_gradient, (sums, grad_BFD.contiguous().numpy(), *lookup, robe.block_size), stretches)
    values = (array_m.detach().numpy(), rates.squares_m.numpy())
    _on_threads(kernels.adagrad, (*values, sums, np.float32(rates.lr), np.float32(rates.eps)), stretches)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="robe")


def _on_threads(kernel: Callable[..., None], arguments: tuple, stretches: Sequence[tuple[int, int]]) -> None:
    """Call a kernel for each stretch, one here and the others on threads of their own; they hold no lock."""
    others = [_pool().submit(kernel, *arguments, stretch) for stretch in stretches[1:]]
    kernel(*arguments, stretches[0])
    for other in others:
        other.result()


def _stretches(num_all: int, unit: int) -> list[tuple[int, int]]:
    """Divide a number of things among torch's threads in multiples of a unit, all but the last."""
    num_units = -(-num_all // unit)
    num_threads = max(min(torch.get_num_threads(), num_units), 1)
    ends = [min(num_units * part // num_threads * unit, num_all) for part in range(num_threads + 1)]
    return list(itertools.pairwise(ends))
