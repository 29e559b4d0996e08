"""What the offline teacher finds in a document: a true question with its answer and the place it stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """kind: the rule; start, end: characters of the evidence in the document; question, answers, reply: ready to use.

    `once` must occur exactly once in whatever is shown (the quoted words of a question, a heading): the question would
    be ambiguous otherwise. `title`: the question names the document by this title, so that it can stand among
    others; empty: the question stands by its own words. `whole`: true only of the whole document.
    """

    kind: str
    start: int
    end: int
    question: str
    answers: tuple[str, ...]
    reply: str
    once: str = ""
    title: str = ""
    whole: bool = False
