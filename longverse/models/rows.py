"""What the network does between its products, row by row, in plain torch. `rowwise.py` has the same faster for a CPU;
beside a checkpoint (`export.write_remote_code`), where torch is alone, this stands in its place."""

import torch.nn.functional as F
from torch import Tensor

from .rope import rotate as rotate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] over its root mean square, times weight [C] (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    return F.silu(gate) * up
