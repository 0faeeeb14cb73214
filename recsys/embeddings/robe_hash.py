"""Where the values of a ROBE array stand: the hash, and its constants."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from recsys.config import InputError
from recsys.embeddings.config import TABLE_SEPARATOR, Owner

P = 2038074743
"""A prime below 2^31: products of two numbers below it fit an int64, and places in an array fit an int32."""


class Bags(NamedTuple):
    """The ids of a batch, a bag for each row and feature, as TorchRec has them."""

    ids_L: Tensor
    """int; the bags of a feature one after another."""
    offsets: Tensor
    """int; where each bag begins, and the last one ends."""
    columns_F: list[int]
    """Place of each field among the batch's features."""
    num_rows: int
    """B."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RobeHash:
    """The hash of one owner.

    Element i of value v of a table with offset o (rows of the tables before it) is, up to its sign, element
        ((a (v + o) + b floor(i / Z) + c) mod P) mod (m - Z + 1) + i mod Z
    of an array of m floats (arXiv 2207.10731): a block of Z elements stays together, wherever it starts. With signs, a
    block counts negative where a hash of the same form, with constants of its own, is odd before the mod (m - Z + 1).
    """

    num_floats: int
    """m."""
    block_size: int
    """Z."""
    dim: int
    """D."""
    first_rows_F: np.ndarray
    """o mod P, int64, by field."""
    places: tuple[int, int, int]
    """a, b, c of the places."""
    signs: tuple[int, int, int] | None
    """a, b, c of the signs, if there are signs."""

    @property
    def num_blocks(self) -> int:
        """Blocks J that a value of a table lies in."""
        return -(-self.dim // self.block_size)

    @property
    def num_starts(self) -> int:
        """Where a block can start."""
        return self.num_floats - self.block_size + 1

    def steps(self, constants: tuple[int, int, int]) -> np.ndarray:
        """Return b j mod P for each block j of a value, int64."""
        return np.array([constants[1] * j % P for j in range(self.num_blocks)], dtype=np.int64)


def robe_hash(sparse: Mapping[str, int], owner: Owner) -> RobeHash:
    """Make the hash of an owner, its constants drawn from the owner's seed.

    Raises:
        InputError: the array would be smaller than a block, or larger than the hash reaches; says which compression
            works.
    """
    config = owner.config
    *first_rows, num_rows = itertools.accumulate(sparse.values(), initial=0)
    num_floats = num_rows * config.embedding_dim
    kept = int(num_floats / config.compression)
    if kept < config.block_size:
        raise InputError(
            f"{owner.name}: compression {config.compression:g} leaves {kept:,} of {num_floats:,} floats, less than one "
            f"block; " + _what_works(num_floats, config.block_size)
        )
    largest = P + config.block_size - 1
    if kept > largest:
        raise InputError(
            f"{owner.name}: compression {config.compression:g} leaves {kept:,} of {num_floats:,} floats, and ROBE's "
            f"hash reaches {largest:,}; the smallest compression that works is {-(-num_floats // largest)}"
        )
    return RobeHash(
        num_floats=kept,
        block_size=config.block_size,
        dim=config.embedding_dim,
        first_rows_F=np.array([row % P for row in first_rows], dtype=np.int64),
        places=_constants(owner.seed, "places"),
        signs=_constants(owner.seed, "signs") if config.sign else None,
    )


def _what_works(num_floats: int, block_size: int) -> str:
    if num_floats < block_size:
        return f"block_size {block_size} is above that too, the largest that works is {num_floats}"
    return f"with block_size {block_size} the largest compression that works is {num_floats // block_size}"


def _constants(seed: str, what: str) -> tuple[int, int, int]:
    """Draw a and b from [1, P), c from [0, P)."""
    digest = hashlib.sha256(TABLE_SEPARATOR.join((seed, "robe", what)).encode()).digest()
    a, b, c = (int.from_bytes(digest[i : i + 8]) for i in (0, 8, 16))
    return a % (P - 1) + 1, b % (P - 1) + 1, c % P
