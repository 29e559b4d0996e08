"""Files that are text already: plain text, Markdown, CSV, source code. The text stays as it stands; paragraphs are
stretches of it.

Plain text and code part at blank lines and form feeds (which begin a page), Markdown also around headings, CSV
between records. Plain text that goes on for long without a blank line has a paragraph a line, or is hard-wrapped: it
parts where a line is indented, is a chapter's, or follows one that ends a sentence, and at LONGEST characters.
Headings: Markdown's, chapter lines of books, and the definitions that code stands in.
"""

import csv
import re
from collections.abc import Iterator

from .document import HAN, HEADING, Document, Paragraph, finished
from .words import sentences

_CODE_SUFFIXES = (
    "py pyi js mjs cjs jsx ts tsx java kt scala c h cc cpp cxx hpp hh m mm cs go rs rb php pl pm lua r jl swift dart hs"
    " ml mli fs clj ex exs erl sh bash zsh fish ps1 bat sql css scss less vue svelte tf proto thrift graphql json jsonl"
    " yaml yml toml ini cfg conf properties xml xsd xsl gradle cmake mk dockerfile f f90 f95 asm s v sv vhd vhdl zig"
    " nim el lisp scm tex bib rst ipynb"
)
CODE = frozenset(_CODE_SUFFIXES.split())
_CODE_NAMES = frozenset(("makefile", "dockerfile", "cmakelists.txt", "jenkinsfile", "rakefile", "gemfile"))
_GAP = re.compile(r"\n(?:[^\S\n\f]*\n)+|\n?\f")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_ENDED = re.compile(r"[.!?。！？…][\"'”’」』）)]*\s*\Z")  # a line's end that ends a sentence
_INDENTED = re.compile(r"\u3000|\t|  ")
LONGEST = 2_000  # characters of a paragraph that has no blank lines
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_CHAPTERS = (
    re.compile(r"(?:part|book|volume)\s+(?:[ivxlcdm]+|\d+|[a-z]{3,9})\b[^\n]{0,80}", re.IGNORECASE),
    re.compile(r"(?:chapter|appendix|act|canto)\s+(?:[ivxlcdm]+|\d+|[a-z]{1,12})\b[^\n]{0,80}", re.IGNORECASE),
)
_ZH_CHAPTERS = (
    re.compile(r"第[一二三四五六七八九十百千零〇两\d]+[部卷篇编](?:[\s\u3000：:][^\n]{0,40})?"),
    re.compile(r"第[一二三四五六七八九十百千零〇两\d]+[章回](?:[\s\u3000：:]?[^\n]{0,40})?"),
    re.compile(r"第[一二三四五六七八九十百千零〇两\d]+节(?:[\s\u3000：:]?[^\n]{0,40})?"),
)
_DEFINITION = re.compile(
    r"[ \t]*(?:(?:export|default|pub(?:\([^)]*\))?|public|private|protected|internal|static|final|"
    r"abstract|async|unsafe|override|inline|extern|virtual|sealed|data|open)\s+)*"
    r"(?:def|class|function\*?|func|fun|fn|struct|impl|interface|trait|enum|module|namespace|package|type|object|sub)"
    r"\s+(?P<name>[\w.:<>$*&\[\], ]*\w)"
)


def kind_of(name: str) -> str:
    """markdown, csv, html, code or text, by a file's name."""
    base = name.lower().rsplit("/", 1)[-1]
    suffix = base.rsplit(".", 1)[-1] if "." in base else ""
    if suffix in ("md", "markdown", "mdx", "qmd", "rmd"):
        return "markdown"
    if suffix in ("csv", "tsv"):
        return "csv"
    if suffix in ("html", "htm", "xhtml"):
        return "html"
    return "code" if suffix in CODE or base in _CODE_NAMES else "text"


def plain_document(text: str, name: str, encoding: str) -> Document:
    """The document of a text that is its own."""
    kind = kind_of(name)
    if kind == "markdown":
        spans = list(_markdown(text))
    elif kind == "csv":
        spans = list(_records(text, "\t" if name.lower().endswith(".tsv") else ""))
    else:
        spans = list(_blocks(text) if kind == "code" else _prose(text))
    paragraphs: list[Paragraph] = []
    opened = {}  # definitions: what code under them belongs to
    page, seen = 1, 0
    for start, end, level in spans:
        page += text.count("\f", seen, start)
        seen = start
        number = len(paragraphs) + 1
        if kind == "code":
            margin = text.rfind("\n", 0, start) + 1
            found = _DEFINITION.match(text, margin, end)
            depth = 1 + len(text[margin:start].expandtabs(4)) // 2
            opened[number] = (min(6, depth), found["name"].strip()[:80] if found else "")
        paragraphs.append(Paragraph(number, page, start, end, text[start:end], (), level))
    pages = text.rstrip("\f \n").count("\f") + 1
    unit = "page" if pages > 1 else ""
    return finished(name, text, paragraphs, format=kind, pages=pages, unit=unit, encoding=encoding, opened=opened)


