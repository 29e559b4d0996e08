"""Tensors as the kernels see them. Apart from `build.py`, so that a process that only compiles needs no torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LAYOUTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


def array(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's memory as numpy; bfloat16 as its bits."""
    assert tensor.is_contiguous()
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
