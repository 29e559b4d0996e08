"""int8 and int4 weights: the arithmetic, the saved form, the kernels, whole checkpoints, the standard's own reader."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.errors import UserError
from longverse.models import calibrate, quant_linear
from longverse.models.calibrate import gptq_rows
from longverse.models.checkpoint import load
from longverse.models.export import export, kl_mean
from longverse.models.quant_linear import (
    QuantFormat,
    QuantLinear,
    dequantize_rows,
    load_form,
    pack_bits,
    quantize_network,
    quantize_rows,
    read_form,
    save_form,
    unpack_bits,
    write_form,
)
from longverse.models.quantize import Quantizer, quantize
from longverse.models.shards import TensorFolder
from tests.helpers import random_network, tiny_config
from tests.models.folders import save_folder
from tests.models.official_layout import make_official

FORMS = [
    QuantFormat(8, 0, True),
    QuantFormat(8, 0, False),
    QuantFormat(8, 64, False),
    QuantFormat(8, 32, True),
    QuantFormat(4, 32, False),
    QuantFormat(4, 64, True),
    QuantFormat(4, 128, False),
]
IDS = torch.arange(4, 104).view(2, 50)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGVERSE_CACHE", str(tmp_path / "cache"))


def weight(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def naive(matrix: torch.Tensor, form: QuantFormat) -> torch.Tensor:
    """Round to nearest, one group at a time, in plain float64."""
    out = torch.empty_like(matrix, dtype=torch.float64)
    size = form.group or matrix.shape[1]
    top = 2**form.bits - 1
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], size):
            values = matrix[row, start : start + size].double()
            if form.symmetric:
                step = float((values.abs().max() / (top / 2)).float())
                levels = (values / step + 2 ** (form.bits - 1)).round().clamp(0, top)
                out[row, start : start + size] = (levels - 2 ** (form.bits - 1)) * step
            else:
                low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
                step = float(torch.tensor((high - low) / top).float())
                zero = round(-low / step)
                levels = ((values / step) + zero).round().clamp(0, top)
                out[row, start : start + size] = (levels - zero) * step
    return out


# ---- arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rounding_is_that_of_the_naive_reference(form: QuantFormat) -> None:
    matrix = weight(8, 128)
    found = dequantize_rows(*quantize_rows(matrix, form, torch.float32), form.bits, torch.float32)
    step = 2 * matrix.abs().amax() / (2**form.bits - 1)
    different = (found - naive(matrix, form)).abs() > 1e-5
    assert different.float().mean() < 0.01  # ties may fall either way
    assert (found - matrix).abs().max() <= 0.51 * step.abs() + 1e-6


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_weight_survives(form: QuantFormat, scale: float, shift: float, seed: int, dtype: torch.dtype) -> None:
    matrix = ((weight(8, 128, seed) + shift) * scale).to(dtype)
    matrix[0] = 0
    saved = save_form(matrix, form, dtype)
    assert {name: tuple(t.shape) for name, t in saved.items()} == form.shapes(8, 128)
    found = load_form(saved, form, torch.float32)
    spread = matrix.float().amax().clamp(min=0) - matrix.float().amin().clamp(max=0)
    span = torch.maximum(spread, 2 * matrix.float().abs().amax()) / (2**form.bits - 1)
    slack = 0.02 if dtype == torch.bfloat16 else 1e-5  # a scale rounded to bfloat16 shortens the range
    assert ((found - matrix.float()).abs() <= 0.51 * span + slack * matrix.float().abs().amax()).all()
    assert (found[0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_are_packed_lowest_first(bits: int) -> None:
    q = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8)
    packed = pack_bits(q, bits)
    assert packed.shape == (3, 64 * bits // 32)
    per = 32 // bits
    for place in (0, 1, per - 1, per, 63):
        word = int(packed[2, place // per]) & 0xFFFFFFFF
        assert (word >> (place % per * bits)) & (2**bits - 1) == int(q[2, place])
    assert torch.equal(unpack_bits(packed, bits), q)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_blocks_in_threads_give_what_one_call_gives(form: QuantFormat) -> None:
    matrix = weight(1000, 256)
    threads = torch.get_num_threads()
    with Quantizer(form, torch.bfloat16) as quantizer:
        found = quantizer(matrix)
    expected = save_form(matrix, form)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.get_num_threads() == threads


# ---- the layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [192, 72])  # a multiple of the kernel's block, and not
def test_every_path_of_the_layer_is_the_dequantised_product(
    form: QuantFormat, dtype: torch.dtype, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = torch.nn.Linear(256, outputs, bias=True).to(dtype)
    layer = QuantLinear.from_linear(linear, form)
    whole = layer.dequantized(dtype)
    assert torch.equal(whole, load_form(save_form(linear.weight.detach(), form, layer.weight_scale.dtype), form, dtype))
    x = torch.randn(2, 150, 256).to(dtype)
    bias = linear.bias
    assert bias is not None
    expected = x.float() @ whole.float().T + bias.float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    with torch.no_grad():
        assert (layer(x) - expected).abs().max() < tolerance
        layer.pack(dtype)
        assert (layer.dequantized(dtype).float() - whole.float()).abs().max() <= (
            1e-7 if dtype == torch.float32 else 1e-2
        )
        assert (layer(x) - expected).abs().max() < tolerance  # many tokens
        assert (layer(x[:, :1]) - expected[:, :1]).abs().max() < tolerance  # one token a row: the packed kernel
        monkeypatch.setattr(quant_linear, "PACKED_TOKENS", dict.fromkeys(quant_linear.PACKED_TOKENS, 10**9))
        assert (layer(x) - expected).abs().max() < tolerance


def test_the_int4_layout_is_torchs_own() -> None:
    block = quant_linear.int4_block()
    if not block:
        pytest.skip("this processor lays int4 weights out in another way; the plain path is taken")
    q = torch.randint(0, 16, (4 * block, 96), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
    assert torch.equal(quant_linear.int4_layout(pack_bits(q.to(torch.uint8), 4), block), packed)


def test_a_live_network_is_quantised_in_place_but_for_its_head() -> None:
    network = random_network(tiny_config(**SIZES))
    with torch.no_grad():
        before = network(IDS).log_softmax(-1)
        assert quantize_network(network, 8) == []
        after = network(IDS).log_softmax(-1)
    assert isinstance(network.lm_head, torch.nn.Linear)
    assert isinstance(network.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)
    assert (before.exp() * (before - after)).sum(-1).mean() < 5e-3


def test_layers_that_do_not_fit_are_left_and_named() -> None:
    network = random_network(tiny_config(intermediate_size=100))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    left = quantize_network(network, 4)
    after = network.state_dict()
    assert after.keys() == before.keys()  # nothing was changed
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert sorted({name.rpartition(".")[2] for name in left}) == ["down_proj", "gate_proj", "up_proj"]


def test_a_live_network_that_is_not_finite_stays_whole() -> None:
    network = random_network(tiny_config(**SIZES))
    network.get_submodule("model.layers.2.mlp.up_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layers.2.mlp.up_proj.weight holds numbers"):
        quantize_network(network, 8)
    assert not any(isinstance(module, QuantLinear) for module in network.modules())


def test_the_saved_parts_are_let_go_once_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "m", tiny_config(**SIZES))
    quantize(str(tmp_path / "m"), tmp_path / "q", bits=4, group=32)
    gone: list[int] = []
    monkeypatch.setattr(TensorFolder, "forget", lambda self, tensor: gone.append(tensor.nbytes))
    load(str(tmp_path / "q"), device="cpu")
    infos = TensorFolder(tmp_path / "q").infos
    repacked = [infos[name].nbytes for name in infos if name.endswith((".weight_packed", ".weight_zero_point"))]
    assert len(repacked) == 2 * 7 * 3
    if quant_linear.int4_block():
        assert sum(gone) >= sum(repacked)


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, None, None), (8, 64, False), (4, 32, None), (4, 64, True), (4, 64, None)]
)
def test_a_quantised_folder_runs_as_its_dequantised_export(
    tmp_path: Path, bits: int, group: int | None, symmetric: bool | None
) -> None:
    folder, _ = make_official(tmp_path)
    written = quantize(str(folder), tmp_path / "q", bits=bits, group=group, symmetric=symmetric, shard_bytes=100_000)
    assert written.shards > 1
    names = TensorFolder(tmp_path / "q").infos
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names)
    quantised = load(str(tmp_path / "q"), dtype="float32", device="cpu")
    full = load(str(folder), dtype="float32", device="cpu")
    with torch.no_grad():
        expected, found = (m.network(IDS, rope_length=60).log_softmax(-1) for m in (full, quantised))
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < kl < (0.01 if bits == 8 else 1.0)
    assert quantised.network.config == full.network.config
    _, check = export(str(tmp_path / "q"), tmp_path / "plain", dtype="float32")
    assert check is not None
    assert check.passed, check


def test_quantising_twice_and_unfit_groups_are_refused(tmp_path: Path) -> None:
    save_folder(tmp_path / "m", tiny_config(**{**SIZES, "intermediate_size": 160}))
    with pytest.raises(UserError, match="use a group of 32"):
        quantize(str(tmp_path / "m"), tmp_path / "q", bits=4, group=64)
    quantize(str(tmp_path / "m"), tmp_path / "q", bits=4, group=32)
    with pytest.raises(UserError, match="quantised already"):
        quantize(str(tmp_path / "q"), tmp_path / "qq", bits=8)
    for bits, group, says in ((3, None, "8 or 4 bits"), (4, 48, "group of 48"), (4, 0, "loses too much")):
        with pytest.raises(UserError, match=says):
            quantize(str(tmp_path / "m"), tmp_path / "x", bits=bits, group=group)


def test_other_quantised_forms_are_refused_by_name(tmp_path: Path) -> None:
    save_folder(tmp_path / "m", {**tiny_config(), "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(UserError, match="quantised by gptq"):
        load(str(tmp_path / "m"), device="cpu")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_config_says_the_form(form: QuantFormat) -> None:
    assert read_form({"quantization_config": json.loads(json.dumps(write_form(form, ["lm_head"])))}) == form


def test_a_missing_part_of_a_quantised_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_folder(tmp_path / "m", tiny_config(**SIZES))
    quantize(str(tmp_path / "m"), tmp_path / "q", bits=4)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight_scale"):
        load(str(tmp_path / "q"), device="cpu")


# ---- calibration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gptq_serves_the_output_better_than_rounding(form: QuantFormat) -> None:
    matrix = weight(64, 256)
    mixing = weight(256, 256, 1) + 2 * torch.eye(256)
    x = weight(2000, 256, 2) @ mixing  # correlated inputs: what GPTQ makes use of
    x[:, 7] = 0  # an input that is never on
    levels = gptq_rows(matrix, x.T @ x, form, torch.float32)
    nearest = quantize_rows(matrix, form, torch.float32)
    assert [t.shape for t in levels if t is not None] == [t.shape for t in nearest if t is not None]
    errors = [
        (x @ (dequantize_rows(*found, form.bits, torch.float32) - matrix).T).square().mean()
        for found in (levels, nearest)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_gptq_on_white_inputs_is_rounding() -> None:
    matrix, form = weight(16, 128), QuantFormat(4, 32, False)
    levels = gptq_rows(matrix, torch.eye(128), form, torch.float32)
    assert torch.equal(levels[0], quantize_rows(matrix, form, torch.float32)[0])


def test_a_calibrated_folder_is_nearer_on_its_kind_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SAMPLE", 64)
    save_folder(tmp_path / "m", tiny_config(**SIZES))
    text = "the thin thane in an inn " * 60
    for name, chosen in (("near", None), ("gptq", text)):
        quantize(str(tmp_path / "m"), tmp_path / name, bits=4, group=32, calibration=chosen)
    models = [load(str(tmp_path / name), dtype="float32", device="cpu") for name in ("m", "near", "gptq")]
    ids = torch.tensor([models[0].tokenizer.encode(text)[:100]])
    with torch.no_grad():
        full, near, gptq = (model.network(ids).log_softmax(-1) for model in models)
    assert kl_mean(full, gptq) < kl_mean(full, near)
    with pytest.raises(UserError, match="calibration text has 1 tokens"):
        quantize(str(tmp_path / "m"), tmp_path / "x", bits=4, group=32, calibration="the")
    assert not (tmp_path / "x").exists()


# ---- others read what we write -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_standards_own_library_unpacks_the_same_weight(form: QuantFormat) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    saved = save_form(weight(64, 256), form, torch.float32)
    stated = write_form(form, ["lm_head"])["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(stated)
    theirs = PackedQuantizationCompressor.decompress(dict(saved), scheme)["weight"]
    assert torch.allclose(theirs.float(), load_form(saved, form, torch.float32), atol=1e-6)


# Zero points are left out: transformers 5.23 with compressed-tensors 0.20 expects them unpacked, against the format.
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, 64)])
def test_transformers_reads_it_through_compressed_tensors(tmp_path: Path, bits: int, group: int | None) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    save_folder(tmp_path / "m", tiny_config(**SIZES))
    quantize(str(tmp_path / "m"), tmp_path / "q", bits=bits, group=group, symmetric=True)
    ours = load(str(tmp_path / "q"), dtype="float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (ours.network(IDS) - theirs(IDS).logits).abs().max() < 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "xverse"])
def test_lora_attaches_trains_and_merges(tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    import longverse  # noqa: F401 - registers XVERSE

    settings = dict(tiny_config(family))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config).float()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    )
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    before = wrapped(IDS, labels=IDS).loss
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(IDS, labels=IDS).loss.backward()
        optimizer.step()
    wrapped.eval()
    with torch.no_grad():
        attached = wrapped(IDS).logits
        merged = wrapped.merge_and_unload()
        assert type(merged) is type(model)
        assert (merged(IDS).logits - attached).abs().max() < 1e-4
        assert merged(IDS, labels=IDS).loss < before
