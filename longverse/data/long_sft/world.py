"""The set of facts "world": many relations from few lines, so that a reader learns to find what is asked for, not sixty
kinds of sentence by heart.

facts/world.{en,zh}.json holds attributes (a noun, what has it, what its value is like, questions and sentences of its
own), patterns that every attribute can be said and asked in (also as lines of lists and tables), and events, each with
several roles, any of which may be asked for by another. What comes out has the form of the other sets' kinds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_NUMBERS = re.compile(r"\{?n[234]\}?|money|price|percent")


def world(folder: Path, language: str) -> dict[str, Any]:
    """lists, sorts (a value put together from entries of lists) and kinds, as `stated` reads them."""
    table = json.loads((folder / f"world.{language}.json").read_text(encoding="utf-8"))
    kinds = [kind for row in table["attributes"] for kind in _attribute(row, table, language)]
    kinds += [kind for number, event in enumerate(table["events"]) for kind in _event(number, event)]
    return {"lists": table["lists"], "sorts": table["sorts"], "kinds": kinds, "hops": [], "several": []}


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
