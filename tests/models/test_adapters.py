"""Adapter folders as models, and folders that are incomplete; merging itself is also tested beside the training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longverse.errors import UserError
from longverse.models.adapters import CONFIG, PREFIX, SETTINGS, WEIGHTS, merge_adapter
from longverse.models.checkpoint import load
from longverse.models.convert import convert
from tests.helpers import random_network, tiny_config
from tests.models.folders import save_folder, save_tokenizer

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": None}, "has r None"),
        ({"r": 0}, "has r 0"),
        ({"r": "x"}, "has r 'x'"),
        ({"lora_alpha": None}, "has lora_alpha None"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_an_adapter_config_that_says_too_little(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | change
    (tmp_path / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    save_file(
        {f"{PREFIX}{Q}.lora_A.weight": torch.ones(2, 64), f"{PREFIX}{Q}.lora_B.weight": torch.ones(64, 2)},
        tmp_path / WEIGHTS,
    )
    with pytest.raises(UserError, match=says):
        merge_adapter(random_network(tiny_config()), tmp_path)


def adapter_folder(place: Path, base: str, seed: int = 0) -> Path:
    """An adapter for the tiny model's query and down projections, with a RoPE plan of its own."""
    place.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name, inputs, outputs in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 96, 64)):
            module = f"{PREFIX}model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(3, inputs, generator=generator) / 8
            tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, 3, generator=generator) / 8
    save_file(tensors, place / WEIGHTS)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": base}
    (place / CONFIG).write_text(json.dumps(config))
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 70000.0}, "max_position_embeddings": 512}
    (place / SETTINGS).write_text(json.dumps({"config": rope}))
    return place


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_folder(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_folder_is_a_model(base: Path, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "tuned", str(base))
    loaded = load(str(folder), dtype="float32")
    merged = load(str(base), dtype="float32").network
    merge_adapter(merged, folder)
    assert loaded.network.config == merged.config
    assert loaded.network.config.rope.theta == 70000
    assert loaded.network.config.window == 512
    assert loaded.name == "tuned"
    ids = torch.arange(40)[None] % 100
    assert torch.equal(loaded.network(ids), merged(ids))
    assert not torch.allclose(loaded.network(ids), load(str(base), dtype="float32").network(ids), atol=1e-2)


def test_an_adapters_window_is_not_the_bases(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"context_window": 300}))
    assert load(str(base)).network.config.window == 300
    assert load(str(adapter_folder(tmp_path / "tuned", str(base)))).network.config.window == 512


def test_a_folder_with_an_embedded_models_name_is_that_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.rename(tmp_path / "smol")
    monkeypatch.chdir(tmp_path)
    assert load("smol").network.config.hidden_size == 64


def test_an_adapter_folder_is_converted_and_tuned_further(base: Path, tmp_path: Path) -> None:
    first = adapter_folder(tmp_path / "first", str(base))
    second = adapter_folder(tmp_path / "second", str(first), seed=1)
    convert(str(second), tmp_path / "whole")
    ids = torch.arange(40)[None] % 100
    whole = load(str(tmp_path / "whole"), dtype="float32").network
    assert torch.equal(whole(ids), load(str(second), dtype="float32").network(ids))
    assert not torch.allclose(whole(ids), load(str(first), dtype="float32").network(ids), atol=1e-2)


def test_an_adapter_of_another_or_no_model(base: Path, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "tuned", str(tmp_path / "tuned"))
    with pytest.raises(UserError, match="its own folder"):
        load(str(folder))
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    with pytest.raises(UserError, match="which model the adapter is for"):
        load(str(folder))
    config = tiny_config(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    save_folder(tmp_path / "other", config)
    folder = adapter_folder(tmp_path / "misfit", str(tmp_path / "other"))
    with pytest.raises(UserError, match="belongs to another model"):
        load(str(folder))


def test_the_tokenizer_that_another_trainer_saved_with_an_adapter_is_used(base: Path, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "tuned", str(base))
    save_tokenizer(folder)  # as TRL and others do
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<pad>", "chat_template": "{{ messages[0].content }}<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load(str(folder), dtype="float32")
    assert loaded.tokenizer.eos_ids == {0, *load(str(base), dtype="float32").tokenizer.eos_ids}
    assert loaded.chat.kind == "template"
    assert any("was saved with the adapter" in note for note in loaded.notes)
