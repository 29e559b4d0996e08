"""PDF to paragraphs and headings: what the lines of a page belong to, told by their places and sizes.

A PDF knows where characters stand and not what they mean. Lines join to a paragraph unless the gap, an indent, a
bullet, another size or a short last line parts them; lines larger than the body (or bold and alone) are headings; what
repeats at the edges of most pages is left out and noted. A paragraph that runs over a page's end is two, so that each
has its page. Not done: text in pictures (a page without a text layer is named), reading order of posters and forms.
"""

import re
from collections import Counter
from itertools import pairwise

from ..errors import UserError
from .document import HAN, Block, Document, assemble
from .pdf_lines import Line, pdf_lines

_BULLET = re.compile(
    r"[•▪◦‣●○■□–—*-]\s|\(?\d{1,3}[.)]\s|\([a-zivx]{1,4}\)\s|[一二三四五六七八九十]{1,3}、|第[一二三四五六七八九十百\d]+条"
)
_FILE_TITLE = re.compile(r"\.(docx?|pdf|tex|indd|pptx?|xlsx?)$|^microsoft |^untitled|^\(", re.IGNORECASE)
_ENDS = re.compile(r"[.!?:。！？：;；][\"'”’」)）]*$")
_WIDE = re.compile(rf"[{HAN}\u3000-\u303f\u3040-\u30ff\uff00-\uffef]")
_UNREADABLE = re.compile(r"[\ufffd\ue000-\uf8ff\x00-\x08\x0e-\x1f]")
EDGE = 3  # lines at the top and bottom of a page that may be running heads


def pdf_document(data: bytes, name: str) -> Document:
    """The document of a PDF. Raises UserError for a damaged, locked or scanned one, or unreadable text."""
    title, pages, pictures = pdf_lines(data, name)
    characters = sum(len(line.text) for page in pages for line in page)
    bare = [number for number, page in enumerate(pages, start=1) if not page]
    if characters < 8 * len(pages) and any(pictures):
        raise UserError(
            f"{name} is a scan: its {len(pages):,} pages are pictures without a text layer; add one first with an OCR"
            " program, such as ocrmypdf."
        )
    if not characters:
        raise UserError(f"{name} holds no text on its {len(pages):,} pages: give a file with text.")
    text = "".join(line.text for page in pages for line in page)
    if len(_UNREADABLE.findall(text.replace("\x02", ""))) > 0.3 * len(text):
        raise UserError(
            f"{name} does not say what its characters mean (fonts without a Unicode table): read it with an OCR"
            " program, such as ocrmypdf --force-ocr."
        )
    notes = []
    scanned = [number for number in bare if pictures[number - 1]]
    if scanned:
        few = ", ".join(map(str, scanned[:8])) + (" …" if len(scanned) > 8 else "")
        notes.append(f"{len(scanned)} of {len(pages)} pages are pictures without text and were not read: {few}.")
    pages, left_out = _without_running_heads(pages)
    if left_out:
        notes.append(f"Repeated at page edges and left out: {'; '.join(left_out[:4])}.")
    return assemble(
        name, layout(pages), title=title if _real_title(title) else "", format="pdf", pages=len(pages), unit="page",
        notes=notes,
    )  # fmt: skip


def _real_title(title: str) -> bool:
    """Programs write file names and their own name where a title belongs."""
    title = title.strip()
    return bool(title) and not _FILE_TITLE.search(title)


def _without_running_heads(pages: list[list[Line]]) -> tuple[list[list[Line]], list[str]]:
    """Drop edge lines that, digits aside, stand on most pages and hardly ever inside of them, as rows of tables do;
    returns the pages and what was dropped."""

    def key(line: Line) -> str:
        return re.sub(r"\d+|\b[ivxlc]+\b", "#", " ".join(line.text.lower().split()))

    def edge(page: list[Line]) -> list[Line]:
        ordered = sorted(page, key=lambda line: -line.base)
        return ordered[:EDGE] + ordered[max(EDGE, len(ordered) - EDGE) :]

    full = [page for page in pages if len(page) > 2]
    if len(full) < 4:
        return pages, []
    counts = Counter(k for page in full for k in {key(line) for line in edge(page)})
    inside: Counter[str] = Counter()
    for page in full:
        outer = {id(line) for line in edge(page)}
        inside.update({key(line) for line in page if id(line) not in outer})
    # Left and right pages may differ, so half is enough; a bare page number is no text whatever its count.
    often, seldom = max(3, 0.4 * len(full)), 0.2 * len(full)
    repeated = {k for k, count in counts.items() if count >= often and inside[k] < seldom}
    examples: dict[str, str] = {}
    kept = []
    for page in pages:
        gone = {id(line) for line in edge(page) if key(line) in repeated}
        for line in page:
            if id(line) in gone:
                examples.setdefault(key(line), line.text)
        kept.append([line for line in page if id(line) not in gone])
    if not any(kept):
        return pages, []
    return kept, [f"“{text[:60]}”" for text in examples.values()]


