"""From a worker's events to OpenAI's objects, as a stream of chunks or as one whole."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ..inference.engine import Stats
from ..models.tokenizer import Tokenizer, token_offsets
from .errors import ApiError, failed
from .generate import Ended, Finished, Generation, Logged, Piece, Reading
from .metrics import Metrics
from .tools import Call, CallFinder
from .worker import Failed, Progress, Task, Worker

Work = Generation | Reading


class Running:
    """The tasks of one request, and their events on the event loop."""

    def __init__(self, worker: Worker, metrics: Metrics, client: str, works: Sequence[Work]) -> None:
        """Queues them. Raises QueueFull, Stopping or UserError."""
        self.worker, self.metrics = worker, metrics
        self.started = time.monotonic()
        self.stats: list[Stats] = []
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._left = len(works)
        self.tasks = [Task(client, work.ids, work.tokens, work, self._put, work.document) for work in works]
        worker.submit(*self.tasks)

    def _put(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Harmless when it is done."""
        if self._left:
            self.metrics.count("longverse_cancelled_total")
        for task in self.tasks:
            self.worker.cancel(task)

    async def events(self) -> AsyncIterator[Any]:
        """Everything until the last task is done or one has failed, which ends the others."""
        first = True
        while self._left:
            event = await self._events.get()
            if isinstance(event, Piece) and first:
                first = False
                self.metrics.observe("longverse_first_token_seconds", time.monotonic() - self.started)
            elif isinstance(event, Ended):
                self._count(event.stats)
            elif isinstance(event, Finished):
                self._left -= 1
            elif isinstance(event, Failed):
                self._left = 0
                self.cancel()
            yield event

    def _count(self, stats: Stats) -> None:
        self.stats.append(stats)
        self.metrics.count("longverse_prompt_tokens_total", stats.prompt_tokens)
        self.metrics.count("longverse_reused_tokens_total", stats.reused_tokens)
        self.metrics.count("longverse_generated_tokens_total", stats.new_tokens)
        if stats.decode_rate:
            self.metrics.observe("longverse_token_seconds", 1 / stats.decode_rate)


