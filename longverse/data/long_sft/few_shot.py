"""Few-shot: hundreds of labelled examples out of the documents, then one more to label."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Iterator

from longverse.data.long_sft.context import SLACK, TAIL, Context, Spec
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn
from longverse.data.long_sft.multi_doc import shown_title
from longverse.data.long_sft.offline_zh import articles, is_law
from longverse.data.long_sft.pool import Opened
from longverse.data.long_sft.prompts import prompt
from longverse.data.text import paragraphs

Example = tuple[Opened, int, int, str]  # document, characters of the passage, label

# What stands before a label, in English and Chinese.
_NAMES = {
    "few_shot_source": ("Book: ", "出处："),
    "few_shot_law": ("", "出处："),
    "few_shot_speaker": ("Speaker: ", ""),
    "few_shot_person": ("", ""),
}


def few_shot(context: Context, spec: Spec) -> Draft:
    """Examples of one kind, as many as fill the item; the last passage's label is the answer."""
    rng = spec.rng
    kinds = (
        ["few_shot_source", "few_shot_speaker"]
        if spec.language != "zh"
        else ["few_shot_source", "few_shot_law", "few_shot_person"]
    )
    rng.shuffle(kinds)
    for kind in kinds:
        try:
            return _draft(context, spec, rng, kind)
        except Reject:
            continue
    raise Reject("too few examples for the target")


def _draft(context: Context, spec: Spec, rng: random.Random, kind: str) -> Draft:
    zh = spec.language == "zh"
    before = _NAMES[kind][1 if zh else 0]
    room = spec.target - 250
    examples: list[Example] = []
    seen: set[str] = set()
    left = room
    for example in _examples(context, rng, kind, spec.language, room):
        opened, start, end, label = example
        passage = opened.text[start:end]
        if passage in seen:
            continue
        seen.add(passage)
        examples.append(example)
        left -= context.counter.count(f"{passage}\n{before}{label}") + 3
        if left < 0:
            break
    if left > 0 or len(examples) < 8:
        raise Reject("too few examples for the target")
    labels = [label for *_, label in examples]
    learnable = [
        i
        for i, label in enumerate(labels)
        if kind in ("few_shot_speaker", "few_shot_person") or labels.count(label) > 1
    ]
    if not learnable:
        raise Reject("too few examples for the target")
    asked = examples.pop(rng.choice(learnable))
    rng.shuffle(examples)
    same = [i for i, example in enumerate(examples) if example[3] == asked[3]] or list(range(len(examples)))
    shown = min(same, key=lambda i: abs(i / len(examples) - spec.depth))
    query = f"{asked[0].text[asked[1] : asked[2]].strip()}\n{before}".rstrip(" ")
    template = prompt(kind, spec.language, rng, query=query.rstrip("\n"))
    parts = [Part.of(o, a, b) for o, a, b, _ in examples]
    for part, (*_, label) in zip(parts, examples, strict=True):
        part.after = f"\n{before}{label}"
    claim = Claim(shown, 0, len(parts[shown].text), 0, False)
    draft = Draft(
        spec.task, kind.removeprefix("few_shot_"), spec.language, parts, [Turn(template, asked[3], (asked[3],))],
        [claim], split=spec.split, notes={"examples": len(examples), "labels": len(set(labels))},
    )  # fmt: skip
    _trim(context, spec, draft, examples, shown)
    return draft


