"""A checkpoint of dynamic tables loads into tables of other sizes: ids keep their vectors, or lose the least used."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.embeddings.config import TABLE_SEPARATOR
from recsys.embeddings.dynamic import DynamicGroup
from recsys.embeddings.dynamic_map import RESERVED_ROWS, resized
from recsys.embeddings.dynamic_rows import parts_of

Key = tuple[str, ...]
"""Where a value stands in a state of nested dictionaries."""


class Resized(NamedTuple):
    """A feature whose tables have another size in the checkpoint."""

    group: DynamicGroup
    feature: str
    map_key: Key
    table_keys: list[Key]
    """Of the owners' tables and their optimizer state."""


def load_resized(
    sizes: Mapping[str, tuple[int, ...]],
    read_into: Callable[[dict[str, Any]], None],
    state: dict[str, Any],
    model: nn.Module,
) -> dict[Key, Any]:
    """Fill dynamic tables that have another size in the checkpoint, and take them out of what is left to load.

    Rows that no id has are left as they are. Every rank reads one whole table of the checkpoint at a time.

    Args:
        sizes: shapes of the checkpoint's tensors.
        read_into: fills tensors of a nested state from it.
        state: nested dictionaries of the sharded tensors to fill, as they were saved; those that are filled are
            removed.
        model: sharded.

    Returns:
        What was removed.
    """
    groups = [module for module in model.modules() if isinstance(module, DynamicGroup)]
    if not groups:
        return {}
    removed: dict[Key, Any] = {}
    for found in list(_resized(groups, state, sizes)):
        before: dict[str, Any] = {}
        for key in (found.map_key, *found.table_keys):
            value = _get(state, key)
            _put(before, key, torch.empty(sizes[".".join(key)], dtype=value.dtype))
        read_into(before)
        rows = _fill_map(found, _get(before, found.map_key), sizes[".".join(found.table_keys[0])][0] - RESERVED_ROWS)
        for key in found.table_keys:
            _fill_table(_get(state, key), _get(before, key), rows)
        for key in (found.map_key, *found.table_keys):
            removed[key] = _get(state, key)
            del _get(state, key[:-1])[key[-1]]
    return removed


def put_back(state: dict[str, Any], removed: Mapping[Key, Any]) -> None:
    """Add to a state what was removed from it."""
    for key, value in removed.items():
        _get(state, key[:-1])[key[-1]] = value


def _resized(
    groups: list[DynamicGroup], state: dict[str, Any], sizes: Mapping[str, tuple[int, ...]]
) -> Iterator[Resized]:
    tables = [("model", key) for key in state["model"] if "embedding_bags." in key]
    states = [
        ("optimizer", "state", key, name)
        for key, values in state.get("optimizer", {"state": {}})["state"].items()
        if "embedding_bags." in key
        for name in values
    ]
    for number, group in enumerate(groups):
        for feature in group.maps.rules:
            (map_key,) = (key for key in state["model"] if key.endswith(f".groups.{number}.maps.{feature}"))
            names = {f"{owner}{TABLE_SEPARATOR}{feature}" for owner in group.owners}
            own = [
                key for key in (*tables, *states) if key[-1].split("embedding_bags.")[-1].rpartition(".")[0] in names
            ]
            if any(sizes.get(".".join(key), ()) != tuple(_get(state, key).size()) for key in own):
                yield Resized(group, feature, ("model", map_key), own)


def _fill_map(found: Resized, entries: Tensor, num_rows: int) -> Tensor:
    """Fill this rank's part of a map; returns the rows that become others, before and after."""
    maps = found.group.maps
    own, rules = maps.by_feature[found.feature], maps.rules[found.feature]
    new, rows = resized(entries, replace(rules, rows=num_rows), rules)
    own.entries.copy_(new[own.first : own.first + own.num_buckets])
    own.changed()
    reserved = torch.arange(RESERVED_ROWS)
    return torch.cat([torch.stack([reserved, reserved], dim=1), rows])


def _fill_table(table: ShardedTensor, before: Tensor, rows: Tensor) -> None:
    for part in parts_of(table):
        here = rows[(rows[:, 1] >= part.first[0]) & (rows[:, 1] < part.first[0] + part.values.size(0))]
        values = before[here[:, 0]]
        if part.values.dim() == 2:
            values = values[:, part.first[1] : part.first[1] + part.values.size(1)]
        part.values[here[:, 1].to(part.values.device) - part.first[0]] = values.to(part.values.device)


def _get(state: Mapping[str, Any], key: Key) -> Any:
    for name in key:
        state = state[name]
    return state


def _put(state: dict[str, Any], key: Key, value: Any) -> None:
    for name in key[:-1]:
        state = state.setdefault(name, {})
    state[key[-1]] = value
