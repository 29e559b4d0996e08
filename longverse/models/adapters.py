"""Adapters in PEFT's format: read, checked and merged into a network without PEFT or transformers.

An adapter folder holds

    adapter_config.json          PEFT's: rank, alpha, targets, and parts that were trained in full (modules_to_save)
    adapter_model.safetensors    `base_model.model.` + the module's name + `.lora_A.weight` [r, in], `.lora_B.weight`
                                 [out, r], or + the name of a whole tensor
    longverse.json               ours, optional: the RoPE plan and the window that the adapter was trained for, and the
                                 chat format that it taught a base model

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. The merged weight is W + scaling * B @ A, added in
float32 and rounded once to the network's dtype. Not read: DoRA, adapters on embeddings, biases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from .network import CausalLM
from .rope import RopePlan
from .shards import Progress, TensorInfo, Tensors, read_json

CONFIG, WEIGHTS, SETTINGS = "adapter_config.json", "adapter_model.safetensors", "longverse.json"
PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter (and not a whole model)."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors by the network's own names. UserError where a file is missing or broken, or
    the adapter is of a kind that is not read."""
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {config.get('peft_type')} adapter: only LoRA adapters can be merged.")
    for key, meaning in (("use_dora", "DoRA"), ("alora_invocation_tokens", "activated LoRA")):
        if config.get(key):
            raise UserError(f"{folder} is a {meaning} adapter, which is not supported: merge it with PEFT first.")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{folder} trained biases ({config['bias']}), which is not supported: merge it with PEFT first."
        )
    path = folder / WEIGHTS
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it holds the adapter's weights; copy the folder again.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): copy it again.") from None
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{folder / CONFIG} has {key} {value!r} and must state a number above 0: copy it again.")
    if foreign := next((name for name in names if not name.startswith(PREFIX)), None):
        raise UserError(f"{path} has a tensor {foreign}, which is not named as PEFT names them: save it with PEFT.")
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def base_of(folder: Path) -> str:
    """The model an adapter was trained on, as its config names it: an embedded name, a folder or a hub id."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / CONFIG} does not say which model the adapter is for (base_model_name_or_path).")
    if is_adapter(Path(base)) and Path(base).resolve() == folder.resolve():
        raise UserError(f"{folder / CONFIG} names its own folder as the adapter's model: name the model instead.")
    return base


def adapter_scaling(config: dict[str, Any], module: str) -> float:
    """alpha / rank of a module, or alpha / sqrt(rank) with rsLoRA, single modules' patterns included."""

    def own(key: str, default: str) -> float:
        for pattern, value in (config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(config[default])

    rank, alpha = own("rank_pattern", "r"), own("alpha_pattern", "lora_alpha")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def low_rank(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling * B @ A in W's dtype: weight [out, in], a [r, in], b [out, r]; the sum is made in float32."""
    return (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype)


def merge_adapter(network: CausalLM, folder: str | Path, on_progress: Progress | None = None) -> list[str]:
    """Merge an adapter into a network and give it the RoPE plan and window the adapter was trained for.

    The network's own weights are replaced, never written into (they may be views of a mapped file). Returns notes for
    the user. Raises UserError, naming file and tensor, for an adapter of another model, and when the network is
    quantised.
    """
    folder = Path(folder)
    config, tensors = read_adapter(folder)
    modules = {name.rpartition(".lora_A")[0] for name in tensors if name.endswith(".lora_A.weight")}
    whole = {name for name in tensors if ".lora_" not in name}
    paired = {f"{module}.lora_{side}.weight" for module in modules for side in "AB"} | whole
    if left := sorted(set(tensors) ^ paired):
        raise UserError(f"{folder / WEIGHTS}: {left[0]} has no partner or is not supported: save the adapter again.")
    done, total = 0, len(modules) + len(whole)
    for name in sorted(modules):
        module = _linear(network, name, folder)
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        if (b.shape[0], a.shape[1]) != tuple(module.weight.shape) or a.shape[0] != b.shape[1]:
            raise UserError(
                f"{folder / WEIGHTS} changes {name} as {[b.shape[0], a.shape[1]]} where the model has"
                f" {list(module.weight.shape)}: the adapter belongs to another model."
            )
        device = module.weight.device
        merged = low_rank(module.weight.detach(), a.to(device), b.to(device), adapter_scaling(config, name))
        module.weight = nn.Parameter(merged, requires_grad=False)
        done += 1
        if on_progress is not None:
            on_progress(done, total)
    for name in sorted(whole):
        _replace(network, name, tensors[name], folder)
        done += 1
        if on_progress is not None:
            on_progress(done, total)
    network.tie()
    return [f"The adapter {folder.name} is merged in.", *apply_settings(network, folder)]


class AdaptedTensors:
    """A checkpoint's tensors with an adapter merged into them, read like a `TensorFolder`: so loading, converting,
    quantising and exporting all see the adapted model. One merged tensor is made at a time.

    Raises UserError, naming file and tensor, for an adapter of another model.
    """

    def __init__(self, base: Tensors, adapter: Path) -> None:
        self.base, self.adapter = base, adapter
        self.config, tensors = read_adapter(adapter)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}  # name of the weight: A [r, in], B [out, r]
        self.whole = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
        for name in tensors:
            module, _, side = name.partition(".lora_")
            if not side:
                continue
            a, b = (tensors.get(f"{module}.lora_{which}.weight") for which in "AB")
            if a is None or b is None or side not in ("A.weight", "B.weight"):
                raise UserError(f"{adapter / WEIGHTS}: {name} has no partner or is not supported: save it again.")
            self.pairs[f"{module}.weight"] = a, b
        shapes: dict[str, tuple[int, ...]] = {name: (b.shape[0], a.shape[1]) for name, (a, b) in self.pairs.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in self.whole.items()}
        for name, shape in shapes.items():
            if name not in self.infos:
                raise UserError(
                    f"{adapter / WEIGHTS} changes {name.removesuffix('.weight')}, which the model has not: the"
                    " adapter belongs to another model."
                )
            if self.infos[name].shape != shape:
                raise UserError(
                    f"{adapter / WEIGHTS} changes {name} as {list(shape)} where the model has"
                    f" {list(self.infos[name].shape)}: the adapter belongs to another model."
                )

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype by name."""
        return self.base.infos

    def get(self, name: str) -> Tensor:
        """One tensor, merged."""
        if name in self.whole:
            return self.whole[name].to(self.infos[name].dtype)
        return self._merged(name, self.base.get(name))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, merged, in the base's order."""
        for name, tensor in self.base.stream():
            yield name, self.get(name) if name in self.whole else self._merged(name, tensor)

    def forget(self, tensor: Tensor) -> None:
        """Nothing: a merged tensor is of ordinary memory, and the base's were let go when they were merged."""

    def is_mapped(self, name: str) -> bool:
        """Whether a tensor is a view of a file, whose memory the system only lends."""
        return name not in self.pairs and name not in self.whole and self.base.is_mapped(name)

    def origin(self, name: str) -> str:
        """What an error message calls the place of a tensor."""
        return self.base.origin(name)

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        if name not in self.pairs:
            return weight
        scaling = adapter_scaling(self.config, name.removesuffix(".weight"))
        merged = low_rank(weight, *self.pairs[name], scaling)
        self.base.forget(weight)
        return merged


def _linear(network: CausalLM, name: str, folder: Path) -> nn.Linear:
    try:
        module = network.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"{folder / WEIGHTS} changes {name}, which this model has not: the adapter belongs to another model."
        ) from None
    if not isinstance(module, nn.Linear):
        raise UserError(
            f"{folder} changes {name}, which is {type(module).__name__} here: load the model unquantised and merge the"
            " adapter before quantising."
        )
    return module


