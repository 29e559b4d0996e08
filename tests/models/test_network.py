"""The network against transformers' Llama, Qwen2, Qwen3 and Mistral classes with the same weights; attention and the
cache against the naive reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse import UserError
from longverse.models.attention import chunk_attention, one_shot_attention, reference_attention
from longverse.models.cache import KVCache
from longverse.models.network import CausalLM, NetworkConfig
from tests.helpers import random_network, tiny_config, transformers_twin

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": tiny_config("llama"),
    "llama grouped, tied, biases": tiny_config(
        "llama", num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama yarn": tiny_config("llama", rope_theta=None, rope_parameters=YARN),
    "llama 3": tiny_config("llama", num_key_value_heads=1, rope_theta=None, rope_parameters=LLAMA3),
    "llama linear": tiny_config("llama", rope_scaling={"type": "linear", "factor": 8.0}),
    "mistral": tiny_config("mistral", num_key_value_heads=2, sliding_window=None),
    "qwen2": tiny_config("qwen2", num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": tiny_config("qwen3", num_key_value_heads=2, head_dim=32),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_transformers(config: dict[str, Any]) -> None:
    network = random_network(config)
    twin = transformers_twin(network, config)
    ids = torch.randint(0, config["vocab_size"], (2, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = network(ids), twin(ids).logits
    assert theirs.abs().max() > 1  # the logits say something
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "gpt2"}, "Llama-shaped"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"vocab_size": 0}, "at least 1"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": "abc"}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor"),
    ],
)
def test_foreign_configs_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        NetworkConfig.from_dict(tiny_config(**fields))


def test_an_incomplete_config_is_named() -> None:
    config = tiny_config()
    del config["intermediate_size"]
    with pytest.raises(UserError, match="lacks intermediate_size"):
        NetworkConfig.from_dict(config)


def test_windows() -> None:
    assert NetworkConfig.from_dict(tiny_config()).window == 128
    assert NetworkConfig.from_dict(tiny_config("mistral", sliding_window=64)).window == 64
    assert NetworkConfig.from_dict(tiny_config("qwen2", sliding_window=64, use_sliding_window=False)).window == 128
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert NetworkConfig.from_dict(tiny_config(rope_theta=None, rope_parameters=dynamic)).window == 256
    stated = tiny_config(rope_theta=None, rope_parameters=dynamic, context_window=1024)
    assert NetworkConfig.from_dict(stated).window == 1024


def test_a_plan_changed_by_hand_keeps_a_window_that_it_does_not_touch() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    long = NetworkConfig.from_dict(tiny_config(rope_theta=None, rope_parameters=dynamic, context_window=1024))
    assert long.with_rope("abf:500000").window == 1024
    assert long.with_rope("linear:4").window == 512  # of the window before dynamic NTK stretched it
    assert NetworkConfig.from_dict(tiny_config()).with_rope("dynamic:2").window == 256


def test_parameter_shapes_are_the_checkpoints() -> None:
    shapes = NetworkConfig.from_dict(tiny_config(tie_word_embeddings=True, num_key_value_heads=2)).parameter_shapes()
    assert "lm_head.weight" not in shapes
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["model.embed_tokens.weight"] == (151, 64)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(1, 40),
    st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    st.sampled_from([16, 64]),
    st.data(),
)
def test_chunk_attention_equals_the_reference(
    past: int, new: int, heads: tuple[int, int], size: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    q = torch.randn(1, heads[0], new, size, generator=generator)
    k, v = torch.randn(2, 1, heads[1], past + new, size, generator=generator)
    expected = reference_attention(q, k, v)
    torch.testing.assert_close(chunk_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)
    if past == 0:
        torch.testing.assert_close(one_shot_attention(0, q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_chunk_attention_in_bfloat16_stays_within_its_rounding() -> None:
    q = torch.randn(1, 6, 33, 64)
    k, v = torch.randn(2, 1, 2, 200, 64)
    low = chunk_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert (low.float() - reference_attention(q, k, v)).abs().max() < 0.03


def run_in_chunks(network: CausalLM, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits [1, T, V] of `ids` read in chunks of the given sizes (the last one repeats) through a cache."""
    shape, total = network.config, ids.shape[1]
    cache = KVCache(shape.num_layers, shape.num_kv_heads, shape.head_dim, total, torch.float32)
    logits, begin, turn = [], 0, 0
    while begin < total:
        end = min(total, begin + sizes[min(turn, len(sizes) - 1)])
        positions = torch.arange(begin, end)[None]
        with torch.no_grad():
            logits.append(network(ids[:, begin:end], positions, cache.rope_length, cache.attend))
        cache.advance(end - begin)
        begin, turn = end, turn + 1
    assert cache.length == total
    return torch.cat(logits, dim=1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_any_chunking_gives_the_one_shot_logits(sizes: list[int]) -> None:
    network = random_network(CONFIGS["llama grouped, tied, biases"])
    ids = torch.randint(0, 151, (1, 110), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = network(ids)
    torch.testing.assert_close(run_in_chunks(network, ids, sizes), whole, rtol=1e-3, atol=2e-4)


def test_a_cache_refuses_more_than_was_planned() -> None:
    cache = KVCache(1, 1, 4, 3, torch.float32)
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(UserError, match="would hold 4 tokens and was planned for 3"):
        cache.attend(0, x, x, x)
    with pytest.raises(UserError, match="at least 1"):
        KVCache(1, 1, 4, 0, torch.float32)


def test_a_pass_broken_off_leaves_the_cache_as_it_was() -> None:
    network = random_network(CONFIGS["llama"])
    ids = torch.randint(0, 151, (1, 40))
    shape = network.config
    cache = KVCache(shape.num_layers, shape.num_kv_heads, shape.head_dim, 40, torch.float32)

    def read(begin: int, end: int, attend: Any) -> torch.Tensor:
        with torch.no_grad():
            return network(ids[:, begin:end], torch.arange(begin, end)[None], 40, attend)

    read(0, 20, cache.attend)
    cache.advance(20)

    def breaks(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        if layer == 1:
            raise KeyboardInterrupt
        return cache.attend(layer, *qkv)

    with pytest.raises(KeyboardInterrupt):
        read(20, 40, breaks)
    assert cache.length == 20
    after = read(20, 40, cache.attend)
    with torch.no_grad():
        torch.testing.assert_close(after, network(ids)[:, 20:], rtol=1e-3, atol=2e-4)


def test_bytes_per_token() -> None:
    assert KVCache(3, 2, 16, 10, torch.bfloat16).bytes_per_token == 2 * 3 * 2 * 16 * 2


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    network = random_network(CONFIGS["qwen3"]).train()
    ids = torch.randint(0, 151, (2, 30))
    grads = []
    for checkpointing in (False, True):
        network.model.gradient_checkpointing = checkpointing
        network.zero_grad()
        network(ids).logsumexp(-1).mean().backward()
        grads.append(network.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_the_window_of_dual_chunk_attention_ends_where_that_attention_begins() -> None:
    config = tiny_config("qwen2", max_position_embeddings=1_010_000)
    dual = {"chunk_size": 262_144, "original_max_position_embeddings": 262_144}
    assert NetworkConfig.from_dict(config | {"dual_chunk_attention_config": dual}).window == 262_144
