"""RULER: each task's text holds what its definition says, lengths are exact, scores and effective length."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest

from longverse.errors import UserError
from longverse.evaluation.ruler import (
    RulerResult,
    RulerRow,
    RulerSettings,
    fit_draft,
    run_ruler,
    score_answer,
)
from longverse.evaluation.ruler_tasks import TASKS, make_draft, read_questions

from .conftest import Echo


def text_of(task: str, seed: int = 1, pieces: int = 60) -> tuple[str, tuple[str, ...]]:
    draft = make_draft(task, random.Random(seed))
    return draft.build(list(islice(draft.parts(), pieces))), draft.references


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_repeatable_and_hold_their_answers(task: str) -> None:
    text, references = text_of(task)
    assert (text, references) == text_of(task)
    assert text != text_of(task, seed=2)[0]
    for reference in references:
        assert reference.lower() in text.lower()


@pytest.mark.parametrize(
    ("task", "needles", "answers", "value"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f]{8}-[0-9a-f-]{27}"),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multikey_2", 61, 1, r"\d{7}"),  # the haystack of 60 pieces is needles too
        ("niah_multikey_3", 61, 1, r"[0-9a-f]{8}-[0-9a-f-]{27}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_as_defined(task: str, needles: int, answers: int, value: str) -> None:
    text, references = text_of(task)
    assert len(re.findall(rf"for \S+ is: {value}\.", text)) == needles
    assert len(references) == answers
    assert all(re.fullmatch(value, r) for r in references)


def test_variables_form_one_chain_of_four_hops() -> None:
    text, names = text_of("vt")
    assert len(names) == 5
    places = [text.index(f"VAR {name} =") for name in names]
    assert places == sorted(places)
    for earlier, later in pairwise(names):
        assert f"VAR {later} = VAR {earlier}." in text


def test_common_words_come_30_times_and_others_3() -> None:
    text, words = text_of("cwe")
    counts = Counter(re.findall(r"\d+\. (\w+)", text))
    assert len(words) == 10
    assert {counts[word] for word in words} == {30}
    assert {n for word, n in counts.items() if word not in words} == {3}


@pytest.mark.parametrize("pieces", [80, 500, 5000])
def test_frequent_words_follow_zipf(pieces: int) -> None:
    text, words = text_of("fwe", pieces=pieces)
    counts = Counter(text.split("\n")[1].split())
    assert sum(counts.values()) == pytest.approx(pieces, rel=0.15)
    ranked = [word for word, _ in counts.most_common(4)]
    assert ranked[0] == "...."
    assert tuple(ranked[1:]) == words
    assert counts[words[0]] == pytest.approx(counts["...."] / 4, rel=0.1)


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_exact(echo: Echo, task: str) -> None:
    draft = make_draft(task, random.Random(3))
    length = 4000 if task == "cwe" else 900
    request = fit_draft(echo, draft, length)
    assert echo.count(request) + draft.new_tokens == length


def test_what_is_too_short_is_refused(echo: Echo) -> None:
    with pytest.raises(UserError, match="alone take"):
        fit_draft(echo, make_draft("cwe", random.Random(3)), 700)
    with pytest.raises(UserError, match="no room for an answer of 128"):
        fit_draft(echo, make_draft("niah_single_1", random.Random(3)), 100)


def test_scores_are_the_authors() -> None:
    draft = replace(make_draft("vt", random.Random(0)), references=("ABC", "DEF", "GHI", "JKL"))
    assert score_answer("abc and def", draft) == 0.5
    assert score_answer("abc", replace(draft, any_of=True)) == 1.0
    assert score_answer("", draft) == 0.0


def test_run_resume_and_failures(echo: Echo, tmp_path: Path) -> None:
    settings = RulerSettings(lengths=(500, 700), tasks=("niah_single_1", "vt"), samples=2)
    echo.fail = (1,)
    first = run_ruler(echo, settings, journal=tmp_path / "r.jsonl")
    assert first.failures == 1
    assert first.average(700) == 100.0
    calls = echo.calls
    whole = run_ruler(echo, settings, journal=tmp_path / "r.jsonl")
    assert echo.calls == calls + 1
    assert whole.failures == 0
    assert whole.effective_length() == 700
    whole.save(tmp_path)
    again = RulerResult.from_dict(json.loads((tmp_path / "ruler.json").read_text()))
    assert again.rows == whole.rows
    assert "does not compare with published ones" in (tmp_path / "ruler.md").read_text()
    echo.window = 600
    with pytest.raises(UserError, match="window"):
        run_ruler(echo, settings)


def test_effective_length_ends_at_the_first_low_average() -> None:
    rows = [RulerRow("vt", n, 0, ["x"], "", s, n) for n, s in ((1, 1.0), (2, 0.9), (3, 0.5), (4, 1.0))]
    result = RulerResult({"lengths": [1, 2, 3, 4], "tasks": ["vt"], "samples": 1}, {"model": "m"}, rows)
    assert result.effective_length() == 2
    assert RulerResult({**result.settings, "lengths": [3]}, {"model": "m"}, rows).effective_length() is None


def test_question_files_of_the_user(echo: Echo, tmp_path: Path) -> None:
    squad = {
        "data": [
            {"title": "T", "paragraphs": [
                {"context": f"Paragraph {i} is about a lake.",
                 "qas": [{"question": f"Q{i}?", "answers": [{"text": f"lake {i}"}]}]}
                for i in range(30)
            ]}
        ]
    }  # fmt: skip
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad))
    qa = read_questions(path)
    assert len(qa.questions) == 30
    draft = make_draft("qa_1", random.Random(1), qa)
    request = fit_draft(echo, draft, 600)
    assert draft.any_of
    number = draft.references[0].split()[1]
    assert request.messages is not None
    assert request.messages[0]["content"].count(f"Paragraph {number} is") == 1
    hotpot = [
        {
            "question": "Q?",
            "answer": "yes",
            "context": [["A", ["a. ", "b."]], ["B", ["c."]]],
            "supporting_facts": [["A", 0]],
        }
    ]
    path.write_text(json.dumps(hotpot))
    assert read_questions(path).questions == (("Q?", ("yes",), ("A",)),)
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match="neither a SQuAD nor a HotpotQA"):
        read_questions(path)


def test_settings_that_make_no_sense() -> None:
    for change in ({"lengths": (2, 1)}, {"tasks": ("vtt",)}, {"samples": 0}):
        with pytest.raises(UserError):
            RulerSettings(**{"lengths": (1000,), **change})  # type: ignore[arg-type]
