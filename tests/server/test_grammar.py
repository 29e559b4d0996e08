"""The JSON automaton against Python's own parser, and constrained answers of random models."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse import UserError
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from longverse.server import tools
from longverse.server.constrain import AfterTag, Costs, Forced, Vocabulary
from longverse.server.grammar import DEPTH, JSON_OBJECT, Grammar, State
from tests.server.common import load, save_model

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=5)


def walk(grammar: Grammar, text: bytes) -> State | None:
    state: Any = grammar.start
    for byte in text:
        state = grammar.step(state, byte)
        if state is None:
            return None
    return state


@settings(max_examples=150, deadline=None)
@given(OBJECTS, st.sampled_from([None, 0, 2]), st.booleans())
def test_every_object_that_json_writes_is_accepted_and_every_beginning_can_be_ended(
    value: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
    if b"\\ud" in text:  # half a pair of surrogates: written as itself here
        text = json.dumps(value, indent=indent, ensure_ascii=False).encode()
    state: Any = JSON_OBJECT.start
    for end in range(len(text)):
        if end % (1 + len(text) // 16) == 0:
            assert isinstance(json.loads(text[:end] + JSON_OBJECT.closing(state)), dict)
        state = JSON_OBJECT.step(state, text[end])
        assert state is not None
    assert JSON_OBJECT.complete(state)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60), st.integers(0, 2**32))
def test_whatever_is_accepted_parses(choices: list[int], seed: int) -> None:
    """A random walk over allowed bytes, then the shortest end: Python's parser takes all of them."""
    state, text = JSON_OBJECT.start, b""
    likely = b'{}[]":,\\u0123456789.eE+-truefalsn \n\xe4\xb8\xad\xf0\x9f'
    for choice in choices:
        byte = likely[choice % len(likely)] if choice % 3 else choice
        following = JSON_OBJECT.step(state, byte)
        if following is not None and not JSON_OBJECT.complete(following):
            state, text = following, text + bytes([byte])
            rest = JSON_OBJECT.closing(state)
            assert walk(JSON_OBJECT, text + rest[:1]) is not None
            after = JSON_OBJECT.step(state, rest[0])
            assert JSON_OBJECT.closing(after) == rest[1:]  # what `Vocabulary.count` builds on
    assert isinstance(json.loads(text + JSON_OBJECT.closing(state)), dict)


@pytest.mark.parametrize(
    "text",
    [b"[", b"1", b'{"a":01', b'{"a":1.}', b"{,", b'{"a":1,}', b'{"a":+', b'{"a":"\n', b'{"a":"\\x', b'{"a":nul}',
     b'{"a":"\xff', b'{"a":"\xc0\x80', b'{"a":"\xed\xa0\x80', b'{"a":"\\ud800', b'{"a":' + b"[" * DEPTH, b"{}x",
     b"{" + b" " * 25, b'{"a":' + b"1" * 25],
)  # fmt: skip
def test_what_is_no_json_or_past_a_limit_is_not_accepted(text: bytes) -> None:
    assert walk(JSON_OBJECT, text) is None


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load(save_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def vocabulary(engine: Engine) -> Vocabulary:
    return Vocabulary(engine.tokenizer, engine.network.config.vocab_size)


def answer(engine: Engine, constraint: Any, length: int, **settings: Any) -> tuple[str, str]:
    session = engine.session(512)
    ids = engine.chat.encode([{"role": "user", "content": "Say it."}])
    done = session.complete(ids, Sampling(max_new_tokens=length, constraint=constraint, **settings))
    return done.text, done.stats.finish_reason


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20, 90])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_model_writes_valid_json_of_any_length(
    engine: Engine, vocabulary: Vocabulary, length: int, seed: int
) -> None:
    costs = Costs(JSON_OBJECT, vocabulary)
    if length < 2:
        with pytest.raises(UserError, match="may have 1 tokens and its form alone takes 2"):
            Forced(costs, length)
        return
    constraint = Forced(costs, length)
    text, _ = answer(engine, constraint, length, temperature=1.5 if seed else 0.0, seed=seed)
    assert isinstance(json.loads(text), dict)
    assert constraint.complete


