"""The set of facts "world": many relations from few lines, so that a reader learns to find what is asked for, not sixty
kinds of sentence by heart.

facts/world.{en,zh}.json holds attributes (a noun, what has it, what its value is like, questions and sentences of its
own), patterns that every attribute can be said and asked in (also as lines of lists and tables), and events, each with
several roles, any of which may be asked for by another. What comes out has the form of the other sets' kinds.

Facts in two sentences are made of two of these: what an attribute or an event leads to (the captain of a ship, the
person who sold a thing) is what another attribute is asked of. "collections" are attributes with several values.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_PLACES = ("town", "city", "country", "place", "island", "valley")
_NUMBERS = re.compile(r"\{?n[234]\}?|money|price|percent")


def world(folder: Path, language: str) -> dict[str, Any]:
    """lists, sorts (a value put together from entries of lists) and kinds, as `stated` reads them."""
    table = json.loads((folder / f"world.{language}.json").read_text(encoding="utf-8"))
    kinds = [kind for row in table["attributes"] for kind in _attribute(row, table, language)]
    kinds += [kind for number, event in enumerate(table["events"]) for kind in _event(number, event)]
    hops = _hops(table, language)
    several = [kind for row in table["collections"] for kind in _collection(row, table)]
    return {"lists": table["lists"], "sorts": table["sorts"], "kinds": kinds, "hops": hops, "several": several}


def _attribute(row: list[Any], table: dict[str, Any], language: str) -> list[dict[str, Any]]:
    """A kind for each thing that has the attribute, with each sort of value."""
    noun, entities, values = row[0], row[1].split(), row[2].split()
    wh = row[3] if language == "zh" else ""
    asks, says = row[-2], row[-1]
    kinds = []
    for entity in entities:
        for value in values:
            number = _NUMBERS.match(table["sorts"].get(value, value)) is not None
            patterns = table["patterns"] + (table["number_patterns"] if number else [])
            kinds.append(
                {
                    "kind": f"{noun} of {entity}",
                    "entity": entity,
                    "value": value,
                    # what is particular to the attribute as often as what it shares with all
                    "statements": _weigh(says, [pattern.replace("{a}", noun) for pattern in patterns]),
                    "questions": _weigh(
                        asks, [ask.replace("{a}", noun).replace("{w}", wh) for ask in table["questions"]]
                    ),
                    "heldout": False,
                }
            )
    return kinds


def _weigh(own: list[str], shared: list[str]) -> list[str]:
    """Both lists, the shorter one repeated until it is about as long as the other."""
    return own * max(1, round(len(shared) / len(own))) + shared


def _event(number: int, event: dict[str, Any]) -> list[dict[str, Any]]:
    """A kind for each question: the role asked for is the value; the first that the question names is the entity."""
    kinds = []
    for role, questions in event["asks"].items():
        for question in questions:
            known = re.findall(r"\{(\w)\}", question)
            others = {name: sort for name, sort in event["roles"].items() if name not in (role, known[0])}
            kinds.append(
                {
                    "kind": f"event {number}",  # one for all its questions: nobody takes part in two of a kind
                    "entity": event["roles"][known[0]],
                    "value": event["roles"][role],
                    "others": {name.upper(): sort for name, sort in others.items()},
                    "statements": [_renamed(text, known[0], role) for text in event["statements"]],
                    "questions": [_renamed(question, known[0], role)],
                    "heldout": False,
                }
            )
    return kinds


def _renamed(text: str, entity: str, value: str) -> str:
    """Roles as `stated` calls them: e, v, and capitals for the others."""
    names = {entity: "e", value: "v"}
    return re.sub(r"\{(\w)\}", lambda match: "{" + names.get(match[1], match[1].upper()) + "}", text)


def _hops(table: dict[str, Any], language: str) -> list[dict[str, Any]]:
    """Every way from an entity over a middle, by an attribute or an event, to an attribute of the middle."""
    ways = [way for row in table["attributes"] for way in _attribute_ways(row, table, language)]
    ways += [way for number, event in enumerate(table["events"]) for way in _event_ways(number, event, language)]
    hops = []
    for way in ways:
        for row in table["attributes"]:
            noun, entities, values = row[0], row[1].split(), row[2].split()
            if way["middle"] not in entities or noun == way["name"]:
                continue
            word = row[3] if language == "zh" else ""
            shared = [ask.replace("{a}", noun).replace("{w}", word) for ask in table["questions"][:2]]
            questions = [ask.replace("{e}", phrase) for ask in [*row[-2], *shared] for phrase in way["phrases"]]
            questions += [_in_two_parts(way, ask, language) for ask in row[-2]]
            second = [*row[-1], table["patterns"][0].replace("{a}", noun)]
            for value in values:
                hops.append(
                    {
                        "kind": f"{way['name']}, {noun}",
                        "states": [way["kind"], f"{noun} of {way['middle']}"],  # of the entity, of the middle
                        "entity": way["entity"],
                        "middle": way["middle"],
                        "value": value,
                        "others": way["others"],
                        "first": way["statements"],
                        "second": [say.replace("{e}", "{m}") for say in second],
                        "questions": questions,
                        "answer": "{v}",
                        "heldout": False,
                    }
                )
    return hops


def _in_two_parts(way: dict[str, Any], ask: str, language: str) -> str:
    """The question after the way to what it asks of: "Think of the captain of {e}: where was that person born?\""""
    phrase = way["phrases"][0]
    person = way["middle"] == "person"
    if language == "zh":
        return f"先找到{phrase}：" + ask.replace("{e}", "那个人" if person else "它")
    asked = ask.replace("{e}", "that person" if person else "it")
    return f"Think of {phrase}: {asked[:1].lower()}{asked[1:]}"


