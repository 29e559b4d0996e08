"""Single-document questions, and conversations of several turns about one document."""

from __future__ import annotations

import random

from longverse.data.long_sft.context import Context, Spec, at_depth, reply_to
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn
from longverse.data.long_sft.found import Found
from longverse.data.long_sft.multi_doc import shown_title
from longverse.data.long_sft.offline_zh import book
from longverse.data.long_sft.pool import Opened
from longverse.data.long_sft.prompts import prompt


def single_doc_qa(context: Context, spec: Spec) -> Draft:
    """One question whose answer stands at the wanted depth of one long document."""
    rng = spec.rng
    opened, start, end = _stretch(context, spec, rng)
    found = _choose(context, spec, rng, opened, start, end, [spec.depth])[0]
    template = prompt("single_doc_qa", spec.language, rng, question=found.question)
    return _finish(context, spec, rng, opened, start, [found], template, found.kind)


def multi_turn(context: Context, spec: Spec) -> Draft:
    """Several questions in a row about one document; they jump to and fro in it."""
    rng = spec.rng
    opened, start, end = _stretch(context, spec, rng)
    count = max(2, spec.questions)
    depths = [(i + rng.random()) / count for i in range(count)]
    rng.shuffle(depths)
    found = _choose(context, spec, rng, opened, start, end, depths)
    if len(found) < 2:
        raise Reject("nothing found in the text")
    template = prompt("multi_turn", spec.language, rng, question=found[0].question)
    return _finish(context, spec, rng, opened, start, found, template, "mixed")


def _stretch(context: Context, spec: Spec, rng: random.Random) -> tuple[Opened, int, int]:
    """A document and a stretch of it that nearly fills the item: 400 tokens stay for prompt, question and answer."""
    room = max(spec.target - 400, spec.target // 2)
    opened = context.long_document(rng, spec.language, room + 200)
    start, end = context.segment(rng, opened, room - 200)
    return opened, start, end


def _choose(
    context: Context, spec: Spec, rng: random.Random, opened: Opened, start: int, end: int, depths: list[float]
) -> list[Found]:
    """One find for each depth, none twice and none within another's evidence."""
    shown = opened.text[start:end]
    chosen: list[Found] = []
    if context.asker is not None:
        return context.asker.ask_about(spec, rng, opened, start, end, depths)
    everything = context.found(opened.about.index, spec.language)
    for depth in depths:
        for one in at_depth(everything, start, end, depth, shown, rng):
            apart = all(one.end <= other.start or one.start >= other.end for other in chosen)
            if apart and all(one.question != other.question for other in chosen):
                chosen.append(one)
                break
    if not chosen:
        raise Reject("nothing found in the text")
    return chosen


def _finish(
    context: Context,
    spec: Spec,
    rng: random.Random,
    opened: Opened,
    start: int,
    found: list[Found],
    template: str,
    kind: str,
) -> Draft:
    turns, claims = [], []
    for number, one in enumerate(found):
        evidence = opened.text[one.start : one.end]
        reply = reply_to(one.reply, [evidence], spec.recite, spec.language, rng)
        turns.append(Turn(template if number == 0 else one.question, reply, one.answers, one.question))
        claims.append(Claim(0, one.start - start, one.end - start, number))
    draft = Draft(
        spec.task, kind, spec.language, [Part.of(opened, start, start)], turns, claims, recite=spec.recite,
        split=spec.split, teacher=context.asker.name if context.asker else "offline",
    )  # fmt: skip
    draft.unique = [one.once for one in found if one.once]
    # A question that names its document by a title can do so only where the title is shown.
    zh, named = spec.language == "zh", any(one.title for one in found)
    title = shown_title(opened.about) if named else ""
    draft.parts = [
        context.part(opened, start, spec.target - context.overhead(draft), book(title) if zh and title else title)
    ]
    if max(claim.end for claim in claims) > len(draft.parts[0].text):
        raise Reject("evidence past the end")
    return draft
