"""What the system is told about memory: where pages of 2 MiB are worth having, and what may be forgotten."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20  # bytes


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As `torch.empty`; on a CPU in pages of 2 MiB where the system has them.

    For what a token reads from end to end, caches and weights: in pages of 4 KiB the processor waits for their
    addresses, and reads half as fast. Linux gives large pages everywhere ("always"), where asked ("madvise", the usual
    setting of servers), or never. Memory is still taken when it is first written, 2 MiB at a time.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and tensor.nbytes >= 2 * LARGE_PAGE:
        _advise(tensor, getattr(mmap, "MADV_HUGEPAGE", None))
    return tensor


def drop_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that is a clean view of a mapped file; a later read fetches it again.

    Only whole pages within the tensor are dropped, so its neighbours keep theirs. Never call it on a tensor of ordinary
    memory: its values would be lost.
    """
    _advise(tensor, getattr(mmap, "MADV_DONTNEED", None))


def _advise(tensor: Tensor, advice: int | None) -> None:
    """Give the system a piece of advice about the whole pages within a tensor. It need not follow it."""
    if advice is None or sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
