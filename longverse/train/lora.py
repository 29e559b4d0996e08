"""LoRA on the plain network, saved as PEFT saves it.

Shapes: r rank, x [.., in].   y = x W^T + scaling * (x A^T) B^T     A [r, in]   B [out, r], zero at first

W stays as it was loaded (bf16 or float32) and gets no gradient; A and B are float32. Outside of training the layer
computes with the merged weight itself, `adapters.low_rank`, so that what is evaluated is what is shipped after the
merge, but for the adapter's rounding to bfloat16.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): W is held in int4 (models/quant_linear.py: groups of 64 with zero
points, not the paper's NF4 with doubly quantised scales) and made anew in each forward and once more in each backward
pass. The merged weight is then that of the dequantised W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longverse.errors import UserError
from longverse.models.adapters import (
    CONFIG,
    PREFIX,
    SETTINGS,
    WEIGHTS,
    adapter_scaling,
    apply_settings,
    low_rank,
    read_adapter,
)
from longverse.models.network import CausalLM, NetworkConfig
from longverse.models.quant_linear import QuantLinear, quantize_network
from longverse.models.shards import SafetensorsWriter, TensorInfo, replacing, write_json
from longverse.train.config import Lora

NORMS = ("input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm")


class _FrozenProduct(torch.autograd.Function):
    """x W^T of a quantised W, [.., in] to [.., out]. Only the quantised weight waits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0] @ ctx.layer.dequantized(slopes[0].dtype), None


