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
from longverse.evaluation.backends import Request
from longverse.evaluation.endpoint import EndpointBackend
from longverse.evaluation.engine_backend import EngineBackend, prompt_ids
from longverse.evaluation.fitting import ENGLISH_PAD, fit
from longverse.evaluation.ruler import (
    RulerResult,
    RulerRow,
    RulerSettings,
    fit_draft,
    run_ruler,
    score_answer,
)
from longverse.evaluation.ruler_tasks import TASKS, _english, _words, make_draft, read_questions
from longverse.inference.engine import Engine

from .conftest import Echo


def text_of(task: str, seed: int = 1, pieces: int = 60, length: int = 4096) -> tuple[str, tuple[str, ...]]:
    draft = make_draft(task, random.Random(seed), length)
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


def test_the_key_asked_for_has_one_value_among_thousands() -> None:
    text, (value,) = text_of("niah_multikey_2", pieces=20_000)  # more needles than there are pairs of words
    key = re.findall(r"number for (\S+) mentioned", text)[-1]
    assert re.findall(rf"for {key} is: (\d+)", text) == [value]


def test_noise_and_needles_have_a_line_each() -> None:
    for task in ("niah_single_1", "niah_multikey_2"):
        lines = text_of(task)[0].split("\n")
        assert len(lines) == 63  # the order, 60 pieces, the needle, the question
        assert sum(line.startswith("One of the special magic numbers") for line in lines) in (1, 61)


def test_variables_form_one_chain_of_four_hops_after_a_worked_example() -> None:
    draft = make_draft("vt", random.Random(1), 4096)
    text = draft.build(list(islice(draft.parts(), 60)))
    example, asked = text.split("\n\nMemorise")
    names = draft.references
    assert len(names) == 5
    for part, chain in ((asked, names), (example, example.split()[-5:])):
        places = [re.search(rf"^VAR {name} = ", part, re.MULTILINE).start() for name in chain]  # type: ignore[union-attr]
        assert places == sorted(places)
        for earlier, later in pairwise(chain):
            assert f"VAR {later} = VAR {earlier}\n" in part
    assert {len(name) for name in names} == {5}
    assert {len(name) for name in example.split()[-5:]} == {3}
    assert draft.lead.endswith("they are:")


@pytest.mark.parametrize(("length", "counts"), [(4096, ((10, 3), (30, 3))), (4095, ((3, 1), (6, 1)))])
def test_common_words_come_as_often_as_the_authors_say(length: int, counts: tuple[tuple[int, int], ...]) -> None:
    text, words = text_of("cwe", length=length)
    example, asked = text.split("\n\nBelow")
    told = re.findall(r"\d+\. (\w+)", example.split("Answer:")[1])
    shown = example.split("Question:")[0]
    for part, common, (often, seldom) in ((shown, told, counts[0]), (asked, words, counts[1])):
        found = Counter(re.findall(r"\d+\. (\w+)", part))
        assert len(set(common)) == 10
        assert {found[word] for word in common} == {often}
        assert {n for word, n in found.items() if word not in common} == {seldom}
    assert len(told) == 10
    assert not set(told) & set(words)


def test_no_common_word_is_a_part_of_another() -> None:
    text, _ = text_of("cwe", pieces=1500)  # more words than the English list holds
    every = set(re.findall(r"\d+\. (\w+)", text.split("\n\nBelow")[1]))
    assert len(every) == 1510
    english = sorted(word for word in every if not re.fullmatch("([^aeiou][aeiou]){3}", word))
    assert len(english) > 300
    assert not [(a, b) for a in english for b in english if a != b and a in b]


