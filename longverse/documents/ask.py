"""Questions about documents: the documents stand first in the prompt and the question last, so that a session reads
them once and every further question pays only for itself.

Each question is a conversation of its own: no answer depends on an earlier one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import UserError
from ..inference.engine import Engine, Session
from ..inference.sampling import Sampling
from ..wording import language_of, messages
from .citations import NOT_FOUND, Attended, Cited, cite
from .document import Document
from .evidence import attend_to
from .words import Index, groups, names, terms

WAYS = ("auto", "attention", "numbers", "off")
FOLLOWS = 3e9  # parameters from which a model is taken to follow the numbering of paragraphs


@dataclass(frozen=True)
class Prompts:
    """Every question's prompt, and the length that a session for them must be planned for."""

    questions: tuple[str, ...]
    ids: tuple[list[int], ...]
    planned_tokens: int  # the longest prompt and its answer
    documents: tuple[Document, ...] = ()
    numbered: bool = False  # whether the paragraphs carry numbers
    # Of each question, the paragraphs (places of the index) that its prompt holds, where it is not all of them.
    places: tuple[tuple[int, ...] | None, ...] = ()
    made_index: Index | None = None
    follows: bool = False  # whether the question follows earlier turns, without which it may not be understood
    # Of each question, what its prompt holds of each of its `places`, where that is not the whole paragraph.
    parts: tuple[tuple[str, ...] | None, ...] = ()

    @cached_property
    def index(self) -> Index:
        """The words of the documents, made when first asked for."""
        return self.made_index or Index(self.documents)


def text_of(documents: Sequence[Document], *, numbered: bool = False, after: int = 0) -> str:
    """What a prompt holds of documents: a single one as it is; several with their names. Numbers count the index's
    places, behind `after` earlier ones, and stand before all paragraphs but headings."""
    texts = []
    number = after
    for document in documents:
        if not numbered:
            texts.append(document.text.strip("\n"))
            continue
        parts = []
        for paragraph in document.paragraphs:
            number += 1
            parts.append(paragraph.text if paragraph.level else f"[{number}] {paragraph.text}")
        texts.append("\n\n".join(parts))
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{document.name}:\n\n{text}" for document, text in zip(documents, texts, strict=True))


def way_for(engine: Engine, way: str) -> str:
    """attention, numbers or off: what `auto` means for a model. Small models do not follow numbers."""
    if way not in WAYS:
        raise UserError(f"There is no way {way!r} to cite: choose one of {', '.join(WAYS)}.")
    if way != "auto":
        return way
    shape = engine.network.config
    weights = shape.num_layers * (4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size)
    return "numbers" if weights >= FOLLOWS else "attention"


def with_stop(sampling: Sampling, way: str, cite: str) -> Sampling:
    """`sampling` with an end at the first blank line where nothing was asked for: small models, of which `auto` makes
    the way "attention", do not know when to end."""
    ends = way == "attention" and cite == "auto" and not sampling.stop
    return replace(sampling, stop=("\n\n",)) if ends else sampling


def prepare(
    engine: Engine, documents: Document | Sequence[Document], questions: Sequence[str], max_new_tokens: int, *,
    system: str | None = None, numbered: bool = False, limited: bool = True,
) -> Prompts:  # fmt: skip
    """Encode the questions. Raises UserError, before anything is read, when one does not fit the model's window
    (`limited=False` leaves that out, for sessions that read past it)."""
    documents = (documents,) if isinstance(documents, Document) else tuple(documents)
    check(questions)
    text = text_of(documents, numbered=numbered)
    ids = tuple(
        engine.chat.encode(messages(text, question, system=system, numbered=numbered)) for question in questions
    )
    planned = max(map(len, ids)) + max_new_tokens
    if limited and planned > engine.window:
        what = documents[0].name if len(documents) == 1 else f"The text of {len(documents)} documents"
        raise UserError(
            f"{what} takes {planned:,} tokens ({planned - max_new_tokens:,} with the question and"
            f" {max_new_tokens:,} for the answer) and {engine.name} reads {engine.window:,}: use a model with a larger"
            " window, answer from chosen passages with --select, widen this one with --rope (such as dynamic:2, at a"
            " cost in quality), or give a shorter document."
        )
    return Prompts(tuple(questions), ids, planned, documents, numbered, (None,) * len(ids))


def check(questions: Sequence[str]) -> None:
    """UserError where there is no question, or an empty one."""
    if not questions:
        raise UserError('There is no question: type one after the file, in quotes, like "Who wrote it?".')
    for question in questions:
        if not question.strip():
            raise UserError("A question is empty: type it in quotes after the file.")


def doubtful(prompts: Prompts, number: int) -> bool:
    """Whether, by the words of a question alone, its answer may not be in the documents: then an answer is better
    checked before it is shown."""
    question, index = prompts.questions[number], prompts.index
    asked = terms(question)
    nearest = index.nearest(asked, 1)
    if not asked or not nearest:
        return bool(asked)
    held = index.words[nearest[0]]
    return index.share(groups(question), held) < 0.9 or bool(names(question) - held)


def cited(session: Session, prompts: Prompts, number: int, answer: str, ids: Sequence[int]) -> Cited:
    """Tie the answer that `session` just gave to the question of that number to the documents, and check it. `ids` are
    the answer's tokens."""
    attended = attended_by(session, prompts, number, ids)
    return cite(
        prompts.questions[number], answer.strip(), prompts.index, attended, numbered=prompts.numbered,
        read=prompts.places[number],
    )  # fmt: skip


def attended_by(session: Session, prompts: Prompts, number: int, ids: Sequence[int]) -> Attended | None:
    """Where the tokens of that answer looked, with offsets into the answer as it is shown: stripped."""
    parts = prompts.parts[number] if prompts.parts else None
    attended = attend_to(session, prompts.ids[number], ids, prompts.index, prompts.places[number], parts)
    return stripped(session, attended, ids)


def stripped(session: Session, attended: Attended | None, ids: Sequence[int]) -> Attended | None:
    """`attended` by the tokens `ids` of an answer, with offsets into the answer without space around it."""
    written = session.engine.tokenizer.decode(list(ids))
    lead = len(written) - len(written.lstrip())  # what stripping took from the beginning
    return attended.moved(-lead) if attended is not None and lead else attended


def without_words(session: Session, prompts: Prompts, number: int) -> str:
    """What stands in place of an answer without a word: that the documents hold none, where the model ended it; nothing
    where it was cut off."""
    return not_found(prompts, number) if session.stats.finish_reason == "stop" else ""


def not_found(prompts: Prompts, number: int) -> str:
    """What stands in place of an answer that the documents do not bear out, in the question's language."""
    return NOT_FOUND[language_of(prompts.questions[number])]
