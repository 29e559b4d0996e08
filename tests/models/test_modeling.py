"""XverseForCausalLM: transformers' classes around our network, and dynamic NTK that does not drift."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from longverse import UserError, XverseConfig, XverseForCausalLM
from longverse.models.cache import KVCache
from longverse.models.rope import RopePlan
from tests.helpers import TINY, random_network, tiny_config, transformers_twin
from tests.models.folders import save_tokenizer

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
WINDOW, LENGTH = 128, 400  # three times the window the base was made for


def xverse(rope: dict[str, Any] | None = None, **changes: Any) -> XverseForCausalLM:
    """Our class with the weights of `random_network` of the same shape."""
    fields = {k: v for k, v in {**TINY, **changes}.items() if k != "rope_theta"}
    model = XverseForCausalLM(XverseConfig(**fields, rope_parameters=rope)).eval()
    twin = random_network(tiny_config(**changes))
    model.load_state_dict(twin.state_dict())
    return model


def token_ids(length: int, batch: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats at every position, from logits [..., V]."""
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def read_in_chunks(model: Any, ids: torch.Tensor, size: int, **first: Any) -> torch.Tensor:
    """Logits of `ids` read through a transformers cache in chunks; `first` goes to the first forward."""
    cache, logits = DynamicCache(config=model.config), []
    for begin in range(0, ids.shape[1], size):
        out = model(ids[:, begin : begin + size], past_key_values=cache, use_cache=True, **first)
        logits.append(out.logits)
        first = {}
    return torch.cat(logits, dim=1)


def test_registered_and_saved_like_any_model(tmp_path: Path) -> None:
    model = xverse(num_key_value_heads=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is XverseForCausalLM
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = token_ids(50)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_logits_and_loss_equal_llamas_also_under_padding() -> None:
    model, twin = xverse(), transformers_twin(random_network(tiny_config()), tiny_config())
    ids = token_ids(60, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0  # left padding
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, position_ids=positions, labels=ids)
        theirs = twin(ids, attention_mask=mask, position_ids=positions, labels=ids)
    real = mask.bool()
    assert (ours.logits - theirs.logits)[real].abs().max() < 1e-4
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 17, 256])
def test_dynamic_ntk_is_the_same_in_chunks_and_in_one_shot(size: int) -> None:
    """Stock transformers recomputes the base per forward, so its chunked run is another model than its one-shot run."""
    ids = token_ids(LENGTH)
    model = xverse(DYNAMIC)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    divergence = kl(whole, read_in_chunks(model, ids, size, rope_length=LENGTH))

    config = tiny_config(rope_theta=None, rope_parameters=DYNAMIC)
    network = random_network(config)
    shape = network.config
    cache = KVCache(shape.num_layers, shape.num_kv_heads, shape.head_dim, LENGTH, torch.float32)
    engine_logits = []
    with torch.no_grad():
        for begin in range(0, LENGTH, size):
            end = min(begin + size, LENGTH)
            positions = torch.arange(begin, end)[None]
            engine_logits.append(network(ids[:, begin:end], positions, cache.rope_length, cache.attend))
            cache.advance(end - begin)
    engine_divergence = kl(whole, torch.cat(engine_logits, dim=1))

    stock = transformers_twin(network, config)
    with torch.no_grad():
        stock_whole = transformers_twin(network, config)(ids, use_cache=False).logits
    stock_divergence = kl(stock_whole, read_in_chunks(stock, ids, size))
    print(
        f"\nchunks of {size}: KL to one shot, worst position: ours {divergence.max():.1e} (transformers' cache),"
        f" {engine_divergence.max():.1e} (our cache); stock transformers {stock_divergence.max():.2f} nats"
    )
    assert divergence.max() <= 1e-5
    assert engine_divergence.max() <= 1e-5
    assert (whole - stock_whole).abs().max() < 1e-3  # in one shot the two agree: the same formula
    assert stock_divergence.max() > 0.1  # and this is what the pinned base is for


