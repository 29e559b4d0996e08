"""Kernels beside the plain torch code that they must agree with: who can run them here, and why not.

`simd.py` and `team.py` hold the tools, `compiler.py` the process that compiles, `arrays.py` tensors as kernels see
them. `cpu_decode.py` is one token's attention and decoder, `build.py` what binds them to a model and a cache.
`cpu_prefill.py` is many tokens' attention over `f32.py`, `bf16.py` or `amx.py`, called by `chunk.py`; `cpu_rows.py` is
what a network does between its products, called by `rowwise.py`. `cpu_training.py` is attention of training, forward
and backward, over `amx_training.py`, called by `training.py`. They need numba, which compiles them once for this
processor and keeps the result on disk, so no compiler has to be installed. `gpu_decode.py` and `split_k.py` are one
token's attention on a card, in Triton. Nothing here is imported before it is used.
"""

from __future__ import annotations

import os
from functools import lru_cache


def turned_off() -> bool:
    """Whether the user asked for plain torch."""
    return os.environ.get("LONGVERSE_KERNELS", "").lower() in ("torch", "off", "0")


@lru_cache(maxsize=1)
def unavailable() -> str:
    """Why the CPU kernels cannot run on this machine, as half a sentence; "" when they can."""
    if turned_off():
        return "LONGVERSE_KERNELS turns them off"
    from importlib.util import find_spec

    if find_spec("numba") is None or find_spec("llvmlite") is None:
        return "numba is not installed"
    return ""


@lru_cache(maxsize=1)
def bfloat16_runs_here() -> bool:
    """Whether the processor has what the kernels for bfloat16 are made of."""
    if unavailable():
        return False
    import torch

    return torch.cpu._is_avx512_bf16_supported()
