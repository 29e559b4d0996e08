"""From a file to text with paragraphs: .txt, .md and other plain text, in UTF-8, UTF-16 or GB18030.

What cannot be read is named as what it is (a PDF, a picture, an empty file); bytes are never replaced or dropped. Not
done here: PDF, DOCX, EPUB and HTML.
"""

import difflib
import re
import stat
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, expand

LIMIT = 256 * 2**20  # bytes: far above any window, and far below what would fill the memory

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
# Characters that Chinese cannot do without: 30 to 45% of modern prose, laws and classics, down to 5% of hard stretches;
# 2% of Korean or Japanese read as if it were GB18030.
_FREQUENT_HAN = frozenset(
    "的一是不了在有人这中大来上个国我以要他时用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所"
    "民得经之为其者曰无与三十二事日自月公本部和应当第条规理管业关务门或及长高将此由已全等去天相如前里现没家只样进着新都实"
    "重两从加"
)
_FREQUENT_HANGUL = frozenset("이다는의에을가은고를하한사로지기인도나자서어시대부해정그리으수있아일들게것과라니")
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


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
    return decode(_bytes(path), path.name)


def _bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
            with path.open("rb") as file:
                return file.read(LIMIT + 1)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: check the name{_nearby(path)}.") from None
    except PermissionError:
        raise UserError(f"You may not read {path}: change its permissions or copy it.") from None
    except NotADirectoryError:
        raise UserError(f"There is no file {path}: a part of its path is itself a file.") from None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)[:80]!r} cannot be read ({reason}): check the name.") from None
    what = "folder: give one file in it" if stat.S_ISDIR(mode) else "device and not a document: give a text file"
    raise UserError(f"{path} is a {what}.")


def _nearby(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f", or did you mean {path.parent / close[0]}" if close else ""


def decode(data: bytes, name: str) -> Document:
    """The document in `data`; `name` is for its title and for messages. Raises UserError as `read` does."""
    if len(data) > LIMIT:
        raise UserError(f"{name} is larger than {LIMIT // 2**20} MB, the most that is read: give a part of it.")
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
            return _decoded(data, name)
    except UserError:
        if not magic:
            raise
    what = _ZIPPED.get(Path(name).suffix.lower(), what) if magic.startswith(b"PK") else what
    advice = "" if ";" in what else "; give a text file"
    raise UserError(f"{name} is {what}{advice}.")


def _decoded(data: bytes, name: str) -> tuple[str, str]:
    """Text and encoding: byte-order marks, strict UTF-8, GB18030 if it reads as Chinese, UTF-16 by how it reads or by
    its zero bytes."""
    for mark, codec in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return _strict(data, codec, name), codec
    zeros = data.count(0)
    if not zeros:
        try:
            return _no_controls(data.decode("utf-8"), name), "utf-8"
        except UnicodeDecodeError as error:
            wrong = error.start
        text = _try(data, "gb18030")
        other = "" if text is None else _not_chinese(text, data)
        if text is not None and not other:
            return _no_controls(text, name), "gb18030"
        if (utf16 := _utf16(data)) is not None:
            return _no_controls(utf16[0], name), utf16[1]
        raise UserError(
            f"{name} is neither UTF-8 (byte {data[wrong]:#04x} at {wrong:,} is wrong), UTF-16 nor Chinese in GB18030"
            f"{other}: save it as UTF-8."
        )
    if (utf16 := _utf16(data)) is not None:
        return _no_controls(utf16[0], name), utf16[1]
    raise UserError(
        f"{name} holds binary data ({zeros:,} zero bytes), or is UTF-16 without a byte-order mark and in no order that"
        " reads as text: give a text file, best saved as UTF-8."
    )


def _strict(data: bytes, codec: str, name: str) -> str:
    try:
        return _no_controls(data.decode(codec), name)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} begins as {codec.removesuffix('-sig').upper()} and is damaged at byte {error.start:,}:"
            " save it again as UTF-8."
        ) from None


def _try(data: bytes, codec: str) -> str | None:
    try:
        return data.decode(codec)
    except UnicodeDecodeError:
        return None


def _utf16(data: bytes) -> tuple[str, str] | None:
    """UTF-16 without a mark: the byte order in which it reads as Chinese or ASCII, else the one in which other scripts
    have their zero bytes; None where neither tells."""
    orders = {}
    for codec in ("utf-16-le", "utf-16-be"):
        text = _try(data, codec)
        if text is None or "\0" in text:
            continue
        counts = Counter(text)
        plain = sum(count for character, count in counts.items() if character < "\x80")
        known = plain + sum(count for c, count in counts.items() if c >= "\x80" and _in_gb2312(c))
        letters, share = _frequent_share(counts)
        # In the wrong order common characters become rare ones and those of other scripts.
        reads = known >= 0.8 * len(text) and (not letters or share >= 0.05)
        orders[codec] = (reads, known, plain, text)
    best = max(orders, key=lambda codec: orders[codec][:3], default="")
    if not best:
        return None
    # Latin letters, digits, spaces and line ends have a zero byte each: before the other one or after it.
    zeros, odd = data.count(0), data[1::2].count(0)
    on_its_side = odd if best == "utf-16-le" else zeros - odd
    if orders[best][0] or (zeros and on_its_side >= 0.95 * zeros):
        return orders[best][3], best
    return None


def _not_chinese(text: str, data: bytes) -> str:
    """Empty where a text decoded as GB18030 reads as Chinese, else a clause about what it may be.

    Almost any bytes are valid GB18030. Chinese keeps mostly to the 7,445 characters of GB 2312; the bytes of EUC-KR and
    EUC-JP do too, but then its frequent characters are missing, and Japanese shows its kana.
    """
    counts = Counter(character for character in text if character > "\x7f")
    common = sum(count for character, count in counts.items() if _in_gb2312(character))
    letters, share = _frequent_share(counts)
    unknown = " (it may be another encoding, such as EUC-KR, EUC-JP, Shift-JIS, Big5 or Latin-1)"
    if common < 0.8 * counts.total():
        return unknown
    kana = sum(count for character, count in counts.items() if "\u3041" <= character <= "\u30ff")
    hangul = Counter(c for c in _try(data, "euc_kr") or "" if "\uac00" <= c <= "\ud7a3")
    korean = sum(count for c, count in hangul.items() if c in _FREQUENT_HANGUL)
    if korean > share * letters:
        return "; it reads as Korean in EUC-KR"
    if kana * 5 > letters:
        return "; it reads as Japanese, perhaps in EUC-JP"
    return unknown if letters >= 40 and share < 0.04 else ""


def _frequent_share(counts: Counter[str]) -> tuple[int, float]:
    """How many letters outside ASCII there are, and what share of them Chinese uses most."""
    letters = sum(count for character, count in counts.items() if character > "\x7f" and character.isalpha())
    frequent = sum(count for character, count in counts.items() if character in _FREQUENT_HAN)
    return letters, frequent / letters if letters else 0.0


def _in_gb2312(character: str) -> bool:
    try:
        character.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def _no_controls(text: str, name: str) -> str:
    controls = len(_CONTROLS.findall(text))
    if controls > len(text) // 200:  # a stray one is no reason to refuse a book
        raise UserError(f"{name} holds binary data ({controls:,} control characters) and not text: give a text file.")
    return text
