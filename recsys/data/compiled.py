"""How loops over single values become machine code: numba, which takes half a second to import."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function when it is first called with arguments of some types; it runs without the interpreter's lock.

    The machine code is kept beside the function's file, or where that is read-only in the user's cache folder. It is
    made anew when that file changes, but not when another one does: what a function calls must stand in its own file.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder can be written
        return njit(nogil=True)(function)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function part of each compiled one that calls it."""
    return njit(nogil=True, forceinline=True)(function)