def _trim(context: Context, spec: Spec, draft: Draft, examples: list[Example], keep: int) -> None:
    """Drop examples until the item is too short, then let the passage of the last one grow to the exact length."""
    overhead = context.overhead(draft)
    sizes = [context.counter.count(part.text) for part in draft.parts]
    after = [context.counter.count(p.after) + 2 for p in draft.parts]
    excess = overhead + sum(sizes) - spec.target
    while excess > -SLACK and len(draft.parts) > 4:
        index = len(draft.parts) - 1
        if index == keep:
            index -= 1
            draft.claims = [Claim(keep - 1, c.start, c.end, c.question, c.complete) for c in draft.claims]
            keep -= 1
        excess -= sizes.pop(index) + after.pop(index)
        draft.parts.pop(index)
        examples.pop(index)
    for index in range(len(draft.parts) - 1, -1, -1):
        opened, start, _, _ = examples[index]
        if index != keep and opened.end_for(start, max(sizes[index] - excess, 0) + SLACK) < len(opened.text):
            stop = opened.end_for(start, max(sizes[index] - excess - SLACK, 1))
            after_text = draft.parts[index].after
            draft.parts[index] = Part.of(opened, start, max(stop, start + 1), TAIL)
            draft.parts[index].after = after_text
            draft.elastic = index
            return
    raise Reject("no document could be fitted")


def _examples(context: Context, rng: random.Random, kind: str, language: str, room: int) -> Iterator[Example]:
    documents = context.documents(language)
    if kind == "few_shot_law":
        laws = [d for d in documents if d.characters < 120_000]
        rng.shuffle(laws)
        pool: list[Example] = []
        for document in laws[:60]:
            opened = context.pool.open(document.index)
            if not is_law(opened.text) or len({shown_title(d) for d in laws[:60]}) < 2:
                continue
            mine = [
                (opened, a + len(number), b, shown_title(document))
                for number, a, b in articles(opened.text)
                if 30 <= b - a <= 500 and shown_title(document) not in opened.text[a:b]
            ]
            pool += mine[:40]
            if sum(b - a for _, a, b, _ in pool) * context.pool.tokens_per_character("zh") > 2 * room:
                break
        yield from rng.sample(pool, len(pool))
        return
    if kind == "few_shot_source":
        able = [
            d
            for d in documents
            if context.pool.estimate(d.index) >= room // 3 and not is_law(context.pool.text(d.index)[:6_000])
        ]
        if len(able) < 3:
            raise Reject("too few examples for the target")
        works = [context.pool.open(d.index) for d in rng.sample(able, min(len(able), rng.randint(3, 6)))]
        spans = {
            i: [(a, b) for a, b in paragraphs(work.text) if 180 <= (b - a) * (3 if language == "zh" else 1) <= 1_500]
            for i, work in enumerate(works)
        }
        while any(spans.values()):
            i = rng.choice([i for i, mine in spans.items() if mine])
            a, b = spans[i].pop(rng.randrange(len(spans[i])))
            if shown_title(works[i].about) not in works[i].text[a:b]:
                yield works[i], a, b, shown_title(works[i].about)
        return
    rule = "who_said" if kind == "few_shot_speaker" else "courtesy_name"
    for document in rng.sample(documents, len(documents)):
        found = [f for f in context.found(document.index, language) if f.kind == rule]
        if not found:
            continue
        opened = context.pool.open(document.index)
        home = {f.start: f.answers[0] for f in context.found(document.index, language) if f.kind == "birthplace"}
        places = paragraphs(opened.text)
        starts = [a for a, _ in places]
        for one in rng.sample(found, min(len(found), 200)):
            a, b = places[max(0, _before(starts, one.start))]
            inside = [f for f in found if a <= f.start < b]
            if len(inside) != 1 or not a <= one.start < one.end <= b or b - a > 2_000:
                continue
            if kind == "few_shot_speaker":
                if _speakers(opened.text[a:b]) == 1:
                    yield opened, a, b, one.answers[0]
            elif one.start in home:
                who = one.question.removesuffix("的字是什么？")
                yield opened, one.start, min(b, one.end + 260), f"{who}｜{one.answers[0]}｜{home[one.start]}"


def _before(starts: list[int], place: int) -> int:

    return bisect.bisect_right(starts, place) - 1


def _speakers(passage: str) -> int:
    """Speech verbs in a passage; one alone leaves no doubt who speaks."""

    return len(
        re.findall(r"\b(?:said|cried|replied|asked|answered|exclaimed|whispered|murmured|remarked|observed)\b", passage)
    )