Span = tuple[int, int, int]  # start, end, level of a heading (0: none)


def _trimmed(text: str, begin: int, end: int, level: int = 0) -> Iterator[Span]:
    block = text[begin:end]
    if inner := block.strip():
        start = begin + block.index(inner)
        yield start, start + len(inner), level


def _blocks(text: str) -> Iterator[Span]:
    begin = 0
    for gap in [*_GAP.finditer(text), None]:
        end = gap.start() if gap else len(text)
        yield from _trimmed(text, begin, end)
        begin = gap.end() if gap else end


def _prose(text: str) -> Iterator[Span]:
    for begin, end, _ in _blocks(text):
        if end - begin <= LONGEST:
            yield begin, end, _chapter_level(text, begin, end)
            continue
        start, before, alone = begin, "", False
        for line in _LINE.finditer(text, begin, end):
            at, heading = line.start(), _chapter_level(text, line.start(), line.end()) > 0
            parts = alone or heading or _INDENTED.match(line[0]) or _ENDED.search(before)
            if at > start and (parts or line.end() - start > LONGEST):
                yield from _cut(text, start, at)
                start = at
            before, alone = line[0], heading
        yield from _cut(text, start, end)


def _cut(text: str, start: int, end: int) -> Iterator[Span]:
    """A stretch of lines; a single line past LONGEST at the ends of its sentences."""
    level = _chapter_level(text, start, end)
    while end - start > LONGEST:
        ends = [stop for _, stop in sentences(text[start : start + LONGEST])][:-1]  # the last one may go on
        size = ends[-1] if ends else LONGEST
        yield from _trimmed(text, start, start + size)
        start += size
    yield from _trimmed(text, start, end, level)


def _chapter_level(text: str, begin: int, end: int) -> int:
    if end - begin > 120:
        return 0
    line = text[begin:end].strip()
    for patterns in (_CHAPTERS, _ZH_CHAPTERS):
        for level, pattern in enumerate(patterns, start=1):
            # A sentence that begins with "Part two" ends with a point.
            if pattern.fullmatch(line) and line[-1] not in ".,;。，；":
                return level
    return 0


def _markdown(text: str) -> Iterator[Span]:
    begin = at = 0
    fence = ""
    for line in _LINE.findall(text):
        body = line.rstrip("\n")
        if opened := _FENCE.match(body):
            if not fence:
                fence = opened[1]
            elif opened[1].startswith(fence) and not body.strip().strip(fence[0]):
                fence = ""
        elif not fence:
            if marked := HEADING.fullmatch(body):
                yield from _trimmed(text, begin, at)
                yield from _trimmed(text, at, at + len(body), len(marked[1]))
                begin = at + len(body)
            elif not body.strip():
                yield from _trimmed(text, begin, at)
                begin = at
        at += len(line)
    yield from _trimmed(text, begin, len(text))


def _records(text: str, delimiter: str) -> Iterator[Span]:
    """A record may hold line ends between quotes; csv's reader tells where it ends by the lines it has taken."""
    lines = _LINE.findall(text)
    if not delimiter:
        try:
            delimiter = csv.Sniffer().sniff(text[:20_000], ",;\t|").delimiter
        except csv.Error:
            delimiter = ","
    taken = 0

    def feed() -> Iterator[str]:
        nonlocal taken
        for line in lines:
            taken += 1
            yield line

    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    done = 0
    try:
        for _ in csv.reader(feed(), delimiter=delimiter):
            yield from _trimmed(text, offsets[done], offsets[taken])
            done = taken
    except csv.Error:  # a field past csv's limit, a lone quote: lines are records then
        for number in range(done, len(lines)):
            yield from _trimmed(text, offsets[number], offsets[number + 1])


def is_han(character: str) -> bool:
    """Whether a character is a Chinese one (or East Asian punctuation): no space stands beside it."""
    return bool(re.match(rf"[{HAN}\u3000-\u303f\uff00-\uffef]", character))
