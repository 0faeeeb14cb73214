"""Operators in C++, built by `make setup` (see setup.py) where a compiler is there; nothing depends on them."""

import functools
import logging
import sysconfig
from pathlib import Path

import torch

log = logging.getLogger(__name__)

LIBRARIES = ("tables", "fused")


def instructions(most: str = "") -> str:
    """The instruction set that the operators use: plain, avx2, avx512 or avx512_bf16; the processor's widest.

    Args:
        most: use no wider one from now on, for tests.
    """
    name: str = torch.ops.recsys.instructions(most)
    return name


@functools.cache
def available() -> bool:
    """Load the operators `torch.ops.recsys.*`, or say in one line why there are none and what that costs."""
    for name in LIBRARIES:
        library = Path(__file__).with_name(f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
        reason = "not built: there was no compiler"
        if library.exists():
            try:
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
                continue
            except OSError as error:
                reason = f"{library.name} was built for another torch ({str(error).partition(': ')[2]})"
        log.warning(
            "native operators: %s; FBGEMM's and PyTorch's do their work, slower on a CPU. `make setup` builds them",
            reason,
        )
        return False
    return True
