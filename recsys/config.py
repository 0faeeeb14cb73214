"""Configs: strict dump and load of frozen dataclasses, and the one exception that a user is meant to read."""

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# A number that YAML 1.1, which wants a point in it and a sign after the e, reads as a text.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class InputError(ValueError):
    """What the user gave cannot work. The message says what, where, and what would; the CLI prints it and exits 2."""

    on_all_ranks = False
    """Whether every rank of the job raises it, so that one of them may speak for all."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the nearest right ones, or all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(choices)}"


def dump(config: Any) -> Any:
    """A config dataclass as plain JSON values (paths become strings, tuples lists)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: dump(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): dump(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [dump(value) for value in config]
    if hasattr(config, "joinpath"):  # a path of this machine or of an object store
        return str(config)
    return config


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Names, as options have them, and both values of what differs between two dumped configs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: whoever finds `path` finds all of it.

    An object store shows an object only once all of it is there, so it needs no other name.
    """
    if "://" in str(path):
        path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else the name may outlive a power cut without its text
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def load(kind: type[T], values: Any, where: str = "config") -> T:
    """Read plain JSON values back into a config of type `kind`.

    Raises:
        InputError: an unknown key, a missing key or a value of another type, naming the field as `where.field`.
    """
    return typing.cast(T, _load(kind, values, where))


def load_file(kind: type[T], path: Path) -> T:
    """Read a config from a `.json`, `.yaml` or `.yml` file; see `load`."""
    return load(kind, read_values(path), str(path))


def read_values(path: Path) -> Any:
    """Read plain values from a `.json`, `.yaml` or `.yml` file.

    Raises:
        InputError: the file cannot be read, or is not what its name says.
    """
    try:
        text = path.read_text()
        return _parse_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not {path.suffix.lstrip('.') or 'JSON'}: {error}") from None


def _parse_yaml(text: str) -> Any:
    import yaml  # noqa: PLC0415  (not every start needs it)

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _load(kind: Any, values: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _load_dataclass(kind, values, where)
    if origin in (typing.Union, types.UnionType):
        return _load_union(typing.get_args(kind), values, where)
    if origin in (tuple, list, dict, Mapping):
        return _load_collection(kind, values, where)
    return _load_scalar(kind, values, where)


def _load_scalar(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise InputError(f"{where}: {value!r} is not one of {', '.join(map(repr, choices))}")
    elif kind is Path and type(value) is str:
        return _load_path(value, where)
    elif kind is float and (type(value) is int or (type(value) is str and _EXPONENT.fullmatch(value))):
        return float(value)
    elif kind is float and str(value).lower() in ("nan", ".nan"):
        raise InputError(f"{where}: {value} is no number")
    elif kind is not Any and type(value) is not kind:
        raise InputError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {value!r}")
    return value


def _load_path(value: str, where: str) -> Path:
    if "://" not in value:
        return Path(value)
    from recsys.place import place  # noqa: PLC0415  (only object stores need it)

    try:
        return place(value)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _load_collection(kind: Any, values: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (tuple, list):
        if not isinstance(values, list):
            raise InputError(f"{where}: expected a list, found {values!r}")
        return origin(_load(arguments[0], value, f"{where}[{i}]") for i, value in enumerate(values))
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping, found {values!r}")
    key_kind, value_kind = arguments
    return {
        _load(key_kind, key, f"{where}, key {key!r}"): _load(value_kind, value, f"{where}.{key}")
        for key, value in values.items()
    }


def _load_dataclass(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping, found {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise InputError(f"{where}: unknown field {key!r}; {nearest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{where}: field {name!r} is missing")
    read = {name: _load(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**read)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _load_union(kinds: tuple[Any, ...], values: Any, where: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return _load(kind, values, where)
        except InputError as problem:
            problems.append(str(problem))
    raise InputError(f"{problems[0]}, or none" if type(None) in kinds else problems[0])
