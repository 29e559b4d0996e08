"""A second look: where no passage bears an answer out, the question is asked again over a few paragraphs.

Far into a long document a small model finds the place more often than it copies what stands there, and refuses what is
asked in other words than the document's; over a few paragraphs it copies and understands (benchmarks/citations.py has
the shares before and after). Where a passage speaks of what was asked but does not say what was answered, these are the
cited paragraphs and their nearest; where nothing was found, the nearest in the question's words; then the sentences
nearest to it. The second answer is checked like the first and stands only where its passage says it; after nothing was
found it must also bring what the question asks for, a name or a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import UserError
from ..inference.engine import Cancelled, Engine, Session
from ..inference.sampling import Sampling
from ..wording import SAYS, language_of, messages
from .ask import Prompts, cited
from .citations import SAID, SURE, Cited
from .words import (
    asks_a_name_unmarked,
    groups,
    has_han,
    is_of_the_kind,
    marked_names,
    names,
    points_back,
    sentences,
    subject,
    terms,
)

NEAREST = 2  # paragraphs nearest to the question in its words that are looked at beside the cited ones
WIDE = 1024  # tokens of the paragraphs that are looked at where nothing was found
LEAST = 16  # tokens left of them that no paragraph is sought for any more
AMONG = 64  # paragraphs nearest to a question whose sentences are compared
SENTENCES = (8, 3)  # looked at alone, where WIDE tokens of paragraphs gave no answer
ALIKE = 8  # paragraphs among which those are sought that a question may be about
MOST = 2048  # tokens of a prompt: a document of one paragraph is not read again whole
Pause = Callable[[], None]


def checked(
    session: Session, prompts: Prompts, number: int, answer: str, ids: Sequence[int], sampling: Sampling, *,
    cancelled: Cancelled | None = None, pause: Pause | None = None,
) -> Cited:  # fmt: skip
    """Tie the answer that `session` just gave to the question of that number to the documents, as `ask.cited`, and take
    a second look where no passage bears it out. `Cited.first` is the first answer where the second one stands.

    sampling   of the first answer, whose length and stops the second one keeps; it is written greedily
    cancelled  asked before every chunk and token; the first answer stands then
    pause      called between the second look's tokens, to let others compute

    None is taken for models that number paragraphs, which are large enough to answer in words of their own, nor for a
    question that may need the earlier turns of its conversation (`stands_alone`).
    """
    first = cited(session, prompts, number, answer, ids)
    if first.borne_out or prompts.numbered:
        return first
    if prompts.follows and not stands_alone(prompts, number):
        return first
    if session.stats.finish_reason == "cancelled":
        return first
    second = second_look(session.engine, prompts, number, first, sampling, cancelled, pause)
    if second is None:
        return first
    session.stats.finish_reason = "stop"  # of the answer that stands
    return replace(second, first=first.answer)


def stands_alone(prompts: Prompts, number: int) -> bool:
    """Whether a question means the same without the turns before it, as far as its words tell: nothing in it points
    back, it names what it asks about, and one paragraph alone holds that name and nine tenths of all that is asked with
    (SURE)."""
    index, question = prompts.index, prompts.questions[number]
    named, asked = subject(question), groups(question)
    if not named or points_back(question):
        return False
    nearest = index.nearest(frozenset(terms(question)), ALIKE, among=prompts.places[number])
    speaking = [place for place in nearest if index.share(asked, index.words[place]) >= SURE]
    return len(speaking) == 1 and named <= index.words[speaking[0]]


def second_look(
    engine: Engine, prompts: Prompts, number: int, first: Cited, sampling: Sampling,
    cancelled: Cancelled | None = None, pause: Pause | None = None,
) -> Cited | None:  # fmt: skip
    """Ask again with nothing but a few passages (`ever_less`). The first answer that its passage bears out; None where
    none is, or where it was cancelled."""
    index, question = prompts.index, prompts.questions[number]
    if not first.found and asks_a_name_unmarked(question):
        return None
    greedy = Sampling(max_new_tokens=sampling.max_new_tokens, stop=sampling.stop)
    looked: set[tuple[Passage, ...]] = {()}
    for passages, few in ever_less(engine, prompts, number, first):
        if passages in looked:
            continue
        looked.add(passages)
        ids = engine.chat.encode(messages(text_of(prompts, passages), question))
        if len(ids) > MOST or len(ids) + greedy.max_new_tokens > engine.window:
            continue
        try:
            apart = engine.session(len(ids) + greedy.max_new_tokens)
        except UserError:  # no memory for it beside the first session
            return None
        places, parts = (tuple(one.place for one in passages), tuple(one.text for one in passages))
        alone = replace(prompts, questions=(question,), ids=(ids,), places=(places,), parts=(parts,), made_index=index)
        text, written = "", []  # type: ignore[var-annotated]
        for piece in apart.stream(ids, greedy, cancelled=cancelled, ids=written):
            text += piece
            if pause is not None:
                pause()
        if apart.stats.finish_reason == "cancelled":
            return None
        if not text.strip():
            continue
        found = cited(apart, alone, 0, text, written)
        if not found.borne_out or not (first.found or brings_what_is_asked(question, found)):
            continue
        # Of three sentences a small model takes one, whatever is asked; and Chinese seldom marks names, so that after
        # nothing was found a passage in other words may be about anybody.
        own_words = few or (has_han(question) and not marked_names(question) and not first.found)
        if own_words and found.signals.get("asked", 0.0) < SAID:
            continue
        return found
    return None


def brings_what_is_asked(question: str, found: Cited) -> bool:
    """Whether an answer, and what bears it out, hold the name or the number that a question asks for."""
    said = " ".join(one.text for one in found.citations if one.status != "unverified")
    # Behind other words an answer's first capital letter counts, too.
    return is_of_the_kind(question, f"It is {found.answer}") and is_of_the_kind(question, said)


@dataclass(frozen=True)
class Passage:
    """A paragraph of the index, or a sentence of one."""

    place: int
    text: str


def ever_less(
    engine: Engine, prompts: Prompts, number: int, first: Cited
) -> Iterator[tuple[tuple[Passage, ...], bool]]:
    """What is looked at, one after another: the paragraphs that an answer cites with those nearest to the question in
    its words, then the cited ones; where nothing was found, the nearest, more of them. Then a few sentences, and fewer:
    whether it is these."""
    for passages in narrowly(prompts, number, first) if first.found else (widely(engine, prompts, number),):
        yield passages, False
    for count in SENTENCES:
        yield closest(prompts, number, count), True


def narrowly(prompts: Prompts, number: int, first: Cited) -> Iterator[tuple[Passage, ...]]:
    """The cited paragraphs with those nearest to the question, then the cited ones alone."""
    index = prompts.index
    nearest = index.nearest(frozenset(terms(prompts.questions[number])), NEAREST, among=prompts.places[number])
    own = [
        place
        for place, (document, paragraph) in enumerate(index.places)
        if any((one.document, one.paragraph) == (document, paragraph.number) for one in first.citations)
    ]
    for places in ((*sorted({*own, *nearest}),), tuple(own)):
        yield tuple(Passage(place, index.places[place][1].text) for place in places)


def widely(engine: Engine, prompts: Prompts, number: int) -> tuple[Passage, ...]:
    """The paragraphs nearest to a question in its words, as many as WIDE tokens hold, in the documents' order; the
    nearest alone where it is longer."""
    index = prompts.index
    wanted = frozenset(terms(prompts.questions[number]))
    nearest = index.nearest(wanted, len(index.places), among=prompts.places[number])
    places: list[int] = []
    room = WIDE
    for place in nearest:
        if room < LEAST:
            break
        size = len(engine.tokenizer.encode(index.places[place][1].text))
        if size <= room:
            places.append(place)
            room -= size
    return tuple(Passage(place, index.places[place][1].text) for place in sorted(places or nearest[:1]))


def closest(prompts: Prompts, number: int, count: int) -> tuple[Passage, ...]:
    """The sentences nearest to a question, in the documents' order: first by how many of its names and numbers they
    hold, then by the share of its words, with those of the headings above them."""
    index, question = prompts.index, prompts.questions[number]
    asked, named = groups(question), names(question)
    found: list[tuple[float, float, int, int, str]] = []
    for place in index.nearest(frozenset(terms(question)), AMONG, among=prompts.places[number]):
        paragraph = index.places[place][1]
        above = frozenset(terms(" \n ".join(paragraph.heading)))
        for (start, end), said in zip(sentences(paragraph.text), index.said(place), strict=True):
            held = said | above
            share = index.share(asked, held)
            if share:
                found.append((-index.coverage(named, held), -share, place, start, paragraph.text[start:end]))
    return tuple(
        Passage(place, text) for _, _, place, _, text in sorted(sorted(found)[:count], key=lambda one: one[2:4])
    )


def text_of(prompts: Prompts, passages: Sequence[Passage]) -> str:
    """Passages as a prompt holds them, and before those of each document its name where there are several."""
    parts: list[str] = []
    last = None
    for passage in passages:
        number = prompts.index.places[passage.place][0]
        if len(prompts.documents) > 1 and number != last:
            parts.append(f"{prompts.documents[number].name}:")
        parts.append(passage.text)
        last = number
    return "\n\n".join(parts)


def introduction(answer: str) -> str:
    """What stands before a second answer where the first is already shown above it, in the answer's language."""
    return SAYS[language_of(answer)]