class LoraLinear(nn.Module):
    """A frozen linear layer, plain or quantised, and its low-rank update."""

    def __init__(self, base: nn.Linear | QuantLinear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        self._held: Tensor | None = None  # the merged weight, while `merged` holds it

    def reset(self, generator: torch.Generator) -> None:
        """A uniform within sqrt(6 / (1 + 5) / in), as PEFT begins (kaiming with a = sqrt 5); B zero."""
        bound = 1 / math.sqrt(self.base.in_features)
        values = torch.rand(self.lora_A.shape, generator=generator) * 2 * bound - bound
        with torch.no_grad():
            self.lora_A.copy_(values)
            self.lora_B.zero_()

    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in the base's dtype; of a quantised base, in `dtype`."""
        if self._held is not None:
            return self._held
        base = self.base.dequantized(dtype) if isinstance(self.base, QuantLinear) else self.base.weight.detach()
        return low_rank(base, self.lora_A.detach(), self.lora_B.detach(), self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.merged_weight(x.dtype), self.base.bias)
        inner = F.linear(x, self.lora_A.to(x.dtype)) * self.scaling  # [.., r]
        if isinstance(self.base, QuantLinear):
            number = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            frozen = _FrozenProduct.apply(x.to(number), self.base)
        else:
            frozen = self.base(x)
        return frozen + F.linear(inner, self.lora_B.to(x.dtype))  # type: ignore[no-any-return]


def add_lora(network: CausalLM, lora: Lora, seed: int = 0) -> None:
    """Freeze a network and put LoRA on its projections, in place. The same seed begins the same adapter.

    Raises UserError when the projections do not fit the groups of lora.bits.
    """
    network.requires_grad_(False)
    if lora.bits is not None and not any(isinstance(module, QuantLinear) for module in network.modules()):
        shape = network.config
        group = next((group for group in (64, 32) if all(size % group == 0 for size in _inputs(shape))), 64)
        if left := quantize_network(network, lora.bits, group):
            raise UserError(
                f"{left[0]} does not divide into groups of 64 or 32 weights, so this model cannot be held in"
                f" {lora.bits} bits: leave 'bits' out."
            )
    generator = torch.Generator().manual_seed(seed)
    for layer in network.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in lora.targets:
                base = getattr(block, name, None)
                if base is None:
                    continue
                adapted = LoraLinear(base, lora.rank, lora.scaling)
                adapted.reset(generator)
                setattr(block, name, adapted)
    for name, parameter in network.named_parameters():
        if _trained_too(name, lora):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    network.tie()


def begin_with(network: CausalLM, folder: Path) -> None:
    """Give the LoRA of a network the values of a saved adapter, and the network its RoPE plan and window. Raises
    UserError when the adapter has another rank, other targets, another scaling, or parts trained in full that this
    LoRA has not."""
    config, tensors = read_adapter(folder)
    layers = lora_layers(network)
    wanted = {f"{name}.lora_{side}.weight" for name in layers for side in "AB"}
    whole = {name: p for name, p in network.named_parameters() if p.requires_grad and ".lora_" not in name}
    if odd := sorted(set(tensors) ^ (wanted | set(whole))):
        raise UserError(
            f"{folder} and this recipe's LoRA differ in {odd[0]}: give the recipe the adapter's targets and 'also', or"
            " leave 'start' out."
        )
    for name, layer in layers.items():
        if adapter_scaling(config, name) != layer.scaling:
            raise UserError(
                f"{folder} scales {name} by {adapter_scaling(config, name):g} and this recipe by {layer.scaling:g}:"
                " give lora the adapter's rank and alpha."
            )
        for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            _put(parameter, tensors[f"{name}.lora_{side}.weight"], f"{name}.lora_{side}", folder)
    for name, parameter in whole.items():
        _put(parameter, tensors[name], name, folder)
    apply_settings(network, folder)


def _put(parameter: nn.Parameter, values: Tensor, name: str, folder: Path) -> None:
    if parameter.shape != values.shape:
        raise UserError(
            f"{folder} has {name} as {list(values.shape)} and this recipe as {list(parameter.shape)}: give lora the"
            " adapter's rank."
        )
    with torch.no_grad():
        parameter.copy_(values)


def _inputs(shape: NetworkConfig) -> tuple[int, int, int]:
    """Input sizes of the projections."""
    return shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size


def _trained_too(name: str, lora: Lora) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module in ("embed_tokens", "lm_head"):
        return "embeddings" in lora.also
    return module in NORMS and "norms" in lora.also


def lora_layers(network: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by the name of the projection they stand for."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Compute the merged weights once and hold them: for generating with an adapted network. Over a quantised base they
    are made at each use instead, since held they would be the whole model that was to be kept small. Weights trained in
    float32 beside a base of fewer digits are rounded to its type meanwhile, so that all products are of one."""
    layers = [layer for layer in lora_layers(network).values() if not isinstance(layer.base, QuantLinear)]
    for layer in layers:
        layer._held = layer.merged_weight(layer.lora_A.dtype)
    weights = [weight for name, weight in network.named_parameters() if ".lora_" not in name]
    short = next((weight.dtype for weight in weights if weight.dtype in (torch.bfloat16, torch.float16)), None)
    rounded = [(weight, weight.data) for weight in weights if short is not None and weight.dtype == torch.float32]
    for weight, data in rounded:
        weight.data = data.to(short)
    try:
        yield
    finally:
        for layer in layers:
            layer._held = None
        for weight, data in rounded:
            weight.data = data


def merge(network: CausalLM) -> None:
    """Put plain linear layers with the merged weights where LoRA was, and where weights were held in few bits, in
    place."""
    number = network.dtype
    layers: dict[str, Any] = dict(lora_layers(network))
    inside = tuple(f"{name}." for name in layers)
    layers |= {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, QuantLinear) and not name.startswith(inside)
    }
    for name, layer in layers.items():
        if isinstance(layer, QuantLinear):
            weight, base = layer.dequantized(number), layer
        else:
            weight, base = layer.merged_weight(number), layer.base
        with torch.device("meta"):
            plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = base.bias  # type: ignore[assignment]
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, plain)


def save_adapter(
    network: CausalLM,
    lora: Lora,
    folder: Path,
    *,
    base: str,
    settings: dict[str, Any] | None = None,
    chat: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter as PEFT does, and beside it `settings` (config entries such as rope_parameters) and the chat
    format that a base model was taught.

    base: what the base model is called. Each file is complete or absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(network).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and _trained_too(name, lora):
            tensors[f"{PREFIX}{name}"] = parameter.detach()
    saved = {name.removesuffix(".weight").rpartition(".")[2] for name in tensors if ".lora_" not in name}
    if network.config.tied:
        saved.discard("lm_head")
        tensors.pop(f"{PREFIX}lm_head.weight", None)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.scaling * lora.rank,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "modules_to_save": sorted(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    with replacing(folder / WEIGHTS) as aside:
        writer = SafetensorsWriter(aside, {name: TensorInfo(tuple(t.shape), dtype) for name, t in tensors.items()})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    if settings or chat:
        taught = {"chat": chat} if chat else {}
        write_json(folder / SETTINGS, {"base": base, **({"config": settings} if settings else {}), **taught})
    write_json(folder / CONFIG, config)  # last: a folder with it is a whole adapter
