"""Multi-document questions: evidence in one or several of many documents, distractors around it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from longverse.data.long_sft.context import SLACK, TAIL, Context, Spec, cut_marks, reply_to
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn
from longverse.data.long_sft.found import Found
from longverse.data.long_sft.offline_zh import book, law_title
from longverse.data.long_sft.pool import Opened, PoolDocument
from longverse.data.long_sft.prompts import prompt, variants
from longverse.data.text import squash, squash_zh


@dataclass(frozen=True)
class Stand:
    """A document in the collection: the stretch of it that is shown."""

    opened: Opened
    start: int
    end: int

    @property
    def name(self) -> str:
        return shown_title(self.opened.about)


def shown_title(document: PoolDocument) -> str:
    """The title a collection shows: laws without the date of their version."""
    return law_title(document.title) if document.language == "zh" else document.title


def multi_doc_qa(context: Context, spec: Spec) -> Draft:
    """A question over a collection: on one document named among many, on two documents together, or "which document
    holds this sentence"."""
    rng = spec.rng
    code = context.documents("code")
    # One collection in six is of code, where there is some: its questions are about symbols.
    language = "code" if len(code) >= 20 and rng.random() < 1 / 6 and context.asker is None else spec.language
    stands = gather(context, rng, context.documents(language), spec.target - 150)
    if context.asker is not None:
        return _asked(context, spec, rng, stands)
    shapes: list[Callable[[Context, Spec, random.Random, list[Stand]], Question]] = [_one, _two, _which]
    rng.shuffle(shapes)
    for shape in shapes:
        try:
            question = shape(context, spec, rng, stands)
        except Reject:
            continue
        return collection(context, spec, rng, stands, question)
    raise Reject("nothing found in the text")


@dataclass(frozen=True)
class Question:
    """A question on stands: evidence as (stand, start, end) in characters of the source document."""

    kind: str
    text: str
    reply: str
    answers: tuple[str, ...]
    evidence: list[tuple[int, int, int]]
    complete: bool = True  # whether each piece of evidence holds the whole answer
    once: tuple[str, ...] = ()  # what must stand once in the collection


