"""From a file to a document: PDF, DOCX, EPUB, HTML, Markdown, CSV, source code and plain text in UTF-8, UTF-16 or
GB18030; folders and several files at once.

What a file is, its bytes say; the name only tells kinds of text apart. What cannot be read is named as what it is (a
scan, a picture, a locked file, an empty one); bytes are never replaced or dropped.
"""

import os
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError, expand
from ..textfiles import LIMIT, decoded, read_bytes
from .archives import DAMAGED
from .document import Block, Document, Paragraph, assemble
from .plain import kind_of, plain_document

__all__ = ["Block", "Document", "Paragraph", "assemble", "decode", "read", "read_many"]

FOLDER_FILES = 10_000  # files of one folder
FOLDER_BYTES = 1024 * 2**20  # and their bytes

# What a file is by its first bytes, and how people call it. Where they are words that a text may begin with (RIFF,
# GGUF), they count only when the rest is no text; an RTF file is mostly printable and is none all the same.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\xd0\xcf\x11\xe0", "an old Office file; save it as .docx or as plain text first"),
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
    ".docx": "a Word file, and a damaged one; save it anew", ".xlsx": "an Excel file; save it as .csv first",
    ".pptx": "a PowerPoint file; save it as a PDF first", ".epub": "an EPUB book, and a damaged one; get it anew",
    ".odt": "an OpenDocument text; save it as .docx or as a PDF first",
}  # fmt: skip
_PRINTABLE_FORMATS = (b"{\\rtf",)
_SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules"))


Skipped = Callable[[str, str], None]  # told of what is passed over: its name, and why


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


def read_many(sources: Sequence[str | Path], *, skipped: Skipped | None = None) -> list[Document]:
    """Read files and folders, in order; `-` is standard input. A folder gives its files, also of folders in it, by
    name; hidden ones are passed over, and `skipped(name, reason)` hears of those that are no documents and, by their
    path and a slash, of folders that cannot be listed.

    Raises UserError for a named file that cannot be read, a folder without any document, or one far too large.
    """
    found: list[Document] = []
    seen: set[Path] = set()
    for source in sources:
        path = expand(source)
        if str(source) == "-" or not os.path.isdir(path):  # pathlib's own raise where a name is too long
            there = os.path.exists(path)
            if there and (real := path.resolve()) in seen:
                continue
            if there:
                seen.add(real)
            found.append(read(source))
            continue
        before = len(found)
        for file in _files(path, skipped):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            name = file.relative_to(path).as_posix()
            try:
                found.append(decode(read_bytes(file), name))
            except UserError as error:
                if skipped is not None:
                    skipped(name, str(error))
        if len(found) == before:
            raise UserError(f"{path} is a folder without a document in it: give one that holds some.")
    if not found:
        raise UserError("There is no document: name a file or a folder.")
    return found


def _files(folder: Path, skipped: Skipped | None) -> list[Path]:
    """The regular files under a folder, links to folders not followed; `skipped` hears of folders that cannot be
    listed. UserError past the limits."""
    files: list[Path] = []
    size = 0

    def tell(error: OSError) -> None:
        if skipped is not None:
            skipped(
                f"{error.filename}{os.sep}",
                f"{error.filename} cannot be listed ({error.strerror}): check its permissions.",
            )

    for place, folders, names in os.walk(folder, onerror=tell):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            file = Path(place, name)
            try:
                if name.startswith(".") or not file.is_file():
                    continue
                size += file.stat().st_size
            except OSError as error:  # in a folder that may be listed and not entered
                tell(error)
                continue
            files.append(file)
            if len(files) > FOLDER_FILES or size > FOLDER_BYTES:
                raise UserError(
                    f"{folder} holds more than {FOLDER_FILES:,} files or {FOLDER_BYTES // 2**20:,} MB, the most that is"
                    " read at once: give a part of it."
                )
    return files


def decode(data: bytes, name: str) -> Document:
    """The document in `data`; `name` is for its title, its kind of text, and messages. Raises UserError as `read`."""
    if len(data) > LIMIT:
        raise UserError(f"{name} is larger than {LIMIT // 2**20} MB, the most that is read: give a part of it.")
    if not data:
        raise UserError(f"{name} is empty: give a file with text.")
    if data.startswith(b"%PDF-") or (b"%PDF-" in data[:1024] and name.lower().endswith(".pdf")):
        from .pdf import pdf_document

        return pdf_document(data, name)
    if data.startswith(b"PK"):
        kind = _zip_kind(data)
        if kind == "docx":
            from .docx import docx_document

            return docx_document(data, name)
        if kind == "epub":
            from .epub import epub_document

            return epub_document(data, name)
    if data.startswith(b"\xd0\xcf\x11\xe0") and "EncryptedPackage".encode("utf-16-le") in data:
        raise UserError(f"{name} is an Office file locked with a password: save a copy without one.")
    markup = re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)\b", data[:512], re.IGNORECASE)
    if (kind_of(name) == "html" and not any(data.startswith(magic) for magic, _ in _MAGIC)) or markup:
        from .markup import html_document

        return html_document(data, name)
    text, encoding = _text(data, name)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{name} holds only white space: give a file with text.")
    return plain_document(text, name, encoding)


def _zip_kind(data: bytes) -> str:
    """docx, epub, or nothing, by the files that the archive lists."""
    import io

    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except DAMAGED:  # no archive to speak of; the reader of its kind would say so
        return ""
    if "META-INF/container.xml" in names:
        return "epub"
    return "docx" if any(re.fullmatch(r"word/document\d*\.xml", name) for name in names) else ""


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