def test_costs_equal_those_of_trying_every_token(vocabulary: Vocabulary) -> None:
    """The walk over the sorted vocabulary, with its shortcuts, against the definition."""
    grammar = tools.grammar(["get", "get_all"], opened=False)
    costs = Costs(grammar, vocabulary)
    arguments = b'{"k": "\xe4\xb8\xad\\u00e9", "n": [1, -2.5e3, true]}'
    call = b'<tool_call>\n{"name": "get_all", "arguments": ' + arguments + b"}\n</tool_call>"
    for end in range(0, len(call) + 1, 3):
        state = walk(grammar, call[:end])
        assert state is not None
        expected = []
        for token in range(vocabulary.size):
            after: Any = state if vocabulary.bytes_of(token) else None
            for byte in vocabulary.bytes_of(token):
                after = grammar.step(after, byte) if after is not None else None
            expected.append(2**15 - 1 if after is None else vocabulary.count(grammar.closing(after)))
        assert costs.of(state).tolist() == expected


def test_a_forced_call_is_a_call_of_that_function(engine: Engine, vocabulary: Vocabulary) -> None:
    for name in ("get", "get_all"):
        costs = Costs(tools.grammar([name], opened=False), vocabulary)
        text, reason = answer(engine, Forced(costs, 120), 120, temperature=1.2, seed=5)
        (call,) = tools.CallFinder().push(text)
        assert isinstance(call, tools.Call)
        assert call.name == name
        assert isinstance(json.loads(call.arguments), dict)
        assert reason in ("stop", "length")


class Wants(AfterTag):
    """Writes what it is told to until the grammar takes over."""

    def __init__(self, costs: Costs, text: list[int], left: int) -> None:
        super().__init__(costs, tools.OPEN.encode(), left)
        self.wanted = list(text)

    def allowed(self, size: int) -> Any:
        import torch

        if self.forced is None and self.wanted:
            mask = torch.zeros(size, dtype=torch.bool)
            mask[self.wanted.pop(0)] = True
            return mask
        return super().allowed(size)


def test_after_the_opening_tag_a_call_follows_and_after_it_free_text(engine: Engine, vocabulary: Vocabulary) -> None:
    costs = Costs(tools.grammar(["get"], opened=True), vocabulary)
    text = engine.tokenizer.encode("Wait. <tool_call>")
    written, _ = answer(engine, Wants(costs, text, 150), 150, temperature=1.0, seed=2)
    found = tools.CallFinder().push(written)
    assert found[0] == "Wait."
    assert isinstance(found[1], tools.Call)
    assert found[1].name == "get"


CALL = '{"name": "f", "arguments": {"a": 1}}'
PARTS = ["hi ", "<", "tool", "<tool_call>", "</tool_call>", "\n", CALL, "xxxxx", '{"name": 3}', "[]", " "]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=12), st.integers(1, 9))
def test_calls_are_found_however_the_text_is_cut(parts: list[str], size: int) -> None:
    text = "".join(parts)
    whole, cut = tools.CallFinder(), tools.CallFinder()
    one = [*whole.push(text), *whole.flush()]
    many: list[Any] = []
    for start in range(0, len(text), size):
        many += cut.push(text[start : start + size])
    many += cut.flush()

    def merged(found: list[Any]) -> list[Any]:
        row: list[Any] = []
        for part in found:
            part = part if isinstance(part, str) else (part.name, part.arguments)
            if row and isinstance(part, str) and isinstance(row[-1], str):
                row[-1] += part
            else:
                row.append(part)
        return row

    assert merged(one) == merged(many)
    if "<tool_call>" not in text:
        assert "".join(one) == text


def test_a_model_that_cannot_spell_json_is_told_so(tmp_path: Path) -> None:
    from longverse.models.tokenizer import Tokenizer
    from tests.models.folders import save_tokenizer

    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert Vocabulary(tokenizer, 151).count(b"{}") == 2  # printable ASCII suffices
    tokenizer.eos_ids = frozenset()
    with pytest.raises(UserError, match="end token"):
        Vocabulary(tokenizer, 151)


def test_a_client_that_wants_one_call_gets_one(engine: Engine, vocabulary: Vocabulary) -> None:
    costs = Costs(tools.grammar(["get"], opened=True), vocabulary)
    constraint = AfterTag(costs, tools.OPEN.encode(), 150, once=True)
    for token in engine.tokenizer.encode("<tool_call>"):
        constraint.accept(token)
    assert constraint.forced is not None
    while not constraint.forced.complete:
        allowed = constraint.allowed(vocabulary.size)
        constraint.accept(int(allowed.nonzero()[0]))
    assert set(constraint.allowed(vocabulary.size).nonzero().flatten().tolist()) == set(vocabulary.end_ids)
