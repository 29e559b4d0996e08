"""An invented annual report with facts to ask about: the document of `longverse demo`.

Written from a seed out of our own templates, in English or Chinese: a company that does not exist, its works, projects,
laboratories, ships and schools. Every fact is stated in exactly one sentence, and the sections around it state facts of
the same kinds about other names, so that an answer has to be found and cannot be guessed.
"""

import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache

from ..errors import UserError
from .report_grammar import Attribute, Draws, Language, Topic, accepted_wordings, read_language

LANGUAGES = ("en", "zh")
_HAN = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Fact:
    """A question that one sentence of the report answers."""

    question: str
    answer: str
    accepted: tuple[str, ...]  # wordings that count as right
    position: int  # character offset of the sentence in the report
    sentence: str
    kind: str  # of value: person, town, number, date, money, or a list's name

    def is_answered_by(self, text: str) -> bool:
        """Whether an accepted wording occurs in `text`, letter case, punctuation and white space aside."""
        found = _normalise(text)
        return any(_occurs(_normalise(wording), found) for wording in self.accepted)


@dataclass(frozen=True)
class Report:
    """The text and what can be asked about it, in the order of the text."""

    title: str
    text: str
    facts: tuple[Fact, ...]
    language: str


_language = cache(read_language)


def generate_report(seed: int = 0, *, target_words: int = 3000, questions: int = 10, language: str = "en") -> Report:
    """Write a report of at least `target_words` words (Chinese: characters) and choose facts over its whole depth.

    The same arguments give the same report. Raises UserError for an unknown language, or a report too short for so
    many questions.
    """
    if language not in LANGUAGES:
        raise UserError(f"The language {language!r} is unknown: choose en or zh.")
    if questions < 1:
        raise UserError(f"{questions} questions are too few: ask for at least 1.")
    words = _language(language)
    rng = random.Random(f"report {seed} {language}")
    draws = Draws(words, rng)
    company = draws.draw("venture")
    title = draws.fill(words.title, name=company)
    blocks = [f"# {title}"]
    facts: list[Fact] = []
    said: Counter[str] = Counter()  # kinds of value

    def write(topic: Topic, name: str) -> None:
        for block, stated in _section(topic, name, draws, said):
            start = sum(len(written) + 2 for written in blocks)
            blocks.append(block)
            for place, attribute, value, sentence in stated:
                accepted = accepted_wordings(attribute.value, value, language)
                said[attribute.value] += 1
                if question := attribute.question.replace("{name}", name):
                    facts.append(Fact(question, value, accepted, start + place, sentence, attribute.value))

    for topic in words.at("opening"):
        write(topic, company)
    deck: list[Topic] = []
    reserve = 110 * len(words.at("closing"))  # about what the closing sections will add
    while sum(_count_words(block, language) for block in blocks) + reserve < target_words:
        if not deck:  # every kind of section once, in a new order, before any comes again
            deck = words.at("topic")
            rng.shuffle(deck)
        topic = deck.pop()
        write(topic, draws.draw(topic.kind))
    for topic in words.at("closing"):
        write(topic, company)
    text = "\n\n".join(blocks) + "\n"
    return Report(title, text, _spread(facts, questions, len(text), rng), language)


def unanswerable(report: Report, questions: int, seed: int = 0) -> tuple[str, ...]:
    """Questions of the report's own kinds that it does not answer: half of them ask what it leaves unsaid of things
    that it speaks of, half ask about things that stand in another report. Fewer where it has no more."""
    words = _language(report.language)
    rng = random.Random(f"unanswerable {seed} {report.language}")
    unsaid = []
    for heading in re.findall(r"^## (.*)$", report.text, re.MULTILINE):
        for topic in words.topics:
            named = re.fullmatch(re.escape(topic.heading).replace(r"\{name\}", "(?P<name>.+)"), heading)
            # The opening and the closing sections state all of theirs.
            if named is None or topic.where != "topic":
                continue
            for attribute in topic.attributes:
                said = attribute.sentence.replace("{name}", named["name"]).split("{value}")
                if attribute.question and not re.search(".+?".join(map(re.escape, said)), report.text):
                    unsaid.append(attribute.question.replace("{name}", named["name"]))
    size = max(_count_words(report.text, report.language), 1_500)  # a short one may not hold ten facts
    foreign = []
    for other in range(20):
        strange = generate_report(seed + 7919 * (other + 1), target_words=size, questions=10, language=report.language)
        for fact in strange.facts:
            subject = _subject(fact, words)
            if subject and subject not in report.text:
                foreign.append(fact.question)
        if len(foreign) >= questions:
            break
    rng.shuffle(unsaid)
    rng.shuffle(foreign)
    mixed = [question for pair in zip(unsaid, foreign, strict=False) for question in pair]
    rest = unsaid[len(foreign) :] + foreign[len(unsaid) :]
    return tuple(dict.fromkeys(mixed + rest))[:questions]


