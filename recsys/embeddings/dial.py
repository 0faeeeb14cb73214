"""The dial of compressed embeddings: what makes a number of floats fit under a given one."""

import math
from collections.abc import Callable

from recsys.config import InputError
from recsys.embeddings.config import Owner

HALVINGS = 60
"""Of the range that a setting is sought in: about what a float can tell apart."""


def least(num_floats: Callable[[float], int], most: float, num_whole: int, owner: Owner) -> float:
    """Find the least setting, in [0, most], that leaves `num_whole / compression` floats or fewer.

    Args:
        num_floats: what a setting leaves: all at 0, and less at larger ones, but for rounding.
        most: the largest setting that is of use.
        num_whole: floats of whole tables.
        owner: who asks for the compression.

    Raises:
        InputError: no setting does, naming the largest compression that works.
    """
    config = owner.config
    allowed, fewest = num_whole / config.compression, num_floats(most)
    if fewest > allowed:
        reached = math.floor(num_whole / fewest * 100) / 100
        raise InputError(
            f"{owner.name}: embeddings {config.embeddings} cannot reach compression {config.compression:g}: at least "
            f"{fewest:,} of {num_whole:,} floats are left; the largest that works is {reached:.2f}"
        )
    if num_floats(0.0) <= allowed:
        return 0.0
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if num_floats(middle) <= allowed else (middle, high)
    return high