def test_a_batch_with_padding_gives_each_row_its_own_base() -> None:
    model = xverse(DYNAMIC)
    lengths = (200, 330)
    rows = [token_ids(n, seed=n) for n in lengths]
    new = 20
    alone = [model.generate(row, max_new_tokens=new, do_sample=False)[0, -new:] for row in rows]
    ids = torch.zeros(2, max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, -row.shape[1] :] = row[0]
        mask[n, -row.shape[1] :] = 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    for n in range(2):
        assert torch.equal(together[n, -new:], alone[n])


def test_generate_pins_the_base_from_prompt_and_new_tokens() -> None:
    """Greedy `generate` equals recomputing everything each step at the planned length, which is the definition."""
    model = xverse(DYNAMIC)
    ids, new = token_ids(150), 30
    out = model.generate(ids, max_new_tokens=new, do_sample=False)
    expected = ids
    with torch.no_grad():
        for _ in range(new):
            logits = model(expected, use_cache=False, rope_length=150 + new).logits[:, -1]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, expected)


def test_generate_with_beams_and_with_an_explicit_plan() -> None:
    model = xverse(DYNAMIC)
    ids = token_ids(140)
    beams = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    padded = torch.cat((torch.zeros(1, 25, dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(165) >= 25).long()[None]
    shifted = model.generate(padded, attention_mask=mask, max_new_tokens=10, num_beams=3, do_sample=False)
    assert torch.equal(shifted[0, 25:], beams[0])
    with pytest.raises(UserError, match="Assisted decoding"):
        model.generate(ids, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
    far = model.generate(ids, max_new_tokens=10, do_sample=False, rope_length=4000)
    with torch.no_grad():
        first = model(ids, use_cache=False, rope_length=4000).logits[0, -1].argmax()
    assert far[0, 140] == first


def test_a_cache_keeps_its_base_for_the_next_turn_and_refuses_another() -> None:
    model = xverse(DYNAMIC)
    ids = token_ids(140)
    cache = DynamicCache(config=model.config)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False, rope_length=300)
    assert cache.rope_length == 300
    again = model.generate(out, past_key_values=cache, max_new_tokens=10, do_sample=False)
    with torch.no_grad():
        assert again[0, 150] == model(out, use_cache=False, rope_length=300).logits[0, -1].argmax()
        with pytest.raises(UserError, match="differs from 300"):
            model(ids[:, :1], past_key_values=cache, rope_length=301)
        with pytest.raises(UserError, match="past the planned length 300"):
            model(token_ids(200), past_key_values=cache)


def test_a_foreign_cache_without_a_plan_is_refused() -> None:
    plain, dynamic = xverse(), xverse(DYNAMIC)
    cache = DynamicCache(config=plain.config)
    with torch.no_grad():
        plain(token_ids(20), past_key_values=cache)
        with pytest.raises(UserError, match="RoPE base is unknown"):
            dynamic(token_ids(1), past_key_values=cache)


def test_rope_theta_that_transformers_would_ignore_is_an_error(tmp_path: Path) -> None:
    xverse().config.save_pretrained(tmp_path)
    linear = {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(UserError, match="rope_theta set beside"):
        AutoConfig.from_pretrained(tmp_path, rope_theta=500_000)
    with pytest.raises(UserError, match="rope_scaling set beside"):
        AutoConfig.from_pretrained(tmp_path, rope_scaling=linear)
    with pytest.raises(UserError, match="rope_theta set beside"):
        XverseConfig(**TINY).rope_theta = 500_000.0
    with pytest.raises(UserError, match="rope_scaling set beside"):
        XverseConfig(**TINY).rope_scaling = linear
    with pytest.raises(UserError, match="two RoPE bases"):
        XverseConfig(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 5e5})


def test_set_rope_changes_model_and_config_together() -> None:
    model = xverse()
    ids = token_ids(200)
    with torch.no_grad():
        before = model(ids).logits
        model.set_rope(RopePlan("default", 500_000.0, 16))
        assert (model(ids).logits - before).abs().max() > 0.1
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 500_000.0}
    with pytest.raises(UserError, match="changes nothing"):
        model.set_rope(RopePlan("default", 500_000.0, 16))
    with pytest.raises(UserError, match="changes nothing"):
        model.set_rope(RopePlan("linear", 500_000.0, 16, 1.0))
    with pytest.raises(UserError, match="heads of 32"):
        model.set_rope(RopePlan("default", 10_000.0, 32))
    model.set_rope(RopePlan("dynamic", 500_000.0, 16, 2.0, 64))
    assert model.config.to_network().rope == model.rope_plan


def test_config_round_trip_keeps_the_plan(tmp_path: Path) -> None:
    config = XverseConfig(
        **{k: v for k, v in TINY.items() if k != "rope_theta"},
        rope_parameters={**DYNAMIC, "original_max_position_embeddings": 64, "bucket": 32},
        context_window=1024,
        qkv_bias=True,
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_network() == config.to_network()
    assert again.to_network().rope == RopePlan("dynamic", 10_000.0, 16, 2.0, 64, bucket=32)
    assert again.to_network().window == 1024
    assert again.to_network().qkv_bias
    assert not again.to_network().output_bias


def test_gradient_checkpointing_through_transformers_switch() -> None:
    model = xverse().train()
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing
    loss = model(token_ids(30), labels=token_ids(30), use_cache=False).loss
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_chat_answers_whole_and_in_pieces_as_the_engine_does(tmp_path: Path) -> None:
    from longverse.inference.engine import Engine
    from longverse.inference.sampling import Sampling
    from longverse.models.chat import ChatFormat
    from longverse.models.tokenizer import Tokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model, network = xverse(max_position_embeddings=512), random_network(tiny_config(max_position_embeddings=512))
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the end"},
        {"role": "assistant", "content": "of an era"},
        {"role": "user", "content": "and then?"},
    ]
    own = Tokenizer.from_folder(tmp_path)
    engine = Engine(network, own, ChatFormat("xverse", own))
    model.generation_config.eos_token_id = list(own.eos_ids)
    expected = engine.session(300).complete(engine.chat.encode(history), Sampling(max_new_tokens=40)).text
    assert len(expected) > 3
    assert model.chat(tokenizer, history, max_new_tokens=40, do_sample=False) == expected
    pieces = list(model.chat(tokenizer, history, stream=True, max_new_tokens=40, do_sample=False))
    assert "".join(pieces) == expected
    assert all(pieces)
    broken = model.chat(tokenizer, history, stream=True, max_new_tokens=-1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(broken)


def test_what_may_be_a_stop_text_is_held_back() -> None:
    from longverse.models.chat import cut_at_stop, may_stop

    stop = ("\n\nHuman:",)
    assert cut_at_stop("one\n\nHuman: two", stop) == "one"
    assert cut_at_stop("one\n\n", stop) == "one\n\n"
    assert may_stop("one\n\nHu", stop) == 4
    assert may_stop("one\n", stop) == 1
    assert may_stop("one", stop) == 0


@pytest.mark.parametrize(("bits", "within"), [(8, 0.02), (4, 0.8)])
def test_quantize_in_place(bits: int, within: float) -> None:
    model = xverse(intermediate_size=128)
    ids = token_ids(40)
    with torch.no_grad():
        before = model(ids).logits
        assert model.quantize(bits) is model
        change = kl(before, model(ids).logits).mean()
    assert 0 < change < within
    with pytest.raises(UserError, match="use 8 or 4"):
        model.quantize(3)


def test_the_256k_release_keeps_its_rope_through_transformers(tmp_path: Path) -> None:
    """Its config.json states none, and importing longverse puts our class before the release's own code."""
    sizes = {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13_824, "num_attention_heads": 40}
    stated = {"model_type": "xverse", "max_position_embeddings": 32_768, "vocab_size": 100_534, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.warns(UserWarning, match="XVERSE-13B-256K: its config.json states no RoPE; filled in"):
        config = AutoConfig.from_pretrained(tmp_path)
    shape = config.to_network()
    assert shape.window == 262_144
    assert shape.rope == RopePlan("dynamic", 500_000.0, 128, 2.0, original_window=32_768)
