"""longverse in a program: load a model, read documents, ask.

    import longverse

    model = longverse.load("smol")
    report = model.read("report.pdf")
    answer = report.ask("Who is the chair?")
    print(answer.text, [citation.place for citation in answer.citations])

The documents are read into the model at the first question; every further one costs only its own words. What does not
fit is refused with the numbers (UserError), before anything is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .documents import ask as asking
from .documents.citations import Citation, Cited
from .documents.reader import Document, read_many
from .documents.second_look import checked
from .errors import UserError
from .inference.engine import Cancelled, Engine, Progress, Session, Stats
from .inference.memory import check_fits
from .inference.sampling import Sampling

ROOM = 2048  # tokens a session keeps free behind the documents, for questions and answers


@dataclass(frozen=True)
class Answer:
    """An answer to a question about documents.

    text       what to show: the answer, or that the documents do not hold one
    found      whether the documents bear the answer out; `model_text` is what the model wrote first in any case
    citations  the passages it rests on; `marked` is the text with their numbers
    stats      tokens, seconds, attention
    """

    text: str
    found: bool
    model_text: str
    citations: tuple[Citation, ...]
    marked: str
    stats: Stats


class Model:
    """A loaded model. `window` is the longest conversation in tokens."""

    def __init__(self, engine: Engine, *, attention: str = "exact", cache: str = "full") -> None:
        self.engine, self.attention, self.cache = engine, attention, cache
        self.window = engine.window

    def read(self, *paths: str | Path) -> "Reading":
        """Documents to ask about: files of any format that `longverse read` takes, or folders. UserError for what is
        no document, and for what does not fit the window."""
        if not paths:
            raise UserError("There is no document to read: give at least one path.")
        return Reading(self, tuple(read_many([str(path) for path in paths])))

    def session(self, tokens: int) -> Session:
        """A bare session of the engine, planned for `tokens`, with this model's attention and cache. UserError where
        the memory does not suffice."""
        check_fits(self.engine, tokens, self.cache, self.attention)
        return self.engine.session(tokens, attention=self.attention, cache=self.cache)


class Reading:
    """Documents, and the session that holds them once the first question is asked.

    tokens  what the documents take in the prompt, without a question
    """

    def __init__(self, model: Model, documents: tuple[Document, ...]) -> None:
        self.model, self.documents = model, documents
        self.answer: Answer | None = None  # the latest
        self._session: Session | None = None
        self._index: asking.Index | None = None
        self.tokens = len(self._prepare("?", 1, "off").ids[0])

    def ask(
        self, question: str, *, max_new_tokens: int = 256, cite: str = "auto", sampling: Sampling | None = None,
        on_progress: Progress | None = None,
    ) -> Answer:  # fmt: skip
        """The answer with its citations.

        cite         "auto", "attention", "numbers" or "off", as `longverse ask --cite`
        sampling     how it is drawn; the likeliest words when left out. Its max_new_tokens holds then
        on_progress  called with the tokens of the prompt that are read and all of them
        """
        options: dict[str, Any] = {"cite": cite, "sampling": sampling, "on_progress": on_progress}
        "".join(self.stream(question, max_new_tokens=max_new_tokens, **options))
        assert self.answer is not None
        return self.answer

    def stream(
        self, question: str, *, max_new_tokens: int = 256, cite: str = "auto", sampling: Sampling | None = None,
        on_progress: Progress | None = None, cancelled: Cancelled | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """Yield the model's text as it is written. Afterwards `self.answer` is the checked answer, whose text differs
        where the documents do not bear the model's out: then they were looked at once more, or do not say it.
        Arguments as in `ask`; `cancelled` stops it early."""
        way = asking.way_for(self.model.engine, cite)
        sampling = asking.with_stop(sampling or Sampling(max_new_tokens=max_new_tokens), way, cite)
        prompts = self._prepare(question, sampling.max_new_tokens, way)
        return self._run(prompts, sampling, way, on_progress, cancelled)

    def _run(
        self, prompts: asking.Prompts, sampling: Sampling, way: str, on_progress: Progress | None,
        cancelled: Cancelled | None,
    ) -> Iterator[str]:  # fmt: skip
        self.answer = None
        session = self._session_for(prompts.planned_tokens)
        text, ids = "", []  # type: ignore[var-annotated]
        for piece in session.stream(prompts.ids[0], sampling, on_progress=on_progress, cancelled=cancelled, ids=ids):
            piece = piece if text else piece.lstrip()
            text += piece
            yield piece
        cited: Cited | None = None
        stats = session.stats
        if way != "off" and text.strip():
            cited = checked(session, prompts, 0, text, ids, sampling, cancelled=cancelled)
        stats = replace(stats)
        if cited is None:
            shown = text.strip() or (asking.without_words(session, prompts, 0) if way != "off" else "")
            self.answer = Answer(shown, bool(text.strip()), text.strip(), (), shown, stats)
        elif cited.found:
            said = cited.first or cited.answer
            self.answer = Answer(cited.answer, True, said, cited.citations, cited.marked, stats)
        else:
            said = asking.not_found(prompts, 0)
            self.answer = Answer(said, False, cited.answer, (), said, stats)

    def _prepare(self, question: str, max_new_tokens: int, way: str) -> asking.Prompts:
        engine, limited = self.model.engine, self.model.attention != "pages"
        prompts = asking.prepare(
            engine, self.documents, [question], max_new_tokens, numbered=way == "numbers", limited=limited
        )
        if self._index is None:
            self._index = prompts.index
        return replace(prompts, made_index=self._index)

    def _session_for(self, tokens: int) -> Session:
        """The session at hand while `tokens` fit its plan, else a new one, which reads the documents again."""
        if self._session is None or self._session.planned_tokens < tokens:
            self._session = None  # its memory goes before the next one's comes
            planned = tokens + ROOM if self.model.attention == "pages" else min(self.model.window, tokens + ROOM)
            self._session = self.model.session(planned)
        return self._session


def load(
    model: str = "smol", *, dtype: str = "auto", device: str = "auto", rope: str | None = None,
    attention: str = "exact", cache: str = "full", on_progress: Progress | None = None,
) -> Model:  # fmt: skip
    """Load a model by embedded name, path or hub id.

    attention  "exact"; "sparse"; "sparse:0.9", which aims at that share of the attention, or "sparse:0.9:0.1", in a
               tenth of the past at most; or "pages" for documents past the model's window
    cache      "full", "int8" or "int4": how keys and values are kept
    """
    return Model(
        Engine.load(model, dtype=dtype, device=device, rope=rope, on_progress=on_progress),
        attention=attention, cache=cache,
    )  # fmt: skip


__all__: Sequence[str] = ("Answer", "Model", "Reading", "load")
