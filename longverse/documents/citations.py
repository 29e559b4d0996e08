"""Answers with citations: every sentence of an answer is tied to the sentence of a document that it comes from, and
checked against it.

A citation is a pair of offsets into a document's text, so its passage is always what stands there, whatever the model
wrote. Its status says how the answer relates to it:

    verified    the answer's sentence stands there, or all that it adds to the question (names, numbers, words) does
    repaired    the answer quotes with small slips; the passage is how it really reads
    unverified  this is the nearest passage, and it does not say what the answer says

Candidates come from the attention of the answer's tokens (evidence.py), from the numbers that the answer itself gives
("[12]", for models that follow numbered paragraphs), and from the words of question and answer. Whether the documents
answer the question at all is a matter of its words: `Cited.found`.
"""

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

from ..wording import NOT_STATED
from .words import (
    Index,
    can_answer,
    groups,
    has_another_name,
    has_han,
    is_han,
    marked_names,
    names,
    normalise,
    points_back,
    sentences,
    terms,
)

REPAIRED = 0.8  # least likeness (difflib's ratio) of a quotation with slips
SUPPORTED = 0.75  # least share of an answer's own words that its passage must hold
SAID = 0.8  # share of the question's words from which a passage is about what was asked; below, in other words at most
HINTED = 0.18  # share of the question's words below which a passage without its names is about something else
SURE = 0.9  # share of the question's words in a passage that is shown whatever the model answered
NOT_FOUND = {"en": "Not found in the document.", "zh": "文档中没有找到。"}
_REFERENCE = re.compile(r"\s*[\[【]\s*(\d{1,6}(?:\s*[,，、;–-]\s*\d{1,6})*)\s*[\]】]")
_AROUND = ' \n"“”「」『』.。'
_QUOTE = re.compile(r"[\"“「『]([^\"“”「」『』]{8,})[\"”」』]")


@dataclass(frozen=True)
class Citation:
    """A passage of a document: `documents[document].text[start:end] == text`."""

    document: int  # index into the documents asked about
    name: str
    start: int
    end: int
    text: str
    paragraph: int
    page: int | None  # None where the format has no pages
    place: str  # in words: "page 3, paragraph 41"
    heading: tuple[str, ...]
    status: str  # verified, repaired, unverified

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cited_text": self.text, "document_index": self.document, "document_title": self.name,
            "start_char_index": self.start, "end_char_index": self.end, "page": self.page, "paragraph": self.paragraph,
            "heading": list(self.heading), "status": self.status,
        }  # fmt: skip


@dataclass(frozen=True)
class Cited:
    """An answer with its citations, numbered from 1 in the order in which the answer needs them."""

    answer: str  # references that the model wrote are gone
    citations: tuple[Citation, ...]
    marks: tuple[tuple[int, tuple[int, ...]], ...]  # (offset in the answer, citation numbers that belong there)
    found: bool  # whether the documents speak of what was asked
    signals: dict[str, float] = field(default_factory=dict)  # what `found` was decided by
    first: str = ""  # what was answered first, where the answer comes from a second look (second_look.py)

    @property
    def borne_out(self) -> bool:
        """Whether at least one sentence of the answer stands in its passage."""
        return self.found and any(citation.status != "unverified" for citation in self.citations)

    @property
    def marked(self) -> str:
        """The answer with its citation numbers: `It stands in Upton [1].`"""
        text = self.answer
        for offset, numbers in reversed(self.marks):
            mark = " " + "".join(f"[{number}]" for number in numbers)
            head = text[:offset].rstrip()
            point = head[-1:] if head[-1:] in (".", "。", "!", "?", "！", "？") else ""
            text = head.removesuffix(point) + mark + point + text[offset:]
        return text


