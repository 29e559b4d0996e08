"""Summaries: the whole document where it fits the window, else part by part at its headings, and then of the parts.

What stands in which part is said, and every part is read whole: nothing is cut.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..inference.engine import Cancelled, Engine, Progress
from ..inference.sampling import Sampling
from .document import Document, Paragraph

SYSTEM = {
    "en": "You summarise documents. A summary says what matters, in plain sentences, and adds nothing.",
    "zh": "你为文档写摘要：用平实的句子写出要点，不添加文档中没有的内容。",
}
_TASK = {
    "en": "Summarise the {what} above in a few sentences.",
    "zh": "请用几句话概括以上{what}的要点。",
}
_WHAT = {"en": {"document": "document", "part": "section", "parts": "summaries"}, "zh": {"document": "文档", "part": "章节", "parts": "各部分摘要"}}  # fmt: skip  # noqa: E501


@dataclass(frozen=True)
class Part:
    """What is summarised in one go: the text between two offsets."""

    title: str
    place: str  # "pages 3-7", "paragraphs 12-40", or "" for the whole
    start: int
    end: int


@dataclass(frozen=True)
class Summary:
    """One summary; `of` is "document" (read whole), "part", or "parts" (a summary of the parts' summaries)."""

    of: str
    part: Part
    text: str
    tokens: int  # of the prompt
    finish_reason: str = "stop"  # "length": cut at its limit


def messages(text: str, language: str, what: str) -> list[dict[str, str]]:
    """The conversation that asks for a summary of `text`."""
    task = _TASK[language].format(what=_WHAT[language][what])
    return [{"role": "system", "content": SYSTEM[language]}, {"role": "user", "content": f"{text.strip()}\n\n{task}"}]


def parts_of(document: Document, budget: int, tokens: Callable[[str], int], *, join: bool = True) -> list[Part]:
    """The document in parts of at most `budget` tokens each: a section, or with `join` as many as fit together; longer
    ones are cut between paragraphs. Raises UserError for a paragraph that alone is longer."""
    counts = [tokens(paragraph.text) + 2 for paragraph in document.paragraphs]
    groups: list[list[Paragraph]] = []
    spent = 0
    for section in _sections(document.paragraphs):
        size = sum(counts[paragraph.number - 1] for paragraph in section)
        if join and groups and spent + size <= budget:
            groups[-1] += section
            spent += size
            continue
        if size <= budget:
            groups.append(list(section))
            spent = size
            continue
        groups.append([])
        spent = 0
        for paragraph in section:
            count = counts[paragraph.number - 1]
            if count > budget:
                raise UserError(
                    f"Paragraph {paragraph.number} of {document.name} alone takes {count:,} tokens and a part may take"
                    f" {budget:,}: use a model with a larger window."
                )
            if groups[-1] and spent + count > budget:
                groups.append([])
                spent = 0
            groups[-1].append(paragraph)
            spent += count
    return [_part(document, group) for group in groups if group]


def _sections(paragraphs: Sequence[Paragraph]) -> Iterator[list[Paragraph]]:
    """Runs of paragraphs that begin with a heading."""
    section: list[Paragraph] = []
    for paragraph in paragraphs:
        if paragraph.level and section and not section[-1].level:
            yield section
            section = []
        section.append(paragraph)
    if section:
        yield section


def _part(document: Document, group: Sequence[Paragraph]) -> Part:
    first, last = group[0], group[-1]
    title = first.heading[-1] if first.heading else ""
    if document.unit:
        unit, a, b = document.unit, first.page, last.page
    else:
        unit, a, b = "paragraph", first.number, last.number
    return Part(title, f"{unit} {a}" if a == b else f"{unit}s {a}-{b}", first.start, last.end)


def summarize(
    engine: Engine, document: Document, sampling: Sampling, *, by_parts: bool = False,
    cache_for: Callable[[int], str] = lambda tokens: "full",
    on_part: Callable[[int, int, Part], Progress | None] | None = None, cancelled: Cancelled | None = None,
) -> Iterator[Summary]:  # fmt: skip
    """Yield the summary of the whole, or of every part and then of these. `on_part(number, count, part)` comes before
    each and may return a progress callback for it; `cache_for(tokens)` says the cache's format for the longest reading.

    Raises UserError, before anything is read, for a paragraph longer than the window.
    """
    language = document.language

    def size(text: str, what: str) -> int:
        return len(engine.chat.encode(messages(text, language, what)))

    room = engine.window - sampling.max_new_tokens
    whole = Part(document.title, "", 0, len(document.text))
    if not by_parts and size(document.text, "document") <= room:
        parts = [whole]
    else:
        frame = size("", "part")
        if room - frame < 128:
            raise UserError(
                f"{engine.name} reads {engine.window:,} tokens, too few for a part of the document beside"
                f" {sampling.max_new_tokens:,} tokens of summary: lower --max-new-tokens."
            )
        budget = room - frame - 16
        parts = parts_of(document, budget, lambda text: len(engine.tokenizer.encode(text)), join=not by_parts)
    longest = max(size(document.text[part.start : part.end], "part") for part in parts)
    cache = cache_for(min(engine.window, longest + sampling.max_new_tokens))
    return _run(engine, document, sampling, parts, whole, cache, on_part, cancelled)


def _run(
    engine: Engine, document: Document, sampling: Sampling, parts: list[Part], whole: Part, cache: str,
    on_part: Callable[[int, int, Part], Progress | None] | None, cancelled: Cancelled | None,
) -> Iterator[Summary]:  # fmt: skip
    made = []
    for number, part in enumerate(parts, start=1):
        what = "document" if part is whole else "part"
        progress = on_part(number, len(parts), part) if on_part is not None else None
        inside = [p.text for p in document.paragraphs if part.start <= p.start < part.end]
        text = document.text if part is whole else "\n\n".join(inside)
        made.append(_one(engine, document.language, text, what, part, sampling, cache, progress, cancelled))
        yield made[-1]
        if cancelled is not None and cancelled():
            return
    if len(made) < 2:
        return
    together = "\n\n".join(f"{summary.part.title or summary.part.place}: {summary.text}" for summary in made)
    ids = engine.chat.encode(messages(together, document.language, "parts"))
    if len(ids) + sampling.max_new_tokens > engine.window:
        return  # so many parts that their summaries are a book again: they stand for themselves
    progress = on_part(len(parts) + 1, len(parts) + 1, whole) if on_part is not None else None
    yield _one(engine, document.language, together, "parts", whole, sampling, cache, progress, cancelled)


def _one(
    engine: Engine, language: str, text: str, what: str, part: Part, sampling: Sampling, cache: str,
    progress: Progress | None, cancelled: Cancelled | None,
) -> Summary:  # fmt: skip
    ids = engine.chat.encode(messages(text, language, what))
    session = engine.session(len(ids) + sampling.max_new_tokens, cache=cache)
    done = session.complete(ids, sampling, on_progress=progress, cancelled=cancelled)
    return Summary(what, part, done.text.strip(), len(ids), str(done.stats.finish_reason))
