"""Files of text whatever their encoding: what documents and haystacks are read through.

Bytes are never replaced or dropped: what is no text in UTF-8, UTF-16 or GB18030 is refused.
"""

import difflib
import re
import stat
from collections import Counter
from pathlib import Path

from .errors import UserError

LIMIT = 256 * 2**20  # bytes: far above any window, and far below what would fill the memory

# Characters that Chinese cannot do without: 30 to 45% of modern prose, laws and classics, down to 5% of hard stretches;
# 2% of Korean or Japanese read as if it were GB18030.
_FREQUENT_HAN = frozenset(
    "的一是不了在有人这中大来上个国我以要他时用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所"
    "民得经之为其者曰无与三十二事日自月公本部和应当第条规理管业关务门或及长高将此由已全等去天相如前里现没家只样进着新都实"
    "重两从加"
)
_FREQUENT_HANGUL = frozenset("이다는의에을가은고를하한사로지기인도나자서어시대부해정그리으수있아일들게것과라니")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def read_bytes(path: Path) -> bytes:
    """What a file holds, at most LIMIT + 1 bytes of it. UserError where it is missing, no file or not readable."""
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


def decoded(data: bytes, name: str) -> tuple[str, str]:
    """Text and encoding: byte-order marks, strict UTF-8, GB18030 if it reads as Chinese, UTF-16 by how it reads or by
    its zero bytes. UserError, with `name` in it, for what is no text and for more than LIMIT bytes."""
    if len(data) > LIMIT:
        raise UserError(f"{name} is larger than {LIMIT // 2**20} MB, the most that is read: give a part of it.")
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


def read_text(path: Path) -> str:
    """The text of a file, every line ended by a line feed. UserError where it cannot be read or is no text."""
    return decoded(read_bytes(path), path.name)[0].replace("\r\n", "\n").replace("\r", "\n")


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