@dataclass(frozen=True)
class Attended:
    """What `evidence.trace` found, over the index's paragraphs.

    shares    for each token of the answer, the share of the heads' attention on each paragraph (sparse: place -> share)
    offsets   for each token, where its text begins in the answer
    logprob   mean log-probability of the answer's tokens
    """

    shares: Sequence[dict[int, float]]
    offsets: Sequence[int]
    logprob: float

    def moved(self, by: int) -> "Attended":
        """The same with the answer's text moved by so many characters."""
        return Attended(self.shares, [max(0, offset + by) for offset in self.offsets], self.logprob)

    def over(self, start: int, end: int) -> dict[int, float]:
        """Mean share of each paragraph over the tokens of answer[start:end]."""
        rows = [row for row, offset in zip(self.shares, self.offsets, strict=True) if start <= offset < end]
        total: dict[int, float] = {}
        for row in rows or self.shares:
            for place, share in row.items():
                total[place] = total.get(place, 0.0) + share / len(rows or self.shares)
        return total


def cite(
    question: str, answer: str, index: Index, attended: Attended | None = None, *, numbered: bool = False,
    read: Collection[int] | None = None,
) -> Cited:  # fmt: skip
    """Tie an answer to the index's documents.

    numbered  the model saw numbers before the paragraphs, counted over all documents as in `Index.places`, from 1, and
              `[n]` in its answer refers to them; else that is a mark in the text
    read      places of the paragraphs that the model was given; None: all. An answer rests on no other
    """
    answer, references = without_references(answer) if numbered else (answer, [])
    refused = is_refusal(answer)
    asked = frozenset(terms(question))
    found: list[Citation] = []
    marks: list[tuple[int, tuple[int, ...]]] = []
    best: dict[str, float] = {}
    for start, end in sentences(answer) if answer.strip() else []:
        sentence = answer[start:end]
        shares = attended.over(start, end) if attended is not None else {}
        named = [place for offset, places in references if start <= offset <= end for place in places]
        given = range(len(index.places)) if read is None else read
        chosen = [place for place in dict.fromkeys(named) if place in given]
        chosen = chosen or _candidates(sentence, asked, index, shares, read)[:1]
        numbers = []
        for place in chosen:
            citation, signals = _passage(sentence, question, index, place, of_all=read is None)
            signals |= {"attention": shares.get(place, 0.0)} if attended is not None else {}
            if citation not in found:
                found.append(citation)
            numbers.append(found.index(citation) + 1)
            if not best or (-signals["strangers"], signals["asked"]) > (-best["strangers"], best["asked"]):
                best = signals
        if numbers:
            marks.append((end, tuple(dict.fromkeys(numbers))))
    if attended is not None:
        best["logprob"] = attended.logprob
    if found and asked and (refused or not speaks_of(best)):
        # The answer leads nowhere, and a passage may hold the question's words all the same: then that is shown.
        for place in index.nearest(asked, 3, among=read):
            citation, signals = _passage(answer, question, index, place, of_all=read is None)
            if signals["asked"] >= SURE and signals["kind"] and not signals["strangers"]:
                return Cited(answer, (citation,), ((len(answer), (1,)),), True, best | signals)
    return Cited(answer, tuple(found), tuple(marks), bool(found) and not refused and speaks_of(best), best)


def is_refusal(answer: str) -> bool:
    """Whether an answer is nothing but the model's words for what a text does not state (wording.NOT_STATED); a stop
    may have cut their full stop off."""
    return answer.strip(' \n"“”.。').casefold() in {said.rstrip(".。").casefold() for said in NOT_STATED}


def speaks_of(signals: dict[str, float]) -> bool:
    """Whether a cited passage is about what was asked.

    All names and numbers of the question must stand in it, its headings or its section (of Chinese, which seldom marks
    names, those that are marked and what the documents say elsewhere in the question's words must stand in its
    paragraph), and where a number or a time is asked for it must have one. Beyond that it holds most of the question's
    rare words; or it is said in other words (with its names or a fifth of its own), words that the documents do not use
    elsewhere for it. Then the answer must be a passage that the model copied with attention and assurance, and names of
    the question that it lacks must stand in its paragraph or be pointed back to. The limits were set on generated
    reports (benchmarks/citations.py) and on invented facts in novels and laws (benchmarks/smol_facts.py, other seeds
    than it reports).
    """
    if signals.get("strangers", 1.0) or not signals.get("kind", 1.0):
        return False
    if signals["asked"] >= SAID:
        return True
    copied = signals["verified"] and signals["answer"] >= SUPPORTED
    if not copied or not signals["hinted"] or signals["elsewhere"] or signals["apart"]:
        return False
    if "attention" in signals:
        return signals["attention"] >= 0.1 and signals["logprob"] >= -0.4
    return signals["asked"] >= 0.4


