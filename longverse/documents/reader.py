"""From a file to text with paragraphs: .txt, .md and other plain text, in UTF-8, UTF-16 or GB18030.

What cannot be read is named as what it is (a PDF, a picture, an empty file); bytes are never replaced or dropped. Not
done here: PDF, DOCX, EPUB and HTML.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, expand
from ..textfiles import LIMIT, decoded, read_bytes

# What a file is by its first bytes, and how people call it. Where they are words that a text may begin with (RIFF,
# GGUF), they count only when the rest is no text; a PDF or RTF file is mostly printable and is none all the same.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"%PDF-", "a PDF; the PDF reader is not in this version, so save its text as .txt first"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\xd0\xcf\x11\xe0", "an old Office file; save it as plain text first"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a RIFF file (sound, video or picture)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"(\xb5/\xfd", "a Zstandard archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x7fELF", "a program"),
    (b"SQLite format", "an SQLite database"),
    (b"GGUF", "a model file (GGUF); give it with --model"),
    (b"{\\rtf", "an RTF file; save it as plain text first"),
)
_ZIPPED = {
    ".docx": "a Word file", ".xlsx": "an Excel file", ".pptx": "a PowerPoint file", ".epub": "an EPUB book",
    ".odt": "an OpenDocument text",
}  # fmt: skip
_PRINTABLE_FORMATS = (b"%PDF-", b"{\\rtf")
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"


@dataclass(frozen=True)
class Paragraph:
    """A stretch of text between blank lines: `document.text[start:end] == text`, no white space at its edges."""

    start: int  # characters
    end: int
    text: str


@dataclass(frozen=True)
class Document:
    """A text and what is known of it."""

    name: str  # the file's name, or "standard input"
    title: str  # its first Markdown heading, else the name
    text: str  # newlines are \n
    paragraphs: tuple[Paragraph, ...]
    encoding: str  # utf-8, utf-8-sig, utf-16, utf-16-le, utf-16-be, gb18030
    words: int  # runs of letters and digits, and single Chinese characters
    language: str  # en or zh: a guess by the share of Chinese characters


def read(source: str | Path) -> Document:
    """Read a file, or standard input for `-`. Raises UserError for whatever is not readable text."""
    if str(source) == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError(
                "The document is - (standard input) and nothing is piped in: type `longverse ask - ... < FILE`."
            )
        return decode(sys.stdin.buffer.read(LIMIT + 1), "standard input")
    path = expand(source)
    return decode(read_bytes(path), path.name)


def decode(data: bytes, name: str) -> Document:
    """The document in `data`; `name` is for its title and for messages. Raises UserError as `read` does."""
    if not data:
        raise UserError(f"{name} is empty: give a file with text.")
    text, encoding = _text(data, name)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{name} holds only white space: give a file with text.")
    heading = re.search(r"^#{1,6}[ \t]+(\S.*?)[ \t#]*$", text, re.MULTILINE)
    han = len(re.findall(f"[{_HAN}]", text))
    words = han + len(re.findall(rf"[^\W_{_HAN}]+", text))
    return Document(
        name=name,
        title=heading[1] if heading else name,
        text=text,
        paragraphs=tuple(_paragraphs(text)),
        encoding=encoding,
        words=words,
        language="zh" if han * 5 > words else "en",
    )


def _paragraphs(text: str) -> list[Paragraph]:
    found = []
    begin = 0
    for gap in [*re.finditer(r"\n(?:[^\S\n]*\n)+", text), None]:
        end = gap.start() if gap else len(text)
        block = text[begin:end]
        if inner := block.strip():
            start = begin + block.index(inner)
            found.append(Paragraph(start, start + len(inner), inner))
        begin = gap.end() if gap else end
    return found


def _text(data: bytes, name: str) -> tuple[str, str]:
    """Text and encoding; what is no text is named by its first bytes where they tell."""
    magic, what = next((entry for entry in _MAGIC if data.startswith(entry[0])), (b"", ""))
    words = magic.isascii() and magic.decode().isprintable() and magic not in _PRINTABLE_FORMATS
    try:
        if not magic or words:
            return decoded(data, name)
    except UserError:
        if not magic:
            raise
    what = _ZIPPED.get(Path(name).suffix.lower(), what) if magic.startswith(b"PK") else what
    advice = "" if ";" in what else "; give a text file"
    raise UserError(f"{name} is {what}{advice}.")
