"""Keys and values rounded to int8 and int4: the arithmetic, apart from where it is kept.

Shapes: x [..., D], one key or value of a head in its last dimension; g group size.

A head's vector is first rotated by a normalised Hadamard matrix (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456):
rotating queries and keys alike leaves their products as they are, and spreads a channel that is large in every token
over all of them. Then each group of g elements gets its own grid:

    int8   x = scale * level          level -127 .. 127, scale in bf16                   (D + 2 D / g bytes)
    int4   x = scale * level + low    level 0 .. 15, scale and low in bf16               (D / 2 + 4 D / g bytes)

Levels are nearest for the bf16 scale that is used. Byte j of an int4 group holds element j in its low half and element
j + g / 2 in its high half, so that a vector of bytes becomes two vectors of neighbours.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


class Packing:
    """One format for one head size.

    row, scales    the last dimensions of what `quantize` gives
    bytes_per_row  of one key or value of one head
    """

    def __init__(self, format: str, size: int, group: int | None = None) -> None:
        assert format in ("int8", "int4")
        self.format, self.size = format, size
        fitting = [g for g in (64, 32, 16, 8, 4, 2) if size % g == 0]
        assert fitting, "RoPE needs an even head size"
        self.group = group or fitting[0]
        self.rotation = fitting_power(size)
        groups = size // self.group
        self.row: tuple[int, ...] = (size,) if format == "int8" else (size // 2,)
        self.scales: tuple[int, ...] = (groups,) if format == "int8" else (groups, 2)
        self.dtype = torch.int8 if format == "int8" else torch.uint8
        self.bytes_per_row = self.row[0] + (2 if format == "int8" else 4) * groups

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate [..., D] by the Hadamard matrix, in float32, back in the type of x. It is its own inverse."""
        matrix = hadamard(self.size, self.rotation).to(x.device)
        return (x.float() @ matrix).to(x.dtype)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and scales of a rotated x [..., D]."""
        grouped = x.float().unflatten(-1, (-1, self.group))  # [..., D / g, g]
        if self.format == "int8":
            scale = (grouped.abs().amax(-1) / 127).bfloat16()
            levels = (grouped * _inverse(scale)).round_().clamp_(-127, 127)
            return levels.to(torch.int8).flatten(-2), scale
        low, high = grouped.aminmax(dim=-1)
        low = low.bfloat16()
        scale = ((high - low.float()) / 15).bfloat16()
        levels = ((grouped - low.float()[..., None]) * _inverse(scale)).round_().clamp_(0, 15).to(torch.uint8)
        half = self.group // 2
        return (levels[..., :half] | (levels[..., half:] << 4)).flatten(-2), torch.stack((scale, low), -1)

    def dequantize(self, rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The rotated x [..., D] in `dtype`, a new tensor."""
        if self.format == "int8":
            levels = rows.unflatten(-1, (-1, self.group)).to(dtype)
            return (levels * scales.to(dtype)[..., None]).flatten(-2)
        raw = rows.unflatten(-1, (-1, self.group // 2))
        levels = torch.cat((raw & 15, raw >> 4), -1).to(dtype)
        return torch.addcmul(scales[..., 1:].to(dtype), levels, scales[..., :1].to(dtype)).flatten(-2)


def fitting_power(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size


@lru_cache(maxsize=8)
def hadamard(size: int, block: int) -> Tensor:
    """The normalised Hadamard matrix of `block` elements, repeated along the diagonal: float32 [size, size]."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return torch.block_diag(*[matrix / block**0.5] * (size // block))


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale in float32 with a last dimension for the group's elements; 0 where a group is all alike."""
    scale = scale.float()[..., None]
    return torch.where(scale > 0, 1 / scale, 0)
