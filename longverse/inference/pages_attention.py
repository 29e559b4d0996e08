"""Attention of one chunk over its window, for reading at the speed of the matrix products.

torch's CPU flash kernel converts bfloat16 on the way and reaches a fraction of the speed of a bfloat16 product on
machines that have such instructions. Two plain products and a softmax per block of queries reach several times it; the
scores are rounded to bfloat16, so the keys' common part, which moves all scores of a query alike and drops out of
the softmax, is taken off first.
"""

import torch
from torch import Tensor

from ..models.checkpoint import cpu_has_bfloat16
from ..models.compiled import attend_chunk, compiled_fits

BLOCK = 128  # queries of one head at once


def read_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention aligned to the lower right: q [1, H, T, D], k, v [1, G, S, D] -> [1, H, T, D].

    Through attend_chunk, whose own kernel is the fastest where it runs; but bfloat16 on a CPU that multiplies it and
    does not run that kernel (on ARM, or without numba) through blocked products, within bfloat16's own error (scores
    and weights are rounded to it).
    """
    blocked = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] >= BLOCK and cpu_has_bfloat16()
    return blocked_attention(q, k, v) if blocked and not compiled_fits(q, k.shape[2]) else attend_chunk(q, k, v)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`read_attention` by plain products of a block of queries with all its keys."""
    _, heads, new, size = q.shape
    groups, seen = k.shape[1], k.shape[2]
    share, past = heads // groups, seen - new
    k = k - k.mean(2, keepdim=True)  # [1, G, S, D]
    q = (q * size**-0.5).view(groups, share, new, size)
    out = torch.empty_like(q)
    buffer = q.new_empty(share * BLOCK * seen)
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    for group in range(groups):
        keys = k[0, group].T  # [D, S]
        for begin in range(0, new, BLOCK):
            end = min(begin + BLOCK, new)
            n, upto = end - begin, past + end
            rows = q[group, :, begin:end].reshape(-1, size)  # [H/G * n, D]
            scores = torch.mm(rows, keys[:, :upto], out=buffer[: share * n * upto].view(share * n, upto))
            scores.view(share, n, upto)[..., past + begin :].masked_fill_(future[:n, :n], float("-inf"))
            out[group, :, begin:end] = (scores.softmax(-1) @ v[0, group, :upto]).view(share, n, size)
    return out.view(1, heads, new, size)
