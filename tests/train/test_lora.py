"""LoRA: what PEFT computes from our files, what we merge, and what evaluation sees are one thing."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longverse.errors import UserError
from longverse.models.adapters import CONFIG, WEIGHTS, is_adapter, merge_adapter
from longverse.models.network import CausalLM
from longverse.train.config import Lora
from longverse.train.lora import add_lora, begin_with, lora_layers, merge, merged, save_adapter
from tests.helpers import random_network, tiny_config, transformers_twin

IDS = torch.randint(0, 151, (2, 40), generator=torch.Generator().manual_seed(1))


def adapted(lora: Lora, **config: object) -> tuple[CausalLM, CausalLM]:
    """The network as it was, and one with an adapter that is no longer zero."""
    before = random_network(tiny_config(**config))
    network = copy.deepcopy(before)
    add_lora(network, lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in lora_layers(network).values():
            layer.lora_B += 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return before, network


def test_begins_as_the_network_it_adapts() -> None:
    before = random_network(tiny_config())
    network = copy.deepcopy(before)
    add_lora(network, Lora(rank=3))
    expected = before(IDS)
    assert torch.equal(network.eval()(IDS), expected)
    torch.testing.assert_close(network.train()(IDS), expected)
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 7 * 2
    assert all("lora_" in name for name in trainable)
    again = copy.deepcopy(before)
    add_lora(again, Lora(rank=3))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 2}])
def test_merge_is_exact(config: dict, tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=6.0)
    before, network = adapted(lora, **config)
    logits = network.eval()(IDS)
    assert not torch.allclose(logits, before(IDS), atol=1e-2)
    torch.testing.assert_close(network.train()(IDS), logits, rtol=1e-4, atol=1e-4)  # x A B against x (W + A B)
    with merged(network.eval()):
        assert torch.equal(network(IDS), logits)
    save_adapter(network, lora, tmp_path, base="tiny")
    assert is_adapter(tmp_path)
    loaded = copy.deepcopy(before)
    notes = merge_adapter(loaded, tmp_path)
    assert torch.equal(loaded(IDS), logits)
    assert any("merged" in note for note in notes)
    merge(network)
    assert torch.equal(network(IDS), logits)
    assert set(network.state_dict()) == set(before.state_dict())


@pytest.mark.parametrize("also", [(), ("norms",), ("norms", "embeddings")])
@pytest.mark.parametrize("face", ["llama", "xverse"])
def test_peft_loads_what_we_save(also: tuple[str, ...], face: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    lora = Lora(rank=4, targets=("q_proj", "v_proj", "down_proj"), also=also)
    before, network = adapted(lora)
    save_adapter(network, lora, tmp_path, base="tiny")
    if face == "llama":
        twin = transformers_twin(before, tiny_config())
    else:
        from longverse.models.configuration_xverse import XverseConfig
        from longverse.models.modeling_xverse import XverseForCausalLM

        settings = tiny_config()
        settings.pop("model_type")
        twin = XverseForCausalLM(XverseConfig(**settings)).eval()
        twin.load_state_dict(before.state_dict())
    wrapped = peft.PeftModel.from_pretrained(twin, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(input_ids=IDS).logits, network.eval()(IDS), rtol=1e-4, atol=1e-4)
        theirs = wrapped.merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(theirs, network(IDS), rtol=1e-5, atol=1e-4)


def test_we_merge_what_peft_saves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    before = random_network(tiny_config())
    twin = transformers_twin(before, tiny_config())
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "o_proj", "up_proj"], use_rslora=True, init_lora_weights=False,
        modules_to_save=["norm"], rank_pattern={"o_proj": 2}, alpha_pattern={"up_proj": 3}, task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(twin, config).eval()
    wrapped.save_pretrained(str(tmp_path))
    expected = wrapped(input_ids=IDS).logits
    merge_adapter(before, tmp_path)
    torch.testing.assert_close(before(IDS), expected, rtol=1e-4, atol=1e-4)


def test_settings_bring_the_rope_plan(tmp_path: Path) -> None:
    lora = Lora(rank=2)
    before, network = adapted(lora)
    rope = {"rope_type": "dynamic", "rope_theta": 500_000.0, "factor": 2.0}
    settings = {"rope_parameters": rope, "max_position_embeddings": 256, "context_window": 4096}
    save_adapter(network, lora, tmp_path, base="tiny", settings=settings, dtype=torch.bfloat16)
    notes = merge_adapter(before, tmp_path)
    assert before.config.window == 4096
    assert before.model.rotary.plan.kind == "dynamic"
    assert before.model.rotary.plan.original_window == 256
    assert before.config.rope.base(512) > 500_000
    assert any("dynamic NTK" in note for note in notes)


def spoiled(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: spoiled(folder, use_dora=True), "DoRA"),
        (lambda folder: spoiled(folder, peft_type="IA3"), "IA3"),
        (lambda folder: spoiled(folder, bias="all"), "biases"),
        (lambda folder: (folder / WEIGHTS).unlink(), "missing"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), "truncated"),
        (lambda folder: save_file({"a": torch.ones(1)}, folder / WEIGHTS), "not named as PEFT"),
    ],
)
def test_refuses(spoil: object, said: str, tmp_path: Path) -> None:
    before, network = adapted(Lora(rank=2))
    save_adapter(network, Lora(rank=2), tmp_path, base="tiny")
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=said):
        merge_adapter(before, tmp_path)


def test_refuses_an_adapter_of_another_model(tmp_path: Path) -> None:
    _, network = adapted(Lora(rank=2))
    save_adapter(network, Lora(rank=2), tmp_path, base="tiny")
    with pytest.raises(UserError, match="another model"):
        merge_adapter(random_network(tiny_config(intermediate_size=80)), tmp_path)
    with pytest.raises(UserError, match="has not"):
        merge_adapter(random_network(tiny_config(num_hidden_layers=2)), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="partner"):
        merge_adapter(random_network(tiny_config()), tmp_path)


def test_begins_with_a_saved_adapter(tmp_path: Path) -> None:
    lora = Lora(rank=4, also=("norms",))
    before, network = adapted(lora)
    save_adapter(network, lora, tmp_path, base="tiny")
    again = copy.deepcopy(before)
    add_lora(again, lora)
    begin_with(again, tmp_path)
    assert torch.equal(again.eval()(IDS), network.eval()(IDS))
    assert all(p.requires_grad for name, p in again.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (Lora(rank=3, alpha=6), "the adapter's rank"),
        (Lora(rank=4, alpha=4), "scales .* by 2 and this recipe by 1"),
        (Lora(rank=4, targets=("q_proj",)), "differ in"),
        (Lora(rank=4, also=("norms",)), "differ in"),
    ],
)
def test_refuses_to_begin_with_another_form(lora: Lora, said: str, tmp_path: Path) -> None:
    before, network = adapted(Lora(rank=4))
    save_adapter(network, Lora(rank=4), tmp_path, base="tiny")
    add_lora(before, lora)
    with pytest.raises(UserError, match=said):
        begin_with(before, tmp_path)
