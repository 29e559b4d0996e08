"""An answer that no passage says is asked again over a few passages."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from longverse import commands_ask
from longverse.documents import ask, second_look
from longverse.documents.citations import Citation, Cited
from longverse.documents.reader import decode
from longverse.documents.report import generate_report, unanswerable
from longverse.documents.words import asks_a_name_unmarked, is_of_the_kind
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling

SAMPLING = Sampling(max_new_tokens=48, stop=("\n", ". ", "。"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("smol", device="cpu")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_wrong_answer_becomes_what_the_passage_says(
    engine: Engine, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = generate_report(5, target_words=500, questions=2, language=language)
    document = decode(report.text.encode(), "report.md")
    questions = [*(fact.question for fact in report.facts), *unanswerable(report, 1, 5)]
    prompts = ask.prepare(engine, document, questions, 48)
    session = engine.session(prompts.planned_tokens)
    wrong = engine.tokenizer.encode("It is Mr. Nobody of Nowhere.")
    for number, fact in enumerate(report.facts):
        session.read(prompts.ids[number])
        cited = second_look.checked(session, prompts, number, "It is Mr. Nobody of Nowhere.", wrong, SAMPLING)
        assert cited.first == "It is Mr. Nobody of Nowhere."
        assert cited.borne_out
        assert fact.is_answered_by(cited.answer)
        passage = cited.citations[0]
        assert passage.start <= fact.position < passage.end
        assert document.text[passage.start : passage.end] == passage.text

    def never(*arguments: object) -> None:
        raise AssertionError("nothing is to be asked again")

    with monkeypatch.context() as patch:  # what is borne out stands
        patch.setattr(second_look, "second_look", never)
        said = report.facts[0].sentence
        session.read(prompts.ids[0])
        cited = second_look.checked(session, prompts, 0, said, engine.tokenizer.encode(said), SAMPLING)
        assert (cited.found, cited.first) == (True, "")
    # What the document does not answer is not found by a second look either.
    number = len(report.facts)
    session.read(prompts.ids[number])
    cited = second_look.checked(session, prompts, number, "It is Mr. Nobody of Nowhere.", wrong, SAMPLING)
    assert (cited.found, cited.first) == (False, "")


def test_a_question_in_other_words_is_found_by_a_second_look(engine: Engine) -> None:
    text = (
        "# Societies\n\nThe Oldfield Society was founded in 1804. It meets on Mondays.\n\n"
        "The chair of the Marlow Society is Ada Byron. The society owns a boat.\n\nThe river is long."
    )
    document = decode(text.encode(), "societies.md")
    questions = ["Who presides over the Marlow Society?", "Who presides over the Oldfield Society?"]
    prompts = ask.prepare(engine, document, questions, 32)
    session = engine.session(prompts.planned_tokens)
    refused = "The text does not say."
    for number in range(2):
        session.read(prompts.ids[number])
        ids = engine.tokenizer.encode(refused)
        cited = second_look.checked(session, prompts, number, refused, ids, SAMPLING)
        if number == 0:
            assert (cited.found, cited.first) == (True, refused)
            assert "Ada Byron" in cited.answer
            assert "chair of the Marlow Society" in cited.citations[0].text
        else:  # whatever is said of it names nobody
            assert (cited.found, cited.first) == (False, "")


@pytest.mark.parametrize(
    ("question", "said", "fits"),
    [
        ("Who runs the Hill School?", "The Hill School teaches masonry.", False),
        ("Who runs the Hill School?", "The head of the Hill School is Ada Byron.", True),
        ("Who runs the Hill School?", "It is Byron.", True),
        ("From which town is Hill Bank run?", "The budget of Hill Bank is 6 million.", False),
        ("From which town is Hill Bank run?", "The head office of Hill Bank is in Bath.", True),
        ("Where is the base?", "It is in Bath.", True),
        ("What is the area of farm 7?", "Farm 7 grows hops.", False),
        ("What is the area of farm 7, please?", "Farm 7 grows hops.", False),
        ("What is the area of farm 7?", "Farm 7 was bought in May 1990.", False),
        ("What is the area of farm 7?", "Farm 7 has 77 acres.", True),
        ("What is the width of gate 3?", "Gate 3 is 3 metres wide.", True),
        ("What is the area of research of Hill College?", "It studies moss.", True),
        ("What is the area known for?", "For its cheese.", True),
        ("What is the budget of Hill School?", "It has a budget of 4500 crowns.", True),
        ("What is the total yearly cost of it?", "It costs six crowns.", True),
        ("How expensive were the repairs?", "They were long.", False),
        ("When was it built?", "It was built by Ada Byron.", False),
        ("What is it best known for?", "It is known for cheese.", True),
        ("它种植什么？", "它种植油菜。", True),
        ("有多少工人？", "它在白桥。", False),
        ("有多少工人？", "它有412名工人。", True),
    ],
)
def test_what_a_question_asks_for(question: str, said: str, fits: bool) -> None:
    assert is_of_the_kind(question, said) == fits
    assert not asks_a_name_unmarked(question)


@pytest.mark.parametrize("question", ["谁是校长？", "总部在哪里？", "它位于哪个城市？", "经理是什么人？"])
def test_chinese_marks_no_names(question: str) -> None:
    assert asks_a_name_unmarked(question)


def test_the_passage_must_bring_what_is_asked_not_the_answer_alone() -> None:
    question = "Who presides over the Oldfield Society?"

    def cited(answer: str, passage: str) -> Cited:
        citation = Citation(0, "a.txt", 0, len(passage), passage, 1, None, "line 1", (), "verified")
        return Cited(answer, (citation,), ((len(answer), (1,)),), True)

    founded = "The Oldfield Society was founded in 1804."
    assert not second_look.brings_what_is_asked(question, cited(f"{founded} Its president is John Smith.", founded))
    presides = "Ada Byron presides over the Oldfield Society."
    assert not second_look.brings_what_is_asked(question, cited(presides, founded))
    chaired = "The Oldfield Society is chaired by Ada Byron."
    assert second_look.brings_what_is_asked(question, cited("Byron presides over it.", chaired))


def test_the_nearest_paragraphs_are_taken_while_they_fit(engine: Engine) -> None:
    long = "The Marlow boat has oars. " * 400
    short = [f"The Marlow boat number {n} is painted green." for n in range(90)]
    question = "Who owns the Marlow boat?"
    for text, count in (("\n\n".join([long, *short]), None), (long, 1)):
        document = decode(text.encode(), "a.md")
        prompts = ask.prepare(engine, document, [question], 16)
        passages = second_look.widely(engine, prompts, 0)
        places, texts = [one.place for one in passages], [one.text for one in passages]
        assert texts == [prompts.index.places[place][1].text for place in places]
        assert places == sorted(places)
        if count is not None:
            assert len(places) == count
        else:  # the long one has no room, those behind it have
            tokens = [len(engine.tokenizer.encode(text)) for text in texts]
            assert second_look.WIDE - second_look.LEAST - max(tokens) < sum(tokens) <= second_look.WIDE
        chosen = replace(prompts, places=((0, len(prompts.index.places) - 1),))  # nothing but what was selected is read
        assert {one.place for one in second_look.widely(engine, chosen, 0)} <= {0, len(prompts.index.places) - 1}


def test_the_nearest_sentences_name_what_is_asked_about(engine: Engine) -> None:
    """Those with the question's names first, whatever else others share with it; in the documents' order."""
    text = (
        "He went to the school when the bell rang, at what time nobody knew. The Lime Walk school begins lessons at"
        " nine.\n\nThe bell of the Old Wharf school rings at ten. It was late.\n\nLime is a stone."
    )
    question = "At what time does the bell of the Lime Walk school ring?"
    prompts = ask.prepare(engine, decode(text.encode(), "a.txt"), [question], 16)
    nearest = second_look.closest(prompts, 0, 1)
    assert nearest == (second_look.Passage(0, "The Lime Walk school begins lessons at nine."),)
    three = second_look.closest(prompts, 0, 3)
    assert three[0] in nearest or three[1] in nearest
    assert [one.place for one in three] == sorted(one.place for one in three)
    assert "It was late." not in [one.text for one in second_look.closest(prompts, 0, 9)]  # shares no word
    chosen = replace(prompts, places=((1,),))  # nothing but what was selected is read
    assert {one.place for one in second_look.closest(chosen, 0, 9)} == {1}


def test_a_sentence_of_a_long_paragraph_is_found(engine: Engine) -> None:
    """No paragraph of it fits a second look; its sentences do, and their attention counts for the paragraph."""
    story = " ".join(f"On day {n} they went down to the mill and back." for n in range(190))
    fact = "Ada Hill always carries a snuffbox of ebony."
    document = decode(f"{story} {fact} {story}".encode(), "long.txt")
    question = "What is the snuffbox of Ada Hill made of?"
    prompts = ask.prepare(engine, document, [question], 32)
    session = engine.session(prompts.planned_tokens)
    session.read(prompts.ids[0])
    refused = "The text does not say."
    found = second_look.checked(session, prompts, 0, refused, engine.tokenizer.encode(refused), SAMPLING)
    assert (found.first, found.borne_out) == (refused, True)
    assert "ebony" in found.answer
    assert found.citations[0].text == fact
    assert found.signals["attention"] > 0.2


def test_where_no_second_look_is_taken(engine: Engine) -> None:
    """Not for numbered paragraphs, nor a later turn that needs the ones before, nor once it was stopped."""
    question, wrong = "Who is the owner of the brewery?", "The owner of the brewery is Tom Nobody of Nowhere."
    ids = engine.tokenizer.encode(wrong)
    short = decode(b"The owner of the brewery is Ada Hill.", "short.txt")
    prompts = ask.prepare(engine, short, [question], 16)
    session = engine.session(prompts.planned_tokens)
    session.read(prompts.ids[0])
    numbered = second_look.checked(session, replace(prompts, numbered=True), 0, wrong, ids, SAMPLING)
    assert (numbered.borne_out, numbered.first, numbered.answer) == (False, "", wrong)
    stopped = second_look.checked(session, prompts, 0, wrong, ids, SAMPLING, cancelled=lambda: True)
    assert (stopped.first, stopped.answer) == ("", wrong)
    pauses: list[int] = []
    put_right = second_look.checked(session, prompts, 0, wrong, ids, SAMPLING, pause=lambda: pauses.append(1))
    assert (put_right.first, "Ada Hill" in put_right.answer) == (wrong, True)
    assert pauses

    # A later question of a conversation: only one that names its subject.
    document = decode(b"The owner of the Marlow brewery is Ada Hill.", "marlow.txt")
    for asked, looks in (
        ("Who is the owner of the Marlow brewery?", True),
        ("Who is the owner of the brewery?", False),
    ):
        prompts = replace(ask.prepare(engine, document, [asked], 16), follows=True)
        session = engine.session(prompts.planned_tokens)
        session.read(prompts.ids[0])
        later = second_look.checked(session, prompts, 0, wrong, ids, SAMPLING)
        assert ("Ada Hill" in later.answer) is looks


@pytest.mark.parametrize(
    "question",
    [
        "Where does the Marlow boat lie?",
        "Is there a bell on the Marlow boat?",
        "How many oars has the Oldfield boat?",
        "潘氏学校位于哪里？",
        "潘氏学校有多少学生？",
    ],
)
def test_later_questions_that_stand_alone(question: str) -> None:
    assert second_look.stands_alone(following(question), 0)


@pytest.mark.parametrize(
    "question",
    [
        "Where does the boat lie?",  # of whichever was spoken of
        "How many oars has the boat?",
        "Who painted the boathouse?",
        "How many oars has it?",
        "Who works there?",
        "Who was there in 2019?",
        "Who was mayor before?",
        "How much did both cost?",
        "And the Marlow boat?",
        "What about the Marlow boat?",
        "The Marlow boat?",
        "For the Oldfield boat?",
        "What was the profit in 2019?",
        "Who was mayor in 2019?",
        "HOW MANY OARS HAS THE BOAT?",
        "How Many Oars Has The Boat?",
        "Who steers the Marlow ferry to Ely?",  # no paragraph speaks of that
        "Does the school teach English?",  # two schools do
        "学校位于哪里？",
        "学校有多少学生？",
        "有多少学生？",
        "它位于哪里？",
        "该校有多少学生？",
        "潘氏学校？",
        "2019年营业收入是多少？",
    ],
)
def test_later_questions_that_may_lean_on_earlier_turns(question: str) -> None:
    assert not second_look.stands_alone(following(question), 0)


def following(question: str) -> ask.Prompts:
    """A question that follows others in a conversation about boats, firms and schools."""
    text = (
        "The Marlow boat has eight oars and a bell. The Marlow boat lies at Upton.",
        "The Oldfield boat has four oars.",
        "Ada Hill painted the boathouse.",
        "The mayor is Tom Reed. The bridge cost 40 crowns.",
        "Alba Mills had a profit of 3 crowns in 2019. Its school teaches English.",
        "Corn Bank had a profit of 9 crowns in 2019. Its school teaches English.",
        "潘氏学校位于苏州。潘氏学校有两百名学生。",
        "王氏学校位于杭州。",
    )
    document = decode("\n\n".join(text).encode(), "boats.md")
    return ask.Prompts((question,), ((1,),), 1, (document,), places=(None,), follows=True)


def test_the_passage_is_said_below_an_answer_that_was_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = decode(b"The mill stands in Upton.", "a.txt")
    citation = Citation(0, "a.txt", 0, 25, document.text, 1, None, "line 1", (), "verified")
    cited = Cited("The mill stands in Upton.", (citation,), ((25, (1,)),), True, first="It stands in Ely.")
    monkeypatch.setattr(second_look, "checked", lambda *arguments, **named: cited)

    answering: Any = SimpleNamespace(
        stream=lambda *arguments, **named: iter(["It stands in Ely."]), stats=SimpleNamespace(finish_reason="stop")
    )
    prompts = ask.Prompts(("Where does the mill stand?",), ((1,),), 1, (document,), places=(None,))
    text, found = commands_ask.answer(
        answering, prompts, 0, Sampling(max_new_tokens=8), way="attention", shown=True, quiet=True
    )
    assert (text, found) == ("The mill stands in Upton.", cited)
    assert capsys.readouterr().out == "It stands in Ely.\nThe document says: The mill stands in Upton [1].\n"
