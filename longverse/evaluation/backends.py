"""Who answers: the engine, transformers, or an OpenAI-compatible endpoint, behind one small interface.

A back end turns a request into token ids exactly as its model will see them (so lengths can be fitted and
checked), and answers greedily. What goes wrong with one row is a `Failure`, recorded and counted by the
caller; it is never an empty answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longverse.errors import UserError

if TYPE_CHECKING:
    from longverse.inference.engine import Engine, Session

Message = dict[str, str]


@dataclass(frozen=True)
class Request:
    """One question, answered greedily.

    Exactly one of `messages` (put through the model's chat template) and `prompt` (raw text, with the
    tokenizer's own first token if it has that habit). stop: strings that end the answer and are cut off.
    end_line: end at the first line feed after at least one other token, and never begin with one (the
    protocol of samsum). planned_tokens: fixes the length the dynamic RoPE base is chosen for; None takes
    prompt plus new tokens. reuse: may continue the cache of the request before it, if that had the same plan;
    else every request is read from its first token, so that its answer never depends on what ran before.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    end_line: bool = False
    planned_tokens: int | None = None
    reuse: bool = False

    def __post_init__(self) -> None:
        assert (self.messages is None) != (self.prompt is None)

    @classmethod
    def user(cls, text: str, **more: Any) -> Request:
        return cls(messages=({"role": "user", "content": text},), **more)


@dataclass(frozen=True)
class Reply:
    """text: the answer without special tokens; tokens as the back end counted them (None: it did not say)."""

    text: str
    prompt_tokens: int | None
    new_tokens: int | None
    finish_reason: str
    seconds: float
    reused_tokens: int = 0


class Failure(Exception):
    """One request that got no answer; the message says why, in one line."""


class Backend(Protocol):
    """A model that answers requests, wherever it runs."""

    @property
    def name(self) -> str:
        """For tables and messages."""
        ...

    @property
    def window(self) -> int | None:
        """Tokens that prompt and answer may have together; None where unknown."""
        ...

    @property
    def concurrency(self) -> int:
        """Requests to keep under way at once."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a result file says about the model: names and settings, no times."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a raw text with the tokenizer's own special tokens, as the benchmark counts."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens skipped."""
        ...

    def count(self, request: Request) -> int:
        """Tokens of the prompt as the model sees it, template included."""
        ...

    def answer(self, request: Request) -> Reply:
        """Raises Failure when this request cannot be answered, UserError when none can."""
        ...


def check_window(backend: Backend, prompt_tokens: int, new_tokens: int) -> None:
    """UserError when prompt plus answer are longer than the model's window."""
    if backend.window is not None and prompt_tokens + new_tokens > backend.window:
        raise UserError(
            f"A prompt of {prompt_tokens:,} tokens and an answer of {new_tokens:,} exceed {backend.name}'s window of "
            f"{backend.window:,} tokens: shorten it, or state a longer --window (with a --rope that reaches it)."
        )


def answer_all(
    backend: Backend, requests: Sequence[Request], cancelled: Callable[[], bool] | None = None
) -> Iterator[tuple[int, Reply | Failure]]:
    """Yields (index, reply or failure) as they come, `backend.concurrency` at a time.

    With concurrency 1 the order is that of the requests. After `cancelled()` no further request is begun;
    those under way are waited for and yielded.
    """
    if backend.concurrency == 1:
        for index, request in enumerate(requests):
            if cancelled is not None and cancelled():
                return
            yield index, _attempt(backend, request)
        return
    with ThreadPoolExecutor(backend.concurrency) as pool:
        pending: dict[Future[Reply | Failure], int] = {}
        waiting = iter(enumerate(requests))
        more = True
        try:
            while more or pending:
                # Only as many as can run are handed over, so that a cancel leaves nothing queued behind.
                while more and len(pending) < backend.concurrency and not (cancelled and cancelled()):
                    try:
                        index, request = next(waiting)
                    except StopIteration:
                        more = False
                        break
                    pending[pool.submit(_attempt, backend, request)] = index
                if not pending:
                    return
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield pending.pop(future), future.result()
        finally:
            for future in pending:
                future.cancel()


def _attempt(backend: Backend, request: Request) -> Reply | Failure:
    try:
        return backend.answer(request)
    except Failure as failure:
        return failure


def load_tokenizer(model: str) -> tuple[Any, Any]:
    """Tokenizer and chat format of a model by embedded name, folder (weights need not be there), .gguf or hub id."""
    from longverse.models.chat import ChatFormat
    from longverse.models.checkpoint import open_model, read_config
    from longverse.models.tokenizer import Tokenizer

    folder = Path(model).expanduser()
    if folder.is_dir():
        tokenizer = Tokenizer.from_folder(folder)
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        return tokenizer, ChatFormat.for_model(tokenizer, config, folder.name)
    opened = open_model(model)
    return opened.tokenizer, opened.chat()


@dataclass
class EngineBackend:
    """Our own engine. The session of the last request is kept, so a common beginning is read only once.

    attention: how the engine attends (Engine.session); with "pages" there is no window to keep within."""

    engine: Engine
    concurrency: int = 1
    attention: str = "exact"
    _session: Session | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def window(self) -> int | None:
        return None if self.attention == "pages" else self.engine.window

    def describe(self) -> dict[str, Any]:
        rope = self.engine.network.config.rope
        return {
            "backend": "engine",
            "model": self.engine.name,
            "window": self.engine.window,
            "rope": {"kind": rope.kind, "theta": rope.theta, "factor": rope.factor},
            "chat": self.engine.chat.kind,
            "attention": self.attention,
        }

    def encode(self, text: str) -> list[int]:
        return self.engine.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.tokenizer.decode(ids, skip_special=True)

    def _ids(self, request: Request) -> list[int]:
        if request.messages is not None:
            return self.engine.chat.encode(list(request.messages))
        assert request.prompt is not None
        return self.engine.tokenizer.encode(request.prompt)

    def count(self, request: Request) -> int:
        return len(self._ids(request))

    def answer(self, request: Request) -> Reply:
        from longverse.inference.sampling import Sampling

        ids = self._ids(request)
        check_window(self, len(ids), request.max_new_tokens)
        if request.end_line and self.attention == "pages":
            raise UserError("Tasks whose answer ends with its line are not done with pages: use exact attention.")
        planned = request.planned_tokens or len(ids) + request.max_new_tokens
        if self._session is None or planned != self._session.planned_tokens or not request.reuse:
            self._session = None  # frees the old cache before the new one is made
            self._session = self.open_session(planned)
        session = self._session
        start = time.perf_counter()
        if request.end_line:
            text, tokens, reason = self._one_line(session, ids, request.max_new_tokens)
        else:
            done = session.complete(ids, Sampling(max_new_tokens=request.max_new_tokens, stop=request.stop))
            text, tokens, reason = done.text, done.stats.new_tokens, done.stats.finish_reason
        return Reply(
            text=text,
            prompt_tokens=len(ids),
            new_tokens=tokens,
            finish_reason=reason,
            seconds=time.perf_counter() - start,
            reused_tokens=session.stats.reused_tokens,
        )

    def open_session(self, planned_tokens: int) -> Session:
        return self.engine.session(planned_tokens, attention=self.attention)

    def _one_line(self, session: Session, ids: list[int], limit: int) -> tuple[str, int, str]:
        """Greedy answer that never begins with, and ends at, the line feed's token or an end token."""
        import torch

        from longverse.inference.sampling import Sampling

        line_feed = self.engine.tokenizer.encode("\n", add_bos=False)[-1]
        ends = {line_feed, *self.engine.tokenizer.eos_ids}
        first = next(session.stream_ids(ids, Sampling(max_new_tokens=1)), None)
        stats = session.stats
        if first is None or first in ends:
            # The likeliest token but these: read the prompt's last token once more and leave them out.
            cache, network = session.cache, self.engine.network
            cache.truncate(len(ids) - 1)
            del session.tokens[len(ids) - 1 :]
            with torch.inference_mode():
                last = torch.tensor([ids[-1:]], device=network.device)  # [1, 1]
                position = torch.tensor([[len(ids) - 1]], device=network.device)
                logits = network(last, position, cache.rope_length, cache.attend)[0, -1].float()  # [vocabulary]
                logits[sorted(ends)] = float("-inf")
                first = int(logits.argmax())
        out, reason = [first], "length"
        if limit > 1:
            for token in session.stream_ids([*ids, first], Sampling(max_new_tokens=limit - 1)):
                out.append(token)
                if token == line_feed:
                    break
            reason = "stop" if out[-1] == line_feed or len(out) < limit else "length"
        session.stats = stats
        return self.decode(out), len(out), reason


class TransformersBackend:
    """A model folder or hub name through transformers' own classes and `generate`, greedily, without our engine."""

    concurrency = 1

    def __init__(self, path: str, *, dtype: str = "auto", device: str = "cpu") -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"The model {path!r} cannot be loaded by transformers ({reason}): give a model folder."
            ) from error
        self.model: Any = model.to(device).eval()
        self.name = Path(path).name or path
        self.window: int | None = getattr(model.config, "max_position_embeddings", None)

    def describe(self) -> dict[str, Any]:
        import transformers

        return {"backend": f"transformers {transformers.__version__}", "model": self.name, "window": self.window}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _ids(self, request: Request) -> list[int]:
        if request.prompt is not None:
            return self.encode(request.prompt)
        assert request.messages is not None
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.name} has no chat template; use the engine, which knows more formats.")
        text = self.tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def count(self, request: Request) -> int:
        return len(self._ids(request))

    def answer(self, request: Request) -> Reply:
        import torch

        ids = self._ids(request)
        check_window(self, len(ids), request.max_new_tokens)
        more: dict[str, Any] = {}
        ends = self.model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        if request.end_line:
            line_feed = self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
            more = {"eos_token_id": [*ends, line_feed], "min_new_tokens": 1}
        if request.stop:
            more |= {"stop_strings": list(request.stop), "tokenizer": self.tokenizer}
        start = time.perf_counter()
        with torch.inference_mode():
            tensor = torch.tensor([ids], device=self.model.device)  # [1, prompt tokens]
            out = self.model.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
                pad_token_id=ends[0] if ends else 0,
                **more,
            )[0, len(ids) :].tolist()
        text = self.decode(out)
        cut = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
        ended = bool(cut) or (bool(out) and out[-1] in more.get("eos_token_id", ends))
        return Reply(
            text=text[: min(cut)] if cut else text,
            prompt_tokens=len(ids),
            new_tokens=len(out),
            finish_reason="stop" if ended else "length",
            seconds=time.perf_counter() - start,
        )
