"""The needle test: are facts found, wherever they stand and however long the text?

    result = run_needle(EngineBackend(Engine.load("smol")), NeedleSettings(lengths=(1000, 8000)))
    print(result.markdown())
    result.picture(Path("needle.png"))

The protocol. A haystack of prose; facts put between its sentences at stated depths; one question; a greedy
answer; found when the answer holds the value (facts.contains). The prompt the model sees, template included,
has exactly the stated number of tokens. The depth of a fact is the share of the document's tokens before it.

Source of the idea: Kamradt 2023, "Needle in a haystack" (github.com/gkamradt/LLMTest_NeedleInAHaystack); the
variant without shared words follows NoLiMa (arXiv:2502.05167). Texts, facts and scoring here are our own.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation import facts as fact_lists
from longverse.evaluation.backends import Backend, Failure, Reply, Request, answer_all, check_count, check_window
from longverse.evaluation.facts import Fact, Picker, contains, make_fact, several_facts
from longverse.evaluation.files import Journal
from longverse.evaluation.fitting import PADS, PadWords, fit, padding_for
from longverse.evaluation.haystack import LANGUAGES, from_text, generated
from longverse.evaluation.needle_result import NeedleResult, Trial

MODES = ("facts", "several", "hop", "paraphrase")
FEWER = 60  # sentences that a document may give up so that every question fits
_FRAME = {
    "en": (
        "Read the following text carefully; a question about it comes at the end.\n\n",
        "\n\nAnswer this question about the text above, briefly: ",
    ),
    "zh": (
        "请仔细阅读下面的文字，最后有一个关于它的问题。\n\n",
        "\n\n请根据上文简短回答：",
    ),
}


@dataclass(frozen=True)
class NeedleSettings:
    """lengths: tokens of the prompt; depths: shares 0..1; repeats: facts a cell (each of another kind).

    mode: "facts" (plain), "several" (one question for as many values as there are depths), "hop" (two sentences
    far apart answer together), "paraphrase" (question and fact share no word). one_per_document: a document for
    every fact, else the facts of all depths stand in one document and are asked one after another, which reads
    it once. haystack: the user's text (None writes our own), haystack_name its name for the result.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    languages: tuple[str, ...] = ("en",)
    mode: str = "facts"
    kinds: tuple[str, ...] = ()
    repeats: int = 2
    one_per_document: bool = False
    max_new_tokens: int = 64
    seed: int = 0
    haystack: str | None = field(default=None, repr=False)
    haystack_name: str = "generated"

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError("The lengths must be different positive numbers of tokens in rising order, like 1000,2000.")
        if (
            not self.depths
            or not all(0 <= d <= 1 for d in self.depths)
            or list(self.depths) != sorted(set(self.depths))
        ):
            raise UserError("The depths must be different shares from 0 to 1 in rising order.")
        for language in self.languages:
            if language not in LANGUAGES:
                raise UserError(f"The needle test speaks {' and '.join(LANGUAGES)}, not {language!r}; mend --language.")
        if self.mode not in MODES:
            raise UserError(f"No mode is called {self.mode!r}; choose {', '.join(MODES)}.")
        for kind in self.kinds:
            if kind not in fact_lists.KINDS[self.mode]:
                raise UserError(
                    f"No kind of mode {self.mode!r} is called {kind!r}; choose among "
                    f"{', '.join(fact_lists.KINDS[self.mode])}."
                )
        if self.repeats < 1 or self.max_new_tokens < 1:
            raise UserError("--repeats and --max-new-tokens must be at least 1.")

        # Two facts of one kind and name in one document would make a question ambiguous.
        kinds = len(self.kinds or fact_lists.KINDS[self.mode])
        most = kinds * {"facts": 5, "paraphrase": 1, "hop": 7, "several": 1000}[self.mode]
        if len(self.depths) > most and not self.one_per_document:
            raise UserError(
                f"{len(self.depths)} depths ask for more than the {most} different facts of mode {self.mode!r} that "
                "one document can hold: take fewer depths, more kinds, or --one-per-document."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings, of the user's text only a fingerprint."""
        values = asdict(self)
        text = values.pop("haystack")
        values["haystack_sha256"] = None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


@dataclass(frozen=True)
class _Placed:
    fact: Fact
    depth: float


_Plan = tuple[tuple[_Placed, ...], str]  # the facts a question is about, and its text


@dataclass(frozen=True)
class _Document:
    """A document to be written, or as many of one fact each (`one_per_document`), and what is asked about it."""

    language: str
    length: int
    repeat: int
    plans: tuple[_Plan, ...]

    @property
    def key(self) -> str:
        return f"{self.language} {self.length} {self.repeat}"


@dataclass(frozen=True)
class _Question:
    """One request and the facts it is scored on."""

    text: str
    placed: tuple[_Placed, ...]
    measured: tuple[float, ...]
    request: Request
    prompt_tokens: int


USUAL_LONGEST = 8000


def default_lengths(window: int | None, max_new_tokens: int) -> tuple[int, ...]:
    """Eight lengths in even steps up to the last whole thousand (below 4,000: hundred) that leaves the answer room, and
    up to USUAL_LONGEST: what a laptop measures in minutes. Longer ones are asked for."""
    if window is None:
        raise UserError("The model's window is not known here: say which prompts to try with --lengths.")
    room = min(window - max_new_tokens, USUAL_LONGEST)
    unit = 1000 if room >= 4000 else 100 if room >= 400 else 10
    top = room // unit * unit
    if top < 10:
        raise UserError(f"A window of {window:,} tokens has no room for a needle test: use a model with a longer one.")
    return tuple(sorted({max(unit, round(top * i / 8 / unit) * unit) for i in range(1, 9)}))


def run_needle(
    backend: Backend,
    settings: NeedleSettings,
    *,
    journal: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> NeedleResult:
    """Runs every trial of the settings; on_progress(done, total) counts questions.

    journal: a JSON-lines file in which finished questions are kept; a later run with the same settings and
    model goes on where it ended. Raises UserError before any work when a length does not fit the window.
    """
    for length in settings.lengths:
        check_window(backend, length, settings.max_new_tokens)
    header = {**settings.to_dict(), "model": backend.describe()}
    kept = Journal(journal, header) if journal is not None else None
    documents = list(_documents(settings))
    trials = {  # of whole documents: the unit of a resume, since the later questions of one lean on its cache
        document.key: [Trial(**trial) for trial in kept.rows[document.key]["trials"]]
        for document in documents
        if kept is not None and kept.done(document.key)
    }
    todo = [document for document in documents if document.key not in trials]
    total = sum(len(document.plans) for document in documents)
    done = total - sum(len(document.plans) for document in todo)
    asked: list[list[_Question]] = []
    made: list[list[Trial]] = [[] for _ in todo]

    def jobs() -> Iterator[Sequence[Request]]:
        for document in todo:
            asked.append(_build(backend, settings, document))
            yield [question.request for question in asked[-1]]

    if on_progress is not None:
        on_progress(done, total)
    for number, place, reply in answer_all(backend, jobs(), cancelled):
        document = todo[number]
        made[number] += _score(asked[number][place], reply, document)
        done += 1
        if on_progress is not None:
            on_progress(done, total)
        if place + 1 < len(asked[number]):
            continue
        trials[document.key] = sorted(made[number], key=lambda trial: trial.depth)
        if kept is not None:
            failed = next((trial.failed for trial in made[number] if trial.failed), None)
            row = {"trials": [asdict(trial) for trial in trials[document.key]]}
            kept.add(document.key, row | ({"failed": failed} if failed else {}))
    whole = [trial for document in documents for trial in trials.get(document.key, [])]
    return NeedleResult(settings.to_dict(), backend.describe(), whole)


def _documents(settings: NeedleSettings) -> Iterator[_Document]:
    """What is asked, before any text is built."""
    kinds = settings.kinds or fact_lists.KINDS[settings.mode]
    for language, (row, length), repeat in itertools.product(
        settings.languages, enumerate(settings.lengths), range(settings.repeats)
    ):
        picker = Picker(language, f"{settings.seed} {settings.mode} {length} {repeat}")
        if settings.mode == "several":
            made, question = several_facts(picker, len(settings.depths))
            placed = tuple(_Placed(f, d) for f, d in zip(made, settings.depths, strict=True))
            yield _Document(language, length, repeat, ((placed, question),))
            continue
        plans = []
        for column, depth in enumerate(settings.depths):
            # Over the repeats every depth and length meets every kind: a hard kind must not look like a hard depth.
            kind = kinds[(column + repeat * len(settings.depths) + 3 * row) % len(kinds)]
            fact = make_fact(settings.mode, kind, picker)
            plans.append(((_Placed(fact, depth),), fact.question))
        yield _Document(language, length, repeat, tuple(plans))


def _build(backend: Backend, settings: NeedleSettings, about: _Document) -> list[_Question]:
    """The questions of a document, each a request of exactly `length` tokens."""
    language, length, plans = about.language, about.length, about.plans
    seed = settings.seed * 1000 + about.repeat
    if settings.haystack is None:
        source = generated(language, seed)
    else:
        source = from_text(settings.haystack, settings.haystack_name)
    price = lru_cache(maxsize=None)(lambda piece: len(backend.encode(piece)))
    pieces: list[str] = []
    prices: list[int] = []
    spent = 0
    while spent < length * 1.1 + 200:  # merges across pieces save tokens: hold a tenth more than the sum says
        piece = next(source)
        pieces.append(piece)
        prices.append(max(1, price(piece)))
        spent += prices[-1]
    planned = length + settings.max_new_tokens
    shared = not settings.one_per_document
    every = tuple(p for placed, _ in plans for p in placed)

    def request(text: str) -> Request:
        return Request.user(text, max_new_tokens=settings.max_new_tokens, planned_tokens=planned, reuse=True)

    def compose(count: int, placed: Sequence[_Placed], padding: str, question: str) -> str:
        return (
            _FRAME[language][0]
            + _document(pieces[:count], prices, placed, padding, language)[0]
            + (_FRAME[language][1] + question)
        )

    pad = PADS[language]
    fitted: list[tuple[tuple[_Placed, ...], int, str]] = []
    for placed, question in plans:
        inside = every if shared else placed
        overhead = backend.count(request(compose(0, inside, "", question)))
        number, padding = fit(
            lambda n, text, q=question, i=inside: backend.count(request(compose(n, i, text, q))),  # type: ignore[misc]
            length, prices, overhead, pad,
        )  # fmt: skip
        fitted.append((inside, number, padding))
    if shared and len(plans) > 1:
        # One document for all: as many sentences as the longest question leaves room for, the rest padded.
        questions = [question for _, question in plans]
        number, paddings = _fit_all(
            lambda n, question, text: backend.count(request(compose(n, every, text, question))),
            questions, min(n for _, n, _ in fitted), length, pad,
        )  # fmt: skip
        fitted = [(every, number, padding) for padding in paddings]
    built = []
    for (placed, question), (inside, number, padding) in zip(plans, fitted, strict=True):
        text = compose(number, inside, padding, question)
        made = request(text)
        tokens = backend.count(made)
        assert tokens == length, f"{tokens} tokens instead of {length}"
        document, starts = _document(pieces[:number], prices, inside, padding, language)
        where = dict(zip([id(p) for p in inside], starts, strict=True))
        whole = max(1, len(backend.encode(document)))
        measured = tuple(
            min(1.0, len(backend.encode(document[: where[id(p)]])) / whole) if where[id(p)] else 0.0 for p in placed
        )
        built.append(_Question(question, placed, measured, made, tokens))
    # Deepest first: documents of one fact each share all that stands before it, and the cache keeps that part.
    return sorted(built, key=lambda q: -q.placed[0].depth) if settings.one_per_document else built


def _fit_all(
    count: Callable[[int, str, str], int], questions: Sequence[str], most: int, length: int, pad: PadWords
) -> tuple[int, list[str]]:
    """The most sentences, `most` or a few fewer, that leave every question a pad text with which its prompt has exactly
    `length` tokens; and those texts. count(sentences, question, padding): tokens of the whole prompt.

    One question's gap may be smaller than the shortest pad text: then a sentence less is room for all.
    """
    for number in range(most, max(-1, most - FEWER), -1):
        paddings = []
        for question in questions:
            padding = padding_for(lambda text, n=number, q=question: count(n, q, text), length, pad)  # type: ignore[misc]
            if padding is None:
                break
            paddings.append(padding)
        else:
            return number, paddings
    raise UserError(
        f"No prompts of exactly {length:,} tokens could be built from one document; ask for another length, or one "
        "document a fact with --one-per-document."
    )


def _document(
    pieces: Sequence[str], prices: Sequence[int], placed: Sequence[_Placed], padding: str, language: str
) -> tuple[str, list[int]]:
    """The document and, for each placed fact, the character its (first) sentence begins at.

    A fact goes to the sentence end nearest to its depth. A two-hop fact's second sentence stands half the
    document away. The padding stands after the last sentence, before what is placed at the very end.
    """
    total = sum(prices[: len(pieces)])
    cumulative = [0, *itertools.accumulate(prices[: len(pieces)])]

    def border(depth: float) -> int:
        at = depth * total
        right = min(bisect_left(cumulative, at), len(cumulative) - 1)
        left = max(0, right - 1)
        return left if abs(cumulative[left] - at) <= abs(cumulative[right] - at) else right

    inserts: dict[int, list[tuple[str, int | None]]] = {}
    for number, one in enumerate(placed):
        for part, sentence in enumerate(one.fact.sentences):
            depth = one.depth if part == 0 else (one.depth + 0.5 if one.depth <= 0.5 else one.depth - 0.5)
            inserts.setdefault(border(depth), []).append((sentence, number if part == 0 else None))
    glue = " " if language == "en" else ""
    starts = [0] * len(placed)
    parts: list[str] = []
    size = 0

    def add(text: str) -> None:
        nonlocal size
        parts.append(text)
        size += len(text)

    for index in range(len(pieces) + 1):
        if index == len(pieces) and padding:
            add(padding)
        for sentence, owner in inserts.get(index, ()):
            if owner is not None:
                starts[owner] = size
            add(sentence + glue)
        if index < len(pieces):
            piece = pieces[index]
            if inserts.get(index + 1):
                body = piece.rstrip()
                add(body + glue)
            elif index == len(pieces) - 1:
                add(piece.rstrip() + glue)
            else:
                add(piece)
    return "".join(parts).rstrip(), starts


def _score(question: _Question, reply: Reply | Failure, document: _Document) -> list[Trial]:
    failed = str(reply) if isinstance(reply, Failure) else None
    if isinstance(reply, Failure):
        reply = Reply("", None, None, "", 0.0)
    check_count(reply, question.prompt_tokens)
    trials = []
    for placed, measured in zip(question.placed, question.measured, strict=True):
        trials.append(
            Trial(
                language=document.language,
                length=document.length,
                depth=placed.depth,
                repeat=document.repeat,
                kind=placed.fact.kind,
                measured_depth=round(measured, 4),
                question=question.text,
                expected=placed.fact.answer,
                answer=reply.text,
                score=None if failed else float(contains(reply.text, placed.fact.accepted)),
                prompt_tokens=question.prompt_tokens,
                reused_tokens=reply.reused_tokens,
                seconds=round(reply.seconds, 3),
                failed=failed,
            )
        )
    return trials
