"""Stated facts: invented facts of many kinds written into natural documents, and questions about them.

The kinds, names and values stand in facts/: en.json and zh.json of life in old novels, work.*.json of reports (sums,
dates, shares, rooms; lines of lists and tables too), world.*.json of hundreds of relations (see `world`). Kinds marked
"heldout", and every fourth entry of each list, belong to the held-out set: with split="train" an item never shows them,
with split="heldout" it shows only them, so that a model can be tested on kinds, names and values it never saw.

An item has plain facts, facts in two sentences that only together answer, questions that ask for several facts at once,
and questions whose answer is *not* in the text (about a person or place that other facts do name).
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from longverse.data.long_sft.item import SPLITS
from longverse.data.long_sft.prompts import variants
from longverse.data.long_sft.world import world
from longverse.errors import UserError

HELD_OUT_EVERY = 4
SETS = ("life", "work", "world")
WITH_HELD_OUT = ("life", "work")  # the sets of which some kinds are held out
SORTS = {"plain": 0.7, "hop": 0.11, "several": 0.08, "absent": 0.11}  # shares of the questions
_MONTH_NAMES = "January February March April May June July August September October November December"
_MONTHS = _MONTH_NAMES.split()


@dataclass(frozen=True)
class Fact:
    """sentences: what is written into the text, apart from each other; answers: what a right reply contains (all of
    them for sort "several", the first otherwise); reply: a full sentence. Sort "absent" has no sentence."""

    sort: str  # plain, hop, several, absent
    kind: str
    sentences: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    reply: str


@lru_cache
def _table(language: str, sets: tuple[str, ...]) -> dict[str, Any]:
    """The lists of all sets (names of persons are shared), the kinds of the wanted ones."""
    folder, name = Path(__file__).parent / "facts", "zh" if language == "zh" else "en"
    tables = {
        "life": json.loads((folder / f"{name}.json").read_text(encoding="utf-8")),
        "work": json.loads((folder / f"work.{name}.json").read_text(encoding="utf-8")),
    }
    if "world" in sets:
        tables["world"] = world(folder, name)
    lists: dict[str, Any] = {}
    for table in reversed(tables.values()):  # where two have a list of one name, that of life is taken
        lists |= table["lists"]
    return {"lists": lists, "sorts": tables.get("world", {}).get("sorts", {})} | {
        group: [kind for one in sets for kind in tables[one][group]] for group in ("kinds", "hops", "several")
    }


def check_held_out(split: str, sets: tuple[str, ...]) -> None:
    """UserError when facts of the held-out split are wanted and no set has kinds for it."""
    if split == "heldout" and not set(sets) & set(WITH_HELD_OUT):
        raise UserError(
            f"split heldout needs facts of kinds that training never shows, and {', '.join(sets)} has none: add "
            f"{' or '.join(WITH_HELD_OUT)} to facts."
        )


class FactMaker:
    """Draws facts without contradiction: within one maker no kind gets the same bearer or the same value twice.

    taken(text): whether the document already holds a string, so that an invented name never collides with it.
    """

    def __init__(
        self, language: str, split: str, rng: random.Random, document: str = "", sets: tuple[str, ...] = ("life",)
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split must be train or heldout, not {split!r}.")
        check_held_out(split, sets)
        self.language = "zh" if language == "zh" else "en"
        self.split = split
        self.rng = rng
        self._document = document
        self._table = _table(self.language, sets)
        self._used: set[tuple[str, str]] = set()
        self._bearers: list[tuple[str, str, str]] = []  # (type, bearer, kind) of what was stated

    def plain(self, name: str = "") -> Fact:
        """A fact in one sentence, of the kind with this name where one is given."""
        kind = self._named(name) if name else self._kind("kinds")
        bearer, value = self._bearer(kind), self._value(kind["kind"], kind["value"])
        words = {"e": bearer, "v": value} | self._others(kind)
        return Fact(
            "plain", kind["kind"],
            (self._say(self.rng.choice(kind["statements"]), words),),
            self._say(self.rng.choice(kind["questions"]), words), (value,), self._say(kind.get("answer", "{v}"), words),
        )  # fmt: skip

    def hop(self) -> Fact:
        """A fact in two sentences: the bearer leads to something, and that to the value. What the sentences state of
        bearer and middle is stated of them by no other fact."""
        kind = self._kind("hops")
        for _ in range(20):
            middle = self._value(kind["kind"] + " middle", kind["middle"])
            bearer, value = self._bearer(kind), self._value(kind["kind"], kind["value"])
            stated = list(zip(kind.get("states", ()), (bearer, middle), strict=False))
            if not self._used.intersection(stated):
                break
        else:
            raise _UsedUp(kind["entity"])
        self._used.update(stated)
        self._bearers += [
            (sort, name, one) for (one, name), sort in zip(stated, (kind["entity"], kind["middle"]), strict=False)
        ]
        words = {"e": bearer, "m": middle, "v": value} | self._others(kind)
        return Fact(
            "hop", kind["kind"],
            tuple(self._say(self.rng.choice(kind[part]), words) for part in ("first", "second")),
            self._say(self.rng.choice(kind["questions"]), words), (value,), self._say(kind["answer"], words),
        )  # fmt: skip

    def several(self, count: int) -> Fact:
        """`count` facts of one kind about one bearer, and the question that asks for all."""
        kind = self._kind("several")
        bearer = self._bearer(kind)
        values = [self._value(kind["kind"], kind["value"]) for _ in range(count)]
        sentences = tuple(self._say(self.rng.choice(kind["statements"]), {"e": bearer, "v": value}) for value in values)
        question = self._say(self.rng.choice(kind["questions"]), {"e": bearer, "n": _number(count, self.language)})
        if self.language == "zh":
            reply = "、".join(values) + "。"
        else:
            reply = ", ".join(values[:-1]) + f" and {values[-1]}."
        return Fact("several", kind["kind"], sentences, question, tuple(values), _capital(reply))

    def absent(self) -> Fact:
        """A question that the text does not answer: of a kind whose bearers it names, about another bearer; where it
        can be, a bearer of whom the text states something else."""
        kind = self._kind("kinds")
        stated = {b for t, b, k in self._bearers if k == kind["kind"]}
        others = [b for t, b, k in self._bearers if t == kind["entity"] and b not in stated]
        bearer = self.rng.choice(others) if others and self.rng.random() < 0.6 else self._bearer(kind, state=False)
        self._used.add((kind["kind"], bearer))
        question = self._say(self.rng.choice(kind["questions"]), {"e": bearer} | self._others(kind))
        reply = variants("not_stated", self.language)[0]  # always the same words, which a reader can rely on
        return Fact("absent", kind["kind"], (), question, (reply,), reply)

    def _kind(self, group: str) -> dict[str, Any]:
        held = self.split == "heldout"
        return self.rng.choice([kind for kind in self._table[group] if kind["heldout"] == held])

    def _named(self, name: str) -> dict[str, Any]:
        """A kind of this name: one asks for one part of it, another for another."""
        same = [kind for kind in self._table["kinds"] if kind["kind"] == name]
        return same[0] if len(same) == 1 else self.rng.choice(same)

    def _others(self, kind: dict[str, Any]) -> dict[str, str]:
        """What else a kind's sentences name, beside the bearer and the value."""
        return {name: self._draw(sort) for name, sort in kind.get("others", {}).items()}

    def _bearer(self, kind: dict[str, Any], *, state: bool = True) -> str:
        """One that this kind has not had. Two kinds that could answer each other's question share no bearer: a question
        names its kind, so only the same kind matters."""
        for _ in range(200):
            bearer = self._draw(kind["entity"])
            if (kind["kind"], bearer) not in self._used and bearer not in self._document:
                self._used.add((kind["kind"], bearer))
                if state:
                    self._bearers.append((kind["entity"], bearer, kind["kind"]))
                return bearer
        raise _UsedUp(kind["entity"])

    def _value(self, kind: str, sort: str) -> str:
        for _ in range(200):
            value = self._draw(sort)
            if (kind, value) not in self._used:
                self._used.add((kind, value))
                return value
        raise _UsedUp(sort)

    def _draw(self, sort: str) -> str:
        rng = self.rng
        if sort in self._table["sorts"]:
            return re.sub(r"\{(\w+)\}", lambda match: self._draw(match[1]), self._table["sorts"][sort])
        if sort == "person":
            first, last = rng.choice(self._entries("first")), rng.choice(self._entries("last"))
            return last + first if self.language == "zh" else f"{first} {last}"
        if sort in ("n2", "n3", "n4"):
            digits = int(sort[1])
            # A held-out number is one the training never used as a value: split by its remainder.
            while True:
                number = rng.randint(10 ** (digits - 1) + 1, 10**digits - 1)
                if (number % HELD_OUT_EVERY == 3) == (self.split == "heldout"):
                    return str(number)
        if sort in ("money", "price", "percent", "date"):
            return self._amount(sort)
        if sort == "year":
            return str(rng.randint(1601, 1899))
        if sort == "time":
            return f"{rng.randint(7, 11)}:{rng.choice(('10', '20', '25', '35', '40', '50'))}"
        return rng.choice(self._entries(sort))

    def _amount(self, sort: str) -> str:
        """A sum, a price, a share or a date as reports write them. Held-out ones end in another number."""
        rng, zh = self.rng, self.language == "zh"
        while True:
            number = rng.randint(11, 989)
            if (number % HELD_OUT_EVERY == 3) == (self.split == "heldout"):
                break
        if sort == "date":
            day, month, year = number % 28 + 1, rng.randint(1, 12), rng.randint(2019, 2031)
            return f"{year}年{month}月{day}日" if zh else f"{day} {_MONTHS[month - 1]} {year}"
        if sort == "percent":
            return f"{number / 10:.1f}%"
        if sort == "price":
            return f"{number}元" if zh else f"${number}.{rng.choice(('00', '50', '90', '95'))}"
        return f"{number}万元" if zh else f"${number / 10:.1f} million"

    def _entries(self, name: str) -> list[str]:
        held = self.split == "heldout"
        return [x for i, x in enumerate(self._table["lists"][name]) if (i % HELD_OUT_EVERY == 3) == held]

    def _say(self, pattern: str, words: dict[str, str]) -> str:
        text = re.sub(r"\{(\w)\}", lambda match: words.get(match[1], match[0]), pattern)
        if self.language == "en":
            text = _capital(re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text))
        return text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(count: int, language: str) -> str:
    words = ("", "", "two", "three", "four", "five", "six")
    return "零一两三四五六"[count] if language == "zh" else words[count]