def _candidates(
    sentence: str, asked: frozenset[str], index: Index, shares: dict[int, float], read: Collection[int] | None
) -> list[int]:
    """Paragraphs that a sentence of an answer may come from, the likeliest first."""
    own = frozenset(terms(sentence))
    places = {*sorted(shares, key=lambda place: -shares[place])[:4], *index.nearest(own | asked, 4, among=read)}
    places = {place for place in places if not index.places[place][1].level}
    most = max((shares.get(place, 0.0) for place in places), default=0.0) or 1.0

    def score(place: int) -> float:
        held = index.words[place]
        return shares.get(place, 0.0) / most + index.coverage(own, held) + index.coverage(asked, held)

    return sorted(places, key=lambda place: (-score(place), place))


def _passage(
    sentence: str, question: str, index: Index, place: int, *, of_all: bool
) -> tuple[Citation, dict[str, float]]:
    """The passage of one paragraph that a sentence of an answer rests on, its status, and what tells for it. of_all:
    the model had all paragraphs before it."""
    number, paragraph = index.places[place]
    document = index.documents[number]
    quoted = _QUOTE.search(sentence)
    match = match_quote(quoted[1] if quoted else sentence, paragraph.text)
    own, asked = frozenset(terms(sentence)), frozenset(terms(question))
    above = frozenset(terms(" \n ".join(paragraph.heading)))
    spans = sentences(paragraph.text)
    if match is not None:
        # Whole sentences: a bare name is no passage.
        touched = [span for span in spans if span[0] < match[1] and match[0] < span[1]]
        start, end = min(match[0], touched[0][0]), max(match[1], touched[-1][1])
    else:
        held_by = {span: frozenset(terms(paragraph.text[slice(*span)])) | above for span in spans}
        start, end = max(spans, key=lambda span: (index.coverage(own | asked, held_by[span]), -span[0]))
    said = frozenset(terms(paragraph.text[start:end]))
    held = said | above
    share = index.share(groups(question), held)
    # The subject may stand in the sentence before: the paragraph counts.
    elsewhere: list[tuple[str, ...]] = []
    if share < SURE:
        # One that the model chose of everything, with more of the question in it than names, is likely about it, in
        # other words. Of Chinese that can be told only where it marks its names.
        more = marked_names(question) if has_han(question) else (asked - names(question)) & said
        likely = of_all and bool(more)
        elsewhere = index.told_elsewhere(groups(question), index.words[place], of_the_same=likely)
    around = " \n ".join((*paragraph.heading, paragraph.text))
    supported = min(index.coverage(own, held), index.coverage(own, said) + 0.25)  # the headings add a quarter at most
    # A few words in quotation marks bear out themselves and not what is said around them.
    whole = quoted is None or sentence.strip(_AROUND) == quoted[1].strip(_AROUND)
    if match is not None and match[2] == "verified" and whole:
        status = "verified"
    elif not own or supported < SUPPORTED or names(sentence) - held:
        status = "unverified"
    else:
        status = "repaired" if match is not None and match[2] == "repaired" else "verified"
    citation = Citation(
        document=number, name=document.name, start=paragraph.start + start, end=paragraph.start + end,
        text=paragraph.text[start:end], paragraph=paragraph.number, page=paragraph.page if document.unit else None,
        place=document.place(paragraph.start + start, paragraph.start + end), heading=paragraph.heading, status=status,
    )  # fmt: skip
    return (
        citation,
        {
            "asked": share,  # of the question's words in the passage and its headings
            "strangers": float(
                len(names(question) - index.around(place))
                + sum(is_han(g[0]) for g in elsewhere)
                + has_another_name(question, around)
                + sum(name not in normalise(around) for name in marked_names(question))
            ),
            "hinted": float(share >= HINTED or (bool(names(question)) and names(question) <= held)),
            "apart": float(
                not names(question) <= held | index.words[place] and not points_back(paragraph.text[start:end])
            ),
            "answer": index.coverage(own - asked, held),  # share of what the answer adds
            "verified": float(status != "unverified"),
            "elsewhere": float(len(elsewhere)),
            "kind": float(can_answer(question, paragraph.text[start:end])),  # a number or a time where one is asked for
        },
    )


