"""QLoRA: the gradients of LoRA over the dequantised weights, at a quarter of the memory; trained, merged, taken up."""

import copy
from pathlib import Path

import pytest
import torch

from longverse.errors import UserError
from longverse.models.adapters import merge_adapter
from longverse.models.checkpoint import load
from longverse.models.convert import convert
from longverse.models.network import CausalLM
from longverse.models.quant_linear import QuantLinear
from longverse.models.quantize import quantize
from longverse.train.config import Lora
from longverse.train.lora import LoraLinear, add_lora, lora_layers, merge, merged
from longverse.train.run import run_recipe
from longverse.train.trainer import read_log
from tests.helpers import random_network, tiny_config
from tests.train.common import recipe, tiny_folder, write_messages

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192}
IDS = torch.randint(0, 151, (2, 40), generator=torch.Generator().manual_seed(1))


def moved(network: CausalLM) -> CausalLM:
    """The network with an adapter that is no longer zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in lora_layers(network).values():
            layer.lora_B += 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
    return network


def pair() -> tuple[CausalLM, CausalLM]:
    """LoRA over int4 weights, and the same adapter over the weights that these stand for, as plain layers."""
    quantised = random_network(tiny_config(**SIZES))
    add_lora(quantised, Lora(rank=4, bits=4), seed=3)
    plain = random_network(tiny_config(**SIZES))
    add_lora(plain, Lora(rank=4), seed=3)
    for name, layer in lora_layers(quantised).items():
        assert isinstance(layer.base, QuantLinear)
        plain.get_submodule(name).base.weight = torch.nn.Parameter(layer.base.dequantized(torch.float32), False)
    return moved(quantised), moved(plain)


def test_gradients_are_those_over_the_dequantised_weights() -> None:
    found = []
    for network in pair():
        network.train()
        hidden = network.model.embed_tokens(IDS).detach().requires_grad_()
        positions = torch.arange(IDS.shape[1])[None]
        network.model(hidden, positions, IDS.shape[1]).square().sum().backward()
        found.append([hidden.grad, *(p.grad for p in network.parameters() if p.requires_grad)])
    assert len(found[0]) == 1 + 3 * 7 * 2
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


def test_nothing_but_the_quantised_weight_waits_for_the_backward_pass() -> None:
    network, _ = pair()
    layer = network.train().model.layers[0].mlp.gate_proj
    assert isinstance(layer, LoraLinear)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(1, 5, 128, requires_grad=True))
    assert all(tensor.numel() < 128 * 192 for tensor in kept)
    held = sum(buffer.nbytes for buffer in layer.base.buffers())
    assert held < 0.2 * 4 * 128 * 192  # 4 bits and the scales, against float32


def test_merging_a_few_targets_leaves_nothing_in_few_bits() -> None:
    network = random_network(tiny_config(**SIZES))
    add_lora(network, Lora(rank=4, bits=4, targets=("q_proj", "v_proj")), seed=3)
    logits = moved(network).eval()(IDS)
    merge(network)
    assert not any(isinstance(module, QuantLinear) for module in network.modules())
    assert set(network.config.parameter_shapes()) <= set(network.state_dict())
    torch.testing.assert_close(network(IDS), logits, rtol=1e-3, atol=1e-4)


def test_merge_is_exact() -> None:
    network, plain = pair()
    logits = network.eval()(IDS)
    assert torch.equal(logits, plain.eval()(IDS))
    with merged(network):
        assert torch.equal(network(IDS), logits)
    other = copy.deepcopy(network)
    merge(other)
    assert torch.equal(other(IDS), logits)
    assert not any(isinstance(module, QuantLinear) for module in other.modules())


def test_a_width_that_no_group_divides_is_refused() -> None:
    with pytest.raises(UserError, match="leave 'bits' out"):
        add_lora(random_network(tiny_config(intermediate_size=72)), Lora(bits=4))
    with pytest.raises(UserError, match="4 bits, not 8"):
        Lora(bits=8)


@pytest.mark.parametrize(("source", "precision"), [("live", "fp32"), ("folder", "bf16")])
def test_a_run_over_four_bits(tmp_path: Path, source: str, precision: str) -> None:
    """Quantised on the way, or taken from a quantised folder: the same losses, near those of plain LoRA."""
    model = plain_model = tiny_folder(tmp_path / "model", **SIZES)
    data = write_messages(tmp_path / "m.jsonl")
    stage = {"steps": 8, "learning_rate": 5e-3}
    run_recipe(recipe(model, data, stage, precision=precision), tmp_path / "plain")
    if source == "folder":
        quantize(str(model), tmp_path / "small", bits=4)
        model = tmp_path / "small"
    plan = recipe(model, data, stage, lora={"rank": 4, "bits": 4}, precision=precision)
    outcome = run_recipe(plan, tmp_path / "out", write_merged=True)
    losses = [[line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in ("plain", "out")]
    assert losses[1] == pytest.approx(losses[0], rel=0.15)
    assert losses[1][-1] < losses[1][0]
    assert outcome.model is not None
    assert outcome.adapter is not None
    whole = load(str(outcome.model), dtype="float32")
    assert "quantization_config" not in whole.config
    assert "QLoRA" in (outcome.adapter / "README.md").read_text()
    # The adapter, over the weights that the four bits stand for, is the merged model (it is kept in bf16).
    network = load(str(plain_model), dtype="float32").network
    add_lora(network, Lora(rank=1, bits=4))
    merge(network)  # dequantised, with an update of zero
    before = network(IDS % 90)
    merge_adapter(network, outcome.adapter)
    expected = whole.network(IDS % 90)
    near = 0.05 if precision == "fp32" else 0.4  # in bf16 the weights themselves are rounded anew
    assert (network(IDS % 90) - expected).abs().mean() < near * (before - expected).abs().mean()


@pytest.mark.parametrize("form", [{"bits": 4, "group": 32}, {"bits": 8}, {"bits": 4, "group": 32, "symmetric": True}])
def test_an_adapter_over_a_quantised_folder_is_loaded(tmp_path: Path, form: dict[str, int]) -> None:
    """By its own name: the base's weights as its integers say, and the adapter's sum; converting gives the same."""
    tiny_folder(tmp_path / "model", **SIZES)
    quantize(str(tmp_path / "model"), tmp_path / "small", **form)  # type: ignore[arg-type]
    plan = recipe(tmp_path / "small", write_messages(tmp_path / "m.jsonl"), {"steps": 3})
    outcome = run_recipe(plan, tmp_path / "out")
    loaded = load(str(outcome.adapter), dtype="float32")
    assert not any(isinstance(module, QuantLinear) for module in loaded.network.modules())
    assert any("merged in" in note for note in loaded.notes)
    convert(str(tmp_path / "small"), tmp_path / "plain", dtype="float32")
    expected = load(str(tmp_path / "plain"), dtype="float32").network
    before = expected(IDS)
    merge_adapter(expected, outcome.adapter)  # type: ignore[arg-type]
    merged_in = expected(IDS)
    torch.testing.assert_close(loaded.network(IDS), merged_in, rtol=1e-4, atol=1e-4)
    assert float((merged_in - before).abs().max()) > 1e-2
    convert(str(outcome.adapter), tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(
        load(str(tmp_path / "merged"), dtype="float32").network(IDS), loaded.network(IDS), rtol=1e-4, atol=1e-4
    )
