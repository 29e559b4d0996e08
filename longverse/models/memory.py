"""What the system is told about memory: where pages of 2 MiB are worth having, and what may be forgotten.

What a token reads from end to end, caches and weights, is read faster in large pages: in those of 4 KiB the processor
also waits for their addresses. Linux gives large pages everywhere ("always"), where asked ("madvise", the usual setting
of servers), or never (/sys/kernel/mm/transparent_hugepage/enabled). A page is taken whole at the first touch, so they
are asked for only where nearly all of it will be written.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20  # bytes


def empty(size: int) -> Tensor:
    """uint8 [size] on the CPU, not yet written, in large pages; to be filled from end to end."""
    area = torch.empty(size, dtype=torch.uint8)
    _advise(area, LARGE_PAGE, "MADV_HUGEPAGE")
    return area


def expect_rows(array: Tensor, rows: int) -> None:
    """Have large pages under the first `rows` of axis 3 of a cache's array [layers, 1, G, capacity, ...], which are
    about to be written; under all of it where that is most of it."""
    if array.device.type != "cpu":
        return
    if 4 * rows >= 3 * array.shape[3]:
        _advise(array, LARGE_PAGE, "MADV_HUGEPAGE")
    elif array[0, 0, 0, :rows].nbytes >= LARGE_PAGE:
        for strip in array[:, :, :, :rows].flatten(0, 2):  # a view: axis 1 has one element
            _advise(strip, LARGE_PAGE, "MADV_HUGEPAGE")


def drop_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that is a clean view of a mapped file; a later read fetches it again.

    Only whole pages within the tensor are dropped, so its neighbours keep theirs. Never call it on a tensor of ordinary
    memory: its values would be lost.
    """
    _advise(tensor, mmap.PAGESIZE, "MADV_DONTNEED")


def _advise(tensor: Tensor, page: int, advice: str) -> None:
    """Give the system a piece of advice about the whole pages within a contiguous tensor. It need not follow it."""
    number = getattr(mmap, advice, None)
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.nbytes) // page * page
    if number is not None and stop > start and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), number)
