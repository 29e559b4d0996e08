"""Invented facts written into a natural document, several questions about them (see `stated`)."""

from __future__ import annotations

import dataclasses
import random
import re

from longverse.data.long_sft.context import TAIL, Context, Spec, beginning, reply_to
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn
from longverse.data.long_sft.pool import Opened
from longverse.data.long_sft.prompts import prompt
from longverse.data.long_sft.real import Real, real_questions
from longverse.data.long_sft.stated import SORTS, Fact, FactMaker, draw_facts, plain_facts, rivals
from longverse.data.text import paragraphs, sentences, squash, squash_zh
from longverse.wording import DOCUMENT, SYSTEM
from longverse.wording import asked as asked_as


def stated_facts(context: Context, spec: Spec) -> Draft:
    """`spec.questions` questions on facts strewn uniformly over one document. The first fact that is asked stands at
    the wanted depth."""
    rng = spec.rng
    # A short item holds fewer questions: a question, its reply and its fact take 100 tokens or so, in bytes 170.
    each = round(520 * context.pool.tokens_per_character(spec.language)) if spec.language == "en" else 200
    if spec.real and spec.language == "en":
        each = each * 4 // 5  # sentences of the text itself take no room but for the question
    count = min(spec.questions, max(1, (spec.target - 250) // (2 * each if spec.recite else each)))
    room = max(spec.target - each * count, spec.target // 2)
    opened = context.long_document(rng, spec.language, min(room + 400, spec.target))
    maker = FactMaker(spec.language, spec.split, rng, opened.text, spec.facts)
    own = round(count * spec.real)  # questions about sentences of the text itself
    facts = draw_facts(maker, max(count - own, 1), spec.sorts or SORTS)
    asked = facts[:1] + rng.sample(facts[1:], len(facts) - 1)  # asked in another order than drawn
    unasked = plain_facts(maker, rng.randint(0, len(facts)))
    if spec.rivals:
        unasked += rivals(maker, asked, spec.rivals)
    as_asked = bool(spec.ask) and rng.random() < spec.ask
    turns = [Turn(_worded(f.question, spec, rng, as_asked, f is asked[0]), "", f.answers, f.question) for f in asked]
    for turn, fact in zip(turns, asked, strict=True):
        # A whole sentence that names what was asked: for a small model its last words are found by the ones before.
        quoted = ("" if spec.language == "zh" else " ").join(fact.sentences) if spec.quote else ""
        turn.reply = reply_to(quoted or fact.reply, fact.sentences, spec.recite, spec.language, rng)
    draft = Draft(
        spec.task, "+".join(sorted({f.sort for f in asked})), spec.language,
        [Part(opened.about.source, opened.about.id, opened.about.title, "")], turns, [], recite=spec.recite,
        split=spec.split, system=SYSTEM[spec.language] if as_asked else "",
    )  # fmt: skip
    written = [(f, s) for f in asked + unasked for s in f.sentences]
    cost = sum(context.counter.count("\n\n" + sentence) + 2 for _, sentence in written)
    # Which sentences are asked about is known when the text is: until then each takes the room of an average one.
    reserve = own * (each * 3 // 4)
    tokens = spec.target - context.overhead(draft) - cost - 45 - reserve
    if tokens < cost // 2:
        raise Reject("target too short for so many facts")
    start, _ = context.segment(rng, opened, tokens)
    end = opened.end_for(start, tokens)
    text, spans = write_in(opened.text[start:end], written, spec.language, spec.depth, rng)
    about, tail = opened.about, opened.text[end : end + TAIL]
    lead = "" if as_asked else beginning(opened, start)  # `ask` shows a document as it is
    draft.parts = [Part(about.source, about.id, about.title, text, start, tail, lead)]
    places = {id(fact): number for number, fact in enumerate(asked)}
    for (fact, _), (a, b) in zip(written, spans, strict=True):
        if id(fact) in places:
            draft.claims.append(Claim(0, a, b, places[id(fact)], fact.sort == "plain"))
    draft.unique = [sentence for _, sentence in written]
    reals = _ask_real(context, spec, rng, draft, opened, own, as_asked) if own else []
    everything: list[Fact | Real] = [*asked, *reals]
    order = list(range(len(everything)))
    if reals:  # mixed with the facts, but for the first
        order[1:] = rng.sample(order[1:], len(order) - 1)
        at = {old: new for new, old in enumerate(order)}
        draft.turns = [draft.turns[old] for old in order]
        draft.claims = [dataclasses.replace(claim, question=at[claim.question]) for claim in draft.claims]
    draft.notes = {
        "sorts": [one.sort if isinstance(one, Fact) else "real" for one in map(everything.__getitem__, order)],
        "kinds": [everything[old].kind for old in order], "unasked": len(unasked),
    }  # fmt: skip
    return draft


def _worded(question: str, spec: Spec, rng: random.Random, as_asked: bool, first: bool) -> str:
    """A question in a conversation's words: those of `longverse ask`, or of this data."""
    if as_asked:
        lead = DOCUMENT[spec.language].replace("{text}", "{documents}") if first else ""
        return lead + asked_as(question)
    return prompt("stated_facts", spec.language, rng, question=question) if first else question


def _ask_real(
    context: Context, spec: Spec, rng: random.Random, draft: Draft, opened: Opened, count: int, as_asked: bool
) -> list[Real]:
    """Questions about the text's own sentences, none of which is one that was written into it; their turns and claims
    are put behind those of the facts."""
    text = draft.parts[0].text
    found = context.found(opened.about.index, spec.language)
    start = draft.parts[0].origin
    near = [one for one in found if start <= one.start and one.end <= start + len(text)]
    invented = [(text.find(sentence), text.find(sentence) + len(sentence)) for sentence in draft.unique]
    latest = max(len(text) * 17 // 20, len(text) - 3_000)  # the fit may take back what stands at the end
    reals: list[Real] = []
    for real in real_questions(text, spec.language, 2 * count, rng, near, opened.text):
        at = text.find(real.sentence)
        apart = all(at + len(real.sentence) <= a or at >= b for a, b in invented)
        if len(reals) == count:
            break
        if apart and at + len(real.sentence) <= latest:
            draft.claims.append(Claim(0, at, at + len(real.sentence), len(draft.turns)))
            reply = (squash_zh if spec.language == "zh" else squash)(real.sentence)
            worded = _worded(real.question, spec, rng, as_asked, first=False)
            draft.turns.append(Turn(worded, reply, real.answers, real.question))
            reals.append(real)
    draft.unique += [words for real in reals for words in real.once]
    return reals


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
