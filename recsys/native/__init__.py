"""Operators in C++, built by `make setup` (see setup.py) where a compiler is there; nothing depends on them."""

import functools
import logging
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from recsys.native.sources import digest

log = logging.getLogger(__name__)

FALLBACK = {"tables": "FBGEMM", "fused": "PyTorch"}
"""What does the work of a library that is not there."""


def instructions(most: str = "") -> str:
    """The instruction set that the operators use: plain, avx2, avx512 or avx512_bf16; the processor's widest.

    Args:
        most: use no wider one from now on, for tests.
    """
    assert available("tables"), "the operator is in this library"
    name: str = torch.ops.recsys.instructions(most)
    return name


@functools.cache
def available(library: Literal["tables", "fused"]) -> bool:
    """Load the operators `torch.ops.recsys.*` of a library, or say in one line why there are none."""
    path = Path(__file__).with_name(f"{library}{sysconfig.get_config_var('EXT_SUFFIX')}")
    reason = f"{path.name} is not there: no compiler, or not built since the last change"
    if path.exists():
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except OSError as error:
            reason = f"{path.name} was built for another torch ({str(error).partition(': ')[2]})"
        else:
            if _sources(library) == digest(path.parent):
                return True
            reason = f"{path.name} was built from other sources"
    log.warning(
        "native operators: %s; %s does their work, slower on a CPU. `make setup` builds them", reason, FALLBACK[library]
    )
    return False


def _sources(library: str) -> str:
    """What a loaded library was built from."""
    operator = getattr(torch.ops.recsys, f"{library}_sources", None)
    return "" if operator is None else str(operator())
