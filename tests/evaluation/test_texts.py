"""Haystacks, facts and exact lengths."""

import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.errors import UserError
from longverse.evaluation import facts
from longverse.evaluation.facts import KINDS, Picker, contains, make_fact, several_facts
from longverse.evaluation.fitting import PADS, fit, largest_that_fits
from longverse.evaluation.haystack import (
    cut_sentences,
    from_text,
    generated,
    generated_text,
    language_of,
)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_generated_prose_is_long_varied_and_repeatable(language: str) -> None:
    first = list(islice(generated(language, 3), 1500))
    assert first == list(islice(generated(language, 3), 1500))
    assert first != list(islice(generated(language, 4), 1500))
    assert len(set(first)) > 1450
    assert language_of("".join(first)) == language


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_prose_never_holds_an_answer(language: str) -> None:
    prose = facts.normalise("".join(islice(generated(language, 1), 3000)))
    for mode in ("facts", "paraphrase", "hop"):
        for kind in KINDS[mode]:
            for seed in range(25):
                fact = make_fact(mode, kind, Picker(language, seed))
                assert not any(facts.normalise(a) in prose for a in fact.accepted), (fact.kind, fact.answer)


@settings(max_examples=200, deadline=None)
@given(st.text("ab .!?。！？”\n…", max_size=60))
def test_pieces_join_to_the_text(text: str) -> None:
    joined = "".join(cut_sentences(text))
    assert text.startswith(joined)
    assert not text[len(joined) :].strip()


def test_sentence_ends_in_both_languages() -> None:
    assert cut_sentences("他来了。“真的吗？”她问！好…\n第二段") == [
        "他来了。",
        "“真的吗？”",
        "她问！",
        "好…\n",
        "第二段",
    ]
    assert cut_sentences('He left. "Why?" she asked. 3.5 is a number.') == [
        "He left. ",
        '"Why?" ',
        "she asked. ",
        "3.5 is a number.",
    ]


def test_a_short_text_is_read_again(tmp_path: Path) -> None:
    assert list(islice(from_text("One. Two.", "a.txt"), 4)) == ["One. ", "Two.\n\n", "One. ", "Two.\n\n"]
    with pytest.raises(UserError, match=r"a\.txt holds no text"):
        from_text(" \n", "a.txt")


def test_paraphrased_questions_share_no_word_with_the_fact() -> None:
    jieba = pytest.importorskip("jieba")
    for kind in facts.PARAPHRASE_KINDS:
        for seed in range(12):
            fact = make_fact("paraphrase", kind, Picker("en", seed))
            said = set(re.findall(r"\w+", fact.sentences[0].lower()))
            asked = set(re.findall(r"\w+", fact.question.lower()))
            assert not said & asked, (kind, said & asked)
            fact = make_fact("paraphrase", kind, Picker("zh", seed))
            said = {w for w in jieba.cut(fact.sentences[0]) if w.isalnum()}
            asked = {w for w in jieba.cut(fact.question) if w.isalnum()}
            assert not said & asked, (kind, said & asked)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_plain_question_repeats_the_facts_words_but_not_its_answer(language: str) -> None:
    for mode in ("facts", "hop"):
        for kind in KINDS[mode]:
            for seed in range(20):
                fact = make_fact(mode, kind, Picker(language, seed))
                assert not contains(fact.question, fact.accepted)
                assert contains(fact.sentences[-1], fact.accepted)


def test_a_picker_does_not_repeat_itself() -> None:
    picker = Picker("en", 0)
    drawn = [picker.pick("city") for _ in range(15)]
    assert len(set(drawn)) == 15
    made, question = several_facts(Picker("zh", 1), 5)
    assert len({f.answer for f in made}) == 5
    assert "5" in question


@pytest.mark.parametrize(
    ("answer", "accepted", "found"),
    [
        ("It is 4821.", ("4821",), True),
        ("It is 14821.", ("4821",), False),
        ("It costs 4,821 crowns", ("4821",), True),
        ("ＬＩＳＢＯＮ", ("Lisbon",), True),
        ("a party", ("art",), False),
        ("On March 14, 1987.", ("14 March 1987", "March 14, 1987"), True),
        ("密码是4821。", ("4821",), True),
        ("大门是紫色的", ("紫色",), True),
        ("", ("x",), False),
    ],
)
def test_an_answer_is_found_as_a_whole(answer: str, accepted: tuple[str, ...], found: bool) -> None:
    assert contains(answer, accepted) is found


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(-1, 60))
def test_search_finds_the_last_that_fits(limit: int, guess: int, last: int) -> None:
    assert largest_that_fits(lambda n: n <= last, guess, limit) == min(last, limit)


@settings(max_examples=60, deadline=None)
@given(st.integers(40, 900), st.sampled_from(["en", "zh"]), st.integers(1, 5))
def test_lengths_are_exact_for_coarse_tokens_too(target: int, language: str, size: int) -> None:
    # A "token" is up to `size` characters of one word: merges cross the borders of pieces, as with real tokenizers.
    pieces = list(islice(generated(language, 7), 200))

    def tokens(text: str) -> int:
        return sum(-(-len(word) // size) for word in re.findall(r"\s?\S+|\s+", text))

    prices = [tokens(p) for p in pieces]
    frame = "Question: where? "
    number, padding = fit(
        lambda n, pad: tokens(frame + "".join(pieces[:n]) + pad), target, prices, tokens(frame), PADS[language]
    )
    assert tokens(frame + "".join(pieces[:number]) + padding) == target


def test_a_length_below_the_frame_is_refused() -> None:
    with pytest.raises(UserError, match="alone take 30"):
        fit(lambda n, pad: 30 + n, 20, [1] * 10, 30, PADS["en"])


def test_generated_text_has_the_wanted_size() -> None:
    assert len(generated_text("en", 0, 5000)) >= 5000
