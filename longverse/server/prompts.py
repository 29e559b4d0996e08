"""From a request's messages to prompt ids. Documents stand first, so that everybody who asks about one shares it."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..documents import ask
from ..documents.reader import Document
from ..inference.engine import Engine
from . import tools
from .errors import ApiError
from .library import Library
from .schemas import ChatRequest, Message, NamedTool
from .sessions import common_prefix

KEPT = 8  # documents whose ids are kept


@dataclass(frozen=True)
class Prompt:
    """ids       what the model reads
    documents  ids of the library's documents in it, in their order
    boundary   how many first tokens are the documents' and shared by every question about them
    """

    ids: list[int]
    documents: tuple[str, ...] = ()
    boundary: int = 0


class Prompts:
    """Builds prompts for one engine. Thread-safe; it blocks (a book takes tenths of a second to tokenise)."""

    def __init__(self, engine: Engine, library: Library) -> None:
        self.engine, self.library = engine, library
        self._kept: OrderedDict[tuple[str, ...], list[int]] = OrderedDict()
        self._lock = threading.Lock()

    def chat(self, request: ChatRequest) -> Prompt:
        """The prompt of a conversation. Raises UserError and ApiError for what the format cannot express."""
        functions = [] if request.tool_choice == "none" else list(request.tools or [])
        if isinstance(request.tool_choice, NamedTool):
            functions = [tool for tool in functions if tool.function.name == request.tool_choice.function.name]
        described = [tool.model_dump(exclude_none=True) for tool in functions]
        documents = tuple(dict.fromkeys(name for message in request.messages for name in message.files()))
        turns = self._turns(request.messages)
        if documents:
            turns = self._with_documents(turns, request.messages, documents)
        native = self.engine.chat.knows_tools
        if described and not native:
            turns = _with_system(turns, tools.introduction(described))
        ids = self.engine.chat.encode(turns, tools=described if described and native else None)
        boundary = common_prefix(self.beginning(documents), ids) if documents else 0
        return Prompt(ids, documents, boundary)

    def beginning(self, documents: tuple[str, ...]) -> list[int]:
        """The ids that every question about these documents begins with."""
        with self._lock:
            if (found := self._kept.get(documents)) is not None:
                self._kept.move_to_end(documents)
                return found
        text = self._text(documents)
        one, other = (self.engine.chat.encode(ask.messages(text, question)) for question in ("a", "问"))
        found = one[: common_prefix(one, other)]
        with self._lock:
            self._kept[documents] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def kept(self, documents: tuple[str, ...]) -> list[int] | None:
        """`beginning`, if it was asked for lately."""
        with self._lock:
            return self._kept.get(documents)

    def forget(self, document: str) -> None:
        """Its ids are kept no longer."""
        with self._lock:
            for key in [key for key in self._kept if document in key]:
                del self._kept[key]

    def _text(self, documents: tuple[str, ...]) -> str:
        return joined([self.library.document(name) for name in documents])

    def _with_documents(
        self, turns: list[dict[str, Any]], messages: Sequence[Message], documents: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """The documents stand before the first question; later turns are as they came."""
        place = next(n for n, turn in enumerate(turns) if turn["role"] == "user")
        question = turns[place]["content"]
        if not question.strip():
            raise ApiError(400, "The message with the document holds no question: add a text part.", param="messages")
        system = "\n\n".join(turn["content"] for turn in turns[:place] if turn["role"] == "system")
        return [*ask.messages(self._text(documents), question, system=system or None), *turns[place + 1 :]]

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        for message in messages:
            role = "system" if message.role == "developer" else message.role
            if role in ("tool", "exec"):
                role = "exec"  # the chat format calls it as the model does
            turn: dict[str, Any] = {"role": role, "content": message.text()}
            if message.tool_calls and self.engine.chat.knows_tools:
                turn["tool_calls"] = [
                    _native(call.function.name, call.function.arguments) for call in message.tool_calls
                ]
            elif message.tool_calls:
                calls = "\n".join(tools.written(c.function.name, c.function.arguments) for c in message.tool_calls)
                turn["content"] = f"{turn['content']}\n{calls}".lstrip("\n")
            turns.append(turn)
        if not any(turn["role"] in ("user", "exec") for turn in turns):
            raise ApiError(400, "The conversation holds no message of the user.", param="messages")
        return turns


def joined(documents: Sequence[Document]) -> str:
    """Several documents as one text, each under its name; a single one as it is."""
    if len(documents) == 1:
        return documents[0].text
    return "\n\n".join(f"# {document.name}\n\n{document.text.strip()}" for document in documents)


def _with_system(turns: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}".strip()}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _native(name: str, arguments: str) -> dict[str, Any]:
    """A call for a template, which wants its arguments as an object."""
    try:
        parsed: Any = json.loads(arguments)
    except ValueError:
        parsed = arguments
    return {"type": "function", "function": {"name": name, "arguments": parsed}}
