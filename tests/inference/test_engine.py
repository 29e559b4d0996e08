"""The engine on small random models: the same text as transformers' `generate`, reuse, stop texts, cancelling."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longverse import UserError, XverseConfig, XverseForCausalLM
from longverse.inference import engine as engine_module
from longverse.inference.engine import HOMES, MASS, Engine, Session, parse_attention
from longverse.inference.sampling import Sampling
from longverse.models import checkpoint, kernels
from longverse.models.chat import ChatFormat
from longverse.models.tokenizer import Tokenizer
from tests.helpers import TINY, random_network, tiny_config
from tests.models.folders import save_folder, save_tokenizer

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CHUNK", 7)


def make_engine(tokenizer: Tokenizer, config: dict[str, Any] | None = None, **more: Any) -> Engine:
    network = random_network(config or tiny_config(max_position_embeddings=512))
    return Engine(network, tokenizer, ChatFormat("plain", tokenizer), **more)


def prompt(length: int, seed: int = 5) -> list[int]:
    return torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


DRAWS = {
    "greedy": Sampling(),
    "greedy with penalty": Sampling(repetition_penalty=1.3),
    "sampled": Sampling(temperature=0.8, seed=7),
    "all at once": Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=11),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("rope", [None, DYNAMIC], ids=["plain", "dynamic"])
def test_the_engine_continues_exactly_as_generate(
    tokenizer: Tokenizer, small_chunks: None, draw: Sampling, rope: dict[str, Any] | None
) -> None:
    config = tiny_config(rope_theta=None, rope_parameters=rope) if rope else tiny_config(max_position_embeddings=512)
    engine = make_engine(tokenizer, config)
    for end in tokenizer.eos_ids:  # a random model ends soon; here a logit of 0 makes that rare
        engine.network.lm_head.weight.data[end] = 0
    fields = {k: v for k, v in TINY.items() if k not in ("rope_theta", "max_position_embeddings")}
    window = config["max_position_embeddings"]
    model = XverseForCausalLM(XverseConfig(**fields, max_position_embeddings=window, rope_parameters=rope)).eval()
    model.load_state_dict(engine.network.state_dict())
    ids, new = prompt(150), 40
    settings = Sampling(**{**vars(draw), "max_new_tokens": new})
    # The engine's plan is what generate plans by itself: prompt + new tokens.
    ours = list(engine.session(len(ids) + new).stream_ids(ids, settings))
    drawn: dict[str, Any] = {"do_sample": False}
    if draw.temperature:
        torch.manual_seed(draw.seed or 0)
        drawn = {"do_sample": True, "temperature": draw.temperature, "top_k": draw.top_k, "top_p": draw.top_p}
        drawn |= {"min_p": draw.min_p or None}
    theirs = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=new,
        repetition_penalty=draw.repetition_penalty,
        eos_token_id=list(tokenizer.eos_ids),
        pad_token_id=0,
        **drawn,
    )[0, len(ids) :].tolist()
    if theirs[-1] in tokenizer.eos_ids:
        theirs.pop()
    assert len(theirs) > 20
    assert ours == theirs


def test_the_second_question_reads_the_question_alone(tokenizer: Tokenizer, small_chunks: None) -> None:
    engine = make_engine(tokenizer)
    document, first, second = prompt(200), prompt(9, 1), prompt(12, 2)
    session = engine.session(300)
    session.complete(document + first, Sampling(max_new_tokens=10))
    assert session.stats.reused_tokens == 0
    again = session.complete(document + second, Sampling(max_new_tokens=10))
    assert again.stats.reused_tokens == 200
    assert again.stats.prompt_tokens == 212
    fresh = engine.session(300).complete(document + second, Sampling(max_new_tokens=10))
    assert again.tokens == fresh.tokens


def test_a_prompt_already_held_is_answered_from_its_last_token(tokenizer: Tokenizer) -> None:
    session = make_engine(tokenizer).session(100)
    one = session.complete(prompt(50), Sampling(max_new_tokens=8))
    two = session.complete(prompt(50), Sampling(max_new_tokens=8))
    assert two.stats.reused_tokens == 49
    assert one.tokens == two.tokens


def test_progress_counts_up_to_the_whole(tokenizer: Tokenizer, small_chunks: None) -> None:
    seen: list[tuple[int, int]] = []
    session = make_engine(tokenizer).session(100)
    session.complete(prompt(50), Sampling(max_new_tokens=1), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 50) for done in [*range(0, 50, 7), 50]]


def test_cancelled_between_chunks_and_taken_up_again(tokenizer: Tokenizer, small_chunks: None) -> None:
    engine = make_engine(tokenizer)
    session, calls = engine.session(100), iter([False, False, True])
    stopped = session.complete(prompt(50), Sampling(max_new_tokens=8), cancelled=lambda: next(calls))
    assert stopped.stats.finish_reason == "cancelled"
    assert stopped.stats.fresh_tokens == len(session.tokens)
    assert stopped.tokens == []
    assert session.cache.length == len(session.tokens) == 14
    again = session.complete(prompt(50), Sampling(max_new_tokens=8))
    assert again.stats.reused_tokens == 14
    assert again.tokens == engine.session(100).complete(prompt(50), Sampling(max_new_tokens=8)).tokens


def test_ctrl_c_inside_a_forward_leaves_the_session_usable(
    tokenizer: Tokenizer, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tokenizer)
    session = engine.session(100)
    attend, calls = session.cache.attend, iter(range(100))

    def interrupted(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        if next(calls) == 7:  # in the middle of the third chunk
            raise KeyboardInterrupt
        return attend(layer, *qkv)

    monkeypatch.setattr(session.cache, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.complete(prompt(50), Sampling(max_new_tokens=8))
    assert session.stats.finish_reason == "cancelled"
    monkeypatch.undo()
    again = session.complete(prompt(50), Sampling(max_new_tokens=8))
    assert again.stats.reused_tokens == 14
    assert again.tokens == engine.session(100).complete(prompt(50), Sampling(max_new_tokens=8)).tokens


def scripted(tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session whose model "writes" `text` and then the end token."""
    session = make_engine(tokenizer).session(300)
    script = iter([*tokenizer.encode(text), next(iter(tokenizer.eos_ids))])

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        likely = torch.zeros(151)
        likely[next(script)] = 1
        return likely

    monkeypatch.setattr(session, "_logits", logits)
    monkeypatch.setattr(session, "_next", lambda token: logits(session._forward([token])))
    return session


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        ((), "one two three", "stop"),
        (("two",), "one ", "stop"),
        (("three", "wo t"), "one t", "stop"),
        (("threex", "zzz"), "one two three", "stop"),
        (("o",), "", "stop"),
    ],
)
def test_stop_texts(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...], expected: str, reason: str
) -> None:
    session = scripted(tokenizer, "one two three", monkeypatch)
    pieces = list(session.stream(prompt(5), Sampling(stop=stop)))
    assert "".join(pieces) == expected
    assert all(pieces)
    assert session.stats.finish_reason == reason


