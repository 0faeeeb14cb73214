"""ROBE on any device, in torch's operations."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recsys.embeddings.robe_hash import Bags, P, RobeHash


class Lookup(NamedTuple):
    """What a lookup leaves for its gradient."""

    starts_LJ: Tensor
    """int64: where each block starts."""
    signs_LJ: Tensor | None
    """float32, 1 or -1, if there are signs."""
    bags_L: Tensor
    """int64: the bag of each id, b * F + f."""


def look_up(array_m: Tensor, robe: RobeHash, bags: Bags) -> tuple[Tensor, Lookup]:
    """Look up a batch: x_BFD, and what `gradient` needs."""
    num_fields = len(bags.columns_F)
    fields, first_rows = torch.empty(2, num_fields, dtype=torch.int64)  # of each feature of the batch
    fields[bags.columns_F] = torch.arange(num_fields)
    first_rows[bags.columns_F] = torch.from_numpy(robe.first_rows_F)
    fields, first_rows = fields.to(array_m.device), first_rows.to(array_m.device)
    given_L = torch.repeat_interleave(bags.offsets.diff(), output_size=len(bags.ids_L))
    features_L = given_L // bags.num_rows
    bags_L = given_L % bags.num_rows * num_fields + fields[features_L]
    # Any 64 bits can be an id; like machine code, this reads them without a sign.
    ids_L = bags.ids_L.long()
    rows_L = (ids_L % P + (ids_L < 0) * (2**64 % P) + first_rows[features_L]) % P
    starts_LJ = _hashed(rows_L, robe, robe.places) % robe.num_starts
    signs_LJ = (1 - 2 * (_hashed(rows_L, robe, robe.signs) % 2)).float() if robe.signs else None
    # Every stretch of the array that a block can cover, without a copy: a block is one of its rows.
    width = min(robe.block_size, robe.dim)
    blocks = array_m.detach().as_strided((robe.num_floats - width + 1, width), (1, 1))
    x_LJW = blocks.index_select(0, starts_LJ.flatten()).view(-1, robe.num_blocks, width)
    if signs_LJ is not None:
        x_LJW = x_LJW * signs_LJ[:, :, None]
    x_BFD = array_m.new_zeros(bags.num_rows, num_fields, robe.dim)
    x_BFD.view(-1, robe.dim).index_add_(0, bags_L, x_LJW.flatten(1)[:, : robe.dim])
    return x_BFD, Lookup(starts_LJ, signs_LJ, bags_L)


def gradient(robe: RobeHash, lookup: Lookup, grad_BFD: Tensor) -> Tensor:
    """Gradient of the whole array, from that of what was looked up."""
    width = min(robe.block_size, robe.dim)
    grad_LD = grad_BFD.reshape(-1, robe.dim).index_select(0, lookup.bags_L)
    grad_LJW = nn.functional.pad(grad_LD, (0, robe.num_blocks * width - robe.dim)).view(-1, robe.num_blocks, width)
    if lookup.signs_LJ is not None:
        grad_LJW = grad_LJW * lookup.signs_LJ[:, :, None]
    grad_m = grad_BFD.new_zeros(robe.num_floats)
    for i in range(width):
        grad_m[i:].index_add_(0, lookup.starts_LJ.flatten(), grad_LJW[:, :, i].flatten())
    return grad_m


def _hashed(rows_L: Tensor, robe: RobeHash, constants: tuple[int, int, int]) -> Tensor:
    """(a v + b j + c) mod P for each row v and block j."""
    a, _, c = constants
    steps_J = torch.from_numpy(robe.steps(constants)).to(rows_L.device)
    return ((a * rows_L + c) % P)[:, None].add(steps_J) % P
