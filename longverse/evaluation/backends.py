"""Who answers: the engine, transformers, or an OpenAI-compatible endpoint, behind one small interface.

A back end turns a request into token ids exactly as its model will see them (so lengths can be fitted and
checked), and answers greedily. What goes wrong with one row is a `Failure`, recorded and counted by the
caller; it is never an empty answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from longverse.errors import UserError, expand

Message = dict[str, str]
IN_A_ROW = 20  # failures one after another that end a run: the back end is gone, and the rows left would all fail


@dataclass(frozen=True)
class Request:
    """One question, answered greedily.

    Exactly one of `messages` (put through the model's chat template) and `prompt` (raw text, with the
    tokenizer's own first token if it has that habit). lead: how the answer begins; it stands after the template, in the
    model's own turn, and the reply goes on from there. stop: strings that end the answer and are cut off.
    end_line: end at the first line feed after at least one other token, and never begin with one (the
    protocol of samsum). planned_tokens: fixes the length the dynamic RoPE base is chosen for; None takes
    prompt plus new tokens. reuse: may continue the cache of the request before it, if that had the same plan;
    else every request is read from its first token, so that its answer never depends on what ran before.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    lead: str = ""
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


class Lane(Protocol):
    """What answers one request at a time."""

    def answer(self, request: Request) -> Reply:
        """Raises Failure when this request cannot be answered, UserError when none can."""
        ...


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
    def lanes(self) -> Sequence[Lane]:
        """What answers side by side: as many requests are under way as there are lanes."""
        ...

    def describe(self) -> dict[str, Any]:
        """Whose answers they are: what must be equal for a later run to go on with this one's rows. No times."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a raw text with the tokenizer's own special tokens, as the benchmark counts."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens skipped."""
        ...

    def count(self, request: Request) -> int:
        """Tokens of the prompt as the model sees it, template and lead included."""
        ...


def template_tokens(backend: Backend) -> int:
    """Tokens that the chat template puts around a message."""
    return backend.count(Request.user("x")) - len(backend.encode("x"))


def check_window(backend: Backend, prompt_tokens: int, new_tokens: int, error: type[Exception] = UserError) -> None:
    """UserError, before a run, when prompt plus answer are longer than the model's window. In `answer` it is the row's
    own Failure: one row that grew when it was cut must not stop all the others."""
    if backend.window is not None and prompt_tokens + new_tokens > backend.window:
        raise error(
            f"A prompt of {prompt_tokens:,} tokens and an answer of {new_tokens:,} exceed {backend.name}'s window of "
            f"{backend.window:,} tokens: shorten it, or state a longer --window (with a --rope that reaches it)."
        )


def check_count(reply: Reply, expected: int) -> None:
    """UserError when the model counted another number of prompt tokens than was fitted and sent."""
    if reply.prompt_tokens is not None and reply.prompt_tokens != expected:
        raise UserError(
            f"The model counted {reply.prompt_tokens:,} tokens where {expected:,} were sent: the tokenizer or the "
            "chat template of --tokenizer is not the served model's."
        )


def answer_all(
    backend: Backend, jobs: Iterable[Sequence[Request]], cancelled: Callable[[], bool] | None = None
) -> Iterator[tuple[int, int, Reply | Failure]]:
    """Yields (number of the job, place of the request in it, reply or failure) as they come.

    A job's requests are answered one after another on one lane, so that they can share its cache; jobs run side by
    side, one a lane. A job is drawn from `jobs` only when a lane is free for it. After `cancelled()` no further request
    is begun; those under way are waited for and yielded. IN_A_ROW failures in a row raise UserError.
    """
    failed = 0
    for number, place, outcome in _outcomes(backend.lanes, jobs, cancelled):
        failed = failed + 1 if isinstance(outcome, Failure) else 0
        yield number, place, outcome
        if failed == IN_A_ROW:
            raise UserError(
                f"{failed} requests in a row got no answer (the last: {outcome}): mend that and give the same "
                "command again; finished rows are kept."
            )


def _outcomes(
    lanes: Sequence[Lane], jobs: Iterable[Sequence[Request]], cancelled: Callable[[], bool] | None
) -> Iterator[tuple[int, int, Reply | Failure]]:
    if len(lanes) == 1:
        for number, job in enumerate(jobs):
            for place, request in enumerate(job):
                if cancelled is not None and cancelled():
                    return
                yield number, place, _attempt(lanes[0], request)
        return
    inboxes: list[SimpleQueue[tuple[int, Sequence[Request]] | None]] = [SimpleQueue() for _ in lanes]
    # What lanes send: an outcome, an error that ends the run, or their own number when they are free again.
    outbox: SimpleQueue[tuple[int, int, Reply | Failure] | BaseException | int] = SimpleQueue()
    stopped = threading.Event()

    def work(lane: int) -> None:
        while (task := inboxes[lane].get()) is not None:
            number, job = task
            try:
                for place, request in enumerate(job):
                    if stopped.is_set() or (cancelled is not None and cancelled()):
                        break
                    outbox.put((number, place, _attempt(lanes[lane], request)))
            except BaseException as error:  # raised again where the answers are waited for
                outbox.put(error)
            outbox.put(lane)

    # Daemons: a Ctrl-C must not wait for an endpoint that takes its time.
    for lane in range(len(lanes)):
        threading.Thread(target=work, args=(lane,), daemon=True).start()
    waiting, free = enumerate(jobs), list(range(len(lanes)))
    try:
        while True:
            while free and not (cancelled is not None and cancelled()) and (task := next(waiting, None)) is not None:
                inboxes[free.pop(0)].put(task)
            if len(free) == len(lanes):
                return
            came = outbox.get()
            if isinstance(came, int):
                free.append(came)
            elif isinstance(came, BaseException):
                raise came
            else:
                yield came
    finally:
        stopped.set()
        for inbox in inboxes:
            inbox.put(None)


def _attempt(lane: Lane, request: Request) -> Reply | Failure:
    try:
        return lane.answer(request)
    except Failure as failure:
        return failure


def load_tokenizer(model: str) -> tuple[Any, Any]:
    """Tokenizer and chat format of a model by embedded name, folder (weights need not be there), .gguf or hub id."""
    from longverse.models.chat import ChatFormat
    from longverse.models.checkpoint import open_model, read_config
    from longverse.models.tokenizer import Tokenizer

    folder = expand(model)
    if folder.is_dir():
        tokenizer = Tokenizer.from_folder(folder)
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        return tokenizer, ChatFormat.for_model(tokenizer, config, folder.resolve().name)
    opened = open_model(model)
    return opened.tokenizer, opened.chat()
