"""Raw ids: a category's own value as 64 bits, where no vocabulary gives it a smaller number."""

import hashlib

import numpy as np
import pyarrow as pa

MISSING = 0
ID_OF_ZERO = 0x9E3779B97F4A7C15 - 2**64
"""The id of the number 0, since 0 means missing: a number that no 32-bit value has, and others as rarely as a hash."""


def raw_ids(values: pa.Array) -> np.ndarray:
    """The id of each value, int64: numbers are their own, texts get the first 64 bits of their BLAKE2b hash.

    Args:
        values: integers of any type, or texts; null is missing.

    Missing is 0 and nothing else is: the number 0, or a text whose hash is 0, has the id `ID_OF_ZERO`.
    """
    if pa.types.is_integer(values.type):
        ids = values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)  # uint64 keeps its bits
    else:
        texts = (text or "" for text in values.to_pylist())
        words = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
        ids = np.frombuffer(words, dtype="<i8").copy()
    ids[ids == 0] = ID_OF_ZERO
    ids[values.is_null().to_numpy(zero_copy_only=False)] = MISSING
    return ids
