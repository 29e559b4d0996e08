"""smol itself, as the wheel ships it: our network and engine against transformers' Llama class."""

import pytest
import torch

from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from longverse.models import embedded

pytestmark = pytest.mark.skipif(embedded.find("smol") is None, reason="the smol wheel is not installed: make setup")

CHINESE = "请把这句话原样写一遍：今天天气很好，我们去公园散步。"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("smol", dtype="float32")


def long_text(engine: Engine, tokens: int) -> list[int]:
    """Generated prose of exactly `tokens` tokens."""
    lines = (
        f"Entry {n}: the keeper of lamp {n * 37 % 101} wrote that the sea was {n % 7} feet high.\n" for n in range(999)
    )
    return engine.tokenizer.encode("".join(lines))[:tokens]


def test_logits_equal_transformers_over_two_thousand_tokens(engine: Engine) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in engine.config.items() if k not in ("model_type", "architectures")})
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    twin.load_state_dict(engine.network.state_dict(), assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)  # its buffers were left on the meta device
    twin.eval()
    ids = long_text(engine, 2000)
    session = engine.session(2100)
    with torch.no_grad():
        theirs = twin(torch.tensor([ids])).logits[0]  # [T, V]
        ours = engine.network(torch.tensor([ids]))[0]
        assert (ours - theirs).abs().max() < 1e-4
        # in chunks, through its cache: the last position
        chunked = None
        for begin in range(0, len(ids), 512):
            chunked = session._logits(session._forward(ids[begin : begin + 512]))
    assert chunked is not None
    assert (chunked - theirs[-1]).abs().max() < 1e-3


def test_an_answer_and_a_chinese_stream(engine: Engine) -> None:
    session = engine.session(600)
    asked = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    assert "Paris" in session.complete(engine.chat.encode(asked), Sampling(max_new_tokens=30)).text
    prompt = engine.tokenizer.encode(CHINESE + "\n" + CHINESE + "\n请把这句话")
    pieces = list(session.stream(prompt, Sampling(max_new_tokens=24)))
    assert any("\u4e00" <= character <= "\u9fff" for piece in pieces for character in piece)
    assert not any("\ufffd" in piece for piece in pieces[:-1])