def _replace(network: CausalLM, name: str, tensor: Tensor, folder: Path) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        module = network.get_submodule(parent)
        old = getattr(module, leaf)
    except AttributeError:
        raise UserError(f"{folder / WEIGHTS} holds {name}, which this model has not.") from None
    if old.shape != tensor.shape:
        raise UserError(
            f"{folder / WEIGHTS} has {name} as {list(tensor.shape)} where the model has {list(old.shape)}: the adapter"
            " belongs to another model."
        )
    setattr(module, leaf, nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False))


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The entries of a config.json that hold for the merged model (rope_parameters, max_position_embeddings,
    context_window); empty for an adapter that PEFT wrote."""
    return dict(_settings(folder).get("config") or {})


def adapter_chat(folder: Path) -> str | None:
    """The chat format that an adapter taught a base model; None where it taught none."""
    return _settings(folder).get("chat")


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    return read_json(path) if path.exists() else {}


def adapted_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A model's config with the RoPE plan and the window that the adapter in `folder` was trained for."""
    settings = adapter_settings(folder)
    old = ["rope_theta", "rope_scaling"] if "rope_parameters" in settings else []
    old += ["context_window"] if "max_position_embeddings" in settings else []
    return {key: value for key, value in config.items() if key not in old} | settings


def apply_settings(network: CausalLM, folder: Path) -> list[str]:
    """Give a network the RoPE plan and the window that an adapter was trained for, where it states them; notes for the
    user."""
    settings = adapter_settings(folder)
    if not settings:
        return []
    shape = network.config
    plan = RopePlan.from_config({"head_dim": shape.head_dim, **settings})
    window = int(settings.get("context_window") or settings["max_position_embeddings"])
    network.config = replace(shape, rope=plan, window=window)
    network.model.rotary.plan = plan
    plan.verify(network)
    return [f"It brings {plan.describe()} and a window of {window:,} tokens."]
