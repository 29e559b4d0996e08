"""LoRA on the plain network, saved as PEFT saves it.

Shapes: r rank, x [.., in].   y = x W^T + scaling * (x A^T) B^T     A [r, in]   B [out, r], zero at first

W stays as it was loaded (bf16 or float32) and gets no gradient; A and B are float32. Outside of training the layer
computes with the merged weight itself, `adapters.low_rank`, so that what is evaluated is bit for bit what is shipped
after the merge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longverse.errors import UserError
from longverse.models.adapters import CONFIG, PREFIX, SETTINGS, WEIGHTS, low_rank
from longverse.models.network import CausalLM
from longverse.models.shards import SafetensorsWriter, TensorInfo, replacing, write_json
from longverse.train.config import Lora

NORMS = ("input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm")


class LoraLinear(nn.Module):
    """A frozen linear layer and its low-rank update."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        device = base.weight.device
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

    def merged_weight(self) -> Tensor:
        """[out, in] in the base's dtype."""
        if self._held is not None:
            return self._held
        return low_rank(self.base.weight.detach(), self.lora_A.detach(), self.lora_B.detach(), self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.merged_weight(), self.base.bias)
        inner = F.linear(x, self.lora_A.to(x.dtype)) * self.scaling  # [.., r]
        return self.base(x) + F.linear(inner, self.lora_B.to(x.dtype))


def add_lora(network: CausalLM, lora: Lora, seed: int = 0) -> None:
    """Freeze a network and put LoRA on its projections, in place. The same seed begins the same adapter."""
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in network.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in lora.targets:
                base = getattr(block, name, None)
                if base is None:
                    continue
                if not isinstance(base, nn.Linear):
                    raise UserError(f"{name} is {type(base).__name__}: load the model unquantised to train LoRA on it.")
                adapted = LoraLinear(base, lora.rank, lora.scaling)
                adapted.reset(generator)
                setattr(block, name, adapted)
    for name, parameter in network.named_parameters():
        if _trained_too(name, lora):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    network.tie()


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
    """Compute the merged weights once and hold them: for generating with an adapted network."""
    layers = lora_layers(network).values()
    for layer in layers:
        layer._held = layer.merged_weight()
    try:
        yield
    finally:
        for layer in layers:
            layer._held = None


def merge(network: CausalLM) -> None:
    """Put plain linear layers with the merged weights where LoRA was, in place."""
    for name, layer in lora_layers(network).items():
        layer.base.weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, layer.base)


def save_adapter(
    network: CausalLM,
    lora: Lora,
    folder: Path,
    *,
    base: str,
    settings: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter as PEFT does, and `settings` (config entries such as rope_parameters) beside it.

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
    if settings:
        write_json(folder / SETTINGS, {"base": base, "config": settings})
    write_json(folder / CONFIG, config)  # last: a folder with it is a whole adapter
