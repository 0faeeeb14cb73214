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


class Lookup(NamedTuple):
    """What a lookup leaves for its gradient."""

    starts_LJ: np.ndarray
    """int32: where each block starts, s, or ~s where it counts negative; rows first, fields within them."""
    ends: np.ndarray
    """int32 [B * F + 1]: where the ids of each bag (b, f) stand in `starts_LJ`."""


class Space:
    """What updates need beside the array: a gradient that is zero between them, and which lines it touches."""

    def __init__(self, num_floats: int) -> None:
        self.grad_m = np.zeros(num_floats, np.float32)
        self.touched = np.zeros(-(-num_floats // kernels.LINE), np.bool_)


def look_up(array_m: Tensor, robe: RobeHash, bags: Bags) -> tuple[Tensor, Lookup]:
    """Look up a batch: x_BFD, and what `gradient` and `update` need."""
    ids_L, offsets, columns_F = bags.ids_L.numpy(), bags.offsets.numpy(), np.array(bags.columns_F, dtype=np.int64)
    ends = np.empty(bags.num_rows * len(columns_F) + 1, np.int32)
    kernels.order(offsets, columns_F, ends)
    x_BFD = torch.empty(bags.num_rows, len(columns_F), robe.dim)
    starts_LJ = np.empty((int(ends[-1]), robe.num_blocks), np.int32)
    signs = robe.signs or robe.places
    _on_threads(
        kernels.look_up,
        (
            *(array_m.detach().numpy(), ids_L, offsets, columns_F, robe.first_rows_F, ends),
            *(robe.places, robe.steps_J(robe.places)),
            *(signs, robe.steps_J(signs)[: robe.num_blocks if robe.signs else 0]),
            *(robe.block_size, starts_LJ, x_BFD.numpy()),
        ),
        _stretches(bags.num_rows, kernels.TILE_ROWS),
    )
    return x_BFD, Lookup(starts_LJ, ends)


def gradient(robe: RobeHash, lookup: Lookup, grad_BFD: Tensor) -> Tensor:
    """Gradient of the whole array, from that of what was looked up."""
    grad_m = torch.zeros(robe.num_floats)
    untracked = np.empty(0, np.bool_)
    _on_threads(
        kernels.add_gradient,
        (grad_m.numpy(), untracked, grad_BFD.contiguous().numpy(), *lookup, robe.block_size),
        _stretches(robe.num_floats, kernels.LINE),
    )
    return grad_m


def update(
    array_m: Tensor,
    sums_m: Tensor,
    space: Space,
    robe: RobeHash,
    lookup: Lookup,
    grad_BFD: Tensor,
    *,
    lr: float,
    eps: float,
) -> None:
    """Update the array by Adagrad where the batch has touched it: sums += g^2, array -= lr g / (sqrt(sums) + eps)."""
    _on_threads(
        kernels.add_and_update,
        (
            *(array_m.detach().numpy(), sums_m.numpy(), space.grad_m, space.touched),
            *(grad_BFD.contiguous().numpy(), *lookup, robe.block_size, np.float32(lr), np.float32(eps)),
        ),
        _stretches(robe.num_floats, kernels.LINE),
    )


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
