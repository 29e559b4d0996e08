"""One instruction item: its fields, its line in the file, and what must be true of it.

A file of items is JSON lines. Offsets count characters (Unicode code points) of message contents, so that anybody can
check evidence with a slice: `messages[d.message].content[d.start:d.end]` is document d as the student sees it, and
evidence e of it is `[d.start + e.start : d.start + e.end]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from longverse.data.config import nearest
from longverse.data.text import fold
from longverse.errors import UserError

TASKS = (
    "single_doc_qa",
    "multi_doc_qa",
    "summary",
    "code_completion",
    "few_shot",
    "multi_turn",
    "stated_facts",
)
SPLITS = ("train", "heldout")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ShownDocument:
    """A document (or a part of one) inside a message."""

    source: str  # name of the source
    id: str  # the document's id within it
    title: str
    message: int  # index of the message that shows it
    start: int  # characters, in that message's content
    end: int
    origin: int  # where the shown part begins in the source document, in characters
    complete: bool  # whether the whole document is shown


@dataclass(frozen=True)
class Evidence:
    """Where an answer stands. `document`: index in `documents`; start, end: characters within the shown document;
    depth: place of its middle among all document characters of the item, 0 to 1; question: which answer it is for, in
    order of the assistant's messages; complete: whether it alone holds the answer (each hop of two does not)."""

    document: int
    start: int
    end: int
    text: str
    depth: float
    question: int = 0
    complete: bool = True