def test_what_might_become_a_stop_text_waits(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    session = scripted(tokenizer, "abcabd", monkeypatch)
    pieces = list(session.stream(prompt(5), Sampling(stop=("abd",))))
    assert pieces == ["abc"]


def test_the_length_limit_and_closing_early(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    session = scripted(tokenizer, "one two three", monkeypatch)
    assert session.complete(prompt(5), Sampling(max_new_tokens=3)).text == "one"
    assert session.stats.finish_reason == "length"
    assert session.stats.new_tokens == 3
    session = scripted(tokenizer, "one two three", monkeypatch)
    stream = session.stream(prompt(5), Sampling())
    assert next(stream) == "o"
    stream.close()  # type: ignore[attr-defined]
    assert session.stats.finish_reason == "cancelled"


def test_refusals_come_before_any_work(tokenizer: Tokenizer) -> None:
    engine = make_engine(tokenizer)
    with pytest.raises(UserError, match=r"needs 513 tokens and model reads 512"):
        engine.session(513)
    session = engine.session(100)
    with pytest.raises(UserError, match=r"95 tokens, and with 6 for the answer it exceeds the 100 planned"):
        session.stream(prompt(95), Sampling(max_new_tokens=6))
    with pytest.raises(UserError, match="prompt is empty"):
        session.stream([], Sampling())
    assert session.cache.length == 0
    assert make_engine(tokenizer, window=600).session(513).planned_tokens == 513


def test_statistics(tokenizer: Tokenizer) -> None:
    session = make_engine(tokenizer, tiny_config(rope_theta=None, rope_parameters=DYNAMIC)).session(400)
    stats = session.complete(prompt(300), Sampling(max_new_tokens=5)).stats
    assert stats.rope_base == session.engine.network.config.rope.base(400) > 10_000
    assert stats.attention == "exact"
    assert stats.prefill_rate > 0
    assert stats.decode_rate > 0
    assert stats.peak_memory_bytes > 10**7


def test_a_cache_in_the_machines_memory_gives_the_same_answer(tokenizer: Tokenizer, small_chunks: None) -> None:
    engine = make_engine(tokenizer)
    answers = [engine.session(80, home=home).complete(prompt(50), Sampling(max_new_tokens=9)) for home in HOMES]
    assert answers[0].tokens == answers[1].tokens
    assert [answer.stats.cache_home for answer in answers] == list(HOMES)
    with pytest.raises(UserError, match="cannot lie in"):
        engine.session(80, home="cellar")


def test_the_share_to_keep_stands_behind_a_colon(tokenizer: Tokenizer) -> None:
    engine = make_engine(tokenizer)
    for text, mass, most in (
        ("sparse", MASS, 1.0), ("sparse:0.9", 0.9, 1.0), ("sparse:1", 1.0, 1.0), ("sparse:0.9:0.25", 0.9, 0.25),
    ):  # fmt: skip
        session = engine.session(80, attention=text)
        assert (session.attention, session.mass, session.most) == ("sparse", mass, most)
        assert session.cache.sparse is not None
        assert (session.cache.sparse.mass, session.cache.sparse.most) == (mass, most)
    names = {
        f"sparse:{MASS}:1": "sparse", "sparse:0.90": "sparse:0.9", "sparse:0.9:1": "sparse:0.9",
        "sparse:0.9:0.10": "sparse:0.9:0.1", "pages": "pages",
    }  # fmt: skip
    assert {text: parse_attention(text).name for text in names} == names
    assert parse_attention("sparse:0.9500001").name == "sparse:0.9500001"  # no other way's name
    answer = engine.session(80, attention="sparse:0.9").complete(prompt(20), Sampling(max_new_tokens=2))
    assert answer.stats.attention == "sparse:0.9"
    for text, message in (
        ("dense", "no attention 'dense': choose one of exact, sparse, pages"),
        ("exact:0.9", "no attention 'exact:0.9'"),
        ("sparse:", "names no share to keep"),
        ("sparse:most", "names no share to keep"),
        ("sparse:0", "cannot be kept: choose one above 0 and up to 1"),
        ("sparse:nan", "cannot be kept"),
        ("sparse:95", "cannot be kept"),
        ("sparse:0.9:", "names no share to keep"),
        ("sparse:0.9:all", "or two, with the most of the past"),
        ("sparse:0.9:2", "A part of 2 of the past cannot be read"),
        ("sparse:0.9:0", "cannot be read"),
        ("sparse:0.9:0.1:3", "names no share to keep"),
    ):
        with pytest.raises(UserError, match=message):
            engine.session(80, attention=text)


@pytest.mark.parametrize("kernel", [True, False])
def test_sparse_sessions_say_what_writing_kept(
    tokenizer: Tokenizer, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr("longverse.models.kernels.unavailable", lambda: "this test asks for torch")
    elif kernels.unavailable():
        pytest.skip(f"no CPU kernels: {kernels.unavailable()}")
    config = tiny_config(max_position_embeddings=2048, num_key_value_heads=2)
    engine = make_engine(tokenizer, config)
    texts = {}
    for mass in (0.3, 1.0):
        session = engine.session(1300, attention=f"sparse:{mass}")
        texts[mass] = session.complete(prompt(1200), Sampling(max_new_tokens=30))
        kept = session.stats.mass_written
        assert (mass <= kept < 1) if kernel and mass < 1 else kept == 1  # in torch every value is read
        assert not session.cache.sparse.writing  # type: ignore[union-attr]
    exact = engine.session(1300).complete(prompt(1200), Sampling(max_new_tokens=30))
    assert texts[1.0].tokens == exact.tokens


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_float32_for_want_of_something_faster_is_not_float32_by_name(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "cpu_has_bfloat16", lambda: False)
    save_folder(tmp_path, tiny_config())
    engine = Engine.load(str(tmp_path), dtype=dtype, device="cpu")
    assert engine.network.dtype == torch.float32
    assert any("--dtype float32" in note for note in engine.notes) == (dtype == "auto")
    session = engine.session(100)
    assert session.cache.kept == engine.kept == (torch.bfloat16 if dtype == "auto" else torch.float32)
    decoder = engine.decoder()
    if decoder is not None:
        assert decoder.weights == ("int8" if dtype == "auto" else "full")


@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_a_question_leaves_no_trace_in_a_quantised_cache(tokenizer: Tokenizer, cache: str) -> None:
    """The document's newest tokens, kept in full, are overwritten by a question and are there again for the next."""
    engine = make_engine(tokenizer, tiny_config(max_position_embeddings=2048))
    document = list(range(5, 90)) * 4
    first, second = [[*document, 7, 8, 9, *range(20, 20 + n)] for n in (60, 30)]

    def session() -> Session:
        made = engine.session(600, cache=cache)
        made.boundary = len(document)
        return made

    fresh = session()
    expected = fresh._logits(forwards(fresh, second))
    asked = session()
    asked.complete(first, Sampling(max_new_tokens=20))
    done = asked.complete(second, Sampling(max_new_tokens=1))
    assert done.stats.reused_tokens == len(document)
    asked.cache.truncate(len(document))
    del asked.tokens[len(document) :]
    assert torch.equal(asked._logits(forwards(asked, second)), expected)


def forwards(session: Session, ids: list[int]) -> torch.Tensor:
    """The last hidden state of `ids`, cut as a prompt is, after what the session holds."""
    for begin, end in session._pieces(len(session.tokens), len(ids)):
        hidden = session._forward(ids[begin:end])
    return hidden
