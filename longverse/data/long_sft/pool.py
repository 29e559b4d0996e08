"""The documents a builder draws from: written once into one file, then mapped by every worker.

Two million characters of novel in every process would set the peak memory, so the pool keeps UTF-8 on the disk and
gives a worker one document at a time, with counts for every unit of the linear encoder: a slice that begins and ends
at units is counted without encoding it again.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from longverse.data.shards import replace_file
from longverse.data.sources import Skipped, SourceConfig, read_source
from longverse.data.tokenise import LinearEncoder
from longverse.errors import UserError


@dataclass(frozen=True)
class PoolDocument:
    """What is known of a document without reading it."""

    index: int
    id: str
    source: str
    language: str
    title: str
    start: int  # bytes in the pool's file
    end: int
    characters: int


def write_pool(
    folder: Path,
    sources: Sequence[SourceConfig],
    base: Path,
    keep: Callable[[str, str], bool],
) -> dict[str, Skipped]:
    """Read all sources into `folder`/pool.txt and pool.jsonl, unless they are there. keep(text, language): False drops
    a document (contamination). Returns what was skipped, by source."""
    skipped = {source.name: Skipped() for source in sources}
    listing, data = folder / "pool.jsonl", folder / "pool.txt"
    summary = folder / "pool.skipped.json"
    if listing.exists() and data.exists() and summary.exists():
        for name, values in json.loads(summary.read_text(encoding="utf-8")).items():
            skipped[name].counts.update(values["counts"])
            skipped[name].examples.extend(values["examples"])
        return skipped
    lines: list[str] = []
    place = 0
    temporary = data.with_name("pool.txt.tmp")
    with temporary.open("wb") as file:
        for source in sources:
            before = len(lines)
            for document in read_source(source, base, skipped[source.name]):
                if not keep(document.text, document.language):
                    skipped[source.name].add("overlaps a decontamination file", document.id)
                    continue
                encoded = document.text.encode("utf-8")
                file.write(encoded)
                row = PoolDocument(
                    len(lines), document.id, source.name, document.language, document.title.strip(),
                    place, place + len(encoded), len(document.text),
                )  # fmt: skip
                lines.append(json.dumps(asdict(row), ensure_ascii=False))
                place += len(encoded)
            if len(lines) == before:
                why = "; ".join(skipped[source.name].examples[:2]) or "it is empty"
                raise UserError(f"source {source.name!r} gave no document ({why}); correct it or drop it.")
    temporary.replace(data)
    replace_file(
        summary, json.dumps({n: {"counts": s.counts, "examples": s.examples} for n, s in skipped.items()}).encode()
    )
    replace_file(listing, ("\n".join(lines) + "\n").encode())
    return skipped


class UnitCounter:
    """Token counts with a memory: units come back all the time while an item is fitted.

    The memory maps the 64-bit hash of a unit to its count; a builder confirms finished items by a full encoding.
    """

    _ENTRIES = 400_000

    def __init__(self, encoder: LinearEncoder) -> None:
        self.encoder = encoder
        self._known: dict[int, int] = {}

    def units(self, text: str) -> tuple[list[str], list[int]]:
        """The units of a text and their token counts."""
        units = self.encoder.split(text)
        keys = list(map(hash, units))
        known = self._known
        missing = {key: unit for key, unit in zip(keys, units, strict=True) if key not in known}
        if missing:
            if len(known) > self._ENTRIES:
                known.clear()
                missing = dict(zip(keys, units, strict=True))
            words = list(missing.values())
            for start in range(0, len(words), 4096):
                part = words[start : start + 4096]
                encoded = self.encoder.backend.encode_batch_fast(part, add_special_tokens=False)
                known.update((hash(unit), len(e)) for unit, e in zip(part, encoded, strict=True))
        return units, [known[key] for key in keys]

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        return sum(self.units(text)[1])


class Opened:
    """A document with its text, and token counts that are made where they are asked for.

    The text is divided at safe cuts into blocks of about 30,000 characters; a block's units are counted when it is
    first touched, so that a short item out of a long document pays for what it shows only.
    """

    _BLOCK = 30_000

    def __init__(self, about: PoolDocument, text: str, counter: UnitCounter) -> None:
        self.about = about
        self.text = text
        self._counter = counter
        self._bounds: dict[int, int] = {}
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def tokens_between(self, start: int, end: int) -> int:
        """Tokens of text[start:end], exact where both are at units, else to within a unit."""
        total, block = 0, self._block_of(start)
        while self._bound(block) < end:
            ends, counts = self._block(block)
            first = int(np.searchsorted(ends, max(start, ends[0])))
            last = int(np.searchsorted(ends, min(end, ends[-1])))
            total += int(counts[last] - counts[first])
            block += 1
        return total

    def end_for(self, start: int, tokens: int) -> int:
        """The last unit's end such that text[start:end] has at most `tokens` tokens."""
        if tokens <= 0 or start >= len(self.text):
            return min(start, len(self.text))
        block = self._block_of(start)
        while True:
            ends, counts = self._block(block)
            first = int(np.searchsorted(ends, max(start, ends[0])))
            if counts[-1] - counts[first] > tokens:
                last = int(np.searchsorted(counts, counts[first] + tokens, side="right")) - 1
                return int(ends[max(last, first)]) if ends[max(last, first)] >= start else start
            tokens -= int(counts[-1] - counts[first])
            if ends[-1] >= len(self.text):
                return len(self.text)
            block += 1

    def start_for(self, end: int, tokens: int) -> int:
        """The first unit's beginning such that text[start:end] has at most `tokens` tokens."""
        block = self._block_of(max(end - 1, 0))
        while True:
            ends, counts = self._block(block)
            last = int(np.searchsorted(ends, min(end, ends[-1])))
            if counts[last] >= tokens:
                return int(ends[int(np.searchsorted(counts, counts[last] - max(tokens, 0)))])
            tokens -= int(counts[last])
            if block == 0:
                return 0
            block -= 1

    def _bound(self, block: int) -> int:
        """Where a block begins: at the first safe cut from its nominal place on."""
        if block not in self._bounds:
            nominal = block * self._BLOCK
            cut = self._counter.encoder.next_cut(self.text, nominal) if 0 < nominal < len(self.text) else nominal
            self._bounds[block] = min(cut, len(self.text))
        return self._bounds[block]

    def _block_of(self, place: int) -> int:
        block = place // self._BLOCK
        while block and self._bound(block) > place:
            block -= 1
        return block

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(int64[units + 1] ends in characters, the first being the block's beginning; int64[units + 1] tokens
        before)."""
        if block not in self._blocks:
            start, stop = self._bound(block), self._bound(block + 1)
            units, tokens = self._counter.units(self.text[start:stop])
            sizes = np.fromiter(map(len, units), dtype=np.int64, count=len(units))
            if sizes.sum() != stop - start:  # a tokenizer whose cut swallows the space: one character a cut
                sizes[:-1] += 1
            ends = start + np.concatenate([[0], np.cumsum(sizes)])
            self._blocks[block] = ends, np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        return self._blocks[block]


class Pool:
    """The documents of a pool folder, opened one at a time."""

    def __init__(self, folder: Path, counter: UnitCounter) -> None:
        with (folder / "pool.jsonl").open("rb") as lines:  # str.splitlines would cut a title at U+2028
            self.documents = [PoolDocument(**json.loads(line)) for line in lines]
        self.counter = counter
        self._file = (folder / "pool.txt").open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self.open = lru_cache(maxsize=12)(self._open)
        self._ratios: dict[str, float] = {}

    def text(self, index: int) -> str:
        """The text of a document, without counts."""
        about = self.documents[index]
        return self._map[about.start : about.end].decode("utf-8")

    def _open(self, index: int) -> Opened:
        return Opened(self.documents[index], self.text(index), self.counter)

    def tokens_per_character(self, language: str) -> float:
        """Estimate from three documents of a language, for choosing documents before they are opened."""
        if language not in self._ratios:
            samples = [d for d in self.documents if d.language == language][:40:16]
            texts = [self.text(d.index)[:20_000] for d in samples] or ["The river ran on."]
            self._ratios[language] = sum(map(self.counter.count, texts)) / max(1, sum(map(len, texts)))
        return self._ratios[language]

    def estimate(self, index: int) -> int:
        """Estimated tokens of a document."""
        about = self.documents[index]
        return round(about.characters * self.tokens_per_character(about.language))