@dataclass(frozen=True)
class Item:
    """An instruction item. tokens: of the whole conversation under the chat format; prompt_tokens: up to the first
    answer; answers: for each question the accepted short answers (empty where the answer is free text)."""

    id: str
    task: str
    kind: str
    language: str
    seed: int
    tokens: int
    prompt_tokens: int
    target_tokens: int
    messages: Messages
    documents: tuple[ShownDocument, ...]
    evidence: tuple[Evidence, ...]
    answers: tuple[tuple[str, ...], ...]
    recite: bool
    teacher: str  # "offline", or the endpoint's model name
    split: str = "train"  # of stated facts: "train" or "heldout"
    notes: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """The item as one line of JSON, newline included."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": str, "task": str, "kind": str, "language": str, "seed": int, "tokens": int, "prompt_tokens": int,
    "target_tokens": int, "messages": list, "documents": list, "evidence": list, "answers": list, "recite": bool,
    "teacher": str, "split": str, "notes": dict,
}  # fmt: skip


def parse_item(values: Any) -> Item:
    """An Item from a JSON object, every field checked. UserError names the first field that is wrong."""
    if not isinstance(values, dict):
        raise UserError("the line is no JSON object.")
    for name, kind in _FIELDS.items():
        if name not in values:
            raise UserError(f"the field {name!r} is missing.")
        if not isinstance(values[name], kind) or (kind is int and isinstance(values[name], bool)):
            raise UserError(f"the field {name!r} is {type(values[name]).__name__}, not {kind.__name__}.")  # type: ignore[union-attr]
    if extra := [name for name in values if name not in _FIELDS]:
        raise UserError(f"the field {extra[0]!r} is not known{nearest(extra[0], _FIELDS)}")
    for i, message in enumerate(values["messages"]):
        if not isinstance(message, dict) or any(not isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"message {i} must be an object with a text as role and one as content.")
    for i, accepted in enumerate(values["answers"]):
        if not isinstance(accepted, list) or any(not isinstance(answer, str) or not answer for answer in accepted):
            raise UserError(f"answers {i} must be a list of texts that are not empty.")
    item = Item(
        **{
            **values,
            "documents": tuple(_part(ShownDocument, d, f"document {i}") for i, d in enumerate(values["documents"])),
            "evidence": tuple(_part(Evidence, e, f"evidence {i}") for i, e in enumerate(values["evidence"])),
            "answers": tuple(map(tuple, values["answers"])),
        }
    )
    if problem := problem_of(item):
        raise UserError(problem)
    return item


def _part(cls: Any, values: Any, where: str) -> Any:
    """A ShownDocument or Evidence from a JSON object. UserError names the field that is wrong."""
    if not isinstance(values, dict):
        raise UserError(f"{where} must be an object.")
    hints = get_type_hints(cls)
    if extra := [name for name in values if name not in hints]:
        raise UserError(f"{where}: the field {str(extra[0])!r} is not known{nearest(str(extra[0]), hints)}")
    for one in fields(cls):
        if one.name not in values:
            if one.default is MISSING:
                raise UserError(f"{where}: the field {one.name!r} is missing.")
            continue
        value, kind = values[one.name], hints[one.name]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{where}: {one.name} is {type(value).__name__}, not {kind.__name__}.")
    return cls(**values)


def problem_of(item: Item) -> str | None:
    """The first thing wrong with an item, in words, or None. Checks everything that needs no tokenizer."""
    if item.task not in TASKS:
        return f"task {item.task!r} is not known{nearest(item.task, TASKS)}"
    if item.language not in ("en", "zh"):
        return f"language must be en or zh, not {item.language!r}."
    if item.split not in SPLITS:
        return f"split must be train or heldout, not {item.split!r}."
    roles = [message.get("role") for message in item.messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        return f"the messages must alternate user and assistant and end with an answer, not {roles}."
    if any(not isinstance(m.get("content"), str) or not m["content"].strip() for m in item.messages):
        return "a message is empty."
    replies = [m["content"] for m in item.messages if m["role"] == "assistant"]
    if len(item.answers) != len(replies):
        return f"there are {len(item.answers)} lists of answers for {len(replies)} replies."
    if not 0 < item.prompt_tokens < item.tokens:
        return f"prompt_tokens {item.prompt_tokens} must lie between 0 and tokens {item.tokens}."
    if item.tokens != item.target_tokens:
        return f"the item has {item.tokens} tokens, its target is {item.target_tokens}."
    for i, document in enumerate(item.documents):
        if not 0 <= document.message < len(item.messages):
            return f"document {i} is in message {document.message}, which does not exist."
        if not 0 <= document.start <= document.end <= len(item.messages[document.message]["content"]):
            return f"document {i} lies outside its message."
        if document.origin < 0:
            return f"document {i} begins at {document.origin} of its source, which is before its beginning."
    sizes = [document.end - document.start for document in item.documents]
    for i, evidence in enumerate(item.evidence):
        if not 0 <= evidence.document < len(item.documents):
            return f"evidence {i} is of document {evidence.document}, which does not exist."
        document = item.documents[evidence.document]
        shown = item.messages[document.message]["content"][document.start : document.end]
        if not 0 <= evidence.start < evidence.end <= len(shown):
            return f"evidence {i} lies outside its document."
        if shown[evidence.start : evidence.end] != evidence.text or not evidence.text:
            return f"evidence {i} is not what stands at its offsets."
        middle = sum(sizes[: evidence.document]) + (evidence.start + evidence.end) / 2
        if not abs(evidence.depth - middle / sum(sizes)) <= 2e-4:
            return f"evidence {i} has depth {evidence.depth} and lies at {middle / sum(sizes):.4f}."
        if not 0 <= evidence.question < len(replies):
            return f"evidence {i} is for question {evidence.question}, which does not exist."
    for reply, accepted in zip(replies, item.answers, strict=True):
        if accepted and not any(fold(a) in fold(reply) for a in accepted):
            return f"the reply {reply[:60]!r} holds none of the accepted answers {list(accepted)[:3]}."
    return None


def read_items(path: str | Path) -> Iterator[tuple[int, Item | None, str]]:
    """(line number, item, "") for every good line of a file and (line number, None, what is wrong) for the others.
    UserError when the file cannot be read."""
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, parse_item(json.loads(line)), ""
                except UserError as error:
                    yield number, None, str(error)
                except (ValueError, RecursionError):
                    yield number, None, "the line is no JSON."
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
