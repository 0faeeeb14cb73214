"""What a sweep tries: fields of a config by their dotted names, each with values or a range."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recsys.config import InputError, dump, load, nearest
from recsys.studies.sweep.config import SweepConfig
from recsys.training.config import TrainConfig

_RANGE = re.compile(r"(?P<kind>log|uniform|int)\((?P<low>[^,()]+),(?P<high>[^,()]+)\)")
_WORDS: dict[Any, dict[str, Any]] = {bool: {"true": True, "false": False}, type(None): {"none": None}}
NOT_SWEPT = ("data", "out", "resume")


@dataclass(frozen=True)
class Choice:
    """Values to choose from, as they were written."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Numbers to draw from, both ends included."""

    kind: Literal["log", "uniform", "int"]
    low: float
    high: float


Space = dict[str, Choice | Range]
"""What is tried for each field."""
Values = Mapping[str, str | float | int]
"""What one trial has for each field; of a Choice, as it was written."""


def read_space(config: SweepConfig) -> Space:
    """Read a sweep's --grid and --space.

    Raises:
        InputError: one is not understood, or a field, or one of its values, is wrong; naming it.
    """
    space: Space = {}
    for option, texts in (("--grid", config.grid), ("--space", config.space)):
        for text in texts:
            name, equals, right = (part.strip() for part in text.partition("="))
            if not equals or not right:
                raise InputError(f"{option} {text!r} is no FIELD=...")
            if name in space:
                raise InputError(f"{option} {text!r}: {name} is named twice")
            if name in NOT_SWEPT:
                raise InputError(f"{option} {text!r}: {name} is each trial's own")
            found = _choice(right) if option == "--grid" else _range(text, right)
            kind = _kind(name, option)
            for value in found.values if isinstance(found, Choice) else (found.low, found.high):
                _convert(kind, value, f"{option} {name}")
            space[name] = found
    return space


def applied(recipe: TrainConfig, values: Values) -> TrainConfig:
    """The recipe with other values in some of its fields.

    Raises:
        InputError: values that cannot be, or that cannot be together.
    """
    plain = dump(recipe)
    for name, value in values.items():
        *groups, last = name.split(".")
        part = plain
        for group in groups:
            part = part[group]
        part[last] = _convert(_kind(name, "sweep"), value, name)
    try:
        return load(TrainConfig, plain)
    except InputError as error:
        raise InputError(f"sweep, {described(values)}: {error}") from None


def described(values: Values) -> str:
    """Values in a line."""
    return ", ".join(
        f"{name}={f'{value:.4g}' if isinstance(value, float) else value}" for name, value in values.items()
    )


def _choice(text: str) -> Choice:
    values = tuple(value.strip() for value in text.split(";" if ";" in text else ","))
    if not all(values) or len(set(values)) < len(values):
        raise InputError(f"--grid {text!r}: a value is empty, or named twice")
    return Choice(values)


def _range(text: str, right: str) -> Range:
    match = _RANGE.fullmatch(right.replace(" ", ""))
    if not match:
        raise InputError(f"--space {text!r}: write FIELD=log(A,B), uniform(A,B) or int(A,B)")
    try:
        low, high = (float(match[end]) for end in ("low", "high"))
    except ValueError as error:
        raise InputError(f"--space {text!r}: {error}") from None
    kind: Literal["log", "uniform", "int"] = match["kind"]  # type: ignore[assignment]
    if not low < high or (kind == "log" and low <= 0) or (kind == "int" and (low % 1 or high % 1)):
        of = {"log": "above 0", "uniform": "of numbers", "int": "of whole numbers"}[kind]
        raise InputError(f"--space {text!r}: {kind} takes a range {of}, the lower end first")
    return Range(kind, low, high)


def _kind(name: str, option: str) -> Any:
    """The type of the field of that dotted name."""
    kind: Any = TrainConfig
    where = "the config"
    for part in name.split("."):
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            known = nearest(part, fields) if fields else f"{where} has none"
            raise InputError(f"{option} {name}: unknown field {part!r} of {where}; {known}")
        kind, where = fields[part], part
    if dataclasses.is_dataclass(kind):
        inner = next(field.name for field in dataclasses.fields(kind))
        raise InputError(f"{option} {name}: has fields of its own; name one, such as {name}.{inner}")
    return kind


def _convert(kind: Any, value: str | float, where: str) -> Any:
    """A value as JSON has it, for a field of that type; `load` looks at it closer."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for other in arguments:
            try:
                return _convert(other, value, where)
            except InputError:
                continue
    elif origin in (tuple, list) and isinstance(value, str):
        return [_convert(arguments[0], part, where) for part in value.split()]
    elif origin is Literal:
        for choice in arguments:
            if str(choice) == value:
                return choice
        raise InputError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
    elif kind in (int, float):
        return _number(kind, value, where)
    elif isinstance(value, str):
        words = _WORDS.get(kind, {})
        if value in words or kind in (str, Path):
            return words.get(value, value)
    raise InputError(f"{where}: {value!r} is no {getattr(kind, '__name__', kind)}")


def _number(kind: type[int] | type[float], value: str | float, where: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise InputError(f"{where}: {value!r} is no {kind.__name__}")
    return kind(number)
