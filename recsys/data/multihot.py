"""Multi-hot ids: several for the one id of a row and feature, as MLPerf's DLRM-DCNv2 trains on.

Criteo's logs give one id a feature. The benchmark makes lists of them, which weigh on memory and network as a real
recommender's do: the first id of a list is the logged one, and its companions are random but fixed, one row of a table
an id. An id has the same companions in every row, rank and epoch, so ids may be expanded while they are loaded, or
stored expanded (`multihot_files`), with the same result.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recsys.config import InputError, nearest
from recsys.data.schema import Schema

# Criteo 1TB as MLPerf's DLRM-DCNv2 trains on it: 26 features, 214 ids a row, 204,184,588 ids in all.
MLPERF_SIZES = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)

# Tables up to this size are held in memory; the rows of larger ones are drawn whenever their id occurs.
TABLE_BYTES = 64 * 2**20
# Draws made together: few enough to stay in cache, enough to hide what a call of numpy costs.
BLOCK_DRAWS = 32_768


def _uniform(words: np.ndarray, num_ids: int) -> np.ndarray:
    return (_shares(words) * num_ids).astype(np.int32)


def _pareto(words: np.ndarray, num_ids: int) -> np.ndarray:
    """Draw floor(u^-4 - 1) mod num_ids, u uniform over (0, 1]: a Pareto II (Lomax) variable of shape 1/4.

    What int32 cannot hold counts as -2^31, which is what the reference's cast makes of it on x86: 0.46 % of all
    companions are the one id -2^31 mod num_ids.
    """
    tail = 1.0 - _shares(words)
    tail *= tail
    tail *= tail
    value = 1.0 / tail - 1.0
    whole = np.where(value < 2.0**31, value, -(2.0**31)).astype(np.int32)
    return whole - whole // num_ids * num_ids  # four times as fast as %, and right where the product overflows


DISTRIBUTIONS = {"uniform": _uniform, "pareto": _pareto}


class MultiHot:
    """Expands one id of feature f to `sizes[f]`: the id itself, then its companions.

    Companion j of id i is draw i * size + j of a SplitMix64 stream that starts at a key made of seed and feature name.
    Nothing else decides it, so every process finds the same alone. Companions are distributed over [0, num_ids) as in
    the tables of MLPerf's reference, though the draws are others. Id 0, missing or rare, is an id like any other: it
    has companions, and may be one.

    Args:
        schema: features and their numbers of ids.
        sizes: ids a row of each feature, the logged one among them.
        distribution: "uniform", or "pareto" for a heavy head: small ids are in most lists.
        seed: of all companions.

    Raises:
        InputError: the schema is multi-hot already or has raw ids, sizes do not fit it, or the distribution is unknown.
    """

    def __init__(self, schema: Schema, sizes: tuple[int, ...], distribution: str, seed: int) -> None:
        _check(schema, sizes, distribution)
        self.sizes = sizes
        self._features = [
            _Companions(name, num_ids, size, _key(seed, name), DISTRIBUTIONS[distribution])
            for (name, num_ids), size in zip(schema.sparse.items(), sizes, strict=True)
        ]
        self._num_ids = np.array(list(schema.sparse.values()), dtype=np.uint32)
        self._tables = [feature.table() for feature in self._features]

    def expand(self, ids_FB: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Expand the ids of B rows.

        Args:
            ids_FB: int32, features in the schema's order.
            out: contiguous int32 [B * sum(sizes)] to write to; None takes new memory.

        Returns:
            int32 [B * sum(sizes)], in the order of a KeyedJaggedTensor's values: by feature, then by row.

        Raises:
            ValueError: an id lies outside of its feature's [0, num_ids).
        """
        num_features, num_rows = ids_FB.shape
        assert ids_FB.dtype == np.int32
        assert num_features == len(self.sizes)
        if out is None:
            out = np.empty(num_rows * sum(self.sizes), dtype=np.int32)
        assert out.dtype == np.int32
        assert out.shape == (num_rows * sum(self.sizes),)
        assert out.flags.c_contiguous
        self._check_ids(ids_FB)
        at = 0
        for feature, table, ids_B in zip(self._features, self._tables, ids_FB, strict=True):
            lists = out[at : at + num_rows * feature.size].reshape(num_rows, feature.size)
            at += lists.size
            if table is None:
                feature.write(ids_B, lists)
            else:  # mode "raise" would write to a buffer first
                np.take(table, ids_B, axis=0, out=lists, mode="clip")
        return out

    def _check_ids(self, ids_FB: np.ndarray) -> None:
        largest_F = ids_FB.view(np.uint32).max(axis=1, initial=0)  # as unsigned numbers, negative ids are the largest
        if (largest_F >= self._num_ids).any():
            index = int(np.argmax(largest_F >= self._num_ids))
            feature, ids_B = self._features[index], ids_FB[index]
            raise ValueError(
                f"feature {feature.name!r} has ids {ids_B.min()} to {ids_B.max()}, but the schema gives it "
                f"{feature.num_ids} ids; prepare again"
            )