def _attribute_ways(row: list[Any], table: dict[str, Any], language: str) -> list[dict[str, Any]]:
    """What has the attribute leads to its value: "the captain of {e}", "the person who commands {e}"."""
    noun, entities, values = row[0], row[1].split(), row[2].split()
    known = {entity for other in table["attributes"] for entity in other[1].split()}
    named = f"{{e}}的{noun}" if language == "zh" else f"the {noun} of {{e}}"
    says = [say.replace("{v}", "{m}") for say in [*row[-1], table["patterns"][0].replace("{a}", noun)]]
    return [
        {
            "name": noun,
            "kind": f"{noun} of {entity}",
            "entity": entity,
            "middle": value,
            "others": {},
            "phrases": [named, *(phrase for ask in row[-2] if (phrase := _relative(ask, value, language)))],
            "statements": says,
        }
        for value in values
        if value in known
        for entity in entities
    ]


def _event_ways(number: int, event: dict[str, Any], language: str) -> list[dict[str, Any]]:
    """Who took part in an event is known by the other role that the question names."""
    ways = []
    for role, questions in event["asks"].items():
        for question in questions:
            known = re.findall(r"\{(\w)\}", question)
            phrase = _relative(question, event["roles"][role], language)
            if not phrase or len(known) != 1:
                continue
            others = {name.upper(): sort for name, sort in event["roles"].items() if name not in (role, known[0])}
            says = [_renamed(text, known[0], role).replace("{v}", "{m}") for text in event["statements"]]
            ways.append(
                {
                    "name": f"event {number}",
                    "kind": f"event {number}",
                    "entity": event["roles"][known[0]],
                    "middle": event["roles"][role],
                    "others": others,
                    "phrases": [_renamed(phrase, known[0], role)],
                    "statements": says,
                }
            )
    return ways


def _relative(question: str, sort: str, language: str) -> str:
    """What a question asks for, as a phrase: "Who sold {o}?" gives "the person who sold {o}". Empty for other forms,
    and where what is asked for, of this sort, is neither a person nor a place."""
    if language == "zh":
        match = re.fullmatch(r"谁(.+)？", question)
        return f"{match[1]}的人" if match and sort == "person" else ""
    if sort == "person" and (match := re.fullmatch(r"Who (.+)\?", question)):
        return f"the person who {match[1]}"
    if sort in _PLACES and (match := re.fullmatch(r"Where (is|was) (\{\w\}) (.+)\?", question)):
        return (
            "" if match[3].endswith((" for", " from", " to")) else f"the place where {match[2]} {match[1]} {match[3]}"
        )
    return ""


def _collection(row: list[Any], table: dict[str, Any]) -> list[dict[str, Any]]:
    """A kind for each thing of which several values are stated, one a sentence."""
    noun, entities, value, statements, *single = row
    name = single[0] if single else noun  # as the attribute of one value is called: nobody has only one and several
    questions = [ask.replace("{a}", noun) for ask in table["collection_questions"]]
    return [
        {
            "kind": f"{name} of {entity}",
            "entity": entity,
            "value": value,
            "statements": statements,
            "questions": questions,
            "heldout": False,
        }
        for entity in entities.split()
    ]
