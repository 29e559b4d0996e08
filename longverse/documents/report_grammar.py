"""Sentences from templates: what the invented reports are made of.

A language is a text file beside this one (report_en.txt, report_zh.txt): syllables for names, lists of things, and
topics. A topic is a heading (`== topic place: The {name} factory`), the facts it states (`? kind of value | sentence |
question`, the question left out for what is never asked) and the prose around them (one template a line). Templates
have two marks: `[one|another]` picks a wording, `{slot}` is filled: `{name}` and `{value}` from the section, `{n}`
(number), `{pct}`, `{month}` and the like drawn. Names, numbers, dates and sums are drawn once in a report, so no
sentence can contradict another.
"""

import random
import re
from dataclasses import dataclass, field
from importlib.resources import files

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Attribute:
    """One thing a section states: which kind of value, how it is said, how it is asked."""

    value: str  # person, town, venture, number, date, money, or the name of a list of things
    sentence: str
    question: str = ""  # empty: stated and never asked, only there to be told from the rest


@dataclass(frozen=True)
class Topic:
    """A kind of section."""

    where: str  # opening, topic or closing
    kind: str  # which names its subject takes: place, surname, venture, or company (the report's own)
    heading: str
    attributes: tuple[Attribute, ...]
    prose: tuple[str, ...]


@dataclass(frozen=True)
class Language:
    """What one language file holds."""

    code: str
    title: str
    topics: tuple[Topic, ...]
    syllables: dict[str, tuple[tuple[str, ...], ...]]  # maker of names -> lists of syllables, one from each
    things: dict[str, tuple[str, ...]]

    @property
    def hyphen(self) -> str:
        return "" if self.code == "zh" else "-"

    def at(self, where: str) -> list[Topic]:
        """The topics of one place: opening, topic or closing."""
        return [topic for topic in self.topics if topic.where == where]


def read_language(code: str) -> Language:
    """Read report_<code>.txt; a malformed file is a defect and raises."""
    title = ""
    syllables: dict[str, tuple[tuple[str, ...], ...]] = {}
    things: dict[str, tuple[str, ...]] = {}
    topics: list[Topic] = []
    heading: tuple[str, str, str] | None = None
    attributes: list[Attribute] = []
    prose: list[str] = []

    def close() -> None:
        if heading is not None:
            topics.append(Topic(*heading, tuple(attributes), tuple(prose)))
            attributes.clear()
            prose.clear()

    source = files("longverse.documents") / f"report_{code}.txt"
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            close()
            place, text = line[3:].split(": ", 1)
            where, kind = place.split(" ")
            heading = (where, kind, text)
        elif line.startswith("? "):
            attributes.append(Attribute(*line[2:].split(" | ")))
        elif line.startswith("title: "):
            title = line.removeprefix("title: ")
        elif line.startswith("names "):
            maker, text = line.removeprefix("names ").split(": ", 1)
            syllables[maker] = tuple(tuple(part.split(" ")) for part in text.split(" + "))
        elif line.startswith("list "):
            name, text = line.removeprefix("list ").split(": ", 1)
            things[name] = tuple(text.split("|"))
        elif line and not line.startswith("#"):
            prose.append(line)
    close()
    return Language(code, title, tuple(topics), syllables, things)


@dataclass
class Draws:
    """Names and values, each given out once."""

    language: Language
    rng: random.Random
    used: set[str] = field(default_factory=set)
    decks: dict[str, list[str]] = field(default_factory=dict)

    def draw(self, kind: str) -> str:
        """A value of one kind; all but percentages, months and things of a used-up list are new to the report."""
        if kind == "month":
            return self.rng.choice(self.language.things["month"])
        if kind == "pct":
            return self._percent(self.rng.randint(11, 199) / 10)
        if kind in self.language.things:
            return self._next(kind, self.language.things[kind])
        if kind == "person":
            given = self._name("given")
            surname = self.draw("surname")
            return f"{given} {surname}" if self.language.code == "en" else surname + given
        for attempt in range(4000):
            value = self._make(kind, reach=1 + attempt // 10)
            if value not in self.used:
                self.used.add(value)
                return value
        raise AssertionError(f"no unused value of kind {kind} is left")

    def _make(self, kind: str, reach: int) -> str:
        # reach grows while draws collide, so long reports find unused values farther out.
        rng = self.rng
        if kind in self.language.syllables:
            name = self._name(kind)
            # When all are taken, double names.
            return name if reach < 40 else f"{name}{self.language.hyphen}{self._name(kind)}"
        if kind == "town":
            return self._make("place", reach)
        if kind in ("number", "n"):
            return f"{rng.randint(31, 980 * reach):,}"
        if kind == "money":
            return self._money(rng.randint(12, 95 * reach))
        if kind == "date":
            return self._date(rng.randint(2016 - 4 * reach, 2030), rng.randint(1, 12))
        raise AssertionError(f"unknown kind of value {kind}")

    def _name(self, kind: str) -> str:
        """One syllable from each list, none again before its list is used up: names differ in every part."""
        parts = enumerate(self.language.syllables[kind])
        return "".join(self._next(f"{kind} {place}", syllables) for place, syllables in parts).replace("_", " ")

    def next_general(self) -> str:
        """A template that fits any section."""
        return self._next("general", self.language.at("general")[0].prose)

    def _next(self, deck: str, cards: tuple[str, ...]) -> str:
        if not self.decks.get(deck):
            self.decks[deck] = list(cards)
            self.rng.shuffle(self.decks[deck])
        return self.decks[deck].pop()

    def _percent(self, value: float) -> str:
        return f"{value:.1f}%" if self.language.code == "zh" else f"{value:.1f} percent"

    def _money(self, tenths: int) -> str:
        if self.language.code == "zh":
            return f"{tenths * 10}万元"
        return f"{tenths / 10:.1f} million crowns"

    def _date(self, year: int, month: int) -> str:
        return (
            f"{year}年{month}月" if self.language.code == "zh" else f"{self.language.things['month'][month - 1]} {year}"
        )

    def fill(self, template: str, **slots: str) -> str:
        """The template with its wordings chosen and its slots filled."""
        text, before = template, ""
        while text != before:
            text, before = _CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), text), text
        return _SLOT.sub(lambda match: slots.get(match[1]) or self.draw(match[1]), text)


def accepted_wordings(kind: str, value: str, language: str) -> tuple[str, ...]:
    """What counts as right: the whole value; a sum may lack its currency and a thing its article."""
    if kind == "money":
        return (value, value.removesuffix("元" if language == "zh" else " crowns"))
    if language == "en" and kind in ("gift", "relic", "instrument", "animal", "heat"):
        return tuple(dict.fromkeys((value, value.removeprefix("an ").removeprefix("a "))))
    return (value,)
