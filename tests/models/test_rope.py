"""RopePlan against transformers' own functions, the formulas of the papers, and configs that contradict themselves."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longverse import UserError
from longverse.models.rope import RopePlan, implied_base, live_inv_freq, rotate
from tests.helpers import random_network, tiny_config

XVERSE_256K = RopePlan("dynamic", 500_000.0, 128, 2.0, 32_768)


def llama(head_dim: int, window: int, rope: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=window, rope_parameters=dict(rope)
    )


ropes = st.one_of(
    st.builds(lambda t: {"rope_type": "default", "rope_theta": t}, st.floats(100, 1e7)),
    st.builds(
        lambda t, f, kind: {"rope_type": kind, "rope_theta": t, "factor": f},
        st.floats(100, 1e7),
        st.floats(1, 32),
        st.sampled_from(["linear", "dynamic"]),
    ),
    st.builds(
        lambda t, f, low, wide: {
            "rope_type": "llama3",
            "rope_theta": t,
            "factor": f,
            "low_freq_factor": low,
            "high_freq_factor": low + wide,
            "original_max_position_embeddings": 64,
        },
        st.floats(100, 1e7),
        st.floats(1, 32),
        st.floats(0.5, 2),
        st.floats(0.5, 6),
    ),
    st.builds(
        lambda t, f, extra: {
            "rope_type": "yarn",
            "rope_theta": t,
            "factor": f,
            "original_max_position_embeddings": 64,
            **extra,
        },
        st.floats(100, 1e7),
        st.floats(1, 32),
        st.sampled_from(
            [
                {},
                {"beta_fast": 16.0, "beta_slow": 2.0},
                {"attention_factor": 1.2},
                {"mscale": 1.0, "mscale_all_dim": 0.7},
            ]
        ),
    ),
)


@settings(max_examples=150, deadline=None)
@given(ropes, st.sampled_from([4, 16, 64, 128]), st.integers(1, 4000))
def test_every_kind_equals_transformers(rope: dict[str, Any], head_dim: int, length: int) -> None:
    config = llama(head_dim, 256, rope)
    plan = RopePlan.from_config(config.to_dict())
    if rope["rope_type"] == "default":
        expected, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None, seq_len=length)
    torch.testing.assert_close(plan.inv_freq(length), expected, rtol=1e-5, atol=0)
    assert plan.attention_scaling == pytest.approx(scaling)


@settings(max_examples=60, deadline=None)
@given(ropes, st.sampled_from([16, 64]))
def test_written_parameters_mean_the_same_when_read_back(rope: dict[str, Any], head_dim: int) -> None:
    config = llama(head_dim, 256, rope).to_dict()
    plan = RopePlan.from_config(config)
    again = RopePlan.from_config({**config, "rope_parameters": plan.to_rope_parameters()})
    assert torch.equal(again.inv_freq(1000), plan.inv_freq(1000))
    assert again.attention_scaling == plan.attention_scaling


def test_the_base_of_the_256k_model() -> None:
    assert XVERSE_256K.base(262_144) == pytest.approx(7_829_416, abs=1)
    assert XVERSE_256K.base(262_144) == pytest.approx(500_000 * 15 ** (128 / 126))
    assert XVERSE_256K.base(32_768) == XVERSE_256K.base(1) == 500_000


def test_static_ntk_is_a_larger_base_everywhere() -> None:
    plan = RopePlan("ntk", 10_000.0, 64, 4.0)
    base = 10_000 * 4 ** (64 / 62)
    assert plan.base() == pytest.approx(base)
    assert plan.to_rope_parameters() == {"rope_type": "default", "rope_theta": plan.base()}
    # its point: the longest wavelength is stretched by exactly the factor
    plain = RopePlan("default", 10_000.0, 64)
    assert float(plain.inv_freq()[-1] / plan.inv_freq()[-1]) == pytest.approx(4.0, rel=1e-5)
    assert implied_base(plan.inv_freq()) == pytest.approx(base, rel=1e-4)


@given(st.integers(1, 100_000), st.integers(1, 9000))
def test_a_bucket_gives_near_lengths_one_base(length: int, bucket: int) -> None:
    plan = RopePlan("dynamic", 500_000.0, 128, 2.0, 4096, bucket=bucket)
    pinned = plan.pinned_length(length)
    assert length <= pinned < length + bucket
    assert plan.base(length) == plan.base(pinned) >= RopePlan("dynamic", 500_000.0, 128, 2.0, 4096).base(length)


def test_angles_per_row_and_per_token_equal_single_runs() -> None:
    plan = RopePlan("dynamic", 10_000.0, 16, 2.0, 32)
    positions = torch.arange(48)[None].expand(2, -1)
    lengths = torch.tensor([[40], [90]])
    cos, sin = plan.cos_sin(positions, lengths)
    for row, length in enumerate((40, 90)):
        alone = plan.cos_sin(positions[:1], length)
        assert torch.equal(cos[row], alone[0][0])
        assert torch.equal(sin[row], alone[1][0])
    per_token = plan.cos_sin(positions, lengths.expand(2, 48))
    assert torch.equal(per_token[0], cos)


def test_rotation_depends_on_distance_alone() -> None:
    plan = RopePlan("yarn", 10_000.0, 16, 4.0, 32)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(a: int, b: int) -> float:
        turned = []
        for x, position in ((q, a), (k, b)):
            cos, sin = plan.cos_sin(torch.tensor([[position]]), 64)
            turned.append(rotate(x, cos[:, None], sin[:, None]))
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(57, 53), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("abf:500000", "plain RoPE, base 500,000"),
        ("linear:4", "position interpolation, base 10,000, factor 4"),
        ("ntk:4", "static NTK"),
        ("dynamic:2", "dynamic NTK, base 10,000, factor 2 past 2,048 tokens"),
        ("dynamic:2:512", "past 512 tokens"),
        ("yarn:4", "YaRN"),
        ("abf:500_000,dynamic:2", "dynamic NTK, base 500,000, factor 2 past 2,048 tokens"),
    ],
)
def test_changes_are_read(change: str, says: str) -> None:
    current = RopePlan("default", 10_000.0, 64)
    assert says in RopePlan.parse(change, current, 2048).describe()


ODD = ["dynamic:2:inf", "dynamic:2:nan", "abf:1e300", "ntk:1e300", "linear:4,dynamic:2", "linear:1", "yarn:1"]


@pytest.mark.parametrize(
    "change",
    ["abf:10000", "default", "abf", "abf:x", "linear:0.5", "bogus:2", "abf:-1", "dynamic:2:0", "", "linear:nan", *ODD],
)
def test_changes_that_change_nothing_or_mean_nothing_are_refused(change: str) -> None:
    with pytest.raises(UserError):
        RopePlan.parse(change, RopePlan("default", 10_000.0, 64), 2048)


def test_a_change_of_nothing_says_so() -> None:
    with pytest.raises(UserError, match="changes nothing"):
        RopePlan.parse("dynamic:2:32768", XVERSE_256K, 32_768)


def test_a_change_keeps_what_it_does_not_name() -> None:
    dynamic = RopePlan("dynamic", 1e4, 16, 2.0, 512, bucket=64)
    assert RopePlan.parse("dynamic:4", dynamic, 1024) == RopePlan("dynamic", 1e4, 16, 4.0, 512, bucket=64)
    yarn = RopePlan("yarn", 1e4, 16, 2.0, 512, beta_fast=16.0)
    assert RopePlan.parse("yarn:8", yarn, 1024) == RopePlan("yarn", 1e4, 16, 8.0, 512, beta_fast=16.0)
    assert RopePlan.parse("abf:20000", dynamic, 1024).bucket == 64
    assert dynamic.trained_window == 512


def test_old_and_new_spellings_read_alike() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    old = {**sizes, "rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    new = {**sizes, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}}
    assert RopePlan.from_config(old) == RopePlan.from_config(new) == RopePlan("dynamic", 5e5, 16, 2.0, 128)
    assert RopePlan.from_config(sizes) == RopePlan("default", 10_000.0, 16)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "two RoPE bases"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            },
            "differ",
        ),
        ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 3}}, "does not know alpha"),
        ({"partial_rotary_factor": 0.5}, "Partly rotated"),
        ({"rope_theta": 0}, "above 1"),
    ],
)
def test_contradictory_configs_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        RopePlan.from_config({"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128, **fields})


def test_the_live_check_finds_a_step_that_transformers_ignored() -> None:
    """`config.rope_theta = 500000` is a no-op in transformers; the plan sees it on the live frequencies."""
    plan = RopePlan("default", 500_000.0, 16)
    config = AutoConfig.for_model("llama", **{k: v for k, v in tiny_config().items() if k != "model_type"})
    config.rope_theta = 500_000.0
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="runs RoPE base 10,000"):
        plan.verify(model)
    config.rope_parameters = plan.to_rope_parameters()
    plan.verify(AutoModelForCausalLM.from_config(config))


def test_the_live_check_on_our_network() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    network = random_network(tiny_config(rope_theta=None, rope_parameters=rope))
    plan = network.config.rope
    plan.verify(network, 1000)
    with pytest.raises(UserError, match="another head size"):
        RopePlan("default", 10_000.0, 32).verify(network)
    with pytest.raises(UserError, match="ignored"):
        RopePlan("default", 10_000.0, 16).verify(network, 1000)
    with pytest.raises(UserError, match="keeps no RoPE"):
        plan.verify(torch.nn.Linear(2, 2))
    assert list(live_inv_freq(network)) == ["model.rotary.inv_freq"]


def test_windows_after_a_change() -> None:
    assert RopePlan("linear", 1e4, 16, 4.0).window_after(1000) == 4000
    assert RopePlan("yarn", 1e4, 16, 4.0, 1000).window_after(1000) == 4000
    assert RopePlan("dynamic", 1e4, 16, 2.0, 1000).window_after(1000) == 2000
    assert RopePlan("default", 5e5, 16).window_after(1000) == 1000


def test_pinning_freezes_the_dynamic_base() -> None:
    plan = XVERSE_256K.pinned(262_144)
    assert plan.kind == "default"
    assert torch.allclose(plan.inv_freq(1), XVERSE_256K.inv_freq(262_144))
    assert math.isclose(plan.theta, 7_829_416, rel_tol=1e-6)


@pytest.mark.parametrize("change", ["dynamic:2", "yarn:4"])
def test_a_llama3_plan_is_replaced_past_the_trained_window(change: str) -> None:
    """Its own original window is a yardstick of wavelengths, not what the model was trained for."""
    llama3 = RopePlan("llama3", 500_000.0, 64, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert RopePlan.parse(change, llama3, 131_072).original_window == 131_072


def test_a_key_that_says_nothing_of_angles() -> None:
    config = {"head_dim": 64, "max_position_embeddings": 131_072}
    yarn = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    with_key = RopePlan.from_config(config | {"rope_scaling": yarn | {"finetuned": True}})
    assert with_key == RopePlan.from_config(config | {"rope_scaling": yarn})
