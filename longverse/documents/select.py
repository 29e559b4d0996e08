"""Passages instead of the whole: what BM25 finds for a question, for documents past every window.

The ranking is BM25 (Robertson and Zaragoza 2009) by the library bm25s, over the words of words.py: English words and
pairs of Chinese characters. What was read is said; what was not read cannot be in the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..inference.engine import Engine
from .ask import Prompts, check, messages
from .document import Document
from .words import Index, terms

BUDGET = 3072  # tokens of passages for a question, where the window allows: small models lose a fact in more
GAP = "…"  # stands between passages that are not neighbours


@dataclass(frozen=True)
class Selection:
    """What is read for one question."""

    places: tuple[int, ...]  # of the index, in its order
    text: str
    tokens: int

    def pages(self, index: Index) -> str:
        """What was read, in words: `report.pdf: pages 3, 7-9`."""
        by_document: dict[int, list[int]] = {}
        for place in self.places:
            number, paragraph = index.places[place]
            by_document.setdefault(number, []).append(
                paragraph.page if index.documents[number].unit else paragraph.number
            )
        said = []
        for number, numbers in by_document.items():
            document = index.documents[number]
            unit = document.unit or "paragraph"
            ranges = _ranges(sorted(set(numbers)))
            several = "," in ranges or "-" in ranges
            said.append(f"{document.name}: {unit}{'s' if several else ''} {ranges}")
        return "; ".join(said)


class Searcher:
    """BM25 over the paragraphs of some documents, made once and asked many times."""

    def __init__(self, documents: Sequence[Document]) -> None:
        import bm25s

        self.index = Index(documents)
        above: dict[tuple[str, ...], list[str]] = {}
        corpus = []
        for _, paragraph in self.index.places:
            if paragraph.heading not in above:
                above[paragraph.heading] = terms(" \n ".join(paragraph.heading))
            # A paragraph without words would trip the library; this word stands in no question.
            corpus.append(above[paragraph.heading] + terms(paragraph.text) or ["\x00"])
        self._bm25: Any = bm25s.BM25()
        self._bm25.index(corpus, show_progress=False)

    def ranked(self, question: str, count: int) -> list[int]:
        """Paragraphs (no headings) that hold words of the question, the best first."""
        wanted = [word for word in dict.fromkeys(terms(question)) if word in self.index.postings]
        if not wanted:
            return []
        most = min(len(self.index.places), 4 * count)
        places, scores = self._bm25.retrieve([wanted], k=most, show_progress=False)
        found = [
            int(place)
            for place, score in zip(places[0], scores[0], strict=True)
            if score > 0 and not self.index.places[int(place)][1].level
        ]
        return found[:count]

    def select(self, question: str, engine: Engine, budget: int) -> Selection:
        """The best passages that fit `budget` tokens, each paragraph with its neighbours where there is room. Raises
        UserError when no word of the question stands in the documents."""
        index = self.index
        ranked = self.ranked(question, 64)
        if not ranked:
            raise UserError(
                "No word of the question stands in the document, so there are no passages to answer from: ask with"
                " words that it uses, or let the whole be read, without --select."
            )
        cost: dict[int, int] = {}

        def tokens(place: int) -> int:
            if place not in cost:
                cost[place] = len(engine.tokenizer.encode(index.places[place][1].text)) + 2
            return cost[place]

        chosen: set[int] = set()
        spent = 0
        for ring in (0, 1):  # the passages themselves first, then what stands beside them
            for place in ranked:
                for near in (place,) if ring == 0 else (place - 1, place + 1):
                    inside = 0 <= near < len(index.places) and near not in chosen
                    if inside and index.places[near][0] == index.places[place][0] and spent + tokens(near) <= budget:
                        chosen.add(near)
                        spent += tokens(near)
        if not chosen:
            raise UserError(
                f"The best passage alone takes more than the {budget:,} tokens there are for it: use a model with a"
                " larger window."
            )
        places = tuple(sorted(chosen))
        return Selection(places, self._text(places), spent)

    def _text(self, places: Sequence[int]) -> str:
        index = self.index
        parts: list[str] = []
        before = None
        heading: tuple[str, ...] = ()
        for place in places:
            number, paragraph = index.places[place]
            if before is None or place != before + 1:
                if before is not None:
                    parts.append(GAP)
                if before is None or index.places[before][0] != number:
                    parts += [f"{index.documents[number].name}:"] if len(index.documents) > 1 else []
                if not paragraph.level and paragraph.heading and paragraph.heading != heading:
                    parts.append(" > ".join(paragraph.heading))
            parts.append(paragraph.text)
            heading, before = paragraph.heading, place
        return "\n\n".join(parts)


def prepare_selected(
    engine: Engine, documents: Document | Sequence[Document], questions: Sequence[str], max_new_tokens: int, *,
    system: str | None = None, budget: int | None = None,
) -> tuple[Prompts, list[Selection]]:  # fmt: skip
    """Prompts that hold, for each question, the passages found for it. Raises UserError where nothing is found."""
    documents = (documents,) if isinstance(documents, Document) else tuple(documents)
    check(questions)
    searcher = Searcher(documents)
    room = engine.window - max_new_tokens - 256 - max(len(engine.tokenizer.encode(question)) for question in questions)
    budget = min(BUDGET if budget is None else budget, room)
    if budget < 64:
        raise UserError(
            f"{engine.name} reads {engine.window:,} tokens, which leaves no room for passages beside the question and"
            f" {max_new_tokens:,} tokens of answer: lower --max-new-tokens or choose a model with a larger window."
        )
    selections = [searcher.select(question, engine, budget) for question in questions]
    ids = tuple(
        engine.chat.encode(messages(selection.text, question, system=system))
        for question, selection in zip(questions, selections, strict=True)
    )
    prompts = Prompts(
        tuple(questions), ids, max(map(len, ids)) + max_new_tokens, documents,
        places=tuple(selection.places for selection in selections), made_index=searcher.index,
    )  # fmt: skip
    return prompts, selections


def _ranges(numbers: Sequence[int]) -> str:
    """`3, 7-9`"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)
