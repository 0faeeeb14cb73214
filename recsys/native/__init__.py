"""Operators in C++, built by `make setup` (see setup.py) where a compiler is there; nothing depends on them."""

import functools
import logging
import sysconfig
from pathlib import Path

import torch

log = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Load the operators `torch.ops.recsys.*`, or say in one line why there are none and what that costs."""
    library = Path(__file__).with_name(f"tables{sysconfig.get_config_var('EXT_SUFFIX')}")
    reason = "not built: there was no compiler"
    if library.exists():
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError as error:
            reason = f"{library.name} was built for another torch ({str(error).partition(': ')[2]})"
        else:
            return True
    log.warning("native table operators: %s; FBGEMM's do their work, slower on a CPU. `make setup` builds them", reason)
    return False