def gather(context: Context, rng: random.Random, documents: list[PoolDocument], room: int) -> list[Stand]:
    """Documents with different titles that fill `room` tokens: whole ones where they are short, stretches of long ones
    (a twelfth to a quarter of the room each)."""
    if (
        documents and rng.random() < 0.5
    ):  # half of the collections are of one source: the distractors then resemble the evidence
        source = rng.choice(documents).source
        documents = [d for d in documents if d.source == source]
    stands: list[Stand] = []
    titles: set[str] = set()
    left = room
    for document in rng.sample(documents, min(len(documents), 400)):
        if left <= 0:
            break
        if shown_title(document) in titles:
            continue
        opened = context.pool.open(document.index)
        # The last one goes a little beyond: a part is easily shortened, and lengthened only where its document goes on.
        few = room // max(1, len(documents) - 1)
        share = min(left + 3 * SLACK, max(rng.randint(room // 12, room // 4), few, 600))
        if (end := opened.end_for(0, share)) == len(opened.text):
            stand = Stand(opened, 0, end)
        else:
            start, end = context.segment(rng, opened, share)
            last = opened.text.rfind("\n", start, end)
            end = last if last > start + (end - start) // 2 else end
            stand = Stand(opened, start, end)
        tokens = opened.tokens_between(stand.start, stand.end)
        if tokens < 50:
            continue
        titles.add(shown_title(document))
        stands.append(stand)
        left -= tokens + 20
    if len(stands) < 2 or left > 0:
        raise Reject("too few documents for a collection")
    return stands


def _finds(context: Context, spec: Spec, stand: Stand, everything: str) -> list[Found]:
    """Finds inside the stand whose words occur once in the whole collection."""
    whole = stand.start == 0 and stand.end == len(stand.opened.text)
    return [
        f
        for f in context.found(stand.opened.about.index, spec.language)
        if f.start >= stand.start
        and f.end <= stand.end
        and (whole or not f.whole)
        and (not f.once or everything.count(f.once) == 1)
    ]


def _everything(stands: list[Stand]) -> str:
    return "\n\n".join(stand.opened.text[stand.start : stand.end] for stand in stands)


def _named(found: Found, stand: Stand, zh: bool) -> str:
    """The question with the document it is about, where its own words do not say so."""
    if found.title or found.kind in ("who_said", "next_sentence", "missing_name", "courtesy_name", "birthplace"):
        return found.question
    if zh:
        return f"在{book(stand.name)}中，{found.question}"
    return f"In “{stand.name}”: {found.question[0].lower() + found.question[1:]}"


def _pick(rng: random.Random, found: list[Found], named: bool) -> Found:
    """A find of a random kind. named: only such as name their document or can be asked of a named one."""
    kinds = sorted({f.kind for f in found if not named or f.kind not in ("next_sentence", "missing_name")})
    if not kinds:
        raise Reject("nothing found in the text")
    kind = rng.choice(kinds)
    return rng.choice([f for f in found if f.kind == kind])


def _one(context: Context, spec: Spec, rng: random.Random, stands: list[Stand]) -> Question:
    everything = _everything(stands)
    for number in rng.sample(range(len(stands)), len(stands)):
        found = _finds(context, spec, stands[number], everything)
        if found:
            one = _pick(rng, found, named=False)
            zh = spec.language == "zh"
            return Question(
                one.kind, _named(one, stands[number], zh), one.reply, one.answers, [(number, one.start, one.end)],
                complete=one.kind != "defined_in", once=(one.once,) if one.once else (),
            )  # fmt: skip
    raise Reject("nothing found in the text")


def _two(context: Context, spec: Spec, rng: random.Random, stands: list[Stand]) -> Question:
    """Two facts out of two documents; two effective dates are also compared."""
    zh, everything = spec.language == "zh", _everything(stands)
    chosen: list[tuple[int, Found]] = []
    for number in rng.sample(range(len(stands)), len(stands)):
        found = [f for f in _finds(context, spec, stands[number], everything) if len(f.answers[0]) <= 60]
        if chosen and chosen[0][1].kind == "effective_date":
            found = [f for f in found if f.kind == "effective_date"] or found
        try:
            chosen.append((number, _pick(rng, found, named=True)))
        except Reject:
            continue
        if len(chosen) == 2:
            break
    if len(chosen) < 2:
        raise Reject("nothing found in the text")
    (a, first), (b, second) = chosen
    evidence = [(a, first.start, first.end), (b, second.start, second.end)]
    answers = (first.answers[0], second.answers[0])
    if first.kind == second.kind == "effective_date":
        return _compare_dates(stands[a].name, stands[b].name, answers, evidence)
    one, two = _named(first, stands[a], zh), _named(second, stands[b], zh)
    if zh:
        text = f"请回答两个问题：一、{one}二、{two}"
        reply = f"一、{first.reply}\n二、{second.reply}"
    else:
        text = f"Please answer both: (a) {one} (b) {two}"
        reply = f"(a) {first.reply}\n(b) {second.reply}"
    once = tuple(f.once for f in (first, second) if f.once)
    return Question("two_facts", text, reply, answers, evidence, complete=False, once=once)


def _compare_dates(one: str, two: str, days: tuple[str, str], evidence: list[tuple[int, int, int]]) -> Question:
    def key(day: str) -> tuple[int, ...]:
        return tuple(int(n) for n in day.replace("年", " ").replace("月", " ").replace("日", " ").split())

    text = f"{book(one)}和{book(two)}哪一部施行得更早？各自从哪一天起施行？"
    if key(days[0]) == key(days[1]):
        verdict = "两部同日施行。"
    else:
        verdict = f"{book(one if key(days[0]) < key(days[1]) else two)}施行得更早。"
    reply = f"{book(one)}自{days[0]}起施行，{book(two)}自{days[1]}起施行，{verdict}"
    return Question("compare_dates", text, reply, days, evidence, complete=False)


def _which(context: Context, spec: Spec, rng: random.Random, stands: list[Stand]) -> Question:
    """Which document holds a sentence. (Of code: which file defines a name.)"""
    zh, everything = spec.language == "zh", _everything(stands)
    for number in rng.sample(range(len(stands)), len(stands)):
        name = stands[number].name
        found = [
            f for f in _finds(context, spec, stands[number], everything) if f.kind in ("next_sentence", "article_text")
        ]
        if not found:
            continue
        one = rng.choice(found)
        quote = one.once or one.answers[0]
        quote = quote if len(quote) <= 200 else quote[:200].rsplit("，" if zh else " ", 1)[0]
        place = stands[number].opened.text.find(quote, one.start)
        shown = squash_zh(quote) if zh else squash(quote)
        if place < 0 or everything.count(quote) != 1 or name in quote or not name.strip():
            continue
        text = f"“{shown}”出自哪一份文档？" if zh else f"In which document does this stand: “{shown}”?"
        reply = f"出自{book(name)}。" if zh else f"It stands in “{name}”."
        answers = tuple(dict.fromkeys((book(name)[1:-1], name))) if zh else (name,)
        evidence = [(number, place, place + len(quote))]
        return Question("which_document", text, reply, answers, evidence, complete=False, once=(quote,))
    raise Reject("nothing found in the text")


def _asked(context: Context, spec: Spec, rng: random.Random, stands: list[Stand]) -> Draft:
    assert context.asker is not None
    a, b = rng.sample(range(len(stands)), 2)
    spans = [(stands[i].opened, stands[i].start, stands[i].end) for i in (a, b)]
    asked = context.asker.ask_across(spec, rng, spans)
    evidence = [(i, start, end) for i, (start, end) in zip((a, b), asked.evidence, strict=True)]
    question = Question("asked", asked.question, asked.answer, (asked.answer,), evidence, complete=False)
    draft = collection(context, spec, rng, stands, question)
    draft.teacher = context.asker.name
    return draft


def collection(
    context: Context,
    spec: Spec,
    rng: random.Random,
    stands: list[Stand],
    question: Question,
    template: str | None = None,
) -> Draft:
    """The draft: the evidence's document stands at the wanted depth, a document without evidence is elastic."""
    holders = {number for number, _, _ in question.evidence}
    others = [i for i in range(len(stands)) if i not in holders]
    rng.shuffle(others)
    order = list(others)
    main = question.evidence[0][0]
    sizes = {i: stands[i].end - stands[i].start for i in range(len(stands))}
    for holder in sorted(holders - {main}):
        order.insert(rng.randint(0, len(order)), holder)
    total, inside = sum(sizes.values()), question.evidence[0][1] - stands[main].start
    before = [sum(sizes[i] for i in order[:place]) for place in range(len(order) + 1)]
    best = min(range(len(order) + 1), key=lambda place: abs((before[place] + inside) / total - spec.depth))
    order.insert(best, main)
    code = stands[main].opened.about.language == "code"
    label = "# {title}" if code else rng.choice(variants("document_label", spec.language))
    before_cut, after_cut = cut_marks(spec.language, code)
    evidence_texts = [stands[i].opened.text[s:e] for i, s, e in question.evidence]
    reply = reply_to(question.reply, evidence_texts, spec.recite, spec.language, rng)
    if template is None:
        template = prompt("multi_doc_qa", spec.language, rng, question=question.text)
    parts = []
    for number, i in enumerate(order, start=1):
        stand = stands[i]
        heading = context.label(label, number, stand.name) + (f"\n{before_cut}" if stand.start else "")
        part = Part.of(stand.opened, stand.start, stand.end, label=heading)
        part.after = "" if stand.end == len(stand.opened.text) else f"\n{after_cut}"
        parts.append(part)
    place_of = {i: place for place, i in enumerate(order)}
    claims = [
        Claim(place_of[i], s - stands[i].start, e - stands[i].start, 0, question.complete)
        for i, s, e in question.evidence
    ]
    draft = Draft(
        spec.task, question.kind, spec.language, parts, [Turn(template, reply, question.answers, question.text)],
        claims, recite=spec.recite, split=spec.split, unique=list(question.once), code=code,
    )  # fmt: skip
    make_elastic(context, spec, draft, [place_of[i] for i in others], [stands[i] for i in order])
    return draft


def make_elastic(context: Context, spec: Spec, draft: Draft, free: list[int], stands: list[Stand]) -> None:
    """Choose a part without evidence and cut or lengthen it so that the item comes out SLACK tokens short."""
    used = sum(s.opened.tokens_between(s.start, s.end) for s in stands)
    room = spec.target - context.overhead(draft) - used
    for place in sorted(free, key=lambda p: -len(draft.parts[p].text)):
        stand = stands[place]
        own = stand.opened.tokens_between(stand.start, stand.end)
        least = min(own, 400)  # less would be a snippet of a document
        if own + room - SLACK < least or stand.opened.end_for(stand.start, own + room) == len(stand.opened.text):
            continue
        end = stand.opened.end_for(stand.start, own + room - SLACK)
        draft.parts[place] = Part.of(stand.opened, stand.start, end, TAIL, draft.parts[place].label)
        draft.elastic = place
        return
    raise Reject("no document could be fitted")
