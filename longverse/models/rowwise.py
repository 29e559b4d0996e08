"""`rows.py` as fast as a CPU allows: norm, rotation and gate, each in one pass.

torch's lines cost as much as the products on a CPU that multiplies bfloat16. So while nothing is to be differentiated
the kernels of `kernels/cpu_rows.py` run instead: the same formulas in float32, rounded once, where torch rounds in
between. What a row comes to does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kernels, rows

FEW = 1 << 14  # numbers that torch's calls are done with as soon
ALONE = 1 << 20  # numbers that one thread is done with before others would have woken and ended
WHOLE = 32  # a row's numbers must be a multiple of this: two vectors of a kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rows.rms_norm`: x [..., C], weight [C]."""
    if not _compiled(x, weight) or weight.shape != x.shape[-1:]:
        return rows.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    _run("norm_rows", x.numel(), _by_row(x), _bits(weight), eps, _by_row(out))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rows.rotate`: x [B, heads, T, D] by cos, sin [B or 1, 1, T, D]."""
    _, heads, tokens, size = x.shape
    one = (1, 1, tokens, size)  # the same positions in every row of a batch
    if not _compiled(x, cos, sin) or cos.shape != one or sin.shape != one:
        return rows.rotate(x, cos, sin)
    turned = x.transpose(1, 2)
    by_token = turned.is_contiguous()  # as the products leave it; a cache's part goes by head
    held = turned if by_token else x.contiguous()
    out = torch.empty_like(held)
    angles = (_by_row(part.contiguous()) for part in (cos, sin))
    _run("turn_rows", x.numel(), _by_row(held), heads if by_token else 1, *angles, _by_row(out))
    return out.transpose(1, 2) if by_token else out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`rows.swiglu`: gate and up of one shape."""
    if not _compiled(gate, up) or gate.shape != up.shape or not (gate.is_contiguous() and up.is_contiguous()):
        return rows.swiglu(gate, up)
    out = torch.empty_like(gate)
    _run("gate_rows", 2 * gate.numel(), *(_bits(part).reshape(-1) for part in (gate, up, out)))  # twice a norm's work
    return out


def _compiled(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take x. Nothing of them is imported where they do not."""
    return (
        all(part.dtype == torch.bfloat16 and part.device.type == "cpu" for part in (x, *others))
        and x.numel() >= FEW
        and x.shape[-1] % WHOLE == 0
        and torch.is_inference_mode_enabled()
        and not torch.compiler.is_compiling()
        and kernels.bfloat16_runs_here()
    )


def _run(name: str, numbers: int, *args: Any) -> None:
    """A kernel of cpu_rows over about so many numbers, on all threads where that is worth waking them."""
    import numpy as np

    from .kernels.build import row_kernel, team

    given = [np.float32(arg) if isinstance(arg, float) else arg for arg in args]
    if numbers <= ALONE:
        row_kernel(name)(0, 1, np.zeros(1, dtype=np.int64), *given)
    else:
        team(torch.get_num_threads()).run(row_kernel(name), *given)


def _bits(x: Tensor) -> Any:
    from .kernels.arrays import array

    return array(x)


def _by_row(x: Tensor) -> Any:
    return _bits(x).reshape(-1, x.shape[-1])