def _subject(fact: Fact, words: Language) -> str:
    """The name that a fact is about, by the question's template."""
    for topic in words.topics:
        for attribute in topic.attributes:
            pattern = re.escape(attribute.question).replace(r"\{name\}", "(?P<name>.+)")
            if attribute.question and (found := re.fullmatch(pattern, fact.question)):
                return found["name"]
    return ""


_Stated = list[tuple[int, Attribute, str, str]]  # offset in the block, attribute, value, sentence


def _section(topic: Topic, name: str, draws: Draws, said: Counter[str]) -> list[tuple[str, _Stated]]:
    """A heading and its paragraphs; with each block, what it states and where."""
    rng = draws.rng
    prose, attributes = list(topic.prose), list(topic.attributes)
    rng.shuffle(prose)
    rng.shuffle(attributes)
    # Two facts a section, strewn in prose, of the kinds of value said least so far: a report is not a list of names.
    # The first and the last sections state all of theirs.
    if topic.where == "topic":
        attributes.sort(key=lambda attribute: said[attribute.value])
        del attributes[2:]
        prose += [draws.next_general() for _ in range(3)]
        rng.shuffle(prose)
    blocks: list[tuple[str, _Stated]] = [(f"## {draws.fill(topic.heading, name=name)}", [])]
    joiner = "" if draws.language.code == "zh" else " "
    for place, attribute in enumerate(attributes):
        # A paragraph begins with what it states and goes on with its share of the prose.
        value = draws.draw(attribute.value)
        sentence = draws.fill(attribute.sentence, name=name, value=value)
        share = prose[place :: len(attributes)]
        paragraph = joiner.join([sentence, *(draws.fill(template, name=name) for template in share)])
        blocks.append((paragraph, [(0, attribute, value, sentence)]))
    return blocks


def _spread(facts: list[Fact], questions: int, length: int, rng: random.Random) -> tuple[Fact, ...]:
    """`questions` facts at even depths, their kinds of value as different as the report allows, and rare kinds first:
    the only cargo of a report is a fairer question to a small model than one of its twenty people."""
    if questions > len(facts):
        raise UserError(
            f"The report states {len(facts)} facts and {questions} questions are wanted:"
            " ask for a longer report or fewer questions."
        )
    stated = Counter(fact.kind for fact in facts)
    asked: Counter[str] = Counter()
    chosen: list[Fact] = []
    left = list(facts)
    for number in range(questions):
        depth = (number + 0.5) / questions * length
        near = sorted(left, key=lambda fact: abs(fact.position - depth))[:5]
        pick = min(near, key=lambda fact: (asked[fact.kind], stated[fact.kind], rng.random()))
        asked[pick.kind] += 1
        chosen.append(pick)
        left.remove(pick)
    return tuple(sorted(chosen, key=lambda fact: fact.position))


def _count_words(text: str, language: str) -> int:
    return len(text) if language == "zh" else len(text.split())


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)  # 1,240 is 1240
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]", " ", text)  # a point stays only between digits
    return " ".join(text.split())


def _occurs(wanted: str, text: str) -> bool:
    # Whole words and numbers only: 41 is not in 412, nor 3.4 in 13.4, nor Baker in bakery. Chinese has no word edges.
    before = r"(?<!\d)(?<!\d\.)" if wanted[0].isdigit() else "" if _HAN.match(wanted[0]) else r"(?<!\w)"
    after = r"(?!\d)(?!\.\d)" if wanted[-1].isdigit() else "" if _HAN.match(wanted[-1]) else r"(?!\w)"
    return re.search(before + re.escape(wanted) + after, text) is not None
