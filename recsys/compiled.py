"""How loops over single values become machine code: numba, which takes half a second to import."""

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FOR_READING, _IN_ALL_CACHES, _DATA = 0, 3, 1


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


@intrinsic
def prefetch(_: Any, array: Any, index: Any) -> Any:
    """Have the cache line of an array's element fetched, which will be needed soon. The element need not exist."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir, word = cgutils.ir, cgutils.int32_t
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        shape = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0i8")
        place = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        builder.call(function, [place, *(ir.Constant(word, each) for each in (_FOR_READING, _IN_ALL_CACHES, _DATA))])
        return context.get_dummy_value()

    return types.void(array, index), code
