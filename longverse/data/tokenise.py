"""Tokenising in time linear in the text, with nothing but `tokenizers` and numpy (worker processes import no torch).

A tokenizer first splits a text into pieces (its pre-tokenizer), then merges bytes or characters within each piece.
So a text may be cut at any place where a piece always ends, and the ids of the parts, joined, are the ids of the
whole. Which places those are depends on the tokenizer: `LinearEncoder` knows five kinds of cut, and *probes* each
on the tokenizer before using it, over every pair of the character classes that may stand on its two sides: a piece
must end
exactly there (or, for tokenizers without pieces, no vocabulary entry may span it), and the ids must add up. A kind
that fails once is never used; a tokenizer that passes none is run on whole texts.

Cutting pays twice. Long lines cost no more per byte than short ones, and the short units between cuts ("` river`",
"`,`") repeat so often in languages with spaces that a dictionary from unit to ids answers most of them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

_LETTERS = "aZéß"
_HAN = "天地好"
_DIGITS = "07"
_MARKS = ".,;:!?)-"  # what may end a clause; the apostrophe is left out: contractions cling to it
_OTHER = "\"'([{<>}]/\\@#$%^&*+=_~`|€°“”‘’…—「」『』（）《》"
_HAN_MARKS = "，。；：、！？"
_FOLLOW = ("b", " b", "\n", "7", "天", "，", "", "  x", "\n\nQ", "'s", "。。", "...", " 7")
_BEFORE = ("", "b", " b", "7", "天", "b,", "\n", "b  ", "...", "Don't ")

# name: (pattern of the cut, characters seen on its left, on its right). A zero-width pattern, except that `gap`
# swallows the space, for tokenizers that put one in front of every text by themselves.
_CUTS: dict[str, tuple[str, str, str]] = {
    "space": (r"(?<=[^\s\x1c-\x1f])(?= [^\W_])", _LETTERS + _HAN + _DIGITS + _MARKS + _OTHER + _HAN_MARKS, " "),
    "gap": (r"(?<=[^\s\x1c-\x1f]) (?=[^\W_])", _LETTERS + _HAN + _DIGITS + _MARKS + _OTHER + _HAN_MARKS, " "),
    "word": (r"(?<=[A-Za-z])(?=[.,;:!?)])", _LETTERS, ".,;:!?)"),
    "line": (r"(?<=[A-Za-z\u4e00-\u9fff])(?=\n)", _LETTERS + _HAN, "\n"),
    "clause": (r"(?<=[\u4e00-\u9fff])(?=[，。；：、！？])", _HAN, _HAN_MARKS),
    "stop": (r"(?<=[。！？；，])(?=[\u4e00-\u9fff])", "。！？；，", _HAN),
}
_PROBED: dict[str, tuple[str, ...]] = {}  # tokenizer JSON to its cuts: a probe takes half a second
_CACHED_CHARS = 24  # a longer unit hardly ever comes twice
_CACHE_ENTRIES = 200_000  # about 40 MB; the dictionary starts afresh beyond it
_BATCH_UNITS = 4_096
_SEGMENT = 100_000  # characters


class LinearEncoder:
    """Ids of a text without special tokens; text that spells a special token is ordinary text.

    `tokenizer`: a `tokenizers.Tokenizer`, or its JSON. `cuts` lists the kinds of cut that passed the probe.
    """

    def __init__(self, tokenizer: object) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()  # type: ignore[attr-defined]
        self.backend = Tokenizer.from_str(text)  # our own copy: the switches below must not leak to the caller's
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        size = self.backend.get_vocab_size(with_added_tokens=True)
        highest = max(self.backend.get_vocab(with_added_tokens=True).values(), default=0)
        self.vocab_size = max(size, highest + 1)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        if text not in _PROBED:
            _PROBED[text] = self._probe(json.loads(text))
        self.cuts = _PROBED[text]
        self._splitter = re.compile("|".join(_CUTS[name][0] for name in self.cuts)) if self.cuts else None
        self._known: dict[str, bytes] = {}

    def encode_bytes(self, text: str) -> bytes:
        """The ids as little-endian `dtype`."""
        if self._splitter is None or len(text) <= 2 * _SEGMENT:
            return self._encode_segment(text)
        parts, start = [], 0
        while start < len(text):  # lists of units stay small, however long the document
            cut = self._splitter.search(text, start + _SEGMENT)
            end = cut.start() if cut else len(text)
            parts.append(self._encode_segment(text[start:end]))
            start = cut.end() if cut else end
        return b"".join(parts)

    def split(self, text: str) -> list[str]:
        """The units of a text: the ids of the units, joined, are the ids of the text."""
        return self._splitter.split(text) if self._splitter else [text]

    def next_cut(self, text: str, start: int) -> int:
        """The first safe place to cut at or after `start`; `start` itself where the tokenizer has none."""
        cut = self._splitter.search(text, start) if self._splitter else None
        return cut.start() if cut else start

    def _encode_segment(self, text: str) -> bytes:
        units = self.split(text)
        known = self._known
        missing = list({unit for unit in units if unit not in known})
        fresh: dict[str, bytes] = {}
        for start in range(0, len(missing), _BATCH_UNITS):
            part = missing[start : start + _BATCH_UNITS]
            for unit, encoding in zip(
                part, self.backend.encode_batch_fast(part, add_special_tokens=False), strict=True
            ):
                fresh[unit] = np.array(encoding.ids, dtype=self.dtype).tobytes()
        if not fresh:
            return b"".join(map(known.__getitem__, units))
        joined = b"".join([known[unit] if unit in known else fresh[unit] for unit in units])
        if len(known) > _CACHE_ENTRIES:
            known.clear()
        known.update((unit, ids) for unit, ids in fresh.items() if len(unit) <= _CACHED_CHARS)
        return joined

    def encode(self, text: str) -> np.ndarray:
        """[tokens] ids in `dtype`."""
        return np.frombuffer(self.encode_bytes(text), dtype=self.dtype)

    def count(self, text: str) -> int:
        """Number of tokens of `text`."""
        return len(self.encode_bytes(text)) // self.dtype.itemsize

    def counts(self, texts: Iterable[str]) -> list[int]:
        """Number of tokens of each text by itself."""
        return [self.count(text) for text in texts]

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _probe(self, spec: dict) -> tuple[str, ...]:
        """The kinds of cut that hold for this tokenizer, `gap` only where `space` does not."""
        # Merges never cross the end of a piece; where there are no pieces (or too few), the vocabulary decides:
        # no entry holds a space after another character, so no merge can join the two sides of a space.
        spanning = None
        good: list[str] = []
        for name, (_, lefts, rights) in _CUTS.items():
            if name == "gap" and "space" in good:
                continue
            if name in ("word", "line", "clause", "stop") and good == []:
                continue  # no cut at spaces: a tokenizer that sees whole texts
            if self._adds_up(name, lefts, rights):
                at_spaces = name in ("space", "gap")
                if not self._pieces_end(name, lefts, rights):
                    if spanning is None:
                        spanning = _spans_space(spec)
                    if not at_spaces or spanning:
                        continue
                good.append(name)
        return tuple(good)

    def _adds_up(self, name: str, lefts: str, rights: str) -> bool:
        for left, right in itertools.product(lefts, rights):
            for before, after in itertools.product(_BEFORE, _FOLLOW):
                head, tail = f"{before}{left}", f"{right}{after}"
                if name in ("space", "gap"):
                    if not after[:1].isalnum():
                        after = "b" + after
                    tail = f" {after}"
                if self._ids(head + tail) != self._ids(head) + self._ids(tail[1:] if name == "gap" else tail):
                    return False
        return True

    def _pieces_end(self, name: str, lefts: str, rights: str) -> bool:
        splitter = self.backend.pre_tokenizer
        if splitter is None:
            return False
        normalizer = self.backend.normalizer
        for left, right in itertools.product(lefts, rights):
            after = "b" if name in ("space", "gap") else ""
            texts = [f"b{left}", f"{right}{after}b"]
            if normalizer is not None:
                texts = [normalizer.normalize_str(part) for part in ("".join(texts), texts[0])]
                texts = [texts[1], texts[0][len(texts[1]) :]]
            pieces = splitter.pre_tokenize_str("".join(texts))
            if len(texts[0]) not in {span[0] for _, span in pieces[1:]}:
                return False
        return True


def _spans_space(spec: dict) -> bool:
    """Whether a vocabulary entry holds a space marker after another character. Only for models that show spaces
    in their entries; true (cannot tell) for anything else."""
    vocabulary: Sequence = spec.get("model", {}).get("vocab", ())
    entries = [entry if isinstance(entry, str) else entry[0] for entry in vocabulary]
    added = [token["content"] for token in spec.get("added_tokens", ())]
    if not entries or spec["model"].get("type") not in ("BPE", "Unigram"):
        return True
    return any(re.search("[^▁ Ġ][▁ Ġ]", entry) for entry in [*entries, *added])