def without_references(answer: str) -> tuple[str, list[tuple[int, list[int]]]]:
    """An answer without its references to numbered paragraphs, and where in it each stood: (offset, places from 0)."""
    parts: list[str] = []
    references = []
    at = length = 0
    for mark in _REFERENCE.finditer(answer):
        ranges = [[int(n) for n in re.split(r"\s*[–-]\s*", one)] for one in re.split(r"\s*[,，、;]\s*", mark[1])]
        if any(len(ends) > 2 or ends[-1] < ends[0] for ends in ranges):  # a date, which belongs to the text
            continue
        parts.append(answer[at : mark.start()])
        length += len(parts[-1])
        places: list[int] = []
        for ends in ranges:
            # A range of more than ten paragraphs is no reference.
            places += range(ends[0] - 1, min(ends[-1], ends[0] + 9))
        references.append((length, [place for place in places if place >= 0]))
        at = mark.end()
    parts.append(answer[at:])
    return "".join(parts), references


def match_quote(quote: str, text: str) -> tuple[int, int, str] | None:
    """Where a quotation stands in a text: (start, end, "verified" or "repaired"), or None.

    Verified: exactly, or but for letter case, white space, typographic variants and points at the ends. Repaired: like
    one or two neighbouring sentences by at least REPAIRED.
    """
    bare = quote.strip().strip("\"“”'‘’「」『』").rstrip(".。!！?？,，;；:：…").strip()
    if not bare:
        return None
    if (at := _whole(bare, text)) >= 0:
        return at, at + len(bare), "verified"
    wanted, _ = _folded(bare)
    folded, origins = _folded(text)
    if wanted and (at := _whole(wanted, folded)) >= 0:
        return origins[at], origins[at + len(wanted) - 1] + 1, "verified"
    best: tuple[float, int, int] = (0.0, 0, 0)
    spans = sentences(text)
    pairs = [(a[0], b[1]) for a, b in pairwise(spans)]
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(wanted)
    for start, end in [*spans, *pairs]:
        if not 0.5 < (end - start) / max(1, len(bare)) < 2:
            continue
        matcher.set_seq1(_folded(text[start:end])[0])
        if (
            matcher.real_quick_ratio() > best[0]
            and matcher.quick_ratio() > best[0]
            and (r := matcher.ratio()) > best[0]
        ):
            best = (r, start, end)
    return (best[1], best[2], "repaired") if best[0] >= REPAIRED else None


def _folded(text: str) -> tuple[str, list[int]]:
    """A text in one letter case, one kind of quotes and dashes and single spaces; with each character's origin."""
    characters: list[str] = []
    origins: list[int] = []
    for place, character in enumerate(text):
        for folded in unicodedata.normalize("NFKD", normalise(character)):
            if "\u0300" <= folded <= "\u036f":  # an accent, which may be a character of its own or not
                continue
            if folded.isspace():
                if not characters or characters[-1] == " ":
                    continue
                folded = " "
            characters.append(folded)
            origins.append(place)
    if characters and characters[-1] == " ":
        characters.pop()
        origins.pop()
    return "".join(characters), origins


def _whole(wanted: str, text: str) -> int:
    """Where `wanted` stands as whole words: 41 is not in 412."""
    before = r"(?<!\w)" if wanted[0].isalnum() and wanted[0].isascii() else ""
    after = r"(?!\w)" if wanted[-1].isalnum() and wanted[-1].isascii() else ""
    found = re.search(before + re.escape(wanted) + after, text)
    return found.start() if found else -1
