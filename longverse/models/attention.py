"""Exact attention, three ways that must agree: the naive reference, one shot, and a chunk over a cached past.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), T new tokens, S all tokens so far (the past
and the new ones, in order), D head size.   q [B, H, T, D]   k, v [B, G, S, D]   result [B, H, T, D]

Query i of the new tokens stands at position S - T + i and sees keys 0 .. S - T + i: the causal mask is aligned to the
lower right. torch's own `is_causal=True` aligns it to the upper left when T != S, which is wrong here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in float32, with the whole [T, S] matrix in memory: for tests, never for work."""
    heads, new, total = q.shape[1], q.shape[2], k.shape[2]
    k = k.float().repeat_interleave(heads // k.shape[1], dim=1)  # [B, H, S, D]
    v = v.float().repeat_interleave(heads // v.shape[1], dim=1)
    scores = q.float() @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # [B, H, T, S]
    future = torch.ones(new, total, dtype=torch.bool, device=q.device).triu(total - new + 1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).to(q.dtype)


def one_shot_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with no past (T == S): training, and one-shot evaluation."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def chunk_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of T new tokens over the whole past, without a mask of [T, S].

    On CPU the past is attended in one unmasked call and the new tokens in one causal call, and the two are merged by
    their log-sum-exps, which is exact. Elsewhere torch's lower-right causal bias picks the fused kernel. `compiled.py`
    has the same from our own kernel; this file stays plain torch, for it goes beside exported checkpoints.
    """
    new, past = q.shape[2], k.shape[2] - q.shape[2]
    if q.device.type != "cpu":
        from torch.nn.attention.bias import causal_lower_right

        bias = causal_lower_right(new, k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])
    if new == 1:
        return folded_attention(q, k, v)[0]
    own, own_lse = causal_attention(q, k[:, :, past:], v[:, :, past:])
    if past == 0:
        return own
    old, old_lse = folded_attention(q, k[:, :, :past], v[:, :, :past])
    return merge(old, old_lse, own, own_lse)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention with no past (T == S), with the log-sum-exps [B, H, T] of the scores."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [B, H, T, D]: copies of a chunk only
    return _flash(q, k, v, causal=True)


def folded_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Unmasked attention; the H / G queries that share a key/value head are laid out as more tokens of that head, so
    the keys are neither copied nor read more than once. Returns the result and log-sum-exps [B, H, T]."""
    batch, heads, new, size = q.shape
    folded = q.reshape(batch, k.shape[1], -1, size)  # [B, G, H/G * T, D]
    out, lse = _flash(folded, k, v, causal=False)
    return out.reshape(batch, heads, new, size), lse.reshape(batch, heads, new)


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Tensor:
    """Join two attentions of the same queries over disjoint keys: a, b [B, H, T, D] with log-sum-exps [B, H, T]."""
    share = torch.sigmoid(a_lse - b_lse)[..., None]  # exp(a_lse) / (exp(a_lse) + exp(b_lse))
    return torch.lerp(b.float(), a.float(), share).to(a.dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The device's fused attention that also returns float32 log-sum-exps [B, H, T]; heads of q and k alike."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)
    if q.device.type == "cuda" and q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    scores = q.float() @ k.float().transpose(2, 3) / q.shape[-1] ** 0.5  # [B, H, T, S]
    if causal:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)