class Answer:
    """Builds the objects of one request. kind: "chat" or "text". `find_calls`: answers may hold calls of functions."""

    def __init__(
        self, kind: str, model: str, tokenizer: Tokenizer, works: Sequence[Generation], *, find_calls: bool = False,
        return_progress: bool = False, include_usage: bool = False, echo: bool = False, documents: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.kind, self.model, self.tokenizer, self.works = kind, model, tokenizer, works
        self.find_calls, self.return_progress, self.include_usage = find_calls, return_progress, include_usage
        self.documents = documents
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        choices = sum(work.choices for work in works)
        self.finders = [CallFinder() if find_calls else None for _ in range(choices)]
        self.calls: list[list[Call]] = [[] for _ in range(choices)]
        self.offsets = [0] * choices  # characters so far, for a completion's text_offset
        # What stands before each answer: the prompt, where it was asked for.
        self.prefixes = [tokenizer.decode(work.ids) if echo else "" for work in works for _ in range(work.choices)]

    # ---- as a stream ------------------------------------------------------------------------------------

    async def chunks(self, running: Running) -> AsyncIterator[Any]:
        """Chunks, and [DONE] at the end; an error after the beginning is an event of its own."""
        if self.kind == "chat":
            for index in range(len(self.calls)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
        for index, text in enumerate(self.prefixes):
            if text:
                yield self._chunk(index, {"text": text})
        async for event in running.events():
            if isinstance(event, Progress) and self.return_progress:
                progress = {name: getattr(event, name) for name in ("total", "cache", "processed", "time_ms")}
                yield self._chunk(0, {}) | {"prompt_progress": progress}
            elif isinstance(event, Piece):
                for part in self._parts(event.index, event.text):
                    yield self._chunk(event.index, self._delta(event.index, part), event.logged)
                    event = Piece(event.index, "")  # its tokens are reported once
                if event.logged:
                    yield self._chunk(event.index, self._delta(event.index, ""), event.logged)
            elif isinstance(event, Ended):
                for part in self._rest(event.index):
                    yield self._chunk(event.index, self._delta(event.index, part))
                last = self._chunk(event.index, {} if self.kind == "chat" else {"text": ""}, event.logged)
                last["choices"][0]["finish_reason"] = self._reason(event)
                if event.text is not None:
                    last["choices"][0]["delta"]["cited"] = self._cited(event)
                yield last | {"timings": timings(event.stats)}
            elif isinstance(event, Failed):
                yield failed(event).body()
                return
        if self.include_usage:
            yield self._head(chunk=True) | {"choices": [], "usage": self.usage(running.stats)}
        yield "[DONE]"

    def _chunk(self, index: int, delta: dict[str, Any], logged: tuple[Logged, ...] = ()) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        choice |= {"delta": delta} if self.kind == "chat" else {"text": "", **delta}
        choice |= {"logprobs": self._logprobs(index, logged) if logged else None, "finish_reason": None}
        chunk = self._head(chunk=True) | {"choices": [choice]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def _delta(self, index: int, part: str | Call) -> dict[str, Any]:
        if isinstance(part, Call):
            self.calls[index].append(part)
            return {"tool_calls": [part.record(len(self.calls[index]) - 1)]}
        return {"content": part} if self.kind == "chat" else {"text": part}

    # ---- as a whole -------------------------------------------------------------------------------------

    async def whole(self, running: Running) -> dict[str, Any]:
        """The finished object. Raises ApiError where it failed."""
        size = len(self.calls)
        texts: list[list[str]] = [[] for _ in range(size)]
        logged: list[list[Logged]] = [[] for _ in range(size)]
        reasons = [""] * size
        cited: list[dict[str, Any] | None] = [None] * size
        async for event in running.events():
            if isinstance(event, Failed):
                raise failed(event)
            if isinstance(event, Piece | Ended):
                parts = self._rest(event.index) if isinstance(event, Ended) else self._parts(event.index, event.text)
                for part in parts:
                    if isinstance(part, Call):
                        self.calls[event.index].append(part)
                    else:
                        texts[event.index].append(part)
                logged[event.index] += event.logged
            if isinstance(event, Ended):
                reasons[event.index] = self._reason(event)
                if event.text is not None:
                    texts[event.index] = [event.text]
                    cited[event.index] = self._cited(event)
        choices = []
        for index in range(size):
            wanted = any(work.top is not None for work in self.works)
            choice: dict[str, Any] = {"index": index, "finish_reason": reasons[index]}
            choice["logprobs"] = self._logprobs(index, tuple(logged[index])) if wanted else None
            text = "".join(texts[index])
            if self.kind == "chat":
                message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
                if self.calls[index]:
                    message["content"] = text or None
                    message["tool_calls"] = [call.record() for call in self.calls[index]]
                if cited[index] is not None:
                    message["cited"] = cited[index]
                choice["message"] = message
            else:
                choice["text"] = self.prefixes[index] + text
            choices.append(choice)
        usage = {"usage": self.usage(running.stats)}
        return self._head() | {"choices": choices} | usage | {"timings": timings(running.stats[-1])}

    # ---- parts of both ----------------------------------------------------------------------------------

    def _head(self, *, chunk: bool = False) -> dict[str, Any]:
        name = "text_completion" if self.kind == "text" else "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _parts(self, index: int, text: str) -> list[str | Call]:
        finder = self.finders[index]
        return [text] if finder is None else finder.push(text)

    def _rest(self, index: int) -> list[str | Call]:
        finder = self.finders[index]
        return [] if finder is None else finder.flush()

    def _reason(self, event: Ended) -> str:
        if self.calls[event.index]:
            return "tool_calls"
        return event.stats.finish_reason

    def _cited(self, event: Ended) -> dict[str, Any]:
        """The citations of an answer about documents: `marks` tell behind which character of `answer` which of them,
        counted from 1, belong. Without `found`, `answer` says so, and `model_answer` is what the model guessed; with
        it, what it wrote first, where the answer comes from a second look at the passage."""
        found = event.cited
        record: dict[str, Any] = {"answer": event.text, "found": False, "citations": [], "marks": []}
        if found is not None:
            record["found"] = found.found
            if found.found:
                record["citations"] = [
                    citation.record() | {"place": citation.place, "file_id": self.documents[citation.document]}
                    for citation in found.citations
                ]
                record["marks"] = [{"offset": offset, "citations": list(numbers)} for offset, numbers in found.marks]
            if found.first or not found.found:
                record["model_answer"] = found.first or found.answer
        return record

    def usage(self, stats: Sequence[Stats]) -> dict[str, Any]:
        """Tokens of the request: each prompt once, whatever the number of choices."""
        prompt = sum(len(work.ids) for work in self.works)
        new = sum(each.new_tokens for each in stats)
        # The first answer to a prompt tells what was kept from before; later ones find what it read.
        kept = min((each.reused_tokens for each in stats), default=0) if len(self.works) == 1 else 0
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": kept},
        }  # fmt: skip

    def _logprobs(self, index: int, logged: tuple[Logged, ...]) -> dict[str, Any]:
        if self.kind == "chat":
            rows = [
                self._token(each.token, each.logprob)
                | {"top_logprobs": [self._token(token, value) for token, value in each.top]}
                for each in logged
            ]
            return {"content": rows, "refusal": None}
        names = [self._name(each.token) for each in logged]
        offsets, self.offsets[index] = token_offsets((self._bytes(each.token) for each in logged), self.offsets[index])
        tops = [{self._name(token): value for token, value in each.top} for each in logged]
        return {
            "tokens": names, "token_logprobs": [each.logprob for each in logged], "top_logprobs": tops,
            "text_offset": offsets,
        }  # fmt: skip

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._name(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(self._bytes(token))}

    def _bytes(self, token: int) -> bytes:
        if self.tokenizer._spelling is None:
            return self.tokenizer.decode([token], skip_special=False).encode()
        found = self.tokenizer.token_bytes(token)
        return (self.tokenizer.backend.id_to_token(token) or "").encode() if found is None else found

    def _name(self, token: int) -> str:
        """Its text; a part of a character as OpenAI writes it: `bytes:\\xe4\\xb8`."""
        text = self._bytes(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def timings(stats: Stats) -> dict[str, Any]:
    """llama.cpp's names: what was read and written, and how fast."""
    fresh = stats.fresh_tokens
    written = max(0, stats.new_tokens - 1)  # the first token comes out of the reading
    read_ms, write_ms = 1000 * stats.prefill_seconds, 1000 * stats.decode_seconds
    return {
        "cache_n": stats.reused_tokens,
        "prompt_n": fresh,
        "prompt_ms": round(read_ms, 3),
        "prompt_per_token_ms": round(read_ms / fresh, 4) if fresh else 0.0,
        "prompt_per_second": round(stats.prefill_rate, 2),
        "predicted_n": stats.new_tokens,
        "predicted_ms": round(write_ms, 3),
        "predicted_per_token_ms": round(write_ms / written, 4) if written else 0.0,
        "predicted_per_second": round(stats.decode_rate, 2),
        "attention": stats.attention,
        "cache": stats.cache,
        "weights": stats.weights,
    }


async def reading_chunks(running: Running, done: Callable[[], dict[str, Any]]) -> AsyncIterator[Any]:
    """The progress of reading a document, then what `done` gives."""
    async for event in running.events():
        if isinstance(event, Progress):
            progress = {name: getattr(event, name) for name in ("total", "cache", "processed", "time_ms")}
            yield {"object": "file.reading", "prompt_progress": progress}
        elif isinstance(event, Failed):
            yield failed(event).body()
            return
        elif isinstance(event, Finished):
            yield done()
    yield "[DONE]"


def refuse_echo() -> ApiError:
    """Log-probabilities of a prompt are not computed: a session keeps no logits of what it reads."""
    return ApiError(400, "echo together with logprobs is not supported: ask for one of them.", param="echo")
