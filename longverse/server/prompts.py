"""From a request's messages to prompt ids. Documents stand first, so that everybody who asks about one shares it."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..documents import ask
from ..documents.reader import Document
from ..documents.words import Index
from ..inference.engine import Engine, common_prefix
from . import tools
from .errors import ApiError
from .library import Library
from .schemas import ChatRequest, Message, NamedTool

KEPT = 8  # documents whose ids are kept
TAIL = 400  # characters, more than any token spans


@dataclass(frozen=True)
class Prompt:
    """ids       what the model reads
    boundary   how many first tokens are the documents' and shared by every question about them
    documents  ids of the library's documents in it, in their order
    asked      what a citation needs, where the answer is to be tied to the documents
    way        attention, numbers or off
    """

    ids: list[int]
    boundary: int = 0
    documents: tuple[str, ...] = ()
    asked: ask.Prompts | None = None
    way: str = "off"


@dataclass(frozen=True)
class Beginning:
    """What all questions about some documents begin with.

    ids    its tokens
    tail   the last characters of the documents' text
    short  how many tokens prompts about the tail alone have in common; 0 where what follows the documents is spelled
           in another way there, so that a prompt cannot be put together
    """

    ids: list[int]
    tail: str
    short: int


@dataclass
class Shelf:
    """Documents that are asked about together; `beginnings` by whether their paragraphs are numbered."""

    documents: tuple[Document, ...]
    index: Index
    beginnings: dict[bool, Beginning] = field(default_factory=dict)


class Prompts:
    """Builds prompts for one engine. Thread-safe; it blocks (a book takes tenths of a second to tokenise)."""

    def __init__(self, engine: Engine, library: Library) -> None:
        self.engine, self.library = engine, library
        self._kept: OrderedDict[tuple[str, ...], Shelf] = OrderedDict()
        self._lock = threading.Lock()

    def chat(self, request: ChatRequest) -> Prompt:
        """The prompt of a conversation. Raises UserError and ApiError for what the format cannot express."""
        functions = [] if request.tool_choice == "none" else list(request.tools or [])
        if isinstance(request.tool_choice, NamedTool):
            functions = [tool for tool in functions if tool.function.name == request.tool_choice.function.name]
        described = [tool.model_dump(exclude_none=True) for tool in functions]
        names = tuple(dict.fromkeys(name for message in request.messages for name in message.files()))
        turns = self._turns(request.messages)
        way = "off"
        if names:
            # What is to be JSON or a call is not an answer that could be tied to a sentence.
            free = not functions and not request.json_mode
            way = ask.way_for(self.engine, (request.cite or "auto") if free else "off")
            shelf = self.shelf(names)
            asking = [turn["content"] for turn in turns if turn["role"] == "user"]
            question, follows = asking[-1], len(asking) > 1
            beginning = self._beginning(shelf, way == "numbers")
            if beginning.short and not described and turns[0]["role"] == "user":
                # A book is not tokenised again for every question: what follows it is the same after its last words.
                short = self._with_documents(turns, beginning.tail, way == "numbers")
                ids = beginning.ids + self.engine.chat.encode(short)[beginning.short :]
                return self._prompt(ids, names, shelf, question, way, follows)
            text = ask.text_of(shelf.documents, numbered=way == "numbers")
            turns = self._with_documents(turns, text, way == "numbers")
        native = self.engine.chat.knows_tools
        if described and not native:
            turns = _with_system(turns, tools.introduction(described))
        ids = self.engine.chat.encode(turns, tools=described if described and native else None)
        return self._prompt(ids, names, shelf, question, way, follows) if names else Prompt(ids)

    def _prompt(
        self, ids: list[int], names: tuple[str, ...], shelf: Shelf, question: str, way: str, follows: bool
    ) -> Prompt:
        boundary = common_prefix(self._beginning(shelf, way == "numbers").ids, ids)
        asked = ask.Prompts(
            (question,), (ids,), len(ids), shelf.documents, way == "numbers", (None,), shelf.index, follows
        )
        return Prompt(ids, boundary, names, asked if way != "off" else None, way)

    def shelf(self, names: tuple[str, ...]) -> Shelf:
        """The documents of these ids, their words indexed once."""
        with self._lock:
            if (found := self._kept.get(names)) is not None:
                self._kept.move_to_end(names)
                return found
        documents = tuple(self.library.document(name) for name in names)
        found = Shelf(documents, Index(documents))
        with self._lock:
            self._kept[names] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def beginning(self, names: tuple[str, ...], numbered: bool = False) -> list[int]:
        """The ids that every question about these documents begins with."""
        return self._beginning(self.shelf(names), numbered).ids

    def usual_beginning(self, names: tuple[str, ...]) -> list[int]:
        """`beginning` of questions that do not say how they want their answers cited."""
        return self.beginning(names, self._usual)

    @property
    def _usual(self) -> bool:
        """Whether such questions see numbered paragraphs."""
        return ask.way_for(self.engine, "auto") == "numbers"

    def _beginning(self, shelf: Shelf, numbered: bool) -> Beginning:
        if numbered not in shelf.beginnings:
            text = ask.text_of(shelf.documents, numbered=numbered).strip("\n")
            tail = text[-TAIL:].lstrip()

            def encoded(text: str) -> list[list[int]]:
                # Two questions in two languages share nothing but the documents.
                probes = (ask.messages(text, question, numbered=numbered) for question in ("a", "问"))
                return [self.engine.chat.encode(probe) for probe in probes]

            whole, short = encoded(text), encoded(tail)
            begin, common = common_prefix(*whole), common_prefix(*short)
            agree = all(one[begin:] == other[common:] for one, other in zip(whole, short, strict=True))
            shelf.beginnings[numbered] = Beginning(whole[0][:begin], tail, common if agree else 0)
        return shelf.beginnings[numbered]

    def kept(self, names: tuple[str, ...]) -> list[int] | None:
        """`usual_beginning`, if it was made lately."""
        with self._lock:
            shelf = self._kept.get(names)
            found = shelf.beginnings.get(self._usual) if shelf is not None else None
            return found.ids if found is not None else None

    def forget(self, document: str) -> None:
        """Its ids are kept no longer."""
        with self._lock:
            for key in [key for key in self._kept if document in key]:
                del self._kept[key]

    @staticmethod
    def _with_documents(turns: list[dict[str, Any]], text: str, numbered: bool) -> list[dict[str, Any]]:
        """The documents stand before the first question; later turns are as they came."""
        place = next(n for n, turn in enumerate(turns) if turn["role"] == "user")
        question = turns[place]["content"]
        if not question.strip():
            raise ApiError(400, "The message with the document holds no question: add a text part.", param="messages")
        system = "\n\n".join(turn["content"] for turn in turns[:place] if turn["role"] == "system") or None
        if any(turn["role"] != "system" for turn in turns[:place]):
            raise ApiError(
                400, "With documents the first message after the system's must be the user's: leave out what the"
                " assistant says before it.", param="messages",
            )  # fmt: skip
        return [*ask.messages(text, question, system=system, numbered=numbered), *turns[place + 1 :]]

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
