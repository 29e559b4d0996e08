"""Labels by the chat format, length filters, damaged files, the sampler."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from longverse.errors import UserError
from longverse.models.chat import ChatFormat
from longverse.train.config import Source
from longverse.train.examples import Conversations, Example, Mixture, encode_conversation
from tests.train.common import conversation, tiny_chat, tiny_folder, write_messages

LONG_TEXT = "the box in a red box " * 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("long", [False, True])
def test_spans_are_the_answers_and_their_end_token(folder: Path, turns: int, long: bool) -> None:
    tokenizer, chat = tiny_chat(folder)
    messages = conversation(random.Random(1), turns)
    if long:
        messages[0]["content"] = LONG_TEXT
    ids, spans = encode_conversation(messages, chat)
    assert ids == chat.encode(messages, add_generation_prompt=False)
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    assert len(spans) == turns
    for n, ((first, end, weight), reply) in enumerate(zip(spans, replies, strict=True)):
        assert tokenizer.decode(ids[first : end - 1]) == reply
        assert ids[end - 1] in tokenizer.eos_ids
        assert weight == 1
        assert ids[:first] == chat.encode(messages[: 2 * n + 1])  # what inference would feed


def test_a_document_cannot_write_control_tokens(folder: Path) -> None:
    tokenizer, chat = tiny_chat(folder)
    messages = [{"role": "user", "content": "<|endoftext|>" + LONG_TEXT}, {"role": "assistant", "content": "no"}]
    ids, spans = encode_conversation(messages, chat)
    assert sum(token in tokenizer.eos_ids for token in ids) == 2
    assert len(spans) == 1


def test_plain_format_learns_to_stop(folder: Path) -> None:
    tokenizer, _ = tiny_chat(folder)
    chat = ChatFormat("plain", tokenizer)
    ids, [(first, end, _)] = encode_conversation(
        [{"role": "user", "content": "the box"}, {"role": "assistant", "content": "red"}], chat
    )
    assert tokenizer.decode(ids[first : end - 1]).strip() == "red"
    assert ids[end - 1] in tokenizer.eos_ids


def test_xverse_format(folder: Path) -> None:
    tokenizer, _ = tiny_chat(folder)
    chat = ChatFormat("xverse", tokenizer)
    messages = conversation(random.Random(2), 2)
    ids, spans = encode_conversation(messages, chat)
    for n, (first, end, _) in enumerate(spans):
        assert ids[end - 1] in tokenizer.eos_ids
        assert tokenizer.decode(ids[first : end - 1]) == messages[2 * n + 1]["content"]
    assert ids[: spans[0][0]] == chat.encode(messages[:1])


def test_weights_of_messages(folder: Path) -> None:
    _, chat = tiny_chat(folder)
    messages = conversation(random.Random(3), 2)
    _, spans = encode_conversation(messages, chat, [1, 0, 1, 0.5])
    assert [weight for *_, weight in spans] == [0.5]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 2 is no JSON"),
        ('{"prompt": "a"}', "no list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}', "robot"),
        ('{"messages": [{"role": "user", "content": "a", "weight": -1}]}', "weight"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an assistant"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a", "weight": 0}]}',
            "weight 0",
        ),
    ],
)
def test_damaged_lines_are_named(folder: Path, tmp_path: Path, line: str, said: str) -> None:
    tokenizer, chat = tiny_chat(folder)
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": conversation(random.Random(0))}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=said):
        Conversations.open(path, tokenizer, chat)


def test_length_filter_and_cache(folder: Path, tmp_path: Path) -> None:
    tokenizer, chat = tiny_chat(folder)
    path = write_messages(tmp_path / "m.jsonl", 30)
    whole = Conversations.open(path, tokenizer, chat, cache=tmp_path / "cache")
    again = Conversations.open(path, tokenizer, chat, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for n in range(30):
        assert whole.get(n).spans == again.get(n).spans
        assert np.array_equal(whole.get(n).ids, again.get(n).ids)
    middle = int(np.median(whole.lengths))
    some = Conversations.open(path, tokenizer, chat, max_tokens=middle)
    assert sum(some.left_out.values()) + len(some.lengths) == 30
    assert some.lengths.max() <= middle
    assert [len(some.get(n)) for n in range(len(some.lengths))] == some.lengths.tolist()
    with pytest.raises(UserError, match="none of them within"):
        Conversations.open(path, tokenizer, chat, min_tokens=10_000)
    with pytest.raises(UserError, match="does not exist"):
        Conversations.open(tmp_path / "no.jsonl", tokenizer, chat)


class Numbered:
    """Examples that say which they are."""

    def __init__(self, label: str, size: int, endless: bool = False) -> None:
        self.label = label
        self.lengths = np.full(0 if endless else size, 3)

    def get(self, index: int) -> Example:
        return Example(np.array([0, 1, 2]), ((1, 3, 1.0),), f"{self.label}{index}")

    def length(self, index: int) -> int:
        return 3


def test_mixture_is_a_function_of_the_step() -> None:
    def make() -> Mixture:
        return Mixture([Numbered("a", 7), Numbered("b", 5), Numbered("c", 0, True)], [2, 1, 1], 20, 4, seed=3)

    whole = [[e.name for e in make().step(step)] for step in range(20)]
    mixture = make()
    assert [[e.name for e in mixture.step(step)] for step in reversed(range(20))][::-1] == whole
    names = [name for step in whole for name in step]
    assert sum(name[0] == "a" for name in names) == 40
    assert sum(name[0] == "b" for name in names) == 20
    first_epoch = [name for name in names if name[0] == "a"][:7]
    assert sorted(first_epoch) == [f"a{n}" for n in range(7)]
    assert [name for name in names if name[0] == "c"] == [f"c{n}" for n in range(20)]
    assert [lengths.tolist() for lengths in make().lengths()] == [[3] * 4] * 20


def test_the_first_answer_may_weigh_more(folder: Path, tmp_path: Path) -> None:
    tokenizer, chat = tiny_chat(folder)
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": conversation(random.Random(2), 3)}) + "\n")
    plain = Conversations.open(path, tokenizer, chat).get(0)
    heavy = Conversations.open(path, tokenizer, chat, first=3).get(0)
    assert [(a, b) for a, b, _ in heavy.spans] == [(a, b) for a, b, _ in plain.spans]
    assert [weight for *_, weight in heavy.spans] == [3, 1, 1]


def test_only_conversations_have_a_first_answer() -> None:
    with pytest.raises(UserError, match="first answer"):
        Source(store="texts", first=2)
    with pytest.raises(UserError, match="above 0"):
        Source(messages="talk.jsonl", first=0)