def layout(pages: list[list[Line]]) -> list[Block]:
    """The blocks of pages of lines."""
    sizes: Counter[float] = Counter()
    bold = total = 0
    for page in pages:
        for line in page:
            sizes[_rounded(line.size)] += len(line.text)
            total += len(line.text)
            bold += len(line.text) * line.bold
    body = sizes.most_common(1)[0][0] if sizes else 10.0
    larger = sorted((size for size in sizes if size > 1.12 * body), reverse=True)
    levels = {size: min(4, rank) for rank, size in enumerate(larger, start=1)}
    bold_level = min(5, max(levels.values(), default=0) + 1) if bold < 0.3 * total else 0
    blocks = []
    for number, page in enumerate(pages, start=1):
        for lines in _paragraphs(page):
            text = _joined(lines)
            level = levels.get(_rounded(lines[0].size), 0) if len(text) <= 200 else 0
            alone = all(line.bold for line in lines) and len(text) <= 150 and not re.search(r"[.,;，。；]$", text)
            if not level and alone and bold_level and re.search(r"\w", text):
                level = bold_level
            blocks.append(Block(text, number, level))
    return blocks


def _rounded(size: float) -> float:
    return round(2 * size) / 2


def _paragraphs(page: list[Line]) -> list[list[Line]]:
    if not page:
        return []
    # Distances of lines in units of their size; the lower ones are those inside paragraphs, however many have one line.
    pitches = sorted((a.base - b.base) / a.size for a, b in pairwise(page) if 0.9 < (a.base - b.base) / a.size < 4)
    pitch = min(pitches[len(pitches) // 5 if len(pitches) >= 15 else 0], 2.1) if pitches else 1.4
    right = max(line.right for line in page)
    groups = [[page[0]]]
    for before, line in pairwise(page):
        if _begins(groups[-1], before, line, pitch, right):
            groups.append([line])
        else:
            groups[-1].append(line)
    return groups


def _begins(group: list[Line], before: Line, line: Line, pitch: float, right: float) -> bool:
    """Whether `line` begins a paragraph after `before`, the last of `group`."""
    size = before.size
    drop = before.base - line.base
    if abs(drop) < 0.4 * size:  # the same row: cells of a table, or a change of font
        return False
    if abs(line.size - before.size) > 0.1 * size:
        return True
    if drop < 0:  # a new column, or a box: a sentence may go on there
        return bool(_ENDS.search(before.text)) or not re.match(rf"[a-z{HAN}]", line.text)
    if drop > max(1.3 * pitch, pitch + 0.25) * size:
        return True
    if _BULLET.match(line.text):
        return True
    if line.bold != before.bold and all(g.bold == before.bold for g in group):
        return True
    bullet = bool(_BULLET.match(group[0].text))
    column = min(g.left for g in group[1:]) if len(group) > 1 else group[0].left
    if line.left > column + 0.9 * size and not (bullet and len(group) == 1):
        return True
    width = right - min(line.left, before.left)
    short = before.right < right - max(3 * size, 0.12 * width)
    return short and bool(_ENDS.search(before.text))


def _joined(lines: list[Line]) -> str:
    """One line of text: words parted by a hyphen joined, no space between Chinese characters."""
    text = lines[0].text
    for before, line in pairwise(lines):
        following = line.text
        same_row = abs(before.base - line.base) < 0.4 * before.size
        if text.endswith("\x02"):  # PDFium's mark for a hyphen that parts a word
            text = text[:-1] + following if following[:1].islower() else f"{text[:-1]}-{following}"
        elif text.endswith("\xad"):
            text = text[:-1] + following
        elif text.endswith("-") or (_WIDE.match(text[-1]) and _WIDE.match(following[0])):
            text += following
        elif same_row and line.left - before.right > 1.5 * before.size:
            text += f" | {following}"
        else:
            text += f" {following}"
    return " ".join(text.replace("\x02", "-").split())
