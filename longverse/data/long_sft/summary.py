"""Summaries. Without an endpoint they say only what a rule can know of the whole text: an outline of its headings, the
persons named most in each part, a digest of laws; with one, summaries of parts are merged into one."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

from longverse.data.long_sft.context import Context, Spec
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn
from longverse.data.long_sft.multi_doc import Stand, make_elastic
from longverse.data.long_sft.offline_en import names_in, speakers
from longverse.data.long_sft.offline_zh import articles, book, chinese_number, find_chinese, is_law, law_title
from longverse.data.long_sft.pool import Opened, PoolDocument
from longverse.data.long_sft.prompts import prompt, variants
from longverse.data.text import paragraphs, sentences, squash, squash_zh


def summary(context: Context, spec: Spec) -> Draft:
    """One of the forms that the documents allow."""
    rng = spec.rng
    if context.asker is not None:
        return _asked(context, spec, rng)
    if spec.language == "zh" and rng.random() < 0.5:
        laws = [
            d for d in context.documents("zh") if d.characters < 60_000 and is_law(context.pool.text(d.index)[:6_000])
        ]
        if len(laws) >= 20:
            return _laws(context, spec, rng, rng.sample(laws, min(len(laws), 300)))
    opened, start, end = _stretch(context, spec, rng, spec.target * 9 // 10)
    outline = spec.language == "zh" or rng.random() < 0.5
    begun = rng.getstate()
    for _ in range(4):
        # How far the text reaches is known once the prompt and the reply are: summarise again what is really shown.
        rng.setstate(begun)
        headings = _headings(opened.text, start, end, spec.language) if outline else []
        if len(headings) >= 4:
            draft = _outline(context, spec, rng, opened, start, end, headings)
        else:
            try:
                draft = _persons(context, spec, rng, opened, start, end)
            except Reject:  # the form that every text has
                rng.setstate(begun)
                draft = _openings(context, spec, rng, opened, start, end)
        reached = start + len(draft.parts[0].text)
        if abs(reached - end) <= max(400, (end - start) // 100):
            if draft.kind == "chapters":  # the item must show no heading that the outline leaves out
                limit = _next_heading(opened, end, spec.language)
                if reached > limit:
                    raise Reject("evidence past the end")
                draft.parts[0].tail = draft.parts[0].tail[: limit - reached]
            return draft
        end = reached
    raise Reject("summary does not cover the text")


def _stretch(context: Context, spec: Spec, rng: random.Random, room: int) -> tuple[Opened, int, int]:
    opened = context.long_document(rng, spec.language, spec.target)
    start, end = context.segment(rng, opened, room)
    return opened, start, end


def _single(
    context: Context,
    spec: Spec,
    kind: str,
    template: str,
    opened: Opened,
    start: int,
    reply: str,
    spans: list[tuple[int, int]],
) -> Draft:
    draft = Draft(
        spec.task, kind, spec.language, [Part.of(opened, start, start)], [Turn(template, reply)],
        [Claim(0, a - start, b - start, 0, False) for a, b in spans], split=spec.split,
    )  # fmt: skip
    draft.parts = [context.part(opened, start, spec.target - context.overhead(draft))]
    if spans[-1][1] - start > len(draft.parts[0].text):
        raise Reject("evidence past the end")
    return draft


# Chapters and volumes, and the headings of Markdown.
_HEADING = {
    "en": re.compile(
        r"^(?:#{1,4}[ \t]+|[ \t]*(?=(?:CHAPTER|Chapter|BOOK|PART) (?:[IVXLC]+|\d{1,3})\b))(\S[^\n]{0,78}"
        r"(?:\n[ \t]*[A-Z][A-Z ,.:;'’-]{2,78})?)$",  # in capitals it may go on in the next line
        re.MULTILINE,
    ),
    "zh": re.compile(
        r"^(?:#{1,4}[ \u3000]+(\S[^\n]{0,40})"
        r"|[ \u3000]*(\S{0,4}[‧·・]?卷[一二三四五六七八九十百]+[上中下]?[^\n，。：]{0,80}))$",
        re.MULTILINE,
    ),
}


# A line that looks like a heading, its number in any form ("Chapter ll", "CHAPTER THE LAST").
_LIKE_A_HEADING = re.compile(r"^[ \t]*((?:CHAPTER|Chapter|BOOK|PART) \S[^\n]{0,40})$", re.MULTILINE)
_SHOUTED = re.compile(r"\n[ \t]*\n[ \t]*([A-Z][A-Z0-9 ,.:;'’-]{5,78})\n[ \t]*\n")


def _headings(text: str, start: int, end: int, language: str) -> list[tuple[int, int]]:
    """Spans of chapter headings in a stretch: each different, each followed by text of its own."""
    matches = _HEADING["zh" if language == "zh" else "en"].finditer(text, start, end)
    spans = [next(m.span(i) for i in range(1, m.re.groups + 1) if m[i]) for m in matches]
    names = Counter(squash(text[a:b]) for a, b in spans)
    if any(n > 1 for n in names.values()):
        return []  # a table of contents, or numbers that begin anew: the outline would be ambiguous
    for form in (_SHOUTED, _LIKE_A_HEADING):  # headings of another form, which the outline would leave out
        if any(not any(a <= other.start(1) < b for a, b in spans) for other in form.finditer(text, start, end)):
            return []
    numbers = [_volume(text[a:b]) for a, b in spans]
    if any(one and two and two not in (one, one + 1, 1) for one, two in pairwise(numbers)):
        return []  # one between them was not seen
    least = 60 if language == "zh" else 300
    for i, (_, b) in enumerate(spans):
        if (spans[i + 1][0] if i + 1 < len(spans) else end) - b < least:
            return []
    return spans


def _volume(heading: str) -> int | None:
    """The number of 卷十二, 卷十二上 and the like; None without one."""
    number = re.search(r"卷([一二三四五六七八九十百]+)", heading)
    return chinese_number(number[1]) if number else None


def _outline(
    context: Context,
    spec: Spec,
    rng: random.Random,
    opened: Opened,
    start: int,
    end: int,
    headings: list[tuple[int, int]],
) -> Draft:
    text, zh = opened.text, spec.language == "zh"
    lines, spans = [], []
    for number, (a, b) in enumerate(headings, start=1):
        body = re.compile(r"\S").search(text, b)
        if body is None:
            continue
        stop = min(len(text), body.start() + 400)
        if zh and (line := text.find("\n", body.start() + 1, stop)) > 0:
            stop = line  # a list of names and what follows it are not joined
        words = squash_zh(text[body.start() : stop]) if zh else squash(text[body.start() : stop])
        opening = words[:18] if zh else " ".join(words.split()[:10])
        stop = body.start() + _raw_length(text[body.start() : stop], opening)
        lines.append(
            f"{number}. {squash(text[a:b])}：“{opening}……”" if zh else f"{number}. {squash(text[a:b])}: “{opening} …”"
        )
        spans.append((a, stop))
    template = prompt("summary_chapters", spec.language, rng)
    return _single(context, spec, "chapters", template, opened, start, "\n".join(lines), spans)


def _next_heading(opened: Opened, end: int, language: str) -> int:
    """Where the first heading at or behind `end` stands (the text's end when there is none)."""
    following = _HEADING["zh" if language == "zh" else "en"].search(opened.text, end)
    return following.start() if following else len(opened.text)


def _raw_length(raw: str, squashed: str) -> int:
    """Characters of `raw` that fold to `squashed`."""
    need, place = len("".join(squashed.split())), 0
    while need and place < len(raw):
        need -= not raw[place].isspace()
        place += 1
    return place


def _persons(context: Context, spec: Spec, rng: random.Random, opened: Opened, start: int, end: int) -> Draft:
    """Who the text is about, part by part: of equal parts, each named by its first words, the persons named most often
    in it. Only clear cases: the last one that is given comes a quarter (and three times) more often than any other
    name."""
    text = opened.text
    if spec.language != "en":
        raise Reject("no persons stand out in a part of the text")  # names are not told from other words
    places = [start + a for a, b in paragraphs(text[start:end]) if b - a >= 100]
    count = rng.randint(4, 8)
    begins: list[int] = []
    for number in range(count):
        place = next((p for p in places if p >= start + number * (end - start) / count), end)
        if place >= end or place in begins:
            raise Reject("text has too few paragraphs to summarise")
        begins.append(place)
    shown = text[start:end]
    people, known = speakers(text), {name for name, n in names_in(shown).items() if n >= 5}
    words_below = Counter(re.findall(r"\b[a-z]{3,}\b", shown))
    doubtful = {name for name in known if words_below[name.lower()] > 5}  # "Grace", "Will": not every one is a name
    names, lines, spans = [], [], []
    for number, begin in enumerate(begins):
        stop = begins[number + 1] if number + 1 < count else end
        counts = Counter(word for word in re.findall(r"\b[A-Z][a-z]{2,}\b", text[begin:stop]) if word in known)
        ranked = [*sorted(counts.items(), key=lambda one: (-one[1], one[0])), ("", 0), ("", 0), ("", 0)]
        for most in (3, 2, 1):
            clear = ranked[most - 1][1] >= max(ranked[most][1] * 1.25, ranked[most][1] + 3)
            sure = people - doubtful
            if clear and ranked[most][0] not in doubtful and all(name in sure for name, _ in ranked[:most]):
                break
        else:
            raise Reject("no persons stand out in a part of the text")
        chosen = [name for name, _ in ranked[:most]]
        words = re.sub(r'["“”_*#]', "", squash(text[begin : begin + 300])).split()
        names.append(f"part {number + 1} from “{' '.join(words[:7])}”")
        lines.append(f"{number + 1}. {' and '.join(filter(None, (', '.join(chosen[:-1]), chosen[-1])))}")
        spans.append(_mention(text, begin, stop, chosen[0]))
    template = prompt("summary_persons", "en", rng, parts="; ".join(names))
    return _single(context, spec, "persons", template, opened, start, "\n".join(lines), spans)


def _mention(text: str, start: int, end: int, name: str) -> tuple[int, int]:
    """The span of the first sentence of text[start:end] that holds a name."""
    for a, b in paragraphs(text[start:end]):
        for c, d in sentences(text[start + a : start + b], "en"):
            if re.search(rf"\b{name}\b", text[start + a + c : start + a + d]):
                return start + a + c, start + a + d
    raise Reject("nothing found in the text")


_SENTENCE = {
    "en": re.compile(r"[A-Z][^\"“”*_|#<>]{18,280}[.!?]"),
    "zh": re.compile(r"[^「」『』“”*|#<>]{9,110}[。！？]"),
}


def _openings(context: Context, spec: Spec, rng: random.Random, opened: Opened, start: int, end: int) -> Draft:
    """The first and the last sentence of each of several parts, which the prompt names by their first words; of the
    last part, whose end depends on the exact fit, the first alone."""
    text, zh, whole = opened.text, spec.language == "zh", _SENTENCE["zh" if spec.language == "zh" else "en"]
    fold_lines = squash_zh if zh else squash
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []  # the sentence before a paragraph, its own first one
    before: tuple[int, int] | None = None
    for a, b in paragraphs(text[start:end]):
        spans = [(start + a + c, start + a + d) for c, d in sentences(text[start + a : start + b], spec.language)]
        if before and len(spans) > 1:
            both = [fold_lines(text[x:y]) for x, y in (before, spans[0])]
            if all(whole.fullmatch(one) and not one.isupper() for one in both):  # in capitals it is a heading
                found.append((before, spans[0]))
        before = spans[-1] if spans else None
    count = rng.randint(4, 8)
    size = (end - start) / count
    chosen = [
        next((f for f in found if f[1][0] >= start + n * size and f[1][1] < start + (n + 1) * size), None)
        for n in range(count)
    ]
    places = [place for place in chosen if place is not None]
    shown = text[start:end]
    folded = fold_lines(shown)
    if len(places) < count or any(shown.count(text[a:b]) > 1 for pair in places for a, b in pair):
        raise Reject("text has too few paragraphs to summarise")
    names, lines, spans = [], [], []
    for number, (_, first) in enumerate(places, start=1):
        sentence = fold_lines(text[first[0] : first[1]])
        opening = sentence[:10] if zh else " ".join(sentence.split()[:6])
        if folded.count(opening) > 1:
            raise Reject("question is ambiguous")
        names.append(f"第{number}部分从“{opening}”开始" if zh else f"part {number} from “{opening}”")
        spans.append(first)
        last = places[number][0] if number < count else None
        if last is not None:
            spans.append(last)
        ends = "" if last is None else f"“{fold_lines(text[last[0] : last[1]])}”"
        lines.append(f"{number}. “{sentence}”{'……' if zh and ends else ' … ' if ends else ''}{ends}")
    template = prompt("summary_openings", spec.language, rng, parts=("；" if zh else "; ").join(names))
    return _single(context, spec, "openings", template, opened, start, "\n".join(lines), spans)


_PURPOSE = re.compile(
    r"^[ \u3000]*第一条[ \u3000]+(为[^。\n]{6,160}?)[，,](?=根据|依据|依照|按照|制定|结合|遵照)", re.MULTILINE
)
_IN_FORCE = re.compile(r"自(?:公布|发布|颁布|批准|通过)之日起(?:施行|实施|执行|生效)")


def _laws(context: Context, spec: Spec, rng: random.Random, laws: list[PoolDocument]) -> Draft:
    """A digest of whole laws: name, purpose, number of articles, date of effect; a last one is shown in part and said
    to be so. Only laws whose digest is certain."""
    label = rng.choice(variants("document_label", "zh"))
    parts: list[Part] = []
    lines, claims, stands = [], [], []
    left = spec.target - 600
    titles = set()
    for document in laws:
        law, name = context.pool.open(document.index), law_title(document.title)
        digest = _digest(law)
        if digest is None or name in titles:
            continue
        titles.add(name)
        line, spans = digest
        own = law.tokens_between(0, len(law.text)) + 150
        whole = own < left
        if not whole:
            line, spans = "此处为节选，从略。", []
        shown = name if whole else f"{name}（节选）"
        number = len(parts)
        stands.append(Stand(law, 0, len(law.text)))
        parts.append(Part.of(law, label=context.label(label, number + 1, shown)))
        lines.append(f"{number + 1}. {book(name)}：{line}")
        claims += [Claim(number, a, b, 0, False) for a, b in spans]
        left -= own
        if not whole:
            break
    if left > 0 or len(parts) < 4:
        raise Reject("too few documents for a collection")
    draft = Draft(
        spec.task, "laws", "zh", parts, [Turn(prompt("summary_laws", "zh", rng), "\n".join(lines))], claims,
        split=spec.split,
    )  # fmt: skip
    make_elastic(context, spec, draft, [len(parts) - 1], stands)
    if draft.parts[-1].whole:
        raise Reject("no document could be fitted")
    return draft


def _digest(law: Opened) -> tuple[str, list[tuple[int, int]]] | None:
    """A line on a whole law and where it stands. None where a number or a date cannot be read off with certainty."""
    text = law.text
    numbered = articles(text)
    if not numbered:  # a decision or an interpretation that counts in "一、"
        return None
    found = {one.kind: one for one in find_chinese(text, law.about.title)}
    first, last = numbered[0], numbered[-1]
    purpose = _PURPOSE.search(text, first[1], first[2])
    if "article_count" not in found or (purpose is None and re.search(r"为了?\w", text[first[1] : first[2]])):
        return None
    words = [f"目的：{squash_zh(purpose[1])}"] if purpose else ["文中未写明目的"]
    spans = [purpose.span(1)] if purpose else []
    words.append(f"共{found['article_count'].answers[0]}")
    spans.append((last[1], last[2]))
    if "effective_date" in found:
        one = found["effective_date"]
        words.append(f"自{one.answers[0]}起施行")
        if not last[1] <= one.start < last[2]:
            spans.append((one.start, one.end))
    elif (at := _IN_FORCE.search(text, last[1], last[2])) is not None:
        words.append(at[0])
    else:
        return None
    return "；".join(words) + "。", spans


def _asked(context: Context, spec: Spec, rng: random.Random) -> Draft:
    """Hierarchical: the endpoint sums up every part, then the sums. What the student sees is the whole text."""
    assert context.asker is not None
    opened, start, end = _stretch(context, spec, rng, spec.target * 9 // 10 - 600)
    template = prompt("summary_free", spec.language, rng)
    for _ in range(3):
        # Again with the end that the reply leaves room for: only the last part and the merging are asked anew.
        text = context.asker.summarise(spec, opened, start, end)
        draft = Draft(
            spec.task, "free", spec.language, [Part.of(opened, start, start)], [Turn(template, text)], [],
            split=spec.split, teacher=context.asker.name,
        )  # fmt: skip
        draft.parts = [context.part(opened, start, spec.target - context.overhead(draft))]
        reached = start + len(draft.parts[0].text)
        if abs(reached - end) <= max(400, (end - start) // 50):
            return draft
        end = reached
    raise Reject("summary does not cover the text")
