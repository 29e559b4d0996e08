"""From prompt ids to events: what a worker thread does with a session for one prompt."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..documents import ask
from ..documents.citations import Cited
from ..documents.second_look import checked, introduction
from ..inference.engine import Session, Stats, common_prefix
from ..inference.sampling import Constraint, Sampling
from .keeping import Keeping
from .worker import Failed, Turn


@dataclass(frozen=True)
class Logged:
    """A token with its log-probability under the model itself (before temperature and penalties), and the likeliest."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text of choice `index`, and the tokens chosen since the last piece (where asked for)."""

    index: int
    text: str
    logged: tuple[Logged, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Choice `index` is complete. `cited` and `text`, of an answer about documents: its citations, and what it says in
    the end (that the documents do not say it, where they do not)."""

    index: int
    stats: Stats
    logged: tuple[Logged, ...] = ()
    queued_seconds: float = 0.0
    cited: Cited | None = None
    text: str | None = None


@dataclass(frozen=True)
class Finished:
    """All choices of one prompt are complete: nothing follows."""


@dataclass(frozen=True)
class Generation:
    """The answers to one prompt.

    choices     how many; with a seed, the i-th draws with seed + i
    first       number of the first choice, for requests with several prompts
    top         how many of the likeliest tokens to log; None logs nothing
    constraint  makes what forbids tokens, for one answer
    tokens      what the session is planned for: prompt and answer at least
    boundary    first tokens that are a document's: a forward ends there, so that the bits of an answer do not depend
                on whether the document was read before
    asked       the documents and the question, where the answer is to be tied to them; way: how (ask.way_for)
    keeping     where the document is kept between servers; name: what it is called there
    """

    ids: list[int]
    sampling: Sampling
    choices: int = 1
    first: int = 0
    top: int | None = None
    constraint: Callable[[], Constraint] | None = None
    tokens: int = 0
    boundary: int = 0
    asked: ask.Prompts | None = None
    way: str = "off"
    name: str = ""
    keeping: Keeping | None = None

    @property
    def document(self) -> int:
        return self.boundary

    def __call__(self, session: Session, turn: Turn) -> None:
        session, read_before, seconds = self._with_document(session, turn)
        session.boundary = self.boundary
        for choice in range(self.choices):
            logged: list[Logged] = []
            constraint = self.constraint() if self.constraint is not None else None
            sampling = replace(
                self.sampling,
                seed=None if self.sampling.seed is None else (self.sampling.seed + choice) % 2**63,
                constraint=constraint,
                on_token=None if self.top is None else self._logger(session, logged),
            )
            ids: list[int] = []
            text = ""
            # Where the documents may not hold the answer it is checked before it is shown, as `longverse ask` does.
            waits = self.asked is not None and (self.way == "numbers" or ask.doubtful(self.asked, 0))
            progress = turn.progress if choice == 0 else None
            for piece in session.stream(self.ids, sampling, on_progress=progress, cancelled=turn.cancelled, ids=ids):
                if self.asked is not None and not text:
                    piece = piece.lstrip()
                text += piece
                if not waits:
                    turn.emit(Piece(self.first + choice, piece, _drained(logged)))
                turn.pause()
            stats = session.stats
            if choice == 0 and read_before is not None:
                stats.reused_tokens = min(stats.reused_tokens, read_before)
                stats.prefill_seconds += seconds
            if stats.finish_reason == "cancelled":
                turn.emit(Failed(turn.task.reason, "The request was stopped."))
                return
            if stats.finish_reason == "length" and getattr(constraint, "complete", False):
                stats.finish_reason = "stop"  # whole with its last token
            cited = None
            if self.asked is not None and text.strip():
                cited = checked(session, self.asked, 0, text, ids, sampling, cancelled=turn.cancelled, pause=turn.pause)
                if turn.cancelled():
                    turn.emit(Failed(turn.task.reason, "The request was stopped."))
                    return
                final = cited.answer if cited.found else ask.not_found(self.asked, 0)
                says = introduction(final) if cited.first else ""
                if waits or cited.first or not cited.found:
                    turn.emit(Piece(self.first + choice, final if waits else f"\n{says}{final}", _drained(logged)))
                text = final
            elif self.asked is not None:
                text = ask.without_words(session, self.asked, 0)
                turn.emit(Piece(self.first + choice, text, _drained(logged)))
            final_text = text if self.asked is not None else None
            turn.emit(Ended(self.first + choice, stats, _drained(logged), turn.queued_seconds, cited, final_text))
        turn.emit(Finished())

    def _with_document(self, session: Session, turn: Turn) -> tuple[Session, int | None, float]:
        """The session with the document in it where that is kept on disk or is to be; how many tokens it held before,
        and the seconds that reading took, for the statistics of the answer."""
        if self.keeping is None or not self.boundary:
            return session, None, 0.0
        beginning = self.ids[: self.boundary]
        turn.total = len(self.ids)
        session = self.keeping.bring(session, turn, beginning)
        if not self.keeping.keep:
            return session, None, 0.0
        held = common_prefix(session.tokens, beginning)
        started = time.perf_counter()
        session = self.keeping.read(session, turn, beginning, self.name)
        return session, held, time.perf_counter() - started

    def _logger(self, session: Session, logged: list[Logged]) -> Callable[[int, Tensor], None]:
        ends = session.engine.tokenizer.eos_ids
        top = self.top or 0

        def log(token: int, logits: Tensor) -> None:
            if token in ends:
                return
            with torch.inference_mode():
                shares = logits.log_softmax(-1)
                best = shares.topk(min(top, len(shares))) if top else None
            likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best is not None else ()
            logged.append(Logged(token, float(shares[token]), tuple(likeliest)))

        return log


@dataclass(frozen=True)
class Reading:
    """A document is read into a session, and nothing written."""

    ids: list[int]
    tokens: int
    name: str = ""
    keeping: Keeping | None = None

    @property
    def document(self) -> int:
        return len(self.ids)

    def __call__(self, session: Session, turn: Turn) -> None:
        session.boundary = len(self.ids)
        if self.keeping is not None:
            session = self.keeping.read(session, turn, self.ids, self.name)
            whole = len(session.tokens) >= len(self.ids)
        else:
            whole = session.read(self.ids, on_progress=turn.progress, cancelled=turn.cancelled)
        turn.emit(Finished() if whole else Failed(turn.task.reason, "The reading was stopped; what was read is kept."))


def _drained(logged: list[Logged]) -> tuple[Logged, ...]:
    taken = tuple(logged)
    logged.clear()
    return taken