@dataclass(frozen=True)
class _Companions:
    """The lists of one feature: a table int32 [num_ids, size] of which any row can be computed alone."""

    name: str
    num_ids: int
    size: int
    key: int
    draw: Callable[[np.ndarray, int], np.ndarray]

    def table(self) -> np.ndarray | None:
        """Return the whole table, or None where it is too large, or holds nothing but the ids themselves."""
        if self.size == 1 or 4 * self.size * self.num_ids > TABLE_BYTES:
            return None
        table = np.empty((self.num_ids, self.size), dtype=np.int32)
        self.write(np.arange(self.num_ids, dtype=np.int32), table)
        return table

    def write(self, ids_B: np.ndarray, out_BS: np.ndarray) -> None:
        """Write the table's rows `ids_B`, drawing them."""
        out_BS[:, 0] = ids_B
        if self.size == 1:
            return
        companions = np.arange(1, self.size, dtype=np.uint64)
        num_rows = max(BLOCK_DRAWS // self.size, 1)
        for begin in range(0, len(ids_B), num_rows):
            block = slice(begin, begin + num_rows)
            counters = ids_B[block].astype(np.uint64)[:, None] * np.uint64(self.size) + companions
            out_BS[block, 1:] = self.draw(_splitmix64(self.key, counters), self.num_ids)


def _splitmix64(key: int, counters: np.ndarray) -> np.ndarray:
    """Draws number `counters` of the stream that starts at `key` (Steele et al., 2014); arithmetic wraps at 2^64."""
    words = counters * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _shares(words: np.ndarray) -> np.ndarray:
    """Uniform numbers of [0, 1), multiples of 2^-53. Times any n < 2^53, even the largest rounds to less than n."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _key(seed: int, feature: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {feature}".encode()).digest()[:8], "little")


def _check(schema: Schema, sizes: tuple[int, ...], distribution: str) -> None:
    if distribution not in DISTRIBUTIONS:
        raise InputError(f"unknown distribution {distribution!r}; {nearest(distribution, DISTRIBUTIONS)}")
    if schema.raw:
        raise InputError(
            f"ids of feature {schema.raw[0]!r} are raw; multi-hot ids are drawn from those of a vocabulary"
        )
    if schema.hotness:
        feature, hotness = next(iter(schema.hotness.items()))
        raise InputError(
            f"feature {feature!r} is multi-hot already, {hotness} ids a row; expand the data that it was made from"
        )
    if len(sizes) != len(schema.sparse):
        raise InputError(
            f"{len(sizes)} sizes for {len(schema.sparse)} sparse features; name one size a feature, in this order: "
            f"{' '.join(schema.sparse)}"
        )
    for feature, size in zip(schema.sparse, sizes, strict=True):
        if size < 1:
            raise InputError(f"size {size} of feature {feature!r} must be at least 1, which is its own id alone")
