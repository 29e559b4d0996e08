"""Attention of many queries by our own CPU kernel, and whether it runs here.

Shapes as in attention.py: q [B, H, T, D]   k, v [B, G, S, D]   result [B, H, T, D]
"""

import platform

import torch
from torch import Tensor

from . import kernels
from .attention import chunk_attention

MANY = 4096  # keys in float32


def compiled_fits(q: Tensor, keys: int | None) -> bool:
    """Whether our own kernel for many queries serves q over so many keys; None for some keys chosen among many. Nothing
    of it is imported where it does not.

    In float32 torch's fused kernel is nearly as fast: few keys are not worth compiling for, and processors other than
    x86 may have products of their own (Apple's do). Choosing is slow in torch everywhere.
    """
    if q.device.type != "cpu" or q.shape[0] != 1 or q.shape[3] % 16 or kernels.unavailable():
        return False
    if q.dtype == torch.float32:
        return keys is None or (keys >= MANY and platform.machine() in ("x86_64", "AMD64"))
    return q.dtype == torch.bfloat16 and kernels.bfloat16_runs_here()


def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`chunk_attention`, by the kernel where it runs."""
    if q.shape[2] == 1 or not compiled_fits(q, k.shape[2]):
        return chunk_attention(q, k, v)
    from .kernels import chunk

    return chunk.attend(q, k, v)
