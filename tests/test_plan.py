"""The planner's arithmetic, against FACTS known from the model family and against the bytes of live networks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse import UserError
from longverse.commands_plan import shape_of
from longverse.inference import rates as rates_module
from longverse.models.cache import FORMATS, KVCache
from longverse.models.network import NetworkConfig
from longverse.models.quant_linear import quantize_network
from longverse.models.releases import RELEASES
from longverse.plan import (
    CACHES,
    CARDS,
    ORDER,
    SLACK,
    Rates,
    Shape,
    card_rates,
    find_card,
    group_limits,
    make_plan,
    memory_of_machine,
    parse_bytes,
    parse_tokens,
    prefill_seconds,
    token_seconds,
)
from tests.helpers import random_network, tiny_config

GIB = 2**30
LONG = Shape.from_config(next(r for r in RELEASES if r.name == "XVERSE-13B-256K").config(), "XVERSE-13B-256K")
CONTEXT = 262_144


# ---- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * GIB), ("500 mb", 500 * 10**6), ("20G", 20 * 10**9), ("1.5TiB", 3 * 2**39),
     ("4096", 4096), ("0,5gb", 5 * 10**8)],
)  # fmt: skip
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "count"), [("256K", CONTEXT), ("1M", 2**20), ("8192", 8192), ("32_768", 32_768), ("1.5k", 1536)]
)
def test_lengths_in_tokens(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "many", "80 XB", "1e9", "nan"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no amount of memory: write it like 80GB"):
        parse_bytes(text)
    with pytest.raises(UserError, match="no length in tokens: write it like 256K"):
        parse_tokens(text)


# ---- the 13B model at 262,144 tokens -----------------------------------------------------------------------


def test_the_published_figures_of_the_13b_model() -> None:
    assert LONG.weights_bytes("bf16") / GIB == pytest.approx(25.6, abs=0.05)
    cache = {form: CONTEXT * LONG.cache_bytes_per_token(form) / GIB for form in CACHES}
    assert cache["full"] == 200.0
    assert cache["int8"] == 100 * (1 + 2 / 64)  # a bf16 scale for 64 numbers
    assert cache["int4"] == 50 * (1 + 4 / 32)  # a scale and an offset for 64 numbers
    # 6.9e15 counts the head for every token; while reading it is needed for the last one alone.
    assert LONG.linear_flops(CONTEXT, heads=CONTEXT) == pytest.approx(6.9e15, rel=0.01)
    assert LONG.linear_flops(CONTEXT) == pytest.approx(6.65e15, rel=0.01)
    assert LONG.attention_flops(CONTEXT) == pytest.approx(2.8e16, rel=0.01)
    assert LONG.window == CONTEXT


def test_the_13b_model_fits_one_80_gb_card_in_int8_and_int4() -> None:
    card, remark = find_card("80GB")
    plan = make_plan(LONG, CONTEXT, card.memory, card_rates(card), gpu=True)
    assert plan.choice is not None
    assert (plan.choice.weights, plan.choice.cache) == ("int8", "int4")
    assert "since no card was named" in remark
    assert not plan.measured
    small = make_plan(LONG, CONTEXT, 24 * 10**9, None)
    assert small.choice is None
    assert "Nothing fits" in small.reason
    longest = int(small.reason.split("a context of ")[1].split()[0].replace(",", ""))
    assert make_plan(LONG, longest, 24 * 10**9, None).choice is not None
    assert make_plan(LONG, longest + 4096, 24 * 10**9, None).choice is None


def test_every_release_has_the_shape_of_its_name() -> None:
    for release in RELEASES:
        shape = Shape.from_config(release.config(), release.name)
        size = float(release.name.split("-")[1].removesuffix("B"))
        assert shape.parameters / 1e9 == pytest.approx(size, rel=0.08)
        assert shape.window == release.window == NetworkConfig.from_dict(release.config()).window


# ---- against live networks ---------------------------------------------------------------------------------

SHAPES = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([2, 4, 8]),
        "num_key_value_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([8, 16, 64]),
        "hidden_size": st.sampled_from([64, 128]),
        "intermediate_size": st.sampled_from([64, 192]),
        "tie_word_embeddings": st.booleans(),
    }
)


@settings(max_examples=15, deadline=None)
@given(changes=SHAPES)
def test_bytes_are_those_of_the_network_and_its_caches(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    shape, network = Shape.from_config(config), random_network(config)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in network.state_dict().values()}
    assert shape.weights_bytes("float32") == sum(held.values())
    for form in FORMATS:
        cache = KVCache(
            shape.layers, shape.kv_heads, shape.head_dim, 10, torch.bfloat16, "meta" if form == "full" else "cpu",
            format=form,
        )  # fmt: skip
        assert shape.cache_bytes_per_token(form) == cache.bytes_per_token


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_quantised_weights(bits: int) -> None:
    config = tiny_config(hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2)
    network = random_network(config).bfloat16()
    assert quantize_network(network, bits) == []
    held = sum({tensor.data_ptr(): tensor.nbytes for tensor in network.state_dict().values()}.values())
    assert Shape.from_config(config).weights_bytes(f"int{bits}") == pytest.approx(held, rel=0.002)


def test_the_shape_is_the_networks() -> None:
    config = tiny_config("qwen2", num_key_value_heads=2, sliding_window=None, tie_word_embeddings=True)
    shape, network = Shape.from_config(config), NetworkConfig.from_dict(config)
    for ours, theirs in (("layers", "num_layers"), ("kv_heads", "num_kv_heads"), ("head_dim", "head_dim")):
        assert getattr(shape, ours) == getattr(network, theirs)
    for rope in ({"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}):
        config = tiny_config(rope_theta=None, rope_parameters={**rope, "rope_theta": 1e4})
        assert Shape.from_config(config).window == NetworkConfig.from_dict(config).window == 512
    with pytest.raises(UserError, match="intermediate_size is None"):
        Shape.from_config({key: value for key, value in config.items() if key != "intermediate_size"})
    with pytest.raises(UserError, match="hidden_size is 'big'"):
        Shape.from_config(config | {"hidden_size": "big"})


# ---- plans -------------------------------------------------------------------------------------------------


def test_a_cards_forecast_is_what_the_card_printed() -> None:
    """A token written by the 13B shape at 256K on an H200 (benchmarks/gpu_13b.py), within a tenth."""
    rates = card_rates(find_card("H200")[0])
    printed = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "gpu_13b.json").read_text())
    for name, row in printed["rows"].items():
        weights, cache = name.split()[0], name.split()[2]
        forecast = token_seconds(LONG, printed["context"], rates, weights, cache)
        assert forecast == pytest.approx(row["token_seconds"], rel=0.1), name


@settings(max_examples=60, deadline=None)
@given(
    context=st.integers(1, 2**20),
    memory=st.integers(10**9, 10**12),
    card=st.sampled_from(CARDS),
    reach=st.integers(1, 8192),
)
def test_any_plan_is_sound(context: int, memory: int, card: Any, reach: int) -> None:
    plan = make_plan(LONG, context, memory, card_rates(card), gpu=True)
    assert len(plan.options) == 9
    chosen = plan.choice
    for option in plan.options:
        assert option.fits == (option.total_bytes <= SLACK * memory)
    fitting = [(option.weights, option.cache) for option in plan.options if option.fits]
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert (chosen.weights, chosen.cache) == min(fitting, key=ORDER.index)
    assert LONG.attention_flops(context, reach) <= LONG.attention_flops(context)
    json.dumps(plan.to_json())


@given(text=st.lists(st.integers(1, 10**6), min_size=2, max_size=5).map(sorted))
def test_reading_in_two_parts_takes_as_long_as_in_one(text: list[int]) -> None:
    rates = card_rates(CARDS[0])
    whole = prefill_seconds(LONG, text[-1], rates, "bf16", "full")
    parts = sum(
        prefill_seconds(LONG, end, rates, "bf16", "full", begin=begin)
        for begin, end in zip([0, *text[:-1]], text, strict=True)
    )
    head = LONG.linear_flops(0) / rates.linear["bf16"]
    assert parts == pytest.approx(whole + (len(text) - 1) * head)
    seconds = [token_seconds(LONG, held, rates, "int8", "int4") for held in text]
    assert seconds == sorted(seconds)


def test_times_are_operations_and_bytes_over_rates() -> None:
    rates = Rates("x", {"bf16": 1e12}, {"full": 5e11}, {"bf16": 1e10}, {"full": 2e10})
    expected = LONG.linear_flops(1000) / 1e12 + LONG.attention_flops(1000) / 5e11
    assert prefill_seconds(LONG, 1000, rates, "bf16", "full") == pytest.approx(expected)
    read = LONG.weights_bytes("bf16") - 2 * LONG.head_weights  # the embedding's one row is nothing
    expected = read / 1e10 + 1000 * LONG.cache_bytes_per_token("full") / 2e10
    assert token_seconds(LONG, 1000, rates, "bf16", "full") == pytest.approx(expected)
    only = make_plan(LONG, 1000, 10**12, rates)
    assert [option.prefill_seconds is None for option in only.options] == [False] + [True] * 8


@pytest.mark.parametrize(
    ("text", "name"), [("H100", "H100"), ("nvidia rtx 4090", "4090"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
                       ("NVIDIA L40S", "L40S"), ("l4", "L4"), ("L40", "L40"), ("NVIDIA H200", "H200")],
)  # fmt: skip
def test_cards_by_name(text: str, name: str) -> None:
    card, remark = find_card(text)
    assert card.name == name
    assert remark == ""


def test_cards_by_memory_and_unknown_ones() -> None:
    card, remark = find_card("40GB")
    assert card.memory == 40 * 10**9
    assert card.flops == 312e12
    assert remark
    assert find_card("500GB")[0].memory == 500 * 10**9
    with pytest.raises(UserError, match=r"'potato' is not known: name one of H200"):
        find_card("potato")


def test_memory_of_this_machine() -> None:
    total, free = memory_of_machine()
    assert 0 < free <= total


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_every_group_above_count(tmp_path: Path, version: int) -> None:
    """A job's group has no limit of its own here; the one that it lies in has."""
    base = tmp_path if version == 2 else tmp_path / "memory"
    most, now = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    kind = "" if version == 2 else "total_"
    for folder, limit, held in ((base / "slurm" / "job", "max", 3000), (base / "slurm", "8000", 5000)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / most).write_text(f"{limit}\n")
        (folder / now).write_text(f"{held}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{kind}inactive_file 400\n{kind}active_file 100\n")
    (tmp_path / "own").write_text("0::/slurm/job\n" if version == 2 else "7:cpu:/\n4:memory:/slurm/job\n")
    assert group_limits(tmp_path / "own", tmp_path) == [(8000, 4500)]
    assert group_limits(tmp_path / "none", tmp_path) == []


