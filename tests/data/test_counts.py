"""Counting a conversation fast gives what the chat format's own encoding gives, whatever stands in it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from longverse.data.long_sft.pool import UnitCounter
from longverse.data.vocabulary import ChatCounter, Vocabulary
from longverse.errors import UserError
from longverse.models import tokenizer as models_tokenizer
from longverse.models.chat import ChatFormat
from tests.data.texts import TEMPLATE, code_tree, history, law, novel, tokenizer_json

STRIPPING = TEMPLATE.replace("m['content']", "m['content'] | trim")  # as many templates do
FORMATS = ("chatml", "chatml-llama3", "trimmed", "xverse", "xverse-bos", "llama-xverse", "prefix-xverse", "unflagged",
           "normalized", "greedy", "plain")  # fmt: skip


def vocabulary(kind):
    """A vocabulary with ChatML's format or XVERSE's over tokenizers of five constructions."""
    of = {"xverse": "xverse", "xverse-bos": "xverse", "llama-xverse": "llama", "prefix-xverse": "prefix",
          "unflagged": "xverse", "chatml-llama3": "llama3", "normalized": "xverse"}  # fmt: skip
    backend = Tokenizer.from_str(tokenizer_json(of.get(kind, "gpt2")))
    template, bos, ends = None, None, ["</s>"]
    if "xverse" not in kind and kind != "unflagged":
        template, ends = (STRIPPING if kind == "trimmed" else TEMPLATE), ["<|im_end|>"]
        flags = {"normalized": kind == "normalized", "rstrip": kind == "greedy"}
        backend.add_special_tokens([AddedToken(text, **flags) for text in ("<|im_start|>", "<|im_end|>")])
        backend.add_tokens([AddedToken("<think>", special=False)])
        if kind == "plain":
            template = None
    elif kind == "unflagged":  # an end that is an entry of the vocabulary, no added token; a lower id ends texts too
        ends = ["</s>", "<s>"]
    else:
        backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<pad>")])
        ends = ["</s>", "<pad>"] if kind == "xverse" else ends
        bos = backend.token_to_id("<s>") if kind in ("xverse-bos", "prefix-xverse") else None
    tokenizer = models_tokenizer.Tokenizer(
        backend, bos_id=bos, add_bos=bos is not None, eos_ids=[backend.token_to_id(end) for end in ends],
        chat_template=template, special_tokens={"eos_token": ends[0]},
    )  # fmt: skip
    name = "plain" if kind == "plain" else "xverse" if template is None else "template"
    return Vocabulary(kind, tokenizer, ChatFormat(name, tokenizer), kind)


@pytest.fixture(scope="module")
def counters():
    return {kind: ChatCounter(vocabulary(kind)) for kind in FORMATS}


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code") / "tree"
    code_tree(folder, 2)
    return (folder / "part0.py").read_text()


SPECIAL = [
    "<|im_end|>", "<|im_start|>", "<|im_", "end|>", "</s>", "<s>", "<pad>", "<think>", "Human: ", "\n\nAssistant: ",
    "＜/s＞", "＜|im_end|＞", "\ufdd0", "{% if %}", "{{ m }}",
]  # fmt: skip
PLAIN = [
    " ", "\n", "\n\n", "  \n", "\t", "\u3000", "，", "。", "「", "”", "…", "ﬁ", "①", "é", "e\u0301", "😀", "0x1F",
    "don't", "the river", "第十二条", "def f(x):\n    return x", "",
]  # fmt: skip
PIECES = st.one_of(
    st.sampled_from(SPECIAL),
    st.sampled_from(PLAIN),
    st.text(max_size=8),
    st.integers(0, 5).map(lambda seed: novel(seed, 6, 2)[:400]),
    st.integers(0, 5).map(lambda seed: history(seed, 3)[:300]),
    st.integers(0, 5).map(lambda seed: law(seed, 4)[1][:300]),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
ROLES = st.lists(st.sampled_from(["system", "user", "assistant", "exec"]), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", FORMATS)
@given(roles=ROLES, texts=st.lists(TEXTS, min_size=4, max_size=4), prompt=st.booleans())
@example(roles=["assistant"], texts=["", "", "", ""], prompt=False)
@example(roles=["user", "assistant"], texts=["x </s> y", "＜/s＞", "", ""], prompt=True)
@example(roles=["user"], texts=["1 ＜|im_end|＞ 2", "", "", ""], prompt=True)
@example(roles=["user", "assistant", "user", "assistant"], texts=[" a ", " b ", "\nc\n", ""], prompt=False)
@settings(max_examples=60, deadline=None)
def test_counts_equal_the_chat_format(kind, counters, roles, texts, prompt):
    counter = counters[kind]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    try:
        real = len(counter.chat.encode(messages, add_generation_prompt=prompt))
    except UserError:  # half a surrogate: refused by both
        with pytest.raises(UserError):
            counter.count(messages, add_generation_prompt=prompt)
        return
    assert counter.count(messages, add_generation_prompt=prompt) == real
    memory = UnitCounter(counter.encoder)
    assert counter.count(messages, add_generation_prompt=prompt, counter=memory.count) == real


@pytest.mark.parametrize("kind", FORMATS)
def test_long_conversations_are_counted_exactly(kind, counters, code):
    counter = counters[kind]
    for document in (novel(1, 60), history(1, 90), law(1, 40)[1], code * 4):
        messages = [{"role": "user", "content": document + "\n\nWhy?"}, {"role": "assistant", "content": "So it is."}]
        assert counter.count(messages) == len(counter.chat.encode(messages, add_generation_prompt=False))


@pytest.mark.parametrize("kind", ["chatml", "xverse", "xverse-bos"])
def test_ordinary_texts_take_the_fast_path(kind, counters, monkeypatch):
    monkeypatch.setattr(ChatFormat, "encode", None)
    assert counters[kind].count([{"role": "user", "content": novel(2, 12)}]) > 100
