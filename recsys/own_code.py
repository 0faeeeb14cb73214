"""What users name as `package.module:name`, a recipe or a backbone of their own, and what is wrong with it."""

import dataclasses
import importlib
import inspect
import re
import sys
import sysconfig
import traceback
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recsys.backbones.base import Backbone
from recsys.config import InputError, nearest


def find_own(path: str, where: str) -> Any:
    """Import what `package.module:name` names, from the working directory or from what is installed.

    Args:
        path: of a module as Python imports it, and a name in it.
        where: begins the message about what is wrong.

    Raises:
        InputError: there is no such module or name, or the module fails as it is imported.
    """
    module_name, _, name = path.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").removeprefix("./").strip("/").replace("/", ".")
        raise InputError(f"{where}: a module is named as Python imports it, not as a file: write {dotted}:{name}")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", path):
        raise InputError(f"{where}: {path!r} is not package.module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with blamed_on_its_line(where):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # of what the module imports
            raise InputError(f"{where}: no module {error.name!r} in {here}, and none is installed") from None
    if not hasattr(module, name):
        defined = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        told = nearest(name, defined) if defined else "it defines nothing"
        raise InputError(f"{where}: {_short(str(module.__file__))} has no {name!r}; {told}")
    return getattr(module, name)


def find_backbone(path: str, where: str) -> type[Backbone]:
    """Import a backbone of the user's own; see `find_own`.

    Raises:
        InputError: there is none, or it lacks something that a backbone needs.
    """
    kind = find_own(path, where)
    if not (isinstance(kind, type) and issubclass(kind, Backbone)):
        raise InputError(f"{where}: {path} is no Backbone; derive the class from recsys.backbones.base.Backbone")
    at = f"{where}: {place_of(kind)}"
    if inspect.isabstract(kind):
        raise InputError(f"{at}: {kind.__name__} lacks {' and '.join(sorted(kind.__abstractmethods__))}")
    sizes = getattr(kind, "Config", None)
    if not (dataclasses.is_dataclass(sizes) and isinstance(sizes, type)):
        raise InputError(f"{at}: {kind.__name__} has no Config; give it `Config: ClassVar[type] =` a frozen dataclass")
    if not (sizes.__dataclass_params__.frozen and hasattr(sizes, "ladder")):  # type: ignore[attr-defined]
        raise InputError(
            f"{where}: {place_of(sizes)}: {sizes.__name__} must be a frozen dataclass with a method ladder(k, along); "
            "recsys.backbones.layers.MLPSizes is one to derive from"
        )
    for field in dataclasses.fields(sizes):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: {place_of(sizes)}: {sizes.__name__}.{field.name} needs a default")
    with blamed_on_its_line(where):
        sizes()
        typing.get_type_hints(sizes)
    return kind


@contextmanager
def blamed_on_its_line(where: str) -> Iterator[None]:
    """Turn what the user's code raises into one line, with the file and line in it.

    Raises:
        InputError: whose cause is what was raised.
    """
    try:
        yield
    except SyntaxError as error:
        raise InputError(f"{where}: {_short(error.filename or '')}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frame = _frame(error)
        if frame is None:  # ours, of before that code
            raise
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        said = " ".join(str(error).split())
        raise InputError(f"{where}: {_short(frame.filename)}:{frame.lineno}: {kind}{said}") from error


def place_of(thing: Any) -> str:
    """File and line of a function or class of the user's."""
    try:
        return f"{_short(inspect.getsourcefile(thing) or '')}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):  # made by a program, such as a partial
        return f"{thing!r}"


def _frame(error: BaseException) -> traceback.FrameSummary | None:
    """The last line of the user's own code on the way to an error."""
    package = Path(__file__).parent
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[:1] != "<"]
    frames = [frame for frame in frames if not Path(frame.filename).is_relative_to(package)]
    own = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(folder) for folder in installed)]
    return next(reversed(own or frames), None)


def _short(file: str) -> str:
    here = Path.cwd()
    return str(Path(file).relative_to(here)) if Path(file).is_relative_to(here) else file
