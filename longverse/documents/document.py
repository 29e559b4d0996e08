"""What a reader makes of a file: one text, and its paragraphs with page, headings and character offsets.

A citation is a pair of offsets into `Document.text`, whatever the file was: `text[start:end]` gives it back exactly.
Formats that are text already keep their text as it stands; the others are written out as Markdown would write them
(`# ` before headings, `- ` before items, ` | ` between cells), so that a model sees the structure too.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import UserError

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORDS = re.compile(rf"[^\W_{HAN}]+")
_CHINESE = re.compile(rf"[{HAN}]")
HEADING = re.compile(r"(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*")


@dataclass(frozen=True)
class Paragraph:
    """A stretch of a document: `document.text[start:end] == text`, no white space at its edges."""

    number: int  # from 1, in the order of the text
    page: int  # from 1; see Document.unit for what it counts
    start: int  # characters
    end: int
    text: str
    heading: tuple[str, ...] = ()  # the headings above it, the outermost first; a heading names itself last
    level: int = 0  # 1 to 6 for a heading, 0 for all else


@dataclass(frozen=True)
class Document:
    """A text and what is known of it."""

    name: str  # the file's name, or "standard input"
    title: str  # as the file states it, else its first heading, else the name
    text: str  # newlines are \n
    paragraphs: tuple[Paragraph, ...]
    encoding: str  # of a text file: utf-8, utf-8-sig, utf-16, utf-16-le, utf-16-be, gb18030 or a declared one; else ""
    words: int  # runs of letters and digits, and single Chinese characters
    language: str  # en or zh: a guess by the share of Chinese characters
    format: str = "text"  # pdf, docx, epub, html, markdown, csv, code, text
    pages: int = 1
    unit: str = ""  # what `page` counts: "page", "section" (EPUB without page marks), or "" where there are none
    notes: tuple[str, ...] = ()  # what was left out or looks wrong, one sentence each

    def paragraph_at(self, offset: int) -> Paragraph:
        """The paragraph that holds a character, or the last one before it."""
        place = bisect_right(self.paragraphs, offset, key=lambda paragraph: paragraph.start) - 1
        return self.paragraphs[max(0, place)]

    def lines(self, start: int, end: int) -> tuple[int, int]:
        """Line numbers, from 1, of two offsets: the place in a file without pages."""
        first = self.text.count("\n", 0, start) + 1
        return first, first + self.text.count("\n", start, end)

    def place(self, start: int, end: int) -> str:
        """Where a stretch stands, in words: `page 3, paragraph 41`, `lines 12-14`."""
        number = self.paragraph_at(start).number
        if self.unit:
            return f"{self.unit} {self.paragraph_at(start).page}, paragraph {number}"
        if self.format in ("html", "docx"):  # whose lines nobody sees
            return f"paragraph {number}"
        first, last = self.lines(start, end)
        return f"line {first}" if first == last else f"lines {first}-{last}"


@dataclass(frozen=True)
class Block:
    """One paragraph on its way into a document."""

    text: str
    page: int = 1
    level: int = 0  # of a heading


def assemble(
    name: str, blocks: Iterable[Block], *, title: str = "", format: str, pages: int = 1, unit: str = "",
    encoding: str = "", notes: Sequence[str] = (),
) -> Document:  # fmt: skip
    """A document of blocks, with a blank line between them. Raises UserError when they hold no text."""
    parts: list[str] = []
    found: list[Paragraph] = []
    at = 0
    for block in blocks:
        text = _clean(block.text)
        if not text:
            continue
        if block.level:
            text = f"{'#' * min(6, block.level)} {' '.join(text.split())}"
        if parts:
            at += 2
        found.append(Paragraph(len(found) + 1, block.page, at, at + len(text), text, (), min(6, block.level)))
        parts.append(text)
        at += len(text)
    if not found:
        raise UserError(f"{name} holds no text: give a file with text.")
    return finished(
        name, "\n\n".join(parts), found, title=title, format=format, pages=pages, unit=unit, encoding=encoding,
        notes=notes,
    )  # fmt: skip


def finished(
    name: str, text: str, paragraphs: Sequence[Paragraph], *, title: str = "", format: str, pages: int = 1,
    unit: str = "", encoding: str = "", notes: Sequence[str] = (), opened: Mapping[int, tuple[int, str]] | None = None,
) -> Document:  # fmt: skip
    """A document of a text and its paragraphs: the heading paths filled in, the words counted. `opened` tells of
    paragraphs that are no headings and yet begin something (level, name) or, without a name, end it: code."""
    title = " ".join(title.split()) or first_heading(text) or name
    words, han = count_words(text)
    return Document(
        name=name, title=title, text=text, paragraphs=tuple(_with_headings(paragraphs, opened or {})),
        encoding=encoding, words=words, language="zh" if han * 5 > words else "en", format=format, pages=pages,
        unit=unit, notes=tuple(notes),
    )  # fmt: skip


def count_words(text: str) -> tuple[int, int]:
    """Words (runs of letters and digits, and single Chinese characters), and how many of them are Chinese."""
    han = len(_CHINESE.findall(text))
    return han + len(_WORDS.findall(text)), han


def first_heading(text: str) -> str:
    """The first Markdown heading of a text, or nothing."""
    found = re.search(r"^#{1,6}[ \t]+(\S.*?)[ \t]*#*[ \t]*$", text, re.MULTILINE)
    return found[1] if found else ""


def _with_headings(paragraphs: Sequence[Paragraph], opened: Mapping[int, tuple[int, str]]) -> list[Paragraph]:
    path: list[tuple[int, str]] = []  # level and text of the open headings
    made = []
    for paragraph in paragraphs:
        level, name = opened.get(paragraph.number, (paragraph.level, heading_text(paragraph.text)))
        if level:
            while path and path[-1][0] >= level:
                path.pop()
            if name:
                path.append((level, name))
        made.append(replace(paragraph, heading=tuple(text for _, text in path)))
    return made


def heading_text(text: str) -> str:
    """A heading without its marks."""
    marked = HEADING.fullmatch(text)
    return marked[2] if marked else " ".join(text.split())


_BROKEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufdd0\ufdd1\ufffe\uffff]")


def _clean(text: str) -> str:
    """Line ends as \\n, no control characters or halves of characters, no white space at the edges or line ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ")
    text = _BROKEN.sub("", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
