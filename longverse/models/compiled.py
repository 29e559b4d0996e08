"""Attention of many queries by our own CPU kernel, and whether it runs here.

Shapes as in attention.py: q [B, H, T, D]   k, v [B, G, S, D]   result [B, H, T, D]
"""

import torch
from torch import Tensor

from . import kernels
from .attention import chunk_attention


def compiled_fits(q: Tensor, keys: int | None) -> bool:
    """Whether our own kernel for many queries serves q over so many keys (None: over some that it chooses): asked
    before anything of it is imported."""
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float32) or kernels.unavailable():
        return False
    from .kernels import chunk

    return chunk.fits(q, keys)


def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`chunk_attention`, by the kernel where it runs."""
    if q.shape[2] == 1 or not compiled_fits(q, k.shape[2]):
        return chunk_attention(q, k, v)
    from .kernels import chunk

    return chunk.attend(q, k, v)
