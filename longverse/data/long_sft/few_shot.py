"""Few-shot: hundreds of labelled examples out of the documents, then one more to label."""

from __future__ import annotations

import bisect
import random
import re
from collections import Counter
from collections.abc import Iterator

from longverse.data.long_sft.context import SLACK, TAIL, Context, Spec
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn, messages_of
from longverse.data.long_sft.multi_doc import shown_title
from longverse.data.long_sft.offline_zh import articles, is_law
from longverse.data.long_sft.pool import Opened, PoolDocument
from longverse.data.long_sft.prompts import prompt
from longverse.data.text import paragraphs, sentences

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
        left -= context.counter.count(f"{passage}\n{before}{label}") + 1
        if left < 0:
            break
    if left > 0 or len(examples) < 8:
        raise Reject("too few examples for the target")
    counts = Counter(label for *_, label in examples)
    by_rule = kind in ("few_shot_speaker", "few_shot_person")  # the passage itself tells, whatever else is shown
    learnable = [i for i, (*_, label) in enumerate(examples) if by_rule or counts[label] > 1]
    if not learnable:
        raise Reject("too few examples for the target")
    asked = examples.pop(rng.choice(learnable))
    rng.shuffle(examples)
    query = f"{asked[0].text[asked[1] : asked[2]].strip()}\n{before}".rstrip(" ")
    template = prompt(kind, spec.language, rng, query=query.rstrip("\n"))
    parts = [Part.of(o, a, b) for o, a, b, _ in examples]
    for part, (*_, label) in zip(parts, examples, strict=True):
        part.after = f"\n{before}{label}"
    # A labelled passage never grows: its label would become false. A text without a label takes up what is left.
    parts.insert(0, Part.of(asked[0], 0, 0, label="无标签的文字：" if zh else "Text without a label:"))
    draft = Draft(
        spec.task, kind.removeprefix("few_shot_"), spec.language, parts, [Turn(template, asked[3], (asked[3],))], [],
        elastic=0, split=spec.split,
    )  # fmt: skip
    _trim(context, spec, draft, examples, asked[3])
    labels = [label for *_, label in examples]
    if len(set(labels)) < 2 or len(labels) < 4:
        raise Reject("too few labels")
    same = [i for i, label in enumerate(labels) if label == asked[3]] or list(range(len(labels)))
    shown = min(same, key=lambda i: abs(i / len(labels) - spec.depth))
    draft.claims = [Claim(shown + 1, 0, len(draft.parts[shown + 1].text), 0, False)]
    draft.notes = {"examples": len(labels), "labels": len(set(labels))}
    return draft


def _left(context: Context, spec: Spec, draft: Draft) -> int:
    return spec.target - context.chat.count(messages_of(draft), counter=context.counter.count)


_ENDS = ".!?。！？”’」』\"'"  # what a passage ends with
_FREE = 200  # tokens that the text without a label has at least


def _trim(context: Context, spec: Spec, draft: Draft, examples: list[Example], asked: str) -> None:
    """Drop examples (never the last one with the label asked for) until the first part, which has no label, has room;
    it then begins at a paragraph of its document and stops SLACK tokens short of the target."""
    sizes = [context.counter.count(part.text) + context.counter.count(part.after) + 2 for part in draft.parts]
    free = _left(context, spec, draft)
    left = Counter(label for *_, label in examples)
    index = len(examples) - 1
    while free < _FREE + SLACK and index >= 0:
        label = examples[index][3]
        if label != asked or left[label] > 1:
            free += sizes.pop(index + 1)
            draft.parts.pop(index + 1)
            examples.pop(index)
            left[label] -= 1
        index -= 1
        if free >= _FREE + SLACK:  # the sum of hundreds of small counts is off by as many: count the whole
            free = _left(context, spec, draft)
    heading = draft.parts[0].label
    sources = {part.source for part in draft.parts[1:]}
    able = [d for d in context.documents(spec.language) if context.pool.estimate(d.index) > 2 * free]
    able = [d for d in able if d.source in sources] or able
    for document in spec.rng.sample(able, min(len(able), 4)):
        opened = context.pool.open(document.index)
        starts = [a for a, _ in paragraphs(opened.text)]
        for start in spec.rng.sample(starts, min(len(starts), 8)):
            if opened.end_for(start, free + SLACK) < len(opened.text):
                draft.parts[0] = Part.of(opened, start, opened.end_for(start, free - SLACK), TAIL, heading)
                return
    raise Reject("no document could be fitted")


def _examples(context: Context, rng: random.Random, kind: str, language: str, room: int) -> Iterator[Example]:
    documents = context.documents(language)
    if kind == "few_shot_law":
        laws = [d for d in documents if d.characters < 120_000]
        rng.shuffle(laws)
        pool: list[Example] = []
        # No law gives more than a third of the examples, else one label would fill a short item.
        characters = room / context.pool.tokens_per_character("zh") / 3
        for document in laws[:60]:
            opened = context.pool.open(document.index)
            if not is_law(opened.text):
                continue
            own = [
                (opened, _skip_space(opened.text, a + len(number)), b, shown_title(document))
                for number, a, b in articles(opened.text)
                if 30 <= b - a <= 500 and shown_title(document) not in opened.text[a:b]
            ]
            taken = 0
            for example in rng.sample(own, min(len(own), 40)):
                if (taken := taken + example[2] - example[1]) > characters:
                    break
                pool.append(example)
            if sum(b - a for _, a, b, _ in pool) * context.pool.tokens_per_character("zh") > 2 * room:
                break
        yield from rng.sample(pool, len(pool))
        return
    if kind == "few_shot_source":
        able: dict[str, list[PoolDocument]] = {}  # works of one source: letters and statutes are too easily told apart
        for d in documents:
            if context.pool.estimate(d.index) >= room // 3 and not is_law(context.pool.text(d.index)[:6_000]):
                able.setdefault(d.source, []).append(d)
        sources = [source for source in able if len(able[source]) >= 3]
        if not sources:
            raise Reject("too few examples for the target")
        mine = able[rng.choice(sources)]
        works = [context.pool.open(d.index) for d in rng.sample(mine, min(len(mine), rng.randint(3, 6)))]
        spans = {
            i: [
                (a, b)
                for a, b in paragraphs(work.text)
                if 180 <= (b - a) * (3 if language == "zh" else 1) <= 1_500 and work.text[b - 1] in _ENDS
            ]
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
                text = opened.text[one.start : min(b, one.end + 260)]
                ends = [b for _, b in sentences(text, "zh") if b > one.end - one.start and text[b - 1] in _ENDS]
                if ends:
                    yield opened, one.start, one.start + ends[-1], f"{who}｜{one.answers[0]}｜{home[one.start]}"


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _before(starts: list[int], place: int) -> int:
    return bisect.bisect_right(starts, place) - 1


def _speakers(passage: str) -> int:
    """Speech verbs in a passage; one alone leaves no doubt who speaks."""
    return len(
        re.findall(r"\b(?:said|cried|replied|asked|answered|exclaimed|whispered|murmured|remarked|observed)\b", passage)
    )
