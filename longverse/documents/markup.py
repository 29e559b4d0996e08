"""HTML to blocks, for web pages and for the chapters of an EPUB.

Text that a reader would not see is left out: scripts, styles, templates, and what is marked hidden. Headings keep their
level, items their dash, tables their cells; everything else is its text. Nothing is fetched, and nothing is run.
"""

import re
from html.parser import HTMLParser

from ..errors import UserError
from ..textfiles import decoded
from .document import Block, Document, assemble

DEPTH = 2000  # elements inside one another: real pages have tens
_HIDDEN = frozenset(("script", "style", "template", "noscript", "svg", "math", "iframe", "object", "canvas", "select"))
_BLOCK_TAGS = (
    "p div section article header footer main aside nav ul ol dl dt dd blockquote figure figcaption table caption thead"
    " tbody tfoot tr form fieldset address details summary hr li pre h1 h2 h3 h4 h5 h6 body html"
)
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"))
_CHARSET = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)"""
    rb"""|^\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([\w.:-]+)""",
    re.IGNORECASE,
)
# What a start tag ends, and the elements that shield what is outside of them.
_ENDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "li": (("li",), ("ul", "ol", "menu")),
    "dt": (("dt", "dd"), ("dl",)),
    "dd": (("dt", "dd"), ("dl",)),
    "tr": (("tr",), ("table",)),
    "td": (("td", "th"), ("tr", "table")),
    "th": (("td", "th"), ("tr", "table")),
}
_UNSEEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)


def html_document(data: bytes, name: str) -> Document:
    """The document of a web page. Raises UserError when it holds no text or is no text."""
    text, encoding = html_text(data, name)
    parser = blocks_of(text, name)
    return assemble(name, parser.blocks, title=parser.title, format="html", encoding=encoding)


def html_text(data: bytes, name: str) -> tuple[str, str]:
    """Text and encoding: a byte-order mark or the declared charset, else found as for any text file."""
    declared = _CHARSET.search(data[:4096])
    if declared and not data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        charset = (declared[1] or declared[2]).decode("ascii").lower()
        if charset.startswith(("utf-16", "utf-32", "ucs-2", "ucs-4")):
            charset = "utf-8"  # or these letters could not have been read as they stand
        charset = "gb18030" if charset in ("gb2312", "gbk", "gb_2312-80") else charset
        charset = "cp1252" if charset in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii") else charset
        try:
            return data.decode(charset), charset
        except (LookupError, UnicodeDecodeError, ValueError):
            pass  # a wrong declaration is common, and the text is mostly UTF-8 then
    return decoded(data, name)


def blocks_of(text: str, name: str, page: int = 1) -> "Blocks":
    """Parse a page; its blocks begin at `page`."""
    parser = Blocks(page)
    try:
        parser.feed(text)
        parser.close()
        while parser.stack:  # a page cut off in the middle
            parser.handle_endtag(parser.stack[-1][0])
    except _TooDeep:
        raise UserError(
            f"{name} nests more than {DEPTH:,} elements inside one another and was not made to be read: give its text."
        ) from None
    parser.flush()
    return parser


class _TooDeep(Exception):
    """Elements within elements past the limit."""


class Blocks(HTMLParser):
    """Collects `blocks`, the `title`, and page marks (EPUB's `doc-pagebreak`) as it parses."""

    def __init__(self, page: int = 1) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.title = ""
        self.page = page
        self.marks = 0  # page marks seen
        self.stack: list[tuple[str, bool]] = []  # open elements, and whether they hide what is in them
        self.hidden = 0
        self.parts: list[str] = []  # text of the open block
        self.begun = False
        self.begun_on = page  # the page on which that text began
        self.level = 0
        self.prefix = ""
        self.pre = 0
        self.cells: list[list[str]] = []  # the open rows of nested tables, innermost last

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        self._end_implied(tag)
        self._page_mark(values)
        if tag == "br":
            self.parts.append("\n")
        elif tag in ("td", "th") and self.cells:
            self._end_cell()
        elif tag in _BLOCKS and not self.hidden:
            if tag == "tr":
                self.flush()
                self.cells.append([])
            elif not self.cells:  # blocks in a cell are one cell
                self.flush()
            else:
                self.parts.append(" ")
            if tag[0] == "h" and tag[1:].isdigit():
                self.level = int(tag[1:])
            elif tag == "li":
                self.prefix = "- "
            elif tag == "pre":
                self.pre += 1
        if tag in _VOID:
            return
        hides = tag in _HIDDEN or "hidden" in values or bool(_UNSEEN.search(values.get("style", "")))
        self.stack.append((tag, hides))
        self.hidden += hides
        if len(self.stack) > DEPTH:
            raise _TooDeep

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        # XHTML closes <p/> and <a id="x"/> at once; HTML's parser would leave them open.
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def _end_implied(self, tag: str) -> None:
        """Close what this tag ends without an end tag of its own: `<li>` an open item, `<tr>` an open row."""
        ends, within = _ENDS.get(tag, ((), ()))
        if tag in _BLOCKS:
            ends = (*ends, "p")
        for place in range(len(self.stack) - 1, max(-1, len(self.stack) - 12), -1):
            open_tag = self.stack[place][0]
            if open_tag in ends:
                self.handle_endtag(open_tag)
                break
            if open_tag in within or (not within and open_tag in _BLOCKS):
                break

    def handle_endtag(self, tag: str) -> None:
        if not any(open_tag == tag for open_tag, _ in self.stack[-64:]):
            return
        while self.stack:
            closed, hides = self.stack.pop()
            self.hidden -= hides
            self._close(closed)
            if closed == tag:
                return

    def _close(self, tag: str) -> None:
        if self.hidden:
            return
        if tag == "tr" and self.cells:
            self._end_cell()
            row = self.cells.pop()
            while row and not row[-1]:
                row.pop()  # what follows no value takes no column from one
            text = " | ".join(row)
            if self.cells:  # a table inside a cell
                self.parts.append(f" {text} ")
            elif any(row):
                self.blocks.append(Block(text, self.begun_on))
        elif tag in ("td", "th") and self.cells:
            self._end_cell(empty=True)
        elif tag in _BLOCKS:
            if tag == "pre":
                self.flush()
                self.pre = max(0, self.pre - 1)
            elif not self.cells:
                self.flush()
            else:
                self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1][0] == "title":
            if not any(tag == "svg" for tag, _ in self.stack):
                self.title += data
            return
        if self.hidden:
            return
        if not self.pre:
            data = re.sub(r"[ \t\r\n\f\v]+", " ", data)
        if not self.begun and data.strip():
            self.begun, self.begun_on = True, self.page
        self.parts.append(data)

    def flush(self) -> None:
        """End the open block."""
        text = "".join(self.parts)
        self.parts.clear()
        self.begun = False
        if not self.pre:
            text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
        if text.strip():
            self.blocks.append(Block(self.prefix + text.strip("\n"), self.begun_on, self.level))
            self.prefix = ""
        self.level = 0

    def _end_cell(self, empty: bool = False) -> None:
        """End the open cell, or none. empty: it was open, so that without text it keeps its column all the same."""
        text = " ".join("".join(self.parts).split())
        self.parts.clear()
        if text or empty:
            self.cells[-1].append(text)

    def _page_mark(self, values: dict[str, str]) -> None:
        kind = f"{values.get('epub:type', '')} {values.get('role', '')}"
        if "pagebreak" not in kind:
            return
        label = values.get("title") or values.get("aria-label") or values.get("id", "")
        number = re.search(r"\d{1,6}", label)
        self.page = int(number[0]) if number else self.page + 1
        self.marks += 1
