"""Summaries. Without an endpoint they are extractive and hierarchical: a key sentence of every part, an outline of
chapters, a digest of laws; with one, summaries of parts are merged into one."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

from longverse.data.long_sft.context import Context, Spec
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn
from longverse.data.long_sft.multi_doc import Stand, gather, make_elastic
from longverse.data.long_sft.offline_zh import articles, find_chinese, is_law, law_title
from longverse.data.long_sft.pool import Opened
from longverse.data.long_sft.prompts import prompt, variants
from longverse.data.text import paragraphs, sentences, squash


def summary(context: Context, spec: Spec) -> Draft:
    """One of the forms that the documents allow."""
    rng = spec.rng
    if context.asker is not None:
        return _asked(context, spec, rng)
    if spec.language == "zh" and rng.random() < 0.4:
        laws = [
            d for d in context.documents("zh") if d.characters < 60_000 and is_law(context.pool.text(d.index)[:6_000])
        ]
        if len(laws) >= 20:
            return _laws(
                context, spec, rng, gather(context, rng, rng.sample(laws, min(len(laws), 300)), spec.target * 9 // 10)
            )
    opened, start, end = _stretch(context, spec, rng, spec.target * 9 // 10)
    outline = rng.random() < 0.5
    begun = rng.getstate()
    for _ in range(4):
        # How far the text reaches is known once the prompt and the reply are: summarise again what is really shown.
        rng.setstate(begun)
        headings = _headings(opened.text, start, end, spec.language) if outline else []
        if len(headings) >= 4:
            draft = _outline(context, spec, rng, opened, start, end, headings)
        else:
            draft = _key_sentences(context, spec, rng, opened, start, end)
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


_HEADING = {
    "en": re.compile(r"^[ \t]*((?:CHAPTER|Chapter|BOOK|PART) (?:[IVXLC]+|\d{1,3})\b[^\n]{0,60})$", re.MULTILINE),
    "zh": re.compile(
        r"^[ \u3000]*(\S{0,4}[‧·・]?卷[一二三四五六七八九十百]+[上中下]?[^\n，。：]{0,24})$", re.MULTILINE
    ),
}


def _headings(text: str, start: int, end: int, language: str) -> list[tuple[int, int]]:
    """Spans of chapter headings in a stretch: each different, each followed by text of its own."""
    spans = [m.span(1) for m in _HEADING["zh" if language == "zh" else "en"].finditer(text, start, end)]
    names = Counter(squash(text[a:b]) for a, b in spans)
    good = []
    for i, (a, b) in enumerate(spans):
        after = spans[i + 1][0] if i + 1 < len(spans) else end
        if names[squash(text[a:b])] != 1:
            return []  # a table of contents, or numbers that begin anew: the outline would be ambiguous
        if after - b > 400:
            good.append((a, b))
    return good if len(good) == len(spans) else []


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
        words = squash(text[body.start() : stop])
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
    need, place = len(squashed.replace(" ", "")), 0
    while need and place < len(raw):
        need -= not raw[place].isspace()
        place += 1
    return place


def _key_sentences(context: Context, spec: Spec, rng: random.Random, opened: Opened, start: int, end: int) -> Draft:
    """Equal parts, each named by its first words; of each the sentence whose words are most typical of the part."""
    text, zh = opened.text, spec.language == "zh"
    places = [(a, b) for a, b in paragraphs(text[start:end]) if b - a >= (30 if zh else 100)]
    count = rng.randint(4, 8)
    if len(places) < 3 * count:
        raise Reject("text has too few paragraphs to summarise")
    weight = _Weights(text[start:end], spec.language)
    names, lines, spans = [], [], []
    size = (end - start) / count
    for number in range(count):
        mine = [(start + a, start + b) for a, b in places if number * size <= a < (number + 1) * size]
        if not mine:
            raise Reject("text has too few paragraphs to summarise")
        words = re.sub(r'["“”「」『』_*#]', "", squash(text[mine[0][0] : mine[0][0] + 300]))
        opening = words[:12] if zh else " ".join(words.split()[:6])
        span = weight.best(text, mine)
        if span is None:
            raise Reject("text has too few paragraphs to summarise")
        names.append(f"第{number + 1}部分从“{opening}”开始" if zh else f"part {number + 1} from “{opening}”")
        sentence = squash(text[span[0] : span[1]])
        lines.append(f"{number + 1}. “{sentence}”")
        spans.append(span)
    parts = ("；" if zh else "; ").join(names)
    template = prompt("summary_parts", spec.language, rng, parts=parts)
    return _single(context, spec, "key_sentences", template, opened, start, "\n".join(lines), spans)


class _Weights:
    """Scores sentences by how frequent their words are in the part and how rare elsewhere (tf-idf over paragraphs;
    character pairs for Chinese)."""

    def __init__(self, text: str, language: str) -> None:
        self.language = language
        chunks = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        self.chunks = len(chunks)
        self.spread = Counter(word for chunk in chunks for word in set(self.words(chunk)))

    def words(self, text: str) -> list[str]:
        if self.language == "zh":
            return [text[i : i + 2] for i in range(len(text) - 1) if text[i : i + 2].isalpha()]
        return re.findall(r"[a-z']{3,}", text.lower())

    def best(self, text: str, places: list[tuple[int, int]]) -> tuple[int, int] | None:
        """The span of the best sentence among paragraphs; the outer tenth of the part does not count."""
        own = Counter(word for a, b in places for word in self.words(text[a:b]))
        best, found = 0.0, None
        low, high = (15, 110) if self.language == "zh" else (60, 320)
        inner = places[len(places) // 10 : len(places) - len(places) // 10] or places
        for a, b in inner[:: max(1, len(inner) // 150)]:
            for c, d in sentences(text[a:b], self.language):
                sentence = text[a + c : a + d]
                if not low <= d - c <= high or re.search(
                    r'["“”「」『』#|<>]|[^.!?。！？；]$|^(?:（|\(|第|\d)|^.{1,3}、', sentence
                ):
                    continue
                words = self.words(sentence)
                if len(words) < 6 or (self.language != "zh" and not sentence[0].isupper()):
                    continue
                score = sum(
                    math.log1p(own[w]) * math.log((1 + self.chunks) / (0.5 + self.spread[w]))
                    for w in dict.fromkeys(words)
                ) / math.sqrt(len(words))
                if score > best:
                    best, found = score, (a + c, a + d)
        return found


_PURPOSE = re.compile(
    r"^[ \u3000]*第一条[ \u3000]+(为[^。\n]{6,160}?)，(?=根据|依据|依照|按照|制定|结合|遵照)", re.MULTILINE
)


def _laws(context: Context, spec: Spec, rng: random.Random, stands: list[Stand]) -> Draft:
    """A digest of whole laws: name, purpose, number of articles, date of effect; one more is shown in part and said
    to be so."""
    whole = [s for s in stands if s.start == 0 and s.end == len(s.opened.text)]
    if len(whole) < 3:
        raise Reject("too few documents for a collection")
    # The one that is cut is a long one; whatever is shown in part already comes first.
    cut = max(range(len(stands)), key=lambda i: (stands[i] not in whole, len(stands[i].opened.text)))
    label = rng.choice(variants("document_label", "zh"))
    parts, lines, claims = [], [], []
    for i, stand in enumerate(stands):
        name = law_title(stand.opened.about.title)
        full = stand in whole and i != cut
        shown = name if full else f"{name}（节选）"
        parts.append(Part.of(stand.opened, stand.start, stand.end, label=context.label(label, i + 1, shown)))
        line, spans = _digest(stand, full)
        lines.append(f"{i + 1}. 《{name}》{line}")
        claims += [Claim(i, a - stand.start, b - stand.start, 0, False) for a, b in spans]
    draft = Draft(
        spec.task,
        "laws",
        "zh",
        parts,
        [Turn(prompt("summary_laws", "zh", rng), "\n".join(lines))],
        claims,
        split=spec.split,
    )
    make_elastic(context, spec, draft, [cut], stands)
    elastic = draft.parts[cut]
    if any(c.part == cut and c.end > len(elastic.text) for c in claims) or elastic.whole:
        raise Reject("evidence past the end")
    return draft


def _digest(stand: Stand, full: bool) -> tuple[str, list[tuple[int, int]]]:
    text = stand.opened.text
    words, spans = [], []
    purpose = _PURPOSE.search(text, stand.start, stand.end)
    if purpose and stand.start == 0:
        words.append(f"目的：{squash(purpose[1])}")
        spans.append(purpose.span(1))
    if full:
        for kind in ("article_count", "effective_date"):
            for one in find_chinese(text, stand.opened.about.title):
                if one.kind == kind:
                    words.append(f"共{one.answers[0]}" if kind == "article_count" else f"自{one.answers[0]}起施行")
                    spans.append((one.start, one.end))
        if not any(w.startswith("共") for w in words) and articles(text):
            words.append("条文编号不连续，条数从略")
    else:
        words.append("此处为节选，条数与施行日期从略")
    return "：" + "；".join(words) + "。", spans


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