class _UsedUp(Exception):
    """A list has no name or value left that this text has not used; another kind may have."""


def draw_facts(maker: FactMaker, count: int, shares: dict[str, float] = SORTS) -> list[Fact]:
    """`count` questions' worth of facts, the first a plain one where any are. shares: of the sorts. Where a list is
    used up the commonest sort stands in. UserError when the lists do not hold so many different ones."""
    facts: list[Fact] = []
    refused = 0
    while len(facts) < count:
        sort = maker.rng.choices(list(shares), list(shares.values()))[0]
        if not facts and shares.get("plain", 0) > 0:
            sort = "plain"
        if refused > 20:
            sort = max(shares, key=shares.__getitem__)
        try:
            if sort == "plain":
                fact = maker.plain()
            elif sort == "hop":
                fact = maker.hop()
            elif sort == "several":
                fact = maker.several(maker.rng.randint(2, 3))
            else:
                fact = maker.absent()
        except _UsedUp as error:
            refused += 1
            if refused > 200:
                raise UserError(
                    f"the list of {error} is too short for {count} facts in one text; ask for fewer questions."
                ) from None
            continue
        facts.append(fact)
    return facts


def rivals(maker: FactMaker, asked: list[Fact], share: float) -> list[Fact]:
    """For about a `share` of the plain and the absent facts one of the same kind about somebody else: the near miss
    that a reader must tell from what is asked for."""
    facts = []
    for fact in asked:
        if fact.sort in ("plain", "absent") and maker.rng.random() < share:
            with contextlib.suppress(_UsedUp):
                facts.append(maker.plain(fact.kind))
    return facts


def plain_facts(maker: FactMaker, count: int) -> list[Fact]:
    """Up to `count` plain facts that nothing asks about."""
    facts = []
    for _ in range(count):
        try:
            facts.append(maker.plain())
        except _UsedUp:
            continue
    return facts
