"""Looking at a file of items: histograms of lengths and depths, what is wrong with which line, samples."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from longverse.data.long_sft.item import Item, read_items
from longverse.data.report import LENGTH_EDGES, length_label
from longverse.data.vocabulary import ChatCounter
from longverse.errors import UserError

DEPTH_BINS = 10


@dataclass
class Inspection:
    """What a file of items holds. problems: (line number, what is wrong); samples: some good items, drawn evenly."""

    items: int = 0
    tokens: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    wrong: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # by class of report.LENGTH_EDGES
    depths: list[int] = field(default_factory=lambda: [0] * DEPTH_BINS)
    samples: list[tuple[int, Item]] = field(default_factory=list)

    def length_rows(self) -> list[tuple[str, int]]:
        """(label, items) of the length classes that occur."""
        return [(length_label(i), n) for i, n in sorted(self.lengths.items())]


def inspect_items(
    path: Path, *, samples: int = 0, seed: int = 0, counter: ChatCounter | None = None, most_problems: int = 20
) -> Inspection:
    """Read a file of items and check every field of every line; with a counter, the token counts too. Samples are drawn
    by reservoir, so that the file is read once. UserError when the file cannot be read or is empty."""
    found = Inspection()
    rng = random.Random(seed)
    seen: set[str] = set()
    for number, item, problem in read_items(path):
        if item is not None and item.id in seen:
            problem = f"the id {item.id!r} occurs twice."
        if item is not None and counter is not None:
            tokens = counter.count(item.messages)
            if tokens != item.tokens:
                problem = f"it states {item.tokens} tokens and has {tokens} under this tokenizer."
        if item is None or problem:
            found.wrong += 1
            if len(found.problems) < most_problems:
                found.problems.append((number, problem))
            continue
        seen.add(item.id)
        found.items += 1
        found.tokens += item.tokens
        found.tasks[item.task] += 1
        found.languages[item.language] += 1
        found.lengths[sum(item.tokens >= edge for edge in LENGTH_EDGES) - 1] += 1
        for evidence in item.evidence:
            found.depths[min(int(evidence.depth * DEPTH_BINS), DEPTH_BINS - 1)] += 1
        if len(found.samples) < samples:
            found.samples.append((number, item))
        elif samples and (slot := rng.randrange(found.items)) < samples:
            found.samples[slot] = (number, item)
    if not found.items and not found.wrong:
        raise UserError(f"{path} holds no line; give a file that `longverse data sft` wrote.")
    return found


@dataclass(frozen=True)
class Piece:
    """A stretch of a message for the screen. evidence: to be highlighted; a gap stands for `left_out` characters."""

    text: str
    evidence: bool = False
    left_out: int = 0


def pieces_of(item: Item, message: int, context: int = 160) -> list[Piece]:
    """A message cut down to its edges and the surroundings of its evidence, `context` characters on each side."""
    content = item.messages[message]["content"]
    marks = sorted(
        (item.documents[e.document].start + e.start, item.documents[e.document].start + e.end)
        for e in item.evidence
        if item.documents[e.document].message == message
    )
    keep = [(0, min(2 * context, len(content))), (max(0, len(content) - 4 * context), len(content))]
    keep += [(max(0, a - context), min(len(content), b + context)) for a, b in marks]
    out: list[Piece] = []
    place = 0
    for start, end in sorted(keep):
        start = max(start, place)
        if start >= end:
            continue
        if start > place:
            out.append(Piece("", left_out=start - place))
        edges = sorted({start, end, *(min(max(x, start), end) for mark in marks for x in mark)})
        for a, b in itertools.pairwise(edges):
            out.append(Piece(content[a:b], any(m <= a and b <= n for m, n in marks)))
        place = end
    return out
