"""Exact and near-duplicate removal, in one pass and bounded memory.

Exact: a 64-bit hash of the letters and digits of a document (case, spacing and punctuation aside; the marks
themselves where there is no letter).

Near: MinHash by one permutation (Li, Owen, Zhang 2012): every shingle's hash falls into one of `SLOTS` slots by its
top bits and each slot keeps its smallest; slots left empty borrow from the right (rotation densification, Shrivastava
and Li 2014). The share of equal slots estimates the Jaccard similarity of two documents' shingle sets. Candidates come
from locality-sensitive hashing in bands and are then compared by whole signatures.

The index is sorted numpy arrays merged as they grow, 768 to 1,536 bytes a document; beyond `memory_mb` the oldest
documents leave it, which the report states, since near-duplicates farther apart than that are then not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from longverse.data.text import hash64, hashes_of_letters, letters_of, squash

SLOTS = 128
_BLOCK = 250_000  # letters hashed at a time, so that one giant document does not set the peak memory
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_SLOT_BITS = np.uint64(64 - 7)


def rows_of_a_band(threshold: float) -> int:
    """Slots that must agree to make a pair a candidate: 8 in 16 bands, fewer in more bands for lower thresholds.

    With r rows in b bands a pair of similarity s is a candidate with the chance 1 - (1 - s^r)^b (Leskovec, Rajaraman,
    Ullman, "Mining of Massive Datasets", 3.4): at the threshold itself 0.95 at 0.8, at least 0.87 everywhere."""
    return 8 if threshold >= 0.8 else 4 if threshold >= 0.5 else 2


def shingle_width(language: str) -> int:
    """Letters in a shingle: about four English words, or seven Han characters."""
    return 7 if language == "zh" else 20


def signature(text: str, language: str) -> tuple[int, np.ndarray]:
    """(exact hash, uint32[SLOTS]) of a document. A text shorter than one shingle gets an all-zero signature,
    which is never compared."""
    width = shingle_width(language)
    slots = np.full(SLOTS, _EMPTY, dtype=np.uint64)
    exact = np.uint64(0)
    for block in _letter_blocks(text, width - 1):
        hashes = hashes_of_letters(block, width)
        if hashes.size == 0:  # the only block, and shorter than a shingle
            exact = _chain(exact, hashes_of_letters(block, 1))
            continue
        exact = _chain(exact, hashes)
        # Only small values can be a slot's smallest: keeping 1 in 16 of a long block leaves each slot's minimum
        # unchanged unless the slot would be empty, and then the whole block is used.
        low = hashes & np.uint64((1 << 57) - 1)
        if hashes.size > 16 * SLOTS * 16:
            few = low < np.uint64(1 << 53)
            part = np.full(SLOTS, _EMPTY, dtype=np.uint64)
            np.minimum.at(part, (hashes[few] >> _SLOT_BITS).astype(np.intp), low[few])
            if (part == _EMPTY).any():
                np.minimum.at(part, (hashes >> _SLOT_BITS).astype(np.intp), low)
        else:
            part = np.full(SLOTS, _EMPTY, dtype=np.uint64)
            np.minimum.at(part, (hashes >> _SLOT_BITS).astype(np.intp), low)
        slots = np.minimum(slots, part)
    if not exact:  # not one letter: the marks themselves are compared
        return hash64(squash(text)), _densify(slots)
    return int(exact), _densify(slots)


def _letter_blocks(text: str, overlap: int) -> Iterator[np.ndarray]:
    """The letters of a text in blocks of `_BLOCK`, each beginning with the last `overlap` letters of the one before:
    where a block ends depends on letters alone, so that spacing changes no hash."""
    held = np.zeros(0, dtype=np.uint32)
    fresh = 0  # letters held that no block has shown
    for start in range(0, len(text), _BLOCK):
        letters = letters_of(text[start : start + _BLOCK])
        held, fresh = np.concatenate([held, letters]), fresh + letters.size
        while fresh > _BLOCK:
            cut = held.size - fresh + _BLOCK
            yield held[:cut]
            held, fresh = held[max(0, cut - overlap) :], fresh - _BLOCK
    if fresh:
        yield held


def _chain(exact: np.uint64, hashes: np.ndarray) -> np.uint64:
    """Order-sensitive 64-bit hash of a run of hashes, continued from `exact`."""
    with np.errstate(over="ignore"):
        weights = np.arange(1, hashes.size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
        return exact * np.uint64(0xD6E8FEB86659FD93) + np.bitwise_xor.reduce(
            (hashes ^ (hashes >> np.uint64(31))) * weights, initial=np.uint64(hashes.size)
        )


def _densify(slots: np.ndarray) -> np.ndarray:
    filled = np.flatnonzero(slots != _EMPTY)
    if filled.size == 0:
        return np.zeros(SLOTS, dtype=np.uint32)
    # The donor of an empty slot is the next filled one to its right, cyclically; the distance enters the value, so
    # that two borrowed slots agree only when donor and distance do.
    position = np.searchsorted(filled, np.arange(SLOTS))
    donor = filled[position % filled.size]
    distance = ((donor - np.arange(SLOTS)) % SLOTS).astype(np.uint64)
    with np.errstate(over="ignore"):
        value = slots[donor] + distance * np.uint64(0x9E3779B97F4A7C15)
        mixed = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.maximum((mixed >> np.uint64(32)).astype(np.uint32), 1)


def similarity(left: np.ndarray, right: np.ndarray) -> float:
    """Estimated Jaccard similarity of the shingle sets behind two signatures."""
    if not left.any() or not right.any():
        return 0.0
    return float(np.mean(left == right))


@dataclass
class Deduplicator:
    """Accepts documents one after the other; `verdict` says whether one is new.

    near_threshold: estimated Jaccard similarity from which a document counts as a near-duplicate; None: exact only.
    memory_mb: bound on the near-duplicate index.
    """

    near_threshold: float | None = 0.8
    memory_mb: int = 256
    forgotten: int = 0  # documents that left the index for want of memory
    _exact: set[int] = field(default_factory=set)
    _signatures: list[np.ndarray] = field(default_factory=list)  # blocks of [n, SLOTS]
    _recent: list[np.ndarray] = field(default_factory=list)
    _recent_keys: dict[int, list[int]] = field(default_factory=dict)
    _keys: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    _owners: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _first: int = 0  # index of the oldest document still held
    _total: int = 0  # documents ever added

    def __post_init__(self) -> None:
        self._rows = rows_of_a_band(1.0 if self.near_threshold is None else self.near_threshold)

    def verdict(self, exact: int, slots: np.ndarray) -> str:
        """ "new" (and remembered), "exact" or "near"."""
        if exact in self._exact:
            return "exact"
        if self.near_threshold is not None and slots.any():
            keys = self._band_keys(slots)
            for owner in self._candidates(keys):
                if similarity(slots, self._get(owner)) >= self.near_threshold:
                    return "near"
            self._add(keys, slots)
        self._exact.add(exact)
        return "new"

    def remember(self, exact: int, slots: np.ndarray) -> None:
        """Take in a document of an earlier run, accepted then."""
        self._exact.add(exact)
        if self.near_threshold is not None and slots.any():
            self._add(self._band_keys(slots), slots)

    def _candidates(self, keys: np.ndarray) -> set[int]:
        found: set[int] = set()
        for key in keys.tolist():
            found.update(self._recent_keys.get(key, ()))
        if self._keys.size:
            left = np.searchsorted(self._keys, keys, side="left")
            right = np.searchsorted(self._keys, keys, side="right")
            for start, end in zip(left, right, strict=True):
                found.update(self._owners[start:end].tolist())
        return {owner for owner in found if owner >= self._first}

    def _get(self, owner: int) -> np.ndarray:
        index = owner - self._first
        for block in self._signatures:
            if index < len(block):
                return block[index]
            index -= len(block)
        return self._recent[index]

    def _add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        for key in keys.tolist():
            self._recent_keys.setdefault(key, []).append(self._total)
        self._recent.append(slots)
        self._total += 1
        if len(self._recent) >= 2_048:
            self._settle()

    def _settle(self) -> None:
        keys = np.fromiter((key for key, owners in self._recent_keys.items() for _ in owners), dtype=np.uint64)
        owners = np.fromiter((o for owners in self._recent_keys.values() for o in owners), dtype=np.int64)
        self._signatures.append(np.stack(self._recent))
        self._recent, self._recent_keys = [], {}
        bytes_a_document = SLOTS * 4 + SLOTS // self._rows * 16
        limit = max(1, self.memory_mb * 1_000_000 // (bytes_a_document * 2_048)) * 2_048
        while self._total - self._first > limit:
            gone = len(self._signatures.pop(0))
            self._first += gone
            self.forgotten += gone
        all_keys, all_owners = np.concatenate([self._keys, keys]), np.concatenate([self._owners, owners])
        held = all_owners >= self._first
        order = np.argsort(all_keys[held], kind="stable")
        self._keys, self._owners = all_keys[held][order], all_owners[held][order]

    def _band_keys(self, slots: np.ndarray) -> np.ndarray:
        """uint64[bands]: one key for each band of slots, the band's number mixed in."""
        bands = slots.reshape(-1, self._rows).astype(np.uint64)
        key = np.arange(1, len(bands) + 1, dtype=np.uint64)
        with np.errstate(over="ignore"):
            for row in range(self._rows):
                key = (key ^ bands[:, row]) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(29)
        return key
