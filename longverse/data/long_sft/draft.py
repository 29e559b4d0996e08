"""From a task's draft to an item of exactly the wanted number of tokens.

A draft is a conversation whose first question shows parts of documents; one part is *elastic*: it may go on into the
text that follows it in its source, and stops where the conversation reaches its target. Where it stops inside a
sentence a mark shows it ("[…]").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longverse.data.long_sft.item import Evidence, Item, Messages, ShownDocument
from longverse.data.long_sft.pool import Opened, UnitCounter
from longverse.data.vocabulary import ChatCounter


class Reject(Exception):
    """A draft or an item that a gate turned down; `gate` is the name it is counted under."""

    def __init__(self, gate: str) -> None:
        super().__init__(gate)
        self.gate = gate


@dataclass
class Part:
    """A stretch of a document in an item. label: the line above it; text: what is shown; tail: what may follow."""

    source: str
    id: str
    title: str
    text: str
    origin: int = 0
    tail: str = ""
    label: str = ""
    whole: bool = False  # text is the whole document
    after: str = ""  # what stands below it and is no part of the document (the label of an example)

    @classmethod
    def of(cls, opened: Opened, start: int = 0, end: int | None = None, tail: int = 0, label: str = "") -> Part:
        """Characters start:end of an opened document, `tail` more being at hand."""
        text, about = opened.text, opened.about
        end = len(text) if end is None else end
        return cls(
            about.source, about.id, about.title, text[start:end], start, text[end : end + tail], label,
            start == 0 and end == len(text),
        )  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """Evidence in a draft: characters start:end of a part's text, for the answer with this number."""

    part: int
    start: int
    end: int
    question: int = 0
    complete: bool = True


@dataclass
class Turn:
    """A question (for the first turn: a template holding {documents}) and its reply. answers: accepted short ones."""

    user: str
    reply: str
    answers: tuple[str, ...] = ()
    question: str = ""  # the bare question, where there is one


@dataclass
class Draft:
    """What a task proposes."""

    task: str
    kind: str
    language: str
    parts: list[Part]
    turns: list[Turn]
    claims: list[Claim]
    elastic: int = -1  # index of the part that is stretched; -1: the last
    recite: bool = False
    teacher: str = "offline"
    split: str = "train"
    notes: dict[str, Any] = field(default_factory=dict)
    unique: list[str] = field(default_factory=list)  # must stand once in all that is shown
    separator: str = "\n\n"
    system: str = ""  # a message before the first, if any
    code: bool = False  # the documents are source code: what is left out is marked by a comment

    def elastic_index(self) -> int:
        return self.elastic % len(self.parts)


@dataclass(frozen=True)
class _Layout:
    messages: Messages
    spans: list[tuple[int, int]]  # of each part's text in the first message
    after: str  # what follows the elastic part in the first message


def _lay_out(draft: Draft, ending: str) -> _Layout:
    """The conversation with `ending` put after the elastic part's text."""
    elastic = draft.elastic_index()
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    before, _, behind = draft.turns[0].user.partition("{documents}")
    place = len(before)
    for i, part in enumerate(draft.parts):
        lead = (draft.separator if i else "") + (part.label + "\n" if part.label else "")
        text = part.text + (ending if i == elastic else "")
        spans.append((place + len(lead), place + len(lead) + len(text)))
        pieces.append(lead + text + part.after)
        place += len(lead) + len(text) + len(part.after)
    content = before + "".join(pieces) + behind
    messages = [{"role": "system", "content": draft.system}] if draft.system else []
    messages += [{"role": "user", "content": content}, {"role": "assistant", "content": draft.turns[0].reply}]
    for turn in draft.turns[1:]:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.reply})
    return _Layout(messages, spans, content[spans[elastic][1] :])


def messages_of(draft: Draft) -> Messages:
    """The conversation as it stands, before the exact fit."""
    return _lay_out(draft, "").messages


_MARKS = {
    "en": (" […]", " [...]", "\n[...]", "…", " ...", "\n\n[…]"),
    "zh": ("……", "（下略）", "\n（下略）", "……\n", "\n……", "…", "（略）"),
    "code": ("\n# […]", "  # […]", "\n# [...]", "  # [...]", "\n\n# […]", " # ..."),
}


