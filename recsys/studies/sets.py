"""Sets: which members are merged together. Sets of one source and one size have no member in common."""

from collections.abc import Sequence

import numpy as np

from recsys.studies.config import MergeStudyConfig
from recsys.studies.jobs import member_name

SEEDS, BACKBONES, MIXED = "seeds", "backbones", "mixed"
MIXED_SEED = 0
"""Of the order in which mixed sets take members from the pool."""

Sets = list[tuple[str, ...]]


def chunks(names: Sequence[str], size: int) -> Sets:
    """Disjoint runs of `size` names; what is left over at the end is in none."""
    return [tuple(names[start : start + size]) for start in range(0, len(names) - size + 1, size)]


def pool_names(config: MergeStudyConfig) -> list[str]:
    """All members that are trained alone, backbone by backbone."""
    return [member_name(backbone, seed) for backbone in config.backbones for seed in range(config.num_seeds(backbone))]


def sets_of_seeds(config: MergeStudyConfig, backbone: str, size: int, num_seeds: int | None = None) -> Sets:
    """Sets of seeds of one backbone: of all of them, or of its first `num_seeds`."""
    seeds = range(config.num_seeds(backbone) if num_seeds is None else num_seeds)
    return chunks([member_name(backbone, seed) for seed in seeds], size)


def sets_of_backbones(config: MergeStudyConfig, size: int) -> Sets:
    """Sets of different backbones of one seed index; each index starts one backbone further, so that partners vary."""
    backbones, sets = list(config.backbones), []
    for seed in range(config.seeds):
        start = seed % len(backbones)
        sets += chunks([member_name(name, seed) for name in backbones[start:] + backbones[:start]], size)
    return sets


def mixed_sets(config: MergeStudyConfig, size: int) -> Sets:
    """Sets of whatever comes next in one fixed random order of the pool."""
    names = pool_names(config)
    order = np.random.default_rng(MIXED_SEED).permutation(len(names))
    return chunks([names[index] for index in order], size)


def all_sets(config: MergeStudyConfig) -> dict[tuple[str, int], Sets]:
    """Source and size to its sets, where there are any.

    Sources: `seeds` (every backbone, its first `seeds` members, so that all sizes have the same backbones in them),
    `seeds of NAME` (all members of one), `backbones` and `mixed`.
    """
    found: dict[tuple[str, int], Sets] = {}
    for size in sorted(config.sizes):
        of_all = [group for name in config.backbones for group in sets_of_seeds(config, name, size, config.seeds)]
        found[SEEDS, size] = of_all
        found[BACKBONES, size] = sets_of_backbones(config, size)
        found[MIXED, size] = mixed_sets(config, size)
        for name in config.backbones:
            found[f"{SEEDS} of {name}", size] = sets_of_seeds(config, name, size)
    return {key: sets for key, sets in found.items() if sets}
