"""What a process asks of malloc and of the kernel, so that memory costs a training loop little but its bytes."""

import ctypes

import torch
from torch import Tensor

# Of glibc's mallopt: what the end of the heap may hold unused, and from what size a block is mapped of its own.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 2**30
OLD_MMAP_THRESHOLD = 2**25
# Of Linux's madvise: forget what is there, which then reads as zeros; and take pages of 2 MiB where they are touched.
MADV_DONTNEED, MADV_HUGEPAGE, HUGE_PAGE = 4, 14, 2 * 2**20


def keep_freed() -> None:
    """Have glibc keep what a step frees for the next one, which would else fault the same pages in again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    # Older ones take no more than half of what a thread's heap may hold.
    if not mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):
        mallopt(M_MMAP_THRESHOLD, OLD_MMAP_THRESHOLD)


def give_back_freed() -> None:
    """Return to the kernel what was freed, and will not be needed again."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def zeros_on_huge_pages(values: Tensor) -> None:
    """Lay a tensor of zeros on huge pages, on a CPU: each access to one of many small ones walks the page table too.

    (Pages that hold something can be joined too, at half a gigabyte a second.) A kernel that has none of this says so,
    and nothing changes.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    begin = -(-values.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (values.data_ptr() + values.nbytes - begin) // HUGE_PAGE * HUGE_PAGE
    if madvise is None or values.device != torch.device("cpu") or size <= 0:
        return
    for advice in (MADV_DONTNEED, MADV_HUGEPAGE):
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)