def fit(draft: Draft, target: int, identity: str, seed: int, chat: ChatCounter, counter: UnitCounter) -> Item:
    """The item of a draft with exactly `target` tokens. Raises Reject("length") when the tail does not reach it, or
    no cut gives the exact number."""
    need = target - chat.count(_lay_out(draft, "").messages, counter=counter.count)
    if need < 0:  # many small parts, each counted by itself: the sum was off
        _give_back(draft, -need, counter)
        need = target - chat.count(_lay_out(draft, "").messages, counter=counter.count)
    part = draft.parts[draft.elastic_index()]
    layout = _lay_out(draft, "")
    marks = _MARKS["code" if draft.code else "zh" if draft.language == "zh" else "en"]
    left, right = _around(part.text, layout.after, counter)
    still = counter.count(left + right)

    def grown(ending: str) -> int:
        """Tokens that an ending adds: only units near it can change."""
        return counter.count(left + ending + right) - still

    for _ in range(3):
        if need < 0:
            break
        off = 0
        for ending in _endings(part, need, grown, marks, counter):
            layout = _lay_out(draft, ending)
            off = target - chat.count(layout.messages)
            if off == 0:
                item = _item(draft, layout, target, identity, seed, chat, counter)
                shown = [item.messages[d.message]["content"][d.start : d.end] for d in item.documents]
                if any(sum(text.count(words) for text in shown) != 1 for words in draft.unique):
                    raise Reject("question is ambiguous")
                return item
        if off == 0:
            break
        need += off  # units farther away changed too: aim beside it
    raise Reject("length")


def _give_back(draft: Draft, tokens: int, counter: UnitCounter) -> None:
    """Move the end of the elastic part's text, about `tokens` and a few more, to its tail. Reject when evidence
    stands there."""
    index = draft.elastic_index()
    part = draft.parts[index]
    units, counts = counter.units(part.text)
    end, freed = len(part.text), 0
    while units and freed < tokens + 20:
        end -= len(units.pop())
        freed += counts.pop()
    if not units or any(claim.part == index and claim.end > end for claim in draft.claims):
        raise Reject("length")
    part.tail, part.text, part.whole = part.text[end:] + part.tail, part.text[:end], False


def _around(text: str, after: str, counter: UnitCounter) -> tuple[str, str]:
    """The last units before the elastic end and the first after it, between which all change happens."""
    left = counter.encoder.split(text[-600:])
    right = counter.encoder.split(after[:600])
    return "".join(left[1:]) if len(left) > 2 else text[-600:], "".join(right[:-1]) if len(right) > 2 else after[:600]


def _endings(
    part: Part, need: int, grown: Callable[[str], int], marks: tuple[str, ...], counter: UnitCounter
) -> list[str]:
    """Continuations of the elastic part that add exactly `need` tokens, the most natural first: the tail up to a
    sentence or word end with a mark of omission; up to any character; nothing but a mark."""
    if need == 0:
        return [""]
    units, counts = counter.units(part.tail)
    ends = np.concatenate([[0], np.cumsum([len(u) for u in units])]).astype(int)
    total = np.concatenate([[0], np.cumsum(counts)])
    found: list[str] = []
    middle = int(np.searchsorted(total, need))
    if middle >= len(total) and total[-1] + 8 < need:
        raise Reject("length")
    near = sorted(range(max(0, middle - 14), min(len(ends), middle + 2)), key=lambda i: abs(i - (middle - 2)))
    for i in near:
        for mark in marks:
            ending = part.tail[: ends[i]].rstrip() + mark
            if grown(ending) == need:
                found.append(ending)
                break
        if len(found) >= 3:
            return found
    low = int(ends[max(0, middle - 3)])
    high = int(ends[min(len(ends) - 1, middle + 1)])
    for end in range(min(high, low + 400), low, -1):
        for mark in marks:
            ending = part.tail[:end] + mark
            if grown(ending) == need:
                found.append(ending)
                break
        if len(found) >= 4:
            break
    return found


def _item(
    draft: Draft, layout: _Layout, target: int, identity: str, seed: int, chat: ChatCounter, counter: UnitCounter
) -> Item:
    place = 1 if draft.system else 0  # of the message that shows the documents
    documents = tuple(
        ShownDocument(part.source, part.id, part.title, place, start, end, part.origin, part.whole and not part.tail)
        for part, (start, end) in zip(draft.parts, layout.spans, strict=True)
    )
    total = sum(end - start for start, end in layout.spans) or 1
    before = np.cumsum([0] + [end - start for start, end in layout.spans])
    evidence = tuple(
        Evidence(
            claim.part, claim.start, claim.end, draft.parts[claim.part].text[claim.start : claim.end],
            round((int(before[claim.part]) + (claim.start + claim.end) / 2) / total, 4), claim.question, claim.complete,
        )
        for claim in draft.claims
    )  # fmt: skip
    return Item(
        id=identity,
        task=draft.task,
        kind=draft.kind,
        language=draft.language,
        seed=seed,
        tokens=target,
        prompt_tokens=chat.count(layout.messages[: place + 1], add_generation_prompt=True, counter=counter.count),
        target_tokens=target,
        messages=layout.messages,
        documents=documents,
        evidence=evidence,
        answers=tuple(turn.answers for turn in draft.turns),
        recite=draft.recite,
        teacher=draft.teacher,
        split=draft.split,
        notes=draft.notes,
    )
