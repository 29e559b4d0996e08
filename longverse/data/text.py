"""Small, shared views of a text: its language, its hash, its sentences, its n-gram hashes.

Everything here is a pure function of the text, so a build on another machine makes the same choices.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

LANGUAGES = ("en", "zh", "code", "other")

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_CODE = re.compile(
    r"^\s*(?:def |class |import |from \S+ import |return\b|#include|public |private |func |fn |let |const |var "
    r"|if \(|for \(|while \(|@\w|[{}]\s*$|//|/\*)",
    re.MULTILINE,
)


def hash64(text: str, salt: str = "") -> int:
    """A 64-bit hash that does not change between processes, machines or Python versions (BLAKE2b)."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=salt.encode()[:64])
    return int.from_bytes(digest.digest(), "little")


def unit_hash(text: str, salt: str = "") -> float:
    """`hash64` as a number in [0, 1)."""
    return (hash64(text, salt) >> 11) / float(1 << 53)


def detect_language(text: str) -> str:
    """One of LANGUAGES by counting scripts and code-like line beginnings in up to 24,000 characters."""
    if len(text) > 24_000:
        middle = len(text) // 2
        text = text[:8_000] + text[middle : middle + 8_000] + text[-8_000:]
    han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    letters = sum(map(str.isalpha, text)) or 1
    lines = sum(1 for line in text.splitlines() if line.strip()) or 1
    if len(_CODE.findall(text)) > max(2, 0.15 * lines):
        return "code"
    if han > 0.3 * letters:
        return "zh"
    return "en" if latin > 0.6 * letters and latin > 0.3 * len(text) else "other"


def language_of_short(text: str) -> str:
    """`zh` when a sentence holds a fair share of Han characters, else `en`: for questions and answers."""
    han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    return "zh" if han and han * 4 >= latin else "en"


def squash(text: str) -> str:
    """White space folded to single spaces: novels are hard-wrapped."""
    return " ".join(text.split())


_HAN_OR_MARK = r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef“”‘’…—]"
_ZH_BREAK = re.compile(rf"(?<={_HAN_OR_MARK})\s*\n\s*|\s*\n\s*(?={_HAN_OR_MARK})")


def squash_zh(text: str) -> str:
    """`squash` for Chinese, which joins its lines without a space."""
    return squash(_ZH_BREAK.sub("", text))


def fold(text: str) -> str:
    """Case and all white space aside: how answers, replies and evidence are compared."""
    return "".join(text.split()).casefold()


# A full stop ends an English sentence only after a word of more than one letter that is no common title or
# abbreviation; the opening quotation mark of the next sentence may stand before its capital letter.
_EN_END = re.compile(r"""(?<=[a-z0-9)\]'"”’][.!?])["”’)]{0,2}\s+(?=["“‘'(]?[A-Z])""")
_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|St|Messrs|Mme|Mlle|Esq|Rev|Hon|Col|Capt|Lieut|Lt|Gen|Sergt|Prof|Jr|Sr|No|vol|viz|etc|i\.e|e\.g)\.$"
)
_ZH_END = re.compile(r"(?<=[。！？])[」』”’）]*")  # a semicolon parts clauses


def sentences(text: str, language: str) -> list[tuple[int, int]]:
    """Character spans of the sentences of one paragraph, in order, without the white space between them."""
    pattern = _ZH_END if language == "zh" else _EN_END
    spans: list[tuple[int, int]] = []
    start = 0
    for match in pattern.finditer(text):
        end = match.start() + len(match.group().rstrip())
        if language != "zh" and _ABBREVIATION.search(text, start, end):
            continue
        if text[start:end].strip():
            spans.append(_trim(text, start, end))
        start = match.end()
    if text[start:].strip():
        spans.append(_trim(text, start, len(text)))
    return spans


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


# Without blank lines a paragraph ends with a line that ends a sentence: lines may be hard-wrapped.
_LINE_END = re.compile(r"(?<=[.!?。！？；：”」』\"])[ \t]*\n\s*")
_BLANK = re.compile(r"\n[ \t\u3000\r]*\n\s*")


def paragraphs(text: str) -> list[tuple[int, int]]:
    """Character spans of the paragraphs: split at blank lines, and at line ends where there are hardly any."""
    breaks = list(_BLANK.finditer(text))
    if len(breaks) * 3_000 < len(text):
        ends = [m for m in _LINE_END.finditer(text) if not _ABBREVIATION.search(text, m.start() - 12, m.start())]
        breaks = sorted(breaks + ends, key=re.Match.start)  # where both are, they begin at one place
    spans, start = [], 0
    for match in breaks:
        if match.start() > start:
            spans.append((start, match.start()))
        start = match.end()
    if start < len(text) and text[start:].strip():
        spans.append((start, len(text)))
    return spans


_KEEP = np.zeros(0x10000, dtype=np.uint16)


def _keep_table() -> np.ndarray:
    """[65536] the lower-cased letter or digit of each code point, 0 for what shingles ignore; built once."""
    if not _KEEP[ord("a")]:
        for point in range(0x10000):
            char = chr(point)
            if char.isalnum():
                low = char.lower()
                _KEEP[point] = ord(low) if len(low) == 1 and ord(low) < 0x10000 else point
    return _KEEP


_MIX = np.uint64(0x9E3779B97F4A7C15)


def letters_of(text: str) -> np.ndarray:
    """uint32[n]: the code points of the letters and digits of a text, lower-cased, in order."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    high = points >= 0x10000
    letters = _keep_table()[np.where(high, 0, points)].astype(np.uint32)
    if high.any():  # rare Han characters and the like
        rare = [point for point in np.unique(points[high]).tolist() if chr(point).isalnum()]
        letters = np.where(high & np.isin(points, rare), points, letters)
    return letters[letters > 0]


def shingle_hashes(text: str, width: int) -> np.ndarray:
    """uint64[n]: a hash of every run of `width` letters and digits, case, space and punctuation aside. Empty when the
    text holds fewer than `width`."""
    return hashes_of_letters(letters_of(text), width)


def hashes_of_letters(letters: np.ndarray, width: int) -> np.ndarray:
    """uint64[n - width + 1]: a hash of every run of `width` of the n letters.

    A run is hashed by prefix doubling: h(2k)[i] mixes h(k)[i] and h(k)[i + k], so a width costs log2(width) numpy
    passes and no state.
    """
    letters = letters.astype(np.uint64)
    if letters.size < width:
        return np.zeros(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        power = (letters + np.uint64(1)) * _MIX  # hash of runs of 1, 2, 4 ... letters
        done: np.ndarray | None = None
        covered, size = 0, 1
        while True:
            if width & size:
                part = power if done is None else power[covered:]
                done = part if done is None else _mix(done[: part.size], part)
                covered += size
            if covered == width:
                break
            power = _mix(power[:-size], power[size:])
            size *= 2
    assert done is not None
    return done[: letters.size - width + 1]


def _mix(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    mixed = (left ^ (left >> np.uint64(29))) * _MIX + right
    return (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
