"""Muon for the matrices of the layers, AdamW for all else: for models made from nothing.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes of a matrix's momentum the nearest matrix whose
singular values are all alike, so that a step turns every direction as far, also those that gradients seldom point in.
Its length is that of an AdamW step (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both. `tiny`
looks back after 900 steps of its recipe, by AdamW after 1,000 (docs/recipe.md).

Embeddings and head are tables of rows, of which few have a gradient; they, norms and biases stay with AdamW.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longverse.train.parallel import whole, write_whole

MOMENTUM = 0.95
STEPS = 5  # of Newton-Schulz
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of its odd polynomial, Jordan's
RMS = 0.2  # of an AdamW step's elements, about


def is_turned(name: str, weight: Tensor) -> bool:
    """Whether Muon takes this weight of a network."""
    return weight.ndim > 1 and ".layers." in name


class Muon(torch.optim.AdamW):
    """Groups with `muon: True` hold matrices. They have one moment, `exp_avg`; others have AdamW's two."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update. Gradients of Muon's matrices are taken: AdamW passes over what has none."""
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"] if group.get("muon") else ():
                if matrix.grad is not None:
                    self._turn(matrix, matrix.grad, group["lr"], group["weight_decay"])
                    matrix.grad = None
        super().step()

    def _turn(self, matrix: Tensor, slope: Tensor, rate: float, decay: float) -> None:
        state = self.state[matrix]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(matrix)
        momentum = state["exp_avg"].lerp_(slope, 1 - MOMENTUM)
        ahead = slope.lerp(momentum, MOMENTUM)  # Nesterov's
        turn = torch.zeros_like(matrix)
        write_whole(turn, orthogonal(whole(ahead)))  # a shard alone does not say which directions the matrix has
        matrix.mul_(1 - rate * decay).add_(turn, alpha=-rate * RMS * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T [m, n], float32: singular values from 0.6 to 1.2, but for those that were below a
    two hundredth of all together (of the root of their squares' sum), which stay smaller."""
    flat = matrix.shape[0] <= matrix.shape[1]
    x = matrix.float() if flat else matrix.float().T
    x = x / (x.norm() + 1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.T
        x = first * x + (third * square + fifth * square @ square) @ x
    return x if flat else x.T