@pytest.mark.parametrize("length", [2_048, 4_096, 16_384, 131_072])
def test_being_english_does_not_tell_a_common_word(length: int) -> None:
    """The share of English words is that of the distractors, however long the list."""
    kinds: dict[bool, list[bool]] = {True: [], False: []}
    for seed in range(40 if length < 100_000 else 12):  # long lists hold as many words each
        draft = make_draft("cwe", random.Random(seed), length)
        others = list(islice(draft.parts(), length // 20))  # about what a row holds
        assert not set(others) & set(draft.references)
        for common, words in ((True, draft.references), (False, others)):
            kinds[common] += [word in _english() for word in words]
    common, others = (sum(kinds[which]) / len(kinds[which]) for which in (True, False))
    assert abs(common - others) < 0.1
    assert (others == 1) == (length == 4_096)


def test_no_coined_word_holds_an_english_one_or_is_a_part_of_one() -> None:
    words = list(islice(_words(random.Random(1), 6_000), 8_000))
    assert len(set(words)) == 8_000
    english = set(_english())
    assert english < set(words)
    text = " ".join(words)
    assert [word for word in english if text.count(word) != 1] == []
    assert all(text.count(word) == 1 for word in words[:300])
    assert words == list(islice(_words(random.Random(1), 6_000), 8_000))


@pytest.mark.parametrize("pieces", [80, 500, 5000])
def test_frequent_words_follow_zipf(pieces: int) -> None:
    text, words = text_of("fwe", pieces=pieces)
    counts = Counter(text.split("coded words. ")[1].split("\n")[0].split())
    ranked = [word for word, _ in counts.most_common(4)]
    assert ranked == ["....", *words]
    zeta = 1.6449340668482264  # of 2
    assert [n for _, n in counts.most_common()] == [int(pieces / (k * k * zeta)) for k in range(1, len(counts) + 1)]
    assert pieces / ((len(counts) + 1) ** 2 * zeta) < 1  # the next rank would not come once
    assert {len(word) for word in counts} == {4, 6}


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_exact(echo: Echo, task: str) -> None:
    length = {"cwe": 2500, "vt": 1500}.get(task, 900)
    draft = make_draft(task, random.Random(3), length)
    request = fit_draft(echo, draft, length)
    assert request.lead == draft.lead
    assert echo.count(request) + draft.new_tokens == length


def test_pieces_of_a_token_and_less_leave_room_for_the_padding() -> None:
    """fwe's pieces may be shorter than a token, so that many have to give way to the shortest pad text."""

    def count(pieces: int, padding: str) -> int:
        return 20 + pieces // 3 * 2 + (4 + len(padding.split()) if padding else 0)

    for target in range(300, 340):
        pieces, padding = fit(count, target, [1] * 2_000, 20, ENGLISH_PAD)
        assert count(pieces, padding) == target


def test_the_lead_stands_in_the_models_own_turn(engine: Engine) -> None:
    backend = EngineBackend(engine)
    ids = prompt_ids(engine.tokenizer, engine.chat, Request.user("Where?", lead=" It is"))
    assert engine.tokenizer.decode(ids, skip_special=False).endswith("<|start|>assistant\n It is")
    assert len(ids) == backend.count(Request.user("Where?", lead=" It is"))
    served = EndpointBackend("http://127.0.0.1:9/v1", "tiny", tokenizer=engine.tokenizer, chat=engine.chat)
    assert served.count(Request.user("Where?", lead=" It is")) == backend.count(Request.user("Where? It is"))


def test_what_is_too_short_is_refused(echo: Echo) -> None:
    with pytest.raises(UserError, match="alone take"):
        fit_draft(echo, make_draft("cwe", random.Random(3), 300), 300)
    with pytest.raises(UserError, match="no room for an answer of 128"):
        fit_draft(echo, make_draft("niah_single_1", random.Random(3), 4096), 100)


def test_scores_are_the_authors() -> None:
    draft = replace(make_draft("vt", random.Random(0), 4096), references=("ABC", "DEF", "GHI", "JKL"))
    assert score_answer("abc and def", draft) == 0.5
    assert score_answer("abc", replace(draft, any_of=True)) == 1.0
    assert score_answer("", draft) == 0.0


def test_run_resume_and_failures(echo: Echo, tmp_path: Path) -> None:
    settings = RulerSettings(lengths=(500, 700), tasks=("niah_single_1", "niah_single_2"), samples=2)
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


def test_a_squad_file_distracts_with_the_same_article_first(echo: Echo, tmp_path: Path) -> None:
    articles = [
        {
            "title": f"Lake {a}",
            "paragraphs": [
                {
                    "context": f"Paragraph {a}.{i} is about a lake. " + "It is deep. " * (60 if a == 0 else 1),
                    "qas": [{"question": f"Q{a}.{i}?", "answers": [{"text": f"lake {a}.{i}"}]}],
                }
                for i in range(8)
            ],
        }
        for a in range(3)
    ]
    articles[0]["paragraphs"][0]["qas"] = [  # type: ignore[index]
        {"question": "None?", "answers": [{"text": "x"}], "is_impossible": True},
        {"question": "Nothing?", "answers": []},
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": articles}))
    qa = read_questions(path)
    assert len(qa.questions) == 23
    assert re.fullmatch(r"squad\.json \([0-9a-f]{16}\)", qa.name)
    draft = make_draft("qa_1", random.Random(1), 4000, qa)
    article, number = draft.references[0].removeprefix("lake ").split(".")
    near = list(islice(draft.parts(), 7))
    assert all(text.startswith(f"Paragraph {article}.") for text in near)
    # Short documents follow long ones: more of them are drawn until the length is reached.
    request = fit_draft(echo, draft, 4000)
    assert draft.any_of
    assert request.messages is not None
    assert request.messages[0]["content"].count(f"Paragraph {article}.{number} is") == 1
    assert echo.count(request) == 4000 - 32


def test_of_hotpotqa_all_documents_of_the_row_stay(tmp_path: Path) -> None:
    hotpot = [
        {
            "question": f"Q{n}?",
            "answer": "yes",
            "context": [[f"A{n}", ["a. ", "b."]], [f"B{n}", ["c."]]],
            "supporting_facts": [[f"A{n}", 0]],
        }
        for n in range(2)
    ]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(hotpot))
    qa = read_questions(path)
    draft = make_draft("qa_2", random.Random(1), 4096, qa)
    text = draft.build(list(islice(draft.parts(), 2)))
    for title in ("A0\na. b.", "B0\nc.", "A1\na. b.", "B1\nc."):
        assert text.count(f":\n{title}") == 1
    for content, message in (('{"rows": []}', "neither a SQuAD nor a HotpotQA"), (json.dumps(hotpot[:1]), "too few"),
                             ("3", "neither")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_questions(path)


def test_settings_that_make_no_sense() -> None:
    for change in ({"lengths": (2, 1)}, {"tasks": ("vtt",)}, {"samples": 0}):
        with pytest.raises(UserError):
            RulerSettings(**{"lengths": (1000,), **change})  # type: ignore[arg-type]
