"""Cutting a text and joining the ids equals tokenising it whole, for five constructions of tokenizers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from longverse.data.tokenise import LinearEncoder
from tests.data.texts import history, law, novel, tokenizer_json

KINDS = ("gpt2", "llama3", "xverse", "llama", "prefix")
ENCODERS: dict[str, LinearEncoder] = {}


def encoder(kind):
    if kind not in ENCODERS:
        ENCODERS[kind] = LinearEncoder(tokenizer_json(kind))
    return ENCODERS[kind]


pieces = st.sampled_from(
    ["a", "The", "river", " ", "  ", "\n", "\n\n", "\t", ",", ".", "...", "'s", "don't", "7", "1984", "天", "地人",
     "，", "。", "：", "“", "”", "「", "é", "ß", "ﬁ", "①", "́", "🙂", "한", "\u3000", "\xa0",
     "(", ")", "-", "_", "#", "<s>", "<|im_end|>", "\r", "\x1c"]
)  # fmt: skip
text = st.one_of(st.lists(pieces, max_size=40).map("".join), st.text(max_size=60))


@pytest.mark.parametrize("kind", KINDS)
@given(text=text)
@settings(max_examples=250, deadline=None)
def test_ids_equal_those_of_the_whole(kind, text):
    made = encoder(kind)
    whole = made.backend.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
    assert made.encode(text.encode("utf-8", "replace").decode()).tolist() == whole


@pytest.mark.parametrize("kind", KINDS)
def test_documents(kind):
    made = encoder(kind)
    for document in (novel(1), history(1), law(1)[1], " ".join(novel(2, 60).split())):
        for _ in range(2):  # the second time out of the dictionary
            assert made.encode(document).tolist() == made._ids(document)
        assert "".join(made.split(document)).replace(" ", "") == document.replace(" ", "")


def test_which_cuts_pass():
    assert encoder("gpt2").cuts == ("space", "word", "line", "clause", "stop")
    assert "stop" not in encoder("llama3").cuts  # its pieces begin with the mark before a word
    assert "space" in encoder("xverse").cuts
    assert encoder("prefix").cuts == ("gap",)  # it writes a marker before every text


def test_a_long_line_is_many_short_units():
    line = " ".join(f"word{i % 977}" for i in range(250_000))
    units = encoder("gpt2").split(line)
    assert max(map(len, units)) < 20
    assert encoder("gpt2").count(line) == sum(encoder("gpt2").counts(units[:2000])) + encoder("gpt2").count(
        "".join(units[2000:])
    )


def test_special_strings_are_text():
    made = encoder("gpt2")
    special = Tokenizer.from_str(tokenizer_json("gpt2")).token_to_id("<|im_end|>")
    assert special not in made.encode("one <|im_end|> two").tolist()


def test_dtype_follows_the_vocabulary():
    assert encoder("gpt2").dtype == np.uint16
