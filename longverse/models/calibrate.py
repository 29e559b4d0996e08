"""GPTQ: quantise weights column by column, and let the columns still to come make up for each error.

Rounding to nearest treats every weight alone. GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1) minimises the
error of a layer's *output* on real inputs: with H the second moments of the inputs, the error of column i is spread
over the columns after it by row i of the Cholesky factor of H's inverse. Layers go one after the other, each seeing
the hidden states that the quantised layers before it produce, so only one layer is in memory.

Not done: reordering columns by activation, which the saved form would have to record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attention import one_shot_attention
from .network import Layer, NetworkConfig
from .quant_linear import QuantFormat, dequantize_rows, group_grid, save_levels, step_of
from .rope import Rotary
from .shards import NOT_FINITE, is_finite

if TYPE_CHECKING:
    from .shards import Tensors

SAMPLE = 512  # tokens of a stretch of the text
SAMPLES = 32  # stretches at most
BLOCK = 128  # columns treated together before the rest is brought up to date; a multiple of every group
DAMPING = 0.01  # of the mean diagonal of H, added to it
# Layers that read the same input share its second moments.
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def gptq_layers(
    shape: NetworkConfig,
    tensors: Tensors,
    ids: list[int],
    form: QuantFormat,
    scale_dtype: torch.dtype,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name of a linear weight, its saved tensors) of every layer, in order.

    ids: tokens of the calibration text; stretches of SAMPLE spread over it are used. UserError when it is too short.
    """
    if len(ids) < 2 * SAMPLE:
        raise UserError(
            f"The calibration text has {len(ids)} tokens and at least {2 * SAMPLE} are needed: take a longer one."
        )
    count = min(SAMPLES, len(ids) // SAMPLE)
    starts = [n * (len(ids) - SAMPLE) // max(count - 1, 1) for n in range(count)]
    rows = torch.tensor([ids[start : start + SAMPLE] for start in starts])
    with torch.no_grad():
        hidden = [tensors.get("model.embed_tokens.weight")[row].float()[None] for row in rows]  # [1, T, C] each
        cos, sin = Rotary(shape.rope)(torch.arange(SAMPLE)[None], SAMPLE)
        for number in range(shape.num_layers):
            prefix = f"model.layers.{number}."
            with torch.device("meta"):
                layer = Layer(shape, number)
            state = {name: tensors.get(prefix + name).float() for name in layer.state_dict()}
            for name, tensor in state.items():
                if not is_finite(tensor):
                    raise UserError(NOT_FINITE.format(prefix + name))
            layer.load_state_dict(state, assign=True)
            moments = _second_moments(layer, hidden, cos, sin)
            for name, linear in list(layer.named_modules()):
                if not isinstance(linear, nn.Linear):
                    continue
                if cancelled is not None and cancelled():
                    raise KeyboardInterrupt
                short = name.rpartition(".")[2]
                levels = gptq_rows(linear.weight, moments[SHARED.get(short, short)], form, scale_dtype)
                linear.weight = nn.Parameter(dequantize_rows(*levels, form.bits, torch.float32), requires_grad=False)
                yield f"{prefix}{name}.weight", save_levels(*levels, form)
            hidden = [layer(x, cos, sin, one_shot_attention) for x in hidden]


def _second_moments(layer: Layer, hidden: list[Tensor], cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
    """Sum of x xᵀ over all tokens, float32 [K, K], of the inputs of q_proj, o_proj, gate_proj and down_proj."""
    moments: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, arguments: Any) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1])  # [T, K]
            if name not in moments:
                moments[name] = x.new_zeros(x.shape[1], x.shape[1])
            moments[name].addmm_(x.t(), x)

        return hook

    for name, module in layer.named_modules():
        short = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and short not in SHARED:
            hooks.append(module.register_forward_pre_hook(watch(short)))
    for x in hidden:
        layer(x, cos, sin, one_shot_attention)
    for hook in hooks:
        hook.remove()
    return moments


def gptq_rows(
    weight: Tensor, moments: Tensor, form: QuantFormat, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise a weight [N, K] given the second moments [K, K] of its inputs.

    Returns what `quantize_rows` returns: q uint8 [N, K], scale [N, G], zero uint8 [N, G] or None.
    """
    outputs, inputs = weight.shape
    size = form.group or inputs
    columns = weight.float().t().contiguous()  # [K, N]: a column of the weight lies in one piece
    moments = moments.clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1  # inputs that were never anything but zero
    diagonal += DAMPING * diagonal.mean()
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)  # [K, K]
    q = torch.empty(inputs, outputs, dtype=torch.uint8)
    scale = torch.empty(inputs // size, outputs, dtype=scale_dtype)  # [G, N]
    zero = torch.empty(inputs // size, outputs)
    if not form.group:
        scale[0], zero[0] = group_grid(columns.t(), form, scale_dtype)
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        part = columns[first:last]  # [B, N], changed in place
        errors = torch.empty_like(part)
        local = spread[first:last, first:last]
        for place in range(last - first):
            group = (first + place) // size
            if form.group and place % size == 0:
                scale[group], zero[group] = group_grid(part[place : place + size].t(), form, scale_dtype)
            step, offset = step_of(scale[group]), zero[group]
            level = (part[place] / step + offset).round_().clamp_(0, 2**form.bits - 1)
            q[first + place] = level.to(torch.uint8)
            errors[place] = (part[place] - (level - offset) * step) / local[place, place]
            part[place + 1 :].addr_(local[place, place + 1 :], errors[place], alpha=-1)
        columns[last:].addmm_(spread[first:last, last:].t(), errors, alpha=-1)
    zeros = None if form.symmetric else zero.t().to(torch.uint8).contiguous()
    return q.t().contiguous(), scale.t().contiguous(), zeros
