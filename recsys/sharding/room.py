"""Finding room: looks for any packing that fits, where packing for speed found none."""

from collections.abc import Iterator

import numpy as np

from recsys.sharding.packing import Ground, Packing

STEPS = 20_000
"""Placements that are tried beyond one a table; small cases are searched through. Fewer on more than 16 ranks."""


def find_room(ground: Ground, possible: np.ndarray) -> Packing | None:
    """Return a packing that fits, or None: the fullest ranks with room first, and back where that leads nowhere.

    Args:
        ground: of the search.
        possible: options that tables may have [T, O].
    """
    packing = Packing(ground)
    num_shards, held = ground.options.num_shards, ground.options.bytes
    full = (held / np.maximum(ground.capacity, 1.0) * num_shards[:, None]).max(axis=2)
    full = np.where(possible, full, np.inf)
    orders = np.argsort(full, axis=1, kind="stable")
    # Tables that are hard to place go first: those whose smallest shard is largest.
    largest = np.where(possible, (held / np.maximum(ground.capacity, 1.0)).max(axis=2), np.inf).min(axis=1)
    tables = np.lexsort((-full.min(axis=1), -largest)).tolist()
    trails: list[Iterator[tuple[int, tuple[int, ...]]]] = []
    steps = 2 * len(tables) + STEPS * 16 // max(16, ground.world)
    while len(trails) < len(tables) or not trails:
        table = tables[len(trails)]
        trails.append(_ways(packing, table, [option for option in orders[table] if possible[table, option]]))
        while trails:
            table = tables[len(trails) - 1]
            if packing.choice[table] >= 0:
                packing.remove(table)
            way = next(trails[-1], None)
            steps -= 1
            if steps < 0:
                return None
            if way is not None:
                packing.add(table, *way)
                break
            trails.pop()
        if not trails:
            return None
    return packing


def _ways(packing: Packing, table: int, options: list[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Options and places of a table that has none, those that leave the least room over first."""
    for option in options:
        reach = packing.ground.reach[option]
        if reach == "world":
            if np.all(packing.has_room(table, option)):
                yield option, tuple(range(packing.ground.world))
        else:
            ground, parts = packing.ground, packing.ground.options.options[option].columns
            groups: dict[int, list[tuple[int, tuple]]] = {}
            for place in _candidates(packing, table, option):
                groups.setdefault(place[0] // ground.local if ground.within[option] else 0, []).append(place)
            for group in groups.values():
                for places in _subsets(group, parts):
                    yield option, places


def _candidates(packing: Packing, table: int, option: int) -> list[tuple[int, tuple]]:
    """Places with room, fullest first, and what makes two of them the same."""
    ground = packing.ground
    room = np.broadcast_to(packing.has_room(table, option), (ground.world,))
    ranks = [tuple(held) for held in packing.bytes.tolist()]
    nodes = [tuple(sorted(ranks[at : at + ground.local])) for at in range(0, ground.world, ground.local)]
    if ground.reach[option] == "node":
        fits = room.reshape(-1, ground.local).all(axis=1)
        found: list[tuple[int, tuple]] = [(at, nodes[at]) for at in np.flatnonzero(fits).tolist()]
    else:
        found = [(at, (ranks[at], nodes[at // ground.local])) for at in np.flatnonzero(room).tolist()]
    return sorted(found, key=lambda place: place[1], reverse=True)


def _subsets(candidates: list[tuple[int, tuple]], parts: int) -> Iterator[tuple[int, ...]]:
    """Choices of `parts` places; of places that are alike, only the first is tried at each turn."""
    if parts == 0:
        yield ()
        return
    seen = set()
    for index, (place, kind) in enumerate(candidates):
        if kind in seen:
            continue
        seen.add(kind)
        for rest in _subsets(candidates[index + 1 :], parts - 1):
            yield tuple(sorted((place, *rest)))
