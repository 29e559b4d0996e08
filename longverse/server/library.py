"""Uploaded documents, kept in one folder: the file as it came, the document read from it, and what is known of it.

    FOLDER/file-<24 hex digits>/{source, document.json, about.json}

No text of a client becomes part of a path: the ids are the server's own, and names are only shown. A folder appears
whole or not at all.
"""

import json
import re
import secrets
import shutil
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from ..documents.reader import Document
from ..errors import UserError
from .errors import ApiError
from .reading import load, read_apart

KEPT = 16  # documents kept in memory
ID = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True)
class About:
    """What is known of a stored document; `tokens` are of its text alone."""

    id: str
    filename: str
    bytes: int
    created_at: int
    purpose: str
    title: str
    words: int
    tokens: int
    pages: int
    unit: str
    paragraphs: int
    language: str
    format: str
    notes: tuple[str, ...] = ()


class Library:
    """The stored documents. Thread-safe; adding and reading block, so the event loop calls them in a thread.

    limit   bytes of uploaded files together
    most    number of documents
    count   tokens of a text
    """

    def __init__(self, folder: Path, count: Callable[[str], int], *, limit: int = 4 * 2**30, most: int = 1000) -> None:
        self.folder, self.count, self.limit, self.most = folder, count, limit, most
        self._lock = threading.Lock()
        self._documents: OrderedDict[str, Document] = OrderedDict()
        self.about: dict[str, About] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(
                f"The library {folder} cannot be made ({error.strerror}): choose another --library."
            ) from None
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") and path.name.endswith(".part"):
                shutil.rmtree(path, ignore_errors=True)  # a server was killed while it read this one
            elif ID.fullmatch(path.name) and (known := _about(path)) is not None:
                self.about[known.id] = known

    def add(self, file: BinaryIO, filename: str, purpose: str) -> About:
        """Store and read an upload. Raises UserError for no readable document, ApiError when the library is full."""
        name = shown_name(filename)
        identity = f"file-{secrets.token_hex(12)}"
        part = self.folder / f".{identity}.part"
        try:
            part.mkdir(mode=0o700)
            with (part / "source").open("wb") as target:
                shutil.copyfileobj(file, target, 2**20)
            size = (part / "source").stat().st_size
            self._check_room(size)
            document = read_apart(part / "source", part / "document.json", name)
            known = About(
                identity, name, size, int(time.time()), purpose, document.title[:500], document.words,
                self.count(document.text), getattr(document, "pages", 1), getattr(document, "unit", ""),
                len(document.paragraphs), document.language, getattr(document, "format", "text"),
                tuple(getattr(document, "notes", ())),
            )  # fmt: skip
            (part / "about.json").write_text(json.dumps(asdict(known), ensure_ascii=False), encoding="utf-8")
            with self._lock:
                part.rename(self.folder / identity)
                self.about[identity] = known
                self._keep(identity, document)
            return known
        except OSError as error:
            raise ApiError(
                507, f"The library cannot take the file ({error.strerror}).", code="library_error"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def get(self, identity: str) -> About:
        known = self.about.get(identity)
        if known is None:
            raise ApiError(404, f"There is no file {identity[:64]!r} here.", code="file_not_found", param="file_id")
        return known

    def document(self, identity: str) -> Document:
        """The document itself, from memory or from the folder."""
        known = self.get(identity)
        with self._lock:
            if (found := self._documents.get(identity)) is not None:
                self._documents.move_to_end(identity)
                return found
        try:
            found = load(self.folder / known.id / "document.json")
        except (OSError, ValueError, KeyError, TypeError):
            raise ApiError(
                500, f"The stored text of {known.filename} is damaged: delete the file and upload it again.",
                code="file_damaged",
            ) from None  # fmt: skip
        with self._lock:
            self._keep(identity, found)
        return found

    def source(self, identity: str) -> Path:
        """The file as it was uploaded."""
        return self.folder / self.get(identity).id / "source"

    def delete(self, identity: str) -> None:
        known = self.get(identity)
        with self._lock:
            self.about.pop(identity, None)
            self._documents.pop(identity, None)
        part = self.folder / f".{known.id}.part"  # first out of sight, then away
        try:
            (self.folder / known.id).rename(part)
        except OSError:
            return
        shutil.rmtree(part, ignore_errors=True)

    def _keep(self, identity: str, document: Document) -> None:
        self._documents[identity] = document
        self._documents.move_to_end(identity)
        while len(self._documents) > KEPT:
            self._documents.popitem(last=False)

    def _check_room(self, size: int) -> None:
        used = sum(known.bytes for known in list(self.about.values()))
        if len(self.about) >= self.most or used + size > self.limit:
            raise ApiError(
                507,
                f"The library holds {len(self.about):,} documents of {used / 2**20:,.0f} MB and takes {self.most:,} of"
                f" {self.limit / 2**20:,.0f} MB: delete some first.",
                code="library_full",
            )


def shown_name(name: str) -> str:
    """A file's name for people: the last part of whatever path it came with, printable, at most 200 characters."""
    last = re.split(r"[/\\]", name)[-1]
    printable = "".join(c for c in last if unicodedata.category(c)[0] != "C").strip()
    return printable[-200:] if printable.strip(".") else "document"


def _about(path: Path) -> About | None:
    """What about.json says; None for a folder that is no whole document of ours."""
    try:
        record: dict[str, Any] = json.loads((path / "about.json").read_bytes())
        kept = {field.name: record[field.name] for field in fields(About)}
        kept["notes"] = tuple(kept["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return About(**kept) if kept["id"] == path.name else None
