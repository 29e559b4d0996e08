"""Invented facts written into a natural document, several questions about them (see `stated`)."""

from __future__ import annotations

import random
import re

from longverse.data.long_sft.context import TAIL, Context, Spec, beginning, reply_to
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn
from longverse.data.long_sft.prompts import prompt
from longverse.data.long_sft.stated import Fact, FactMaker, draw_facts, plain_facts, rivals
from longverse.data.text import paragraphs, sentences


def stated_facts(context: Context, spec: Spec) -> Draft:
    """`spec.questions` questions on facts strewn uniformly over one document. The first fact that is asked stands at
    the wanted depth."""
    rng = spec.rng
    # A short item holds fewer questions: a question, its reply and its fact take 100 tokens or so, in bytes 170.
    each = round(520 * context.pool.tokens_per_character(spec.language)) if spec.language == "en" else 200
    count = min(spec.questions, max(1, (spec.target - 250) // (2 * each if spec.recite else each)))
    room = max(spec.target - each * count, spec.target // 2)
    opened = context.long_document(rng, spec.language, min(room + 400, spec.target))
    maker = FactMaker(spec.language, spec.split, rng, opened.text, spec.facts)
    facts = draw_facts(maker, count)
    asked = facts[:1] + rng.sample(facts[1:], len(facts) - 1)  # asked in another order than drawn
    unasked = plain_facts(maker, rng.randint(0, count))
    if spec.rivals:
        unasked += rivals(maker, asked, spec.rivals)
    turns = [Turn(f.question, "", f.answers, f.question) for f in asked]
    turns[0].user = prompt("stated_facts", spec.language, rng, question=asked[0].question)
    for turn, fact in zip(turns, asked, strict=True):
        # A whole sentence that names what was asked: for a small model its last words are found by the ones before.
        quoted = ("" if spec.language == "zh" else " ").join(fact.sentences) if spec.quote else ""
        turn.reply = reply_to(quoted or fact.reply, fact.sentences, spec.recite, spec.language, rng)
    draft = Draft(
        spec.task, "+".join(sorted({f.sort for f in asked})), spec.language,
        [Part(opened.about.source, opened.about.id, opened.about.title, "")], turns, [], recite=spec.recite,
        split=spec.split,
        notes={"sorts": [f.sort for f in asked], "kinds": [f.kind for f in asked], "unasked": len(unasked)},
    )  # fmt: skip
    written = [(f, s) for f in asked + unasked for s in f.sentences]
    cost = sum(context.counter.count("\n\n" + sentence) + 2 for _, sentence in written)
    tokens = spec.target - context.overhead(draft) - cost - 45
    if tokens < cost // 2:
        raise Reject("target too short for so many facts")
    start, _ = context.segment(rng, opened, tokens)
    end = opened.end_for(start, tokens)
    text, spans = write_in(opened.text[start:end], written, spec.language, spec.depth, rng)
    about, tail = opened.about, opened.text[end : end + TAIL]
    draft.parts = [Part(about.source, about.id, about.title, text, start, tail, beginning(opened, start))]
    for (fact, _), (a, b) in zip(written, spans, strict=True):
        if fact in asked:
            draft.claims.append(Claim(0, a, b, asked.index(fact), fact.sort == "plain"))
    draft.unique = [sentence for _, sentence in written]
    return draft


def _within_speech(before: str) -> bool:
    """Whether a quotation is open at the end of the beginning of a paragraph."""
    return before.count('"') % 2 == 1 or any(before.count(a) > before.count(b) for a, b in ("“”", "「」", "『』"))


def write_in(
    text: str, written: list[tuple[Fact, str]], language: str, depth: float, rng: random.Random
) -> tuple[str, list[tuple[int, int]]]:
    """The text with sentences written in at ends of paragraphs (of sentences, where there are few paragraphs), the
    first near `depth`, the others strewn evenly; and the span of each sentence."""
    zh = language == "zh"
    places = [end for _, end in paragraphs(text) if re.search(r"[.!?。！？”」\"]$", text[max(0, end - 1) : end])]
    if len(places) < 4 * len(written):
        places = [
            start + b
            for start, end in paragraphs(text)
            for _, b in sentences(text[start:end], language)
            if not _within_speech(text[start : start + b])
        ]
    if len(places) < len(written):
        raise Reject("text has too few sentences for the facts")
    count = len(written)
    wanted = [depth] + [(i + rng.random()) / max(count - 1, 1) for i in range(count - 1)]
    others = wanted[1:]
    rng.shuffle(others)
    wanted[1:] = others
    free = set(places)
    at: list[int] = []
    for share in wanted:
        goal = share * len(text)
        place = min(free, key=lambda p: (abs(p - goal), p))
        free.remove(place)
        at.append(place)
    for fact in {id(fact): fact for fact, _ in written}.values():  # the sentences of one fact keep their order
        own = [index for index, (other, _) in enumerate(written) if other is fact]
        for index, place in zip(own, sorted(at[index] for index in own), strict=True):
            at[index] = place
    spans: list[tuple[int, int]] = [(0, 0)] * count
    out: list[str] = []
    length = last = 0
    for index in sorted(range(count), key=at.__getitem__):
        sentence = written[index][1]
        apart = rng.random() < 0.4 or sentence.startswith(("- ", "| "))  # a line of a list or a table
        lead = "\n\n" if apart else ("" if zh else " ")
        out += [text[last : at[index]], lead, sentence]
        length += at[index] - last + len(lead)
        spans[index] = (length, length + len(sentence))
        length += len(sentence)
        last = at[index]
        if apart and not text[last:].startswith("\n"):
            out.append("\n\n")
            length += 2
            last += len(text[last:]) - len(text[last:].lstrip(" "))
    out.append(text[last:])
    return "".join(out), spans
