"""What came of a run, or of one of its stages: an adapter in PEFT's format, a checkpoint folder, each with its card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longverse.models.chat import XVERSE_TEMPLATE
from longverse.models.checkpoint import Loaded, open_model, stored_dtype
from longverse.models.network import CausalLM, NetworkConfig
from longverse.models.rope import RopePlan
from longverse.train import parallel
from longverse.train.card import write_card
from longverse.train.config import Recipe
from longverse.train.lora import add_lora, lora_layers, merge, save_adapter
from longverse.train.parallel import Ranks
from longverse.train.probe import Figures


def rope_entries(plan: RopePlan, window: int, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that a RoPE plan and a window need, in place of those of `config`."""
    entries: dict[str, Any] = {"rope_parameters": plan.to_rope_parameters(), "max_position_embeddings": window}
    if plan.kind in ("dynamic", "yarn"):  # which else state the window that they reach
        entries["context_window"] = window
    if plan.kind == "dynamic":
        entries["max_position_embeddings"] = plan.original_window
    if (config.get("sliding_window") or window) < window:
        entries["sliding_window"] = None  # it was trained with full attention
    return entries


def write_results(
    recipe: Recipe,
    loaded: Loaded,
    out: Path,
    place: Path,
    ranks: Ranks,
    original: NetworkConfig,
    probes: dict[str, Figures],
    *,
    write_merged: bool,
    taught: bool,
) -> tuple[Path | None, Path | None]:
    """Write PLACE/adapter or PLACE/model, each with a model card, and return where they are. Sharded weights are
    gathered by every rank; rank 0 writes. A model that is there already stays as it is.

    taught: conversations in XVERSE's format were learned, which the result then states where its base does not."""
    network = loaded.network
    adapter: Path | None = None
    model: Path | None = None
    shape = network.config
    if ranks.world > 1:
        state = _gathered(network, ranks)
        if ranks.rank:
            return None, None
        network = _rebuilt(loaded, recipe, state)
    card: dict[str, Any] = {
        "recipe": recipe,
        "loaded": loaded,
        "out": out,
        "original": original,
        "shape": shape,
        "probes": probes,
    }
    if recipe.method == "lora":
        adapter = place / "adapter"
        settings = rope_entries(shape.rope, shape.window, loaded.config) if shape != original else None
        base = str(Path(recipe.model).resolve()) if Path(recipe.model).exists() else recipe.model
        chat = "xverse" if taught else None
        save_adapter(network, recipe.lora, adapter, base=base, settings=settings, chat=chat, dtype=torch.bfloat16)
        write_card(adapter, **card)
    if recipe.method == "full" or write_merged:
        model = place / "model"
        place.mkdir(parents=True, exist_ok=True)
        if not model.exists():
            if recipe.method == "lora":
                network = copy.deepcopy(network)
                merge(network)
            _write_model(recipe, network, model, taught)
            write_card(model, **card)
    return adapter, model


def _gathered(network: CausalLM, ranks: Ranks) -> dict[str, Tensor]:
    """Whole weights in the machine's memory: on rank 0 alone, since those of every rank would be as many models."""
    state = {}
    for name, tensor in network.state_dict().items():
        full = parallel.whole(tensor)  # every rank takes part
        if ranks.rank == 0:
            state[name] = full.cpu()
    return state


def _rebuilt(loaded: Loaded, recipe: Recipe, state: dict[str, Tensor]) -> CausalLM:
    """A network on the CPU with the whole weights, for writing."""
    with torch.device("meta"):
        network = CausalLM(loaded.network.config)
    if recipe.method == "lora":
        add_lora(network.to_empty(device="cpu"), recipe.lora)
    network.load_state_dict(state, assign=True)
    for name, layer in lora_layers(network).items():
        assert layer.lora_A.shape[0] == recipe.lora.rank, name
    network.tie()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(dict(loaded.network.named_parameters())[name].requires_grad)
    return network


def _write_model(recipe: Recipe, network: Any, target: Path, taught: bool) -> None:
    from longverse.models.convert import SHARD_BYTES, settled_config, write_folder
    from longverse.models.shards import TensorInfo

    opened = open_model(recipe.model)
    if taught and opened.continues_text:
        opened.tokenizer.chat_template = XVERSE_TEMPLATE
    number = stored_dtype(opened.tensors.infos)
    if number == torch.float16:
        number = torch.bfloat16  # trained weights may lie outside of its range
    shape = network.config
    shapes = shape.parameter_shapes()
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name in shapes}
    assert tensors.keys() == shapes.keys(), shapes.keys() - tensors.keys()
    infos = {name: TensorInfo(tuple(tensor.shape), number) for name, tensor in tensors.items()}
    config, extras = settled_config(opened)
    past = ("rope_theta", "rope_scaling", "quantization_config", "torch_dtype", "context_window")
    config = {key: value for key, value in config.items() if key not in past}
    config |= {**rope_entries(shape.rope, shape.window, config), "dtype": str(number).removeprefix("torch.")}
    made = iter(tensors.items())
    write_folder(opened, target, config, shape, infos, made, [], SHARD_BYTES, None, None, extras)
