"""The loss, computed only where labels are.

Shapes: N labelled positions, C hidden size, V vocabulary.

Of a 4K-token example with eight short answers some hundred positions carry a label; the head is applied to those alone,
a chunk of positions at a time, so that neither the logits of the prompt nor all logits of the answers ever exist.

torch has `F.linear_cross_entropy` for the second half. It was measured on CPU against this file
(benchmarks/train_throughput.py --loss): several times slower, and it takes no weights of single positions together with
the gradient of the head. So there is one path, and it runs under every torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions whose logits are held at once; with a vocabulary of 49,152 50 MB in float32, on a card 400 MB.
CHUNK, CHUNK_ON_CARD = 256, 2048


def weighted_nll(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int | None = None) -> Tensor:
    """sum over n of weights[n] * -log softmax(hidden[n] @ head.T)[targets[n]], as a float32 scalar.

    hidden   [N, C]; head [V, C]; both of one dtype, products in it and everything after in float32
    targets  int64 [N]; weights float32 [N]; no gradient flows to either
    chunk    positions at a time; when left out CHUNK, and on other devices than a CPU CHUNK_ON_CARD
    """
    chunk = chunk or loss_chunk(hidden.device)
    return _WeightedNll.apply(hidden, head, targets, weights, chunk)  # type: ignore[no-any-return]


def loss_chunk(device: torch.device) -> int:
    """Positions whose logits exist at a time."""
    return CHUNK if device.type == "cpu" else CHUNK_ON_CARD


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """-log p of each target, float32 [N], without gradient: for evaluation."""
    parts = [
        F.cross_entropy(F.linear(hidden[n : n + chunk], head).float(), targets[n : n + chunk], reduction="none")
        for n in range(0, len(targets), chunk)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class _WeightedNll(torch.autograd.Function):
    """The gradients of a sum are known as soon as the logits are, so each chunk's are computed at once and the logits
    let go. What remains for the backward pass is [N, C] and, for a trained head, [V, C]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            log_p = torch.log_softmax(F.linear(hidden[part], head), -1, dtype=torch.float32)  # [n, V]
            own = log_p.gather(1, targets[part, None])  # [n, 1]
            weight = weights[part, None]  # [n, 1]
            total -= (own * weight).sum()
            if grad_hidden is None and grad_head is None:
                continue
            slope = log_p.exp_()  # d nll / d logits = softmax - one-hot
            slope = slope.scatter_add_(1, targets[part, None], -torch.ones_like(own)).to(hidden.dtype)
            # The weights belong to rows, so they may as well be taken into the narrower factor.
            if grad_hidden is not None:
                grad_hidden[part] = (slope @ head) * weight
            if grad_head is not None:
                grad_head += (slope.T @ (hidden[part] * weight).to(hidden.dtype)).float()
        ctx.gradients = grad_hidden, grad_head.to(head.dtype) if grad_head is not None else None
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.gradients
        scale = grads[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype) if grad_hidden is not None else None,
            grad_head * scale.to(grad_head.dtype) if grad_head is not None else None,
            None,
            None,
            None,
        )
