"""Places: folders and files on disk, or on an object store by URL (`s3://bucket/folder`) through fsspec."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

from tyro.constructors import PrimitiveConstructorSpec


def place(text: str | Path) -> Path:
    """Return a path for a local name, and for a URL an object with a path's methods.

    Raises:
        ValueError: the URL's protocol is unknown, or the package that speaks it is not installed.
    """
    if "://" not in str(text):
        return Path(text)
    from upath import UPath  # noqa: PLC0415  (local paths do not need it)

    try:
        found = UPath(str(text))
        _ = found.fs
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from None
    return cast(Path, found)


def is_local(path: Path) -> bool:
    """Whether a path is a file of this machine: it can be memory-mapped and renamed."""
    return isinstance(path, Path) and "://" not in str(path)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its name when the block succeeds and is removed when not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of a killed process that had the same number
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # else a name may outlive a power cut without what it names
        partial.rename(path)
    except OSError as error:
        if error.filename in (None, str(partial)):  # whose name says little
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


# A path's type in configs: the command line would otherwise read `s3://bucket` as `s3:/bucket`.
Place = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda arguments: place(arguments[0]),
        is_instance=lambda value: hasattr(value, "open"),
        str_from_instance=lambda value: [str(value)],
    ),
]
