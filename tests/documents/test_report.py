"""Invented reports: repeatable, every fact stated once, facts over the whole depth, answers judged fairly."""

import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.documents.report import LANGUAGES, Fact, generate_report
from longverse.errors import UserError

sizes = st.sampled_from([1500, 3000, 9000])


@given(st.integers(0, 10**9), sizes, st.sampled_from(LANGUAGES))
@settings(max_examples=40, deadline=None)
def test_every_fact_is_stated_once_where_it_says(seed: int, size: int, language: str) -> None:
    report = generate_report(seed, target_words=size, language=language)
    assert len(report.facts) == 10
    for fact in report.facts:
        assert report.text.count(fact.sentence) == 1
        assert report.text.startswith(fact.sentence, fact.position)
        assert fact.is_answered_by(fact.sentence)
        assert fact.answer in fact.sentence
        assert "{" not in fact.question
    assert len({fact.question for fact in report.facts}) == 10
    # Nothing is left of the templates, and no sentence that states a value comes twice.
    assert not re.search(r"[\[\]{}|]", report.text)


@given(st.integers(0, 10**9))
@settings(max_examples=15, deadline=None)
def test_names_numbers_and_dates_are_never_said_of_two_things(seed: int) -> None:
    report = generate_report(seed, target_words=6000, questions=40)
    for fact in report.facts:
        if fact.kind in ("person", "number", "date", "town"):
            assert len(re.findall(rf"(?<![\w,]){re.escape(fact.answer)}(?!\w|,\d)", report.text)) == 1, fact


@pytest.mark.parametrize("language", LANGUAGES)
def test_facts_lie_over_the_whole_depth(language: str) -> None:
    for seed in range(5):
        report = generate_report(seed, target_words=6000, language=language)
        depths = [fact.position / len(report.text) for fact in report.facts]
        assert depths[0] < 0.15
        assert depths[-1] > 0.85
        assert max(b - a for a, b in pairwise(depths)) < 0.25


def test_the_same_seed_writes_the_same_report_and_another_one_another() -> None:
    assert generate_report(3) == generate_report(3)
    assert generate_report(3).text != generate_report(4).text


@pytest.mark.parametrize(("language", "size"), [("en", 3000), ("en", 40_000), ("zh", 8000), ("zh", 60_000)])
def test_length_is_reached_and_not_much_passed(language: str, size: int) -> None:
    report = generate_report(1, target_words=size, language=language)
    length = len(report.text) if language == "zh" else len(report.text.split())
    assert size <= length < size * 1.05 + 500


def test_it_looks_like_a_report() -> None:
    report = generate_report(0)
    blocks = report.text.strip().split("\n\n")
    assert blocks[0] == f"# {report.title}"
    headings = [block for block in blocks if block.startswith("## ")]
    assert len(headings) == len(set(headings)) >= 8
    assert headings[0] == "## Letter from the chair"
    paragraphs = [block for block in blocks if not block.startswith("#")]
    assert all(30 < len(paragraph) < 1200 for paragraph in paragraphs)
    sentences = Counter(re.split(r"(?<=\.) ", " ".join(paragraphs)))
    assert sum(count - 1 for count in sentences.values()) <= 3


def test_kinds_of_answers_differ() -> None:
    for seed in range(5):
        kinds = Counter(fact.kind for fact in generate_report(seed).facts)
        assert len(kinds) >= 7


def test_too_many_questions_and_unknown_languages_are_refused() -> None:
    with pytest.raises(UserError, match="1000 questions are wanted"):
        generate_report(0, questions=1000)
    with pytest.raises(UserError, match="at least 1"):
        generate_report(0, questions=0)
    with pytest.raises(UserError, match="choose en or zh"):
        generate_report(0, language="fr")


def fact(*accepted: str) -> Fact:
    return Fact("?", accepted[0], accepted, 0, "", "")


@pytest.mark.parametrize(
    ("wordings", "answer", "right"),
    [
        (("412",), "It employs 412 people.", True),
        (("412",), "It employs 4125 people.", False),
        (("41",), "412", False),
        (("1,240",), "about 1240 people", True),
        (("3.4 million",), "It cost 3.4 million crowns.", True),
        (("3.4 million",), "It cost 13.4 million crowns.", False),
        (("3",), "3.4", False),
        (("Ada Baker",), "ADA BAKER!", True),
        (("Baker",), "a bakery", False),
        (("wood boiler",), "a Wood-Boiler", True),
        (("青溪",), "总部设在青溪。", True),
        (("412",), "员工412人", True),
        (("412",), "员工1412人", False),
        (("2019年3月4日",), "于２０１９年3月4日投产", True),
        (("zinc",), "", False),
    ],
)
def test_answers_are_judged_by_whole_words(wordings: tuple[str, ...], answer: str, right: bool) -> None:
    assert fact(*wordings).is_answered_by(answer) is right
