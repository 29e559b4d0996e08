"""The token store: memory-mapped shards of uint16 or uint32 ids with an index of their documents.

A store is a folder:

    store.json          what it is: tokenizer fingerprint, dtype, vocabulary, sources, shards, counts; written last
    documents.npy       one DOCUMENT record a document: shard, offset, length, source, language, copies, extra
    ids.npy  ids.bin    the documents' ids: byte offsets [documents + 1], and UTF-8 bytes
    shards/00000.bin    ids, little-endian, document after document
    shards/00000.npz    that shard's own index and the builder's place in the sources (for a restart)

A shard is finished when its .npz exists; both files are written beside their names and renamed, tokens first.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longverse.data.text import LANGUAGES
from longverse.errors import UserError

DOCUMENT = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # tokens before this document in its shard
        ("length", "<u8"),  # tokens
        ("source", "<u2"),
        ("language", "u1"),  # index in text.LANGUAGES
        ("copies", "<u2"),  # how often the mixture shows the whole of it in an epoch
        ("extra", "<u8"),  # tokens of its beginning shown once more: settles a source's share exactly
    ]
)
FORMAT = 1


def replace_file(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to the disk, rename over it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """`np.savez` under a temporary name, then renamed to `path` (.npz)."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_array(path: Path, array: np.ndarray) -> None:
    """`np.save` under a temporary name, then renamed to `path` (.npy)."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


class ShardWriter:
    """Appends documents to one shard; `finish` makes it real. Nothing exists under the final name before."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.tokens = 0
        self._path = folder / f"{number:05d}.bin"
        self._temporary = folder / f"{number:05d}.bin.tmp"
        self._file = self._temporary.open("wb")
        self._lengths: list[int] = []
        self._sources: list[int] = []
        self._languages: list[int] = []
        self._ids: list[bytes] = []
        self._exact: list[int] = []
        self._signatures: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def add(
        self, ids: bytes, length: int, source: int, language: str, identity: str, exact: int, slots: np.ndarray
    ) -> None:
        """`ids`: the token ids as bytes; `length`: how many."""
        self._file.write(ids)
        self.tokens += length
        self._lengths.append(length)
        self._sources.append(source)
        self._languages.append(LANGUAGES.index(language))
        self._ids.append(identity.encode("utf-8", "replace"))
        self._exact.append(exact)
        self._signatures.append(slots)

    def finish(self, place: dict[str, Any]) -> None:
        """`place`: where the builder stands after this shard, kept in its index as JSON."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        ends = np.cumsum([0, *map(len, self._ids)], dtype=np.uint64)
        save_arrays(
            self._path.with_suffix(".npz"),
            lengths=np.array(self._lengths, dtype=np.uint64),
            sources=np.array(self._sources, dtype=np.uint16),
            languages=np.array(self._languages, dtype=np.uint8),
            ids=np.frombuffer(b"".join(self._ids), dtype=np.uint8),
            id_ends=ends,
            exact=np.array(self._exact, dtype=np.uint64),
            signatures=np.stack(self._signatures) if self._signatures else np.zeros((0, 128), np.uint32),
            place=np.frombuffer(json.dumps(place).encode(), dtype=np.uint8),
        )

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def finished_shards(folder: Path) -> list[Path]:
    """The .npz files 00000, 00001 ... without a gap; whatever else lies in the folder is a remnant."""
    done: list[Path] = []
    while (index := folder / f"{len(done):05d}.npz").exists() and index.with_suffix(".bin").exists():
        done.append(index)
    return done


@dataclass(frozen=True)
class TokenStore:
    """A finished store, opened read-only; tokens stay on the disk until they are looked at."""

    folder: Path
    info: dict[str, Any]  # store.json
    documents: np.ndarray  # DOCUMENT[documents], memory-mapped
    shards: list[np.ndarray]  # per shard: [tokens] memory-mapped ids
    _id_ends: np.ndarray
    _id_bytes: np.ndarray

    @classmethod
    def open(cls, folder: str | Path, tokenizer_fingerprint: str | None = None) -> TokenStore:
        """UserError for a folder that is no finished store, is damaged, or was tokenised by another tokenizer than
        `tokenizer_fingerprint` (where given)."""
        folder = Path(folder)
        try:
            info = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no finished token store; run `longverse data corpus` to its end."
            ) from None
        except ValueError:
            raise UserError(f"{folder / 'store.json'} is damaged; build the store again.") from None
        if info.get("format") != FORMAT:
            raise UserError(f"{folder} has store format {info.get('format')}, known is {FORMAT}; build it again.")
        if tokenizer_fingerprint and info["tokenizer"]["fingerprint"] != tokenizer_fingerprint:
            raise UserError(
                f"{folder} was tokenised by {info['tokenizer']['name']!r}, whose vocabulary is not this model's; "
                f"build a store with this model's tokenizer."
            )
        dtype = np.dtype(info["dtype"])
        shards = []
        for number, tokens in enumerate(info["shard_tokens"]):
            path = folder / "shards" / f"{number:05d}.bin"
            size = path.stat().st_size if path.exists() else -1
            if size != tokens * dtype.itemsize:
                raise UserError(
                    f"{path} has {size:,} bytes where {tokens * dtype.itemsize:,} belong; build the store again."
                )
            shards.append(np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype))
        return cls(
            folder,
            info,
            np.load(folder / "documents.npy", mmap_mode="r"),
            shards,
            np.load(folder / "ids.npy", mmap_mode="r"),
            np.memmap(folder / "ids.bin", dtype=np.uint8, mode="r") if len(shards) else np.zeros(0, np.uint8),
        )

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, each once."""
        return int(sum(self.info["shard_tokens"]))

    def ids(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """[end - start] ids of a document: a view into the mapped file."""
        record = self.documents[document]
        first, length = int(record["offset"]), int(record["length"])
        end = length if end is None else end
        assert 0 <= start <= end <= length
        return self.shards[int(record["shard"])][first + start : first + end]

    def name(self, document: int) -> str:
        """The document's id within its source."""
        start, end = int(self._id_ends[document]), int(self._id_ends[document + 1])
        return bytes(self._id_bytes[start:end]).decode("utf-8")

    def source(self, document: int) -> str:
        """The name of the document's source."""
        return self.info["sources"][int(self.documents[document]["source"])]

    def language(self, document: int) -> str:
        """One of text.LANGUAGES."""
        return LANGUAGES[int(self.documents[document]["language"])]
