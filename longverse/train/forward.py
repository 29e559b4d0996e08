"""The forward of training: a row in, its weighted loss out.

Shapes: T tokens of the row, N labelled places, C hidden size.

It is the network's own layers, called here so that three things can be seen in one place: where activations are kept
and where they are computed anew, where labels are, and how attention stays within documents.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longverse.models.network import Attend, CausalLM, NetworkConfig
from longverse.train.cpu_attention import causal_attention, tile_attention
from longverse.train.loss import token_nll, weighted_nll
from longverse.train.rows import Row, document_attention

# Attention is the one part whose cost grows with the square of the length and whose result is as small as the layer's
# input: kept, it is not computed twice.
_ATTENTION_OPS = (
    causal_attention._opoverload,
    tile_attention._opoverload,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, which gives pages without a living tensor back to the system; None under another libc."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back(*_: object) -> None:
    """Between two layers of a row on a CPU: what a layer computed with is freed, but the heap keeps its pages where the
    few tensors that stay lie between them, and seldom fits the next layer's into the gaps. At 8K tokens of smol it
    would hold several times what is alive."""
    if (trim := _trim()) is not None:
        trim(0)


TRIMMED = 4  # layers between two givings back: the pages are wanted again soon, and taking them costs time


class LossModel(nn.Module):
    """A network and how its loss is computed. autocast: products in bfloat16 over float32 weights."""

    def __init__(self, network: CausalLM, autocast: bool = False) -> None:
        super().__init__()
        self.network = network
        self.autocast = autocast

    def forward(
        self,
        row: Row,
        attend: Attend | None = None,
        *,
        recompute: bool = False,
        offload: bool = False,
        per_token: bool = False,
    ) -> Tensor:
        """float32 scalar: the sum over labels of weight * -log p. With per_token: float32 [N], -log p of each label,
        without gradient.

        attend     attention within documents, when left out on this rank alone
        recompute  keep each layer's input and attention, compute the rest anew in the backward pass
        offload    keep those in main memory
        """
        attend = attend or document_attention(row.bounds)
        decoder = self.network.model
        device = row.ids.device
        kept = torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if offload else nullcontext()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            x = decoder.embed_tokens(row.ids)  # [1, T, C]
            cos, sin = decoder.rotary(row.positions, row.rope_length)  # float32 [1, 1, T, D]
            dtype = torch.bfloat16 if self.autocast else x.dtype
            cos, sin = cos.to(dtype), sin.to(dtype)
            with kept:
                for number, layer in enumerate(decoder.layers):
                    if recompute and torch.is_grad_enabled():
                        again = partial(create_selective_checkpoint_contexts, _keep_attention)
                        trims = device.type == "cpu" and number % TRIMMED == 0
                        if trims and x.requires_grad:
                            x.register_hook(give_back)  # when the backward pass is through the layer
                        if trims:
                            give_back()
                        x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False, context_fn=again)
                    else:
                        x = layer(x, cos, sin, attend)
            hidden = decoder.norm(x[0, row.places])  # [N, C]: the head sees labelled places only
            head = self.network.lm_head.weight  # [V, C]
            if self.autocast:
                hidden, head = hidden.to(torch.bfloat16), head.to(torch.bfloat16)
            else:
                hidden = hidden.to(head.dtype)
            if per_token:
                return token_nll(hidden, head, row.targets)
            return weighted_nll(hidden, head, row.targets, row.weights)


def linear_weights(shape: NetworkConfig) -> int:
    """Weights of all projections of all layers: each costs two operations a token in the forward pass."""
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return shape.num_layers * shape.hidden_size * (heads + 3 * shape.intermediate_size)


def training_flops(shape: NetworkConfig, tokens: int, squares: int, labels: int, full: bool) -> float:
    """Floating-point operations of a forward and backward pass, recomputation not counted.

    tokens; squares: sum of squared document lengths (causal attention does half of it); labels: places the head is
    applied to; full: whether all weights get gradients (three times the forward's products; else twice).
    """
    linear = 2 * linear_weights(shape) * tokens + 2 * shape.vocab_size * shape.hidden_size * labels
    attention = 2 * squares * shape.num_heads * shape.head_dim * shape.num_layers
    return (3 if full else 2) * linear + 3.5 * attention  # a flash backward redoes the scores
