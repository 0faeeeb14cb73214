"""Operators in C++, built by `make setup` (see setup.py) where a compiler is there; nothing depends on them."""

import functools
import logging
from pathlib import Path

import torch

log = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Load the operators `torch.ops.recsys.*`, or say in one line why there are none and what that costs."""
    libraries = sorted(Path(__file__).parent.glob("tables*.so"))
    reason = "not built: there was no compiler"
    for library in libraries:
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError as error:
            reason = f"{library.name} was built for another torch ({str(error).partition(': ')[2]})"
        else:
            return True
    log.warning("native table operators: %s; FBGEMM's do their work, slower on a CPU. `make setup` builds them", reason)
    return False
