"""Configs, field by field, where they differ."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from recsys.config import dump
from recsys.recipes import RECIPES

OF_THE_PLACE = {"data", "out", "resume"}
"""Fields that say where a run stands, not what it does."""


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Fields of a config by their dotted names, as text."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(values, list):
        yield prefix, ", ".join(map(str, values)) or "none"
    else:
        yield prefix, "none" if values is None else str(values)


def differences(
    configs: Sequence[Mapping[str, Any]], left_out: Collection[str] = OF_THE_PLACE
) -> list[tuple[str, list[str]]]:
    """Fields but those left out in which configs differ, and what each has there; empty where it lacks the field."""
    flat = [dict(leaves(config)) for config in configs]
    names = dict.fromkeys(name for values in flat for name in values)
    rows = [(name, [values.get(name, "") for values in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name not in left_out]


def from_nearest_recipe(config: Mapping[str, Any]) -> tuple[str, list[tuple[str, list[str]]]]:
    """The recipe that a config differs least from, and where: what the recipe has and what the config has."""
    recipes = {name: dump(make()) for name, make in RECIPES.items()}
    found = {name: differences([recipe, config]) for name, recipe in recipes.items()}
    # Some recipes differ in their data alone.
    nearest = min(found, key=lambda name: (len(found[name]), recipes[name]["data"] != config["data"]))
    return nearest, found[nearest]
