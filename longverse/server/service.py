"""What all routes share: from a checked request to queued work, and the settings they run under."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request

from ..documents.ask import with_stop
from ..errors import UserError
from ..inference.engine import Engine
from ..inference.sampling import Sampling
from . import tools
from .answers import Answer, Running
from .constrain import AfterTag, Costs, Forced, Vocabulary
from .errors import JSON, ApiError, queue_full, too_long
from .generate import Generation, Reading
from .grammar import JSON_OBJECT, Grammar
from .keeping import Keeping
from .library import About, Library
from .metrics import Metrics
from .prompts import Prompts
from .schema import SchemaGrammar
from .schemas import ChatRequest, CompletionRequest, Drawing
from .stream import EventStream, gone
from .worker import QueueFull, Stopping, Worker

ROOM = 2048  # tokens kept free behind a document, for questions and answers: they share one plan
READERS = 2  # uploads read at once
KEPT_SCHEMAS = 16  # whose costs are kept


@dataclass(frozen=True)
class Settings:
    """How the server meets its clients.

    answer_tokens  an answer's limit where the client names none (and the window allows)
    keep_alive     seconds without an event after which a stream says that it lives
    max_body       bytes of a request; max_upload: of an uploaded file's request
    window         the longest conversation, where it is not the engine's
    keeping        where documents that were read are found and kept
    hosts          names, besides localhost and addresses, under which it may be called
    """

    api_key: str | None = None
    answer_tokens: int = 1024
    keep_alive: float = 10.0
    max_body: int = 8 * 2**20
    max_upload: int = 257 * 2**20
    hosts: tuple[str, ...] = ()
    window: int | None = None
    keeping: Keeping | None = None


class Service:
    """Everything the routes share."""

    def __init__(self, engine: Engine, worker: Worker, library: Library, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.worker, self.library, self.settings = engine, worker, library, settings
        self.metrics = metrics
        self.prompts = Prompts(engine, library)
        self.model = Path(engine.name).name or engine.name
        self.started = int(time.time())
        self.window = settings.window or engine.window
        self.uploads = asyncio.Semaphore(READERS)
        self._vocabulary: Vocabulary | None = None
        self._json: Costs | None = None
        self._schemas: dict[str, Costs] = {}

    def sampling(self, request: Drawing, prompt: int, asked: int | None) -> Sampling:
        """The engine's settings for a request. Raises ApiError when prompt and answer exceed the window."""
        room = self.window - prompt
        if room < 1 or (asked or 1) > room:
            raise too_long(prompt, asked or self.settings.answer_tokens, self.window, self.model, asked is not None)
        return Sampling(
            max_new_tokens=asked or min(room, self.settings.answer_tokens),
            temperature=request.temperature or 0.0,
            top_k=request.top_k or 0,
            top_p=1.0 if request.top_p is None else request.top_p,
            min_p=request.min_p or 0.0,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            seed=None if request.seed is None else request.seed % 2**63,
            stop=request.stops(),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
        )

    def check_model(self, name: str) -> None:
        if name not in (self.model, self.engine.name):
            raise ApiError(
                404, f"The model {name[:100]!r} is not served here; this server has {self.model!r}.",
                code="model_not_found", param="model",
            )  # fmt: skip

    def chat_work(self, request: ChatRequest) -> Generation:
        """Blocks while it tokenises."""
        prompt = self.prompts.chat(request)
        sampling = self.sampling(request, len(prompt.ids), request.longest)
        tokens = len(prompt.ids) + sampling.max_new_tokens
        if prompt.documents:
            tokens = max(tokens, self.planned(prompt.boundary))
        sampling = with_stop(sampling, prompt.way, request.cite or "auto")
        return Generation(
            prompt.ids,
            sampling,
            choices=request.n or 1,
            top=(request.top_logprobs or 0) if request.logprobs else None,
            constraint=self._constraint(request, sampling.max_new_tokens),
            boundary=prompt.boundary,
            tokens=tokens,
            asked=prompt.asked,
            name=", ".join(self.library.get(name).filename for name in prompt.documents),
            keeping=self.settings.keeping,
            way=prompt.way,
        )

    def planned(self, beginning: int) -> int:
        """What a session is planned for in which questions about a document are asked."""
        return min(self.window, beginning + ROOM)

    def completion_work(self, request: CompletionRequest) -> list[Generation]:
        """One for each prompt. Blocks while it tokenises."""
        works: list[Generation] = []
        size = self.engine.network.config.vocab_size
        for prompt in request.prompts():
            if isinstance(prompt, str):
                ids = self.engine.tokenizer.encode(prompt)
            else:
                ids = list(prompt)
                if any(not 0 <= token < size for token in ids):
                    raise ApiError(400, f"The prompt holds a token outside 0 to {size - 1:,}.", param="prompt")
            if not ids:
                raise ApiError(400, "The prompt is empty: give at least one token.", param="prompt")
            sampling = self.sampling(request, len(ids), request.max_tokens)
            first = len(works) * (request.n or 1)
            tokens = len(ids) + sampling.max_new_tokens
            works.append(Generation(ids, sampling, request.n or 1, first, request.logprobs, tokens=tokens))
        return works

    def _constraint(self, request: ChatRequest, max_new_tokens: int) -> Callable[[], Any] | None:
        functions = [tool.function.name for tool in request.tools or []]
        choice = request.tool_choice or "auto"
        if request.json_mode and (schema := request.schema_wanted) is not None:
            costs = self._schema_costs(schema)
        elif request.json_mode:
            self._json = self._json or Costs(JSON_OBJECT, self.vocabulary())
            costs = self._json
        elif functions and choice != "none":
            if choice == "auto":
                costs = self._costs(tools.grammar(functions, opened=True))
                once = request.parallel_tool_calls is False
                return partial(AfterTag, costs, tools.OPEN.encode(), max_new_tokens, once)
            names = functions if isinstance(choice, str) else [choice.function.name]
            costs = self._costs(tools.grammar(names, opened=False))
        else:
            return None
        Forced(costs, max_new_tokens)  # says at once when the answer's limit is too short for its form
        return partial(Forced, costs, max_new_tokens)

    def _schema_costs(self, schema: dict[str, Any]) -> Costs:
        """The costs of a schema; those of the latest schemas are kept, since clients send the same one again."""
        key = json.dumps(schema, sort_keys=True)
        if key not in self._schemas:
            try:
                self._schemas[key] = Costs(SchemaGrammar(schema), self.vocabulary())
            except UserError as error:
                raise ApiError(400, str(error), param="response_format") from None
            except RecursionError:
                raise ApiError(400, "The schema is nested too deeply.", param="response_format") from None
            while len(self._schemas) > KEPT_SCHEMAS:
                self._schemas.pop(next(iter(self._schemas)))
        return self._schemas[key]

    def _costs(self, grammar: Grammar) -> Costs:
        return Costs(grammar, self.vocabulary())

    def vocabulary(self) -> Vocabulary:
        self._vocabulary = self._vocabulary or Vocabulary(self.engine.tokenizer, self.engine.network.config.vocab_size)
        return self._vocabulary

    def run(self, request: Request, user: str | None, works: Sequence[Generation | Reading]) -> Running:
        """Queue a request's work. Raises ApiError."""
        client = f"{request.client.host if request.client else ''}/{user or ''}"
        try:
            return Running(self.worker, self.metrics, client, works)
        except QueueFull as error:
            raise queue_full(error) from None
        except Stopping:
            raise ApiError(503, "The server is stopping.", code="stopping", headers={"Retry-After": "5"}) from None
        except UserError as error:
            raise ApiError(400, str(error), code="memory_exceeded") from None

    async def respond(self, request: Request, drawing: Drawing, answer: Answer, works: Sequence[Generation]) -> Any:
        """Run the work; a stream, or the finished object, given up when the client leaves."""
        running = self.run(request, drawing.user, works)
        if drawing.stream:
            return EventStream(answer.chunks(running), self.settings.keep_alive, running.cancel)
        return JSON(await self.unless_gone(request, running, answer.whole(running)))

    @staticmethod
    async def unless_gone(request: Request, running: Running, result: Any) -> Any:
        work, left = asyncio.ensure_future(result), asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError(408, "The client has left.")  # nobody reads it
            return work.result()
        finally:
            running.cancel()
            for future in (work, left):
                future.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await future

    def file_record(self, known: About) -> dict[str, Any]:
        """OpenAI's file object, and what a reader wants to know under `document`."""
        about = {
            name: getattr(known, name)
            for name in ("title", "words", "tokens", "pages", "unit", "paragraphs", "language", "format", "notes")
        }
        held = 0
        beginning = self.prompts.kept((known.id,))
        if beginning:
            held = self.worker.held(beginning, self.planned(len(beginning)), len(beginning))
        about |= {
            "window": self.window, "fits": known.tokens + 256 <= self.window, "read_tokens": held,
            "read": bool(beginning) and held >= len(beginning or ()) - 1,
        }  # fmt: skip
        return {
            "id": known.id, "object": "file", "bytes": known.bytes, "created_at": known.created_at,
            "filename": known.filename, "purpose": known.purpose, "status": "processed", "document": about,
        }  # fmt: skip


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": said}
    for status, said in {
        400: "The request is wrong: the message says what, the limit and the remedy.",
        401: "The API key is missing or wrong.",
        403: "Sent by another web page, or to a name that is not this server's.",
        404: "There is no such model or file.",
        408: "The body stopped coming.",
        413: "The body is too large.",
        429: "The queue is full: Retry-After says when to try again.",
        503: "The server is stopping, or its memory does not suffice.",
        507: "The library is full.",
    }.items()
}
STREAMED: dict[str, Any] = {
    "description": "The object, or with stream: true its chunks as server-sent events.",
    "content": {"application/json": {}, "text/event-stream": {}},
}
