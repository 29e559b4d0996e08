"""Calls of functions in the text of a model: how the functions are described to it, and its calls found again.

Models whose chat template knows tools (Qwen and others) get them through it. For the others the same is said in the
system message, in the form that Hermes, Qwen and SmolLM2 were trained with: the functions between <tools> tags, a call
as JSON between <tool_call> tags. XVERSE's format takes results in its own role `exec`.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..models.chat import may_stop
from .grammar import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_INTRODUCTION = """You may call functions to help with the user's request. They are described here, one JSON a line:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON between tags, and nothing after it:
<tool_call>
{{"name": "the function", "arguments": {{"the argument": "its value"}}}}
</tool_call>
The result comes back in the next message."""


@dataclass(frozen=True)
class Call:
    """One call; `arguments` is JSON text of an object."""

    id: str
    name: str
    arguments: str

    def record(self, index: int | None = None) -> dict[str, Any]:
        """As OpenAI's interface has it; in a stream with its index."""
        body = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return body if index is None else {"index": index, **body}


def introduction(tools: Sequence[dict[str, Any]]) -> str:
    """The system text for a model whose template has no place for tools."""
    return _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def written(name: str, arguments: str) -> str:
    """A call as the model would have written it."""
    try:
        parsed: Any = json.loads(arguments)
    except ValueError:
        parsed = arguments
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': parsed}, ensure_ascii=False)}\n{CLOSE}"


def grammar(names: Sequence[str], *, opened: bool) -> Grammar:
    """A call of one of the functions. `opened`: the opening tag is written already."""
    begin = "" if opened else OPEN
    heads = frozenset(f'{begin}\n{{"name": "{name}", "arguments": '.encode() for name in names)
    return Grammar([heads, None, frozenset([f"}}\n{CLOSE}".encode()])])


class CallFinder:
    """Parts an answer that comes in pieces into text and calls. What only looks like a call is given back as text."""

    def __init__(self) -> None:
        self._pending = ""
        self._inside = False

    def push(self, piece: str) -> list[str | Call]:
        self._pending += piece
        found: list[str | Call] = []
        while True:
            if self._inside:
                end = self._pending.find(CLOSE)
                if end < 0:
                    return found
                body, self._pending = self._pending[:end], self._pending[end + len(CLOSE) :]
                found += calls_in(body) or [OPEN + body + CLOSE]
                self._inside = False
                continue
            start = self._pending.find(OPEN)
            if start >= 0:
                if text := self._pending[:start].rstrip():
                    found.append(text)
                self._pending, self._inside = self._pending[start + len(OPEN) :], True
                continue
            # White space waits too: before and after a call it is no text.
            ready = len(self._pending.rstrip())
            ready = min(ready, len(self._pending) - may_stop(self._pending, (OPEN,)))
            if text := self._pending[:ready].rstrip():
                found.append(text)
                self._pending = self._pending[len(text) :]
            return found

    def flush(self) -> list[str | Call]:
        """What the end leaves: also a call whose closing tag is missing."""
        rest, self._pending = self._pending, ""
        if self._inside:
            self._inside = False
            return calls_in(rest) or [OPEN + rest]
        return [rest] if rest else []


def calls_in(body: str) -> list[str | Call]:
    """The calls between two tags: one JSON object or a list of them; empty when it is neither."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return []
    made: list[str | Call] = []
    for item in parsed if isinstance(parsed, list) else [parsed]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return []
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):  # some models write the object as a text
            text = arguments
        else:
            text = json.dumps(arguments, ensure_ascii=False)
        if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", item["name"]):
            return []
        made.append(Call(f"call_{secrets.token_hex(12)}", item["name"], text))
    return made