# ---- rates -------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name, value in (("SECONDS", 0.0), ("PAST", 64), ("AT_LEAST", 1), ("BUSY", 0.0), ("LIMIT", 1e9)):
        monkeypatch.setattr(rates_module, name, value)
    monkeypatch.setattr(rates_module, "_file", lambda: tmp_path / "rates.json")
    return tmp_path


def test_rates_are_measured_once(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape.from_config(tiny_config(hidden_size=128, head_dim=32, intermediate_size=256))
    wanted = [("linear", "float32"), ("linear", "int8"), ("linear", "int4"), ("weights", "int8"), ("attention", "full")]
    rates = rates_module.rates_for(shape, torch.float32, wanted)
    assert rates.measured
    assert set(rates.linear) == {"float32", "int8", "int4"}
    assert all(rate > 0 for kind in (rates.linear, rates.weights, rates.attention) for rate in kind.values())

    def no_more(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(rates_module, "measure_figures", no_more)
    other = replace(shape, layers=30, vocab=9)
    assert rates_module.rates_for(other, torch.float32, wanted) == rates
    assert rates_module.rates_for(other, torch.float32, [("cache", "full")], measure=False).cache == {}
    with pytest.raises(AssertionError):
        rates_module.rates_for(shape, torch.float32, wanted, again=True)
    (quick / "rates.json").write_text("{broken")
    assert rates_module.rates_for(shape, torch.float32, wanted, measure=False).linear == {}


def test_every_figure_of_a_plan_can_be_measured(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGVERSE_KERNELS", "torch")  # compiling them is for other tests
    rates_module.kernels.unavailable.cache_clear()
    try:
        shape = Shape.from_config(tiny_config(hidden_size=128, head_dim=32, intermediate_size=256))
        rates = rates_module.rates_for(shape, torch.float32, rates_module.all_figures(torch.float32))
    finally:
        monkeypatch.undo()
        rates_module.kernels.unavailable.cache_clear()
    assert set(rates.weights) == {"float32", "int8", "int4"}  # no rounded copy without kernels
    assert set(rates.attention) == set(rates.cache) == set(FORMATS)
    plan = make_plan(replace(shape, head_dim=24), 100, 10**9, rates, forms=("float32", "int8", "int4"))
    assert all(option.prefill_seconds and option.token_seconds for option in plan.options)


def test_a_busy_machine_is_not_remembered(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "BUSY", 1e9)
    shape = Shape.from_config(tiny_config())
    assert rates_module.rates_for(shape, torch.float32, [("linear", "float32")]).linear
    assert not (quick / "rates.json").exists()


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_wide_layers_are_measured_narrower(release: Any) -> None:
    shape = Shape.from_config(release.config())
    proxy = rates_module.narrowed(shape)
    assert proxy.hidden <= 2048
    assert proxy.layer_weights < 6e7
    assert proxy.heads % proxy.kv_heads == 0
    assert proxy.mlp / proxy.hidden == pytest.approx(shape.mlp / shape.hidden, rel=0.05)


def test_a_plan_for_a_card_needs_no_torch() -> None:
    script = (
        "import os, sys; os.environ['LONGVERSE_COMMAND'] = '1'\n"
        "from longverse.cli import main\n"
        "code = main(['plan', 'XVERSE/XVERSE-13B-256K', '--context', '256K', '--gpu', '80GB', '--json'])\n"
        "assert code == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choice"]["cache"] == "int4"


def test_a_comma_before_three_digits_parts_thousands() -> None:
    assert parse_bytes("20,000MB") == 20_000 * 10**6
    assert parse_bytes("1,5GB") == 1_500_000_000
    assert parse_bytes("0,500GB") == 500 * 10**6
    for nothing in ("0.0001", "0GB", "1,,000MB"):
        with pytest.raises(UserError, match="no amount of memory"):
            parse_bytes(nothing)


def test_cards_are_told_by_whole_words() -> None:
    assert find_card("NVIDIA A100-SXM4-40GB")[0].memory == 40 * 10**9
    assert find_card("RTX 4090")[0].name == "4090"
    assert find_card("NVIDIA GeForce RTX 4090")[0].name == "4090"
    assert find_card("A100 10GB")[0].memory == 10 * 10**9  # a slice of one
    assert find_card("H100 94GB")[0].memory == 94 * 10**9
    assert find_card("H100 47.5GB")[0].memory == 47_500_000_000
    assert find_card("NVIDIA GH200 480GB")[0].name == "H200"
    assert find_card("NVIDIA A100-SXM4-80GB MIG 1g.10gb")[0].memory == 10 * 10**9
    for several in ("8xH100", "2x 4090", "H100 x8", "2×H100"):
        with pytest.raises(UserError, match="several cards"):
            find_card(several)
    with pytest.raises(UserError, match="not known"):
        find_card("RTX A1000")


def test_a_model_that_would_not_be_loaded_is_not_planned(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = {**sizes, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"model_type": "mixtral", "num_local_experts": 8}))
    with pytest.raises(UserError, match="'mixtral' are not supported"):
        shape_of(str(path))
    path.write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 4096}))
    assert shape_of(str(path)).window == 4096


def test_what_is_not_quantised_has_the_width_that_is_computed_in() -> None:
    tied = replace(LONG, tied=True)
    wide, narrow = tied.weights_bytes("int8", 4), tied.weights_bytes("int8")
    assert wide - narrow == 2 * (tied.parameters - tied.layers * tied.layer_weights)
    plan = make_plan(LONG, 8192, 10**12, None, forms=("float32", "int8", "int4"))
    assert next(option for option in plan.options if option.weights == "int8").weights_bytes == LONG.weights_bytes(
        "int8", 4
    )
