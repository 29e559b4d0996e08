"""Our own engine as a back end, in this process or in several beside each other.

    backend = EngineBackend(Engine.load("smol"))
    with EngineProcesses("smol", processes=2) as backend: ...   # two workers of half the threads each

Reading a prompt uses all cores well; writing an answer token by token does not, and short prompts do not either. So
two processes of one thread answer more rows an hour than one process of two.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from longverse.errors import UserError
from longverse.evaluation.backends import Failure, Lane, Reply, Request, check_window

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor

    from longverse.inference.engine import Engine, Session
    from longverse.models.chat import ChatFormat
    from longverse.models.network import CausalLM
    from longverse.models.tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, chat: ChatFormat, request: Request) -> list[int]:
    """Ids of a request as the engine reads them: the chat template or the raw text, then the lead."""
    if request.messages is not None:
        ids = chat.encode(list(request.messages))
    else:
        assert request.prompt is not None
        ids = tokenizer.encode(request.prompt)
    return ids + tokenizer.encode(request.lead, add_bos=False) if request.lead else ids


def fingerprint(network: CausalLM) -> str:
    """16 hex digits that tell one set of weights from another: a model trained on keeps its name and its folder, and
    its old answers must not pass for the new ones'. Every tensor counts by name, shape and 64 values spread over it."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)][:64].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _NotFirst:
    """Forbids some tokens as an answer's first (`Sampling.constraint`)."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens = sorted(tokens)
        self.begun = False

    def allowed(self, size: int) -> Tensor | None:
        import torch

        if self.begun:
            return None
        mask = torch.ones(size, dtype=torch.bool)  # [vocabulary]
        mask[self.tokens] = False
        return mask

    def accept(self, token: int) -> None:
        self.begun = True


@dataclass
class EngineBackend:
    """Our own engine. The session of the last request is kept, so a common beginning is read only once.

    attention and cache: as in `Engine.session`. Past its window a model is only asked with attention "pages".
    """

    engine: Engine
    attention: str = "exact"
    cache: str = "full"
    _session: Session | None = field(default=None, repr=False)
    _weights: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        from longverse.inference.engine import parse_attention

        self.attention = parse_attention(self.attention).name  # journals tell ways apart by it

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def window(self) -> int | None:
        return None if self.attention == "pages" else self.engine.window

    @property
    def lanes(self) -> Sequence[Lane]:
        return (self,)

    def describe(self) -> dict[str, Any]:
        network = self.engine.network
        if self._weights is None:
            self._weights = fingerprint(network)
        return {
            "backend": "engine",
            "model": self.engine.name,
            "weights": self._weights,
            "dtype": str(network.dtype).removeprefix("torch."),
            # Where it is not the same: caches in bfloat16 and answers written with rounded weights.
            **({"kept": str(self.engine.kept).removeprefix("torch.")} if self.engine.kept != network.dtype else {}),
            "window": self.engine.window,
            "rope": asdict(network.config.rope),
            "chat": self.engine.chat.kind,
            "attention": self.attention,
            "cache": self.cache,
        }

    def encode(self, text: str) -> list[int]:
        return self.engine.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.tokenizer.decode(ids, skip_special=True)

    def count(self, request: Request) -> int:
        return len(prompt_ids(self.engine.tokenizer, self.engine.chat, request))

    def answer(self, request: Request) -> Reply:
        from longverse.inference.memory import check_fits
        from longverse.inference.sampling import Sampling

        ids = prompt_ids(self.engine.tokenizer, self.engine.chat, request)
        check_window(self, len(ids), request.max_new_tokens, Failure)
        planned = request.planned_tokens or len(ids) + request.max_new_tokens
        if self._session is None or planned != self._session.planned_tokens or not request.reuse:
            self._session = None  # frees the old cache before the new one is made
            check_fits(self.engine, planned, self.cache, self.attention)
            self._session = self.engine.session(planned, attention=self.attention, cache=self.cache)
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

    def _one_line(self, session: Session, ids: list[int], limit: int) -> tuple[str, int, str]:
        """Greedy answer that never begins with, and ends at, the line feed's token or an end token."""
        from longverse.inference.sampling import Sampling

        line_feed = self.engine.tokenizer.encode("\n", add_bos=False)[-1]
        first = _NotFirst({line_feed, *self.engine.tokenizer.eos_ids})
        out: list[int] = []
        for token in session.stream_ids(ids, Sampling(max_new_tokens=limit, constraint=first)):
            out.append(token)
            if token == line_feed:
                break
        ended = out[-1] == line_feed or len(out) < limit
        return self.decode(out), len(out), "stop" if ended else "length"


class EngineProcesses:
    """`processes` engines in processes of their own, each with its share of the threads; answers as one engine gives.

    Takes `Engine.load`'s arguments and `EngineBackend`'s. Close it, or use it in a `with`. The workers end with this
    process, however it ends. UserError when the model cannot be loaded, and when a worker is killed under way.
    """

    def __init__(
        self,
        model: str = "smol",
        *,
        processes: int,
        attention: str = "exact",
        cache: str = "full",
        **load: Any,
    ) -> None:
        import multiprocessing

        import torch

        from longverse.models.checkpoint import open_model

        if processes < 1:
            raise UserError("--processes must be at least 1.")
        opened = open_model(model, load.pop("on_progress", None))  # converts a GGUF once, before all workers do
        self.name, self.notes = opened.name, opened.notes
        self._tokenizer, self._chat = opened.tokenizer, opened.chat()
        threads = max(1, torch.get_num_threads() // processes)
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads without their thread
        self._workers: list[_Worker] = []
        try:
            for _ in range(processes):
                here, there = context.Pipe()
                work = (there, model, load, attention, cache, threads)
                process = context.Process(target=_serve, args=work, daemon=True)
                process.start()
                there.close()
                self._workers.append(_Worker(here, process))
            told = [worker.receive() for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self._about, self.window = told[0]
        self.lanes: Sequence[Lane] = self._workers

    def __enter__(self) -> EngineProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
            worker.process.join()
            worker.connection.close()

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=True)

    def count(self, request: Request) -> int:
        return len(prompt_ids(self._tokenizer, self._chat, request))


@dataclass
class _Worker:
    """A lane: sends a request to its process and waits for what comes of it."""

    connection: Connection
    process: Any

    def answer(self, request: Request) -> Reply:
        with contextlib.suppress(OSError):  # the worker is gone; what it died of is said below
            self.connection.send(request)
        return self.receive()

    def receive(self) -> Any:
        try:
            came = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise UserError(
                f"A worker process ended (exit code {self.process.exitcode}; -9 is often too little memory): give the "
                "same command again with fewer --processes; finished rows are kept."
            ) from None
        if isinstance(came, Exception):
            raise came
        return came


def _serve(connection: Connection, model: str, load: dict[str, Any], attention: str, cache: str, threads: int) -> None:
    """A worker: what the model is, then a reply or an exception for every request, until nobody asks any more."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches every process; the one that asks decides
    try:
        import torch

        from longverse.inference.engine import Engine

        torch.set_num_threads(threads)
        backend = EngineBackend(Engine.load(model, **load), attention, cache)
        connection.send((backend.describe(), backend.window))
        while True:
            request = connection.recv()
            try:
                connection.send(backend.answer(request))
            except (Failure, UserError) as error:
                connection.send(error)
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):
        pass  # the run is over
