"""What the network does between its products, row by row: norm, rotation and gate.

Each is a line of torch. On a CPU that multiplies bfloat16 those lines cost as much as the products, so while nothing is
to be differentiated a kernel of ours (`kernels/cpu_rows.py`) does each in one pass: the same formula, computed in
float32 and rounded once, where torch rounds in between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, rope

WHOLE = 32  # numbers of a row must be a multiple of this: two vectors of a kernel
ALONE = 1 << 20  # numbers that one thread is done with before others would have woken and ended


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] over its root mean square, times weight [C] (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    if not _compiled(x) or weight.dtype != x.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    _run("norm_rows", x.numel(), _rows(x), _bits(weight), _float32(eps), _rows(out))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope.rotate`: x [B, heads, T, D] by cos, sin [B or 1, 1, T, D]."""
    _, heads, tokens, size = x.shape
    if not _compiled(x) or x.shape[0] != 1 or cos.shape != (1, 1, tokens, size) or cos.dtype != x.dtype:
        return rope.rotate(x, cos, sin)
    by_head = x.is_contiguous()
    held = x if by_head else x.transpose(1, 2).contiguous()  # [1, T, heads, D], as the products leave it
    out = torch.empty_like(held)
    angles = (_rows(part.contiguous()) for part in (cos, sin))
    _run("turn_rows", x.numel(), _rows(held), 1 if by_head else heads, *angles, _rows(out))
    return out if by_head else out.transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    if not _compiled(gate) or not (gate.is_contiguous() and up.is_contiguous()):
        return F.silu(gate) * up
    out = torch.empty_like(gate)
    _run("gate_rows", 2 * gate.numel(), *(_bits(part).reshape(-1) for part in (gate, up, out)))
    return out


def _compiled(x: Tensor) -> bool:
    """Whether our kernels do it. Nothing of them is imported where they do not."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not torch.is_inference_mode_enabled():
        return False
    if kernels.unavailable() or not x.numel() or x.shape[-1] % WHOLE:
        return False
    from .kernels import chunk

    return chunk.runs_here()


def _run(name: str, numbers: int, *args: Any) -> None:
    """A kernel of cpu_rows over about so many numbers, on all threads where that is worth waking them."""
    import numpy as np

    from .kernels.build import row_kernel, team

    kernel = row_kernel(name)
    if numbers <= ALONE:
        kernel(0, 1, np.zeros(1, dtype=np.int64), *args)
    else:
        team(torch.get_num_threads()).run(kernel, *args)


def _bits(x: Tensor) -> Any:
    from .kernels.arrays import array

    return array(x)


def _rows(x: Tensor) -> Any:
    return _bits(x).reshape(-1, x.shape[-1])


def _float32(x: float) -> Any:
    import numpy as np

    return np.float32(x)
