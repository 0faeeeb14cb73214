"""What a process asks of malloc and of the kernel, so that memory costs a training loop little but its bytes."""

import ctypes

import torch
from torch import Tensor

# Of glibc's mallopt: what the end of the heap may hold unused, and from what size a block is mapped of its own.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 2**30
# Of Linux's madvise: pages of 2 MiB from now on; and at once, for what is there (since Linux 6.1).
MADV_HUGEPAGE, MADV_COLLAPSE, HUGE_PAGE = 14, 25, 2 * 2**20


def keep_freed() -> None:
    """Have glibc keep what a step frees for the next one, which would else fault the same pages in again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, KEPT_BYTES)


def use_huge_pages(values: Tensor) -> None:
    """Ask for huge pages under a tensor on a CPU whose rows are read here and there; what is in it stays.

    Each access to a table of many small pages walks the page table too. A kernel that knows none of this says so, and
    nothing is lost.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    begin = -(-values.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (values.data_ptr() + values.nbytes - begin) // HUGE_PAGE * HUGE_PAGE
    if madvise is None or values.device != torch.device("cpu") or size <= 0:
        return
    for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)
