"""Documents read once and kept: the cache of a document on disk, found again by its tokens.

    store = Store()
    session = store.read(engine, document_ids, planned)        # reads, keeps; goes on where a killed reading stopped
    session = store.find(engine, prompt_ids, planned)          # later, in another process: nothing is read again
    session.stream(prompt_ids)

A kept document is found by its tokens, compared one by one, among those that the same weights, RoPE plan and way of
reading made (store_keys.fingerprint); a document that only begins like a kept one takes over the beginning. On a CPU
its files are mapped privately: what a question touches is read from them, and nothing is ever written to them.

While a document is read, what is new goes to disk every 20 seconds in a thread of its own, so a kill costs no more
than that. Whoever reads the same document at the same time waits, and then has it.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..models.converted import cache_folder
from ..plan import gigabytes
from .engine import Cancelled, Engine, Progress, Session, parse_attention
from .store_entry import (
    Appender,
    Busy,
    Damaged,
    Entry,
    Record,
    Waiting,
    blocks,
    locked,
    remove_tree,
)  # fmt: skip
from .store_keys import VERSION, name_of, rope_length
from .store_reading import Keeper, Layout, row_counts

LIMIT = 20 * 10**9  # bytes of all kept documents together, unless told otherwise
DAY = 86400.0  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Kept:
    """A line of `longverse library`. `state`: whole, unfinished (reading goes on from `length`), damaged, or other
    version."""

    id: str
    name: str
    model: str
    tokens: int
    length: int  # of them read
    bytes: int  # on the disk
    used: float  # seconds since 1970
    cache: str
    attention: str
    state: str


class Store:
    """The kept documents of a folder. `notes` collects what a user should know: damage, what could not be kept."""

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = folder if folder is not None else cache_folder() / "library"
        self.limit = LIMIT if limit_bytes is None else limit_bytes
        self.notes: list[str] = []
        self._said: set[str] = set()  # nothing is noted twice

    # ---- finding ----------------------------------------------------------------------------------------

    def find(
        self, engine: Engine, ids: list[int], planned: int, *, cache: str | Collection[str] | None = None,
        attention: str | None = None,
    ) -> Session | None:  # fmt: skip
        """A session that already holds the longest kept beginning of `ids`, or None where nothing useful is kept.

        planned           tokens of the longest prompt and its answer (store_keys.planned_length under dynamic NTK)
        cache, attention  only readings of this format, or one of these, and of this kind; None: of any

        What is kept is checked whole before it is used; damage is noted and the rest used.
        """
        tokens = np.asarray(ids, dtype=np.int32)
        for length, entry in self._matches(engine, tokens, planned, cache, attention):
            try:
                held = entry.usable(entry.verify(entry.records(), length), length)
                if held < length:
                    self._note_damage(entry, held)
                session = self._open(engine, entry, ids, held, planned) if held else None
            except Damaged:
                self._note_damage(entry, 0)
                continue
            except OSError:  # no memory left to map it
                continue
            if session is not None:
                entry.touch()
                return session
        return None

    def _matches(
        self, engine: Engine, tokens: np.ndarray, planned: int, cache: str | Collection[str] | None,
        attention: str | None,
    ) -> list[tuple[int, Entry]]:  # fmt: skip
        """(usable tokens, entry) of the kept readings that begin like `tokens`, the longest first."""
        found = []
        plan = engine.network.config.rope
        attention = None if attention is None else parse_attention(attention).name
        formats = (cache,) if isinstance(cache, str) else cache
        for entry in self._readable():
            shaped = entry.fingerprint
            if formats is not None and shaped.get("cache") not in formats:
                continue
            if attention not in (None, shaped.get("attention")):
                continue
            if entry.capacity < planned or shaped.get("rope_length") != rope_length(plan, planned):
                continue
            try:
                length = self._usable(entry, tokens)
            except Damaged:
                self._note_damage(entry, 0)
                continue
            if length:
                found.append((length, entry))
        found.sort(key=lambda pair: (-pair[0], -pair[1].used))
        # The fingerprint takes a look at every weight, so it comes last.
        return [(length, entry) for length, entry in found if self._made_by(engine, entry)]

    def _usable(self, entry: Entry, tokens: np.ndarray) -> int:
        """How many tokens of an entry begin `tokens` and can be taken over. Raises Damaged."""
        stated, records = entry.tokens(), entry.records()
        n = min(entry.length(), len(stated), len(tokens))
        differing = np.flatnonzero(stated[:n] != tokens[:n])
        return entry.usable(records, int(differing[0]) if len(differing) else n)

    def _made_by(self, engine: Engine, entry: Entry) -> bool:
        shaped = entry.fingerprint
        try:
            layout = Layout.of(engine, entry.capacity, str(shaped.get("cache")), str(shaped.get("attention")))
        except UserError:  # a format or an attention that this model or this version does not have
            return False
        return layout.fingerprint(engine) == shaped

    def _open(self, engine: Engine, entry: Entry, ids: list[int], length: int, planned: int) -> Session:
        """A session over an entry's first `length` tokens. Raises Damaged."""
        shaped: dict[str, Any] = {name: entry.fingerprint[name] for name in ("cache", "attention")}
        if engine.network.device.type == "cpu":
            session = engine.session(entry.capacity, **shaped, allocate=entry.allocate)
        else:
            session = engine.session(planned, **shaped)
            rows = row_counts(session.cache, length)
            for name, array in session.cache.storage().items():
                if name not in rows:
                    continue
                stored = entry.allocate(name, entry.arrays[name].shape, array.dtype)
                array[:, :, :, : rows[name]].copy_(stored[:, :, :, : rows[name]])
        entry.fill_ends(session.cache.storage(), length)
        session.cache.restore(length)
        if (sparse := getattr(session.cache, "sparse", None)) is not None:  # reading goes on counting
            last = next(record for record in entry.records() if record.tokens >= length)
            # Where an earlier version did not note it: what was aimed at.
            sparse.share_sum, sparse.share_count = (sparse.mass, 1) if last.shares is None else last.shares
        session.tokens = list(ids[:length])
        return session

    # ---- reading ----------------------------------------------------------------------------------------

    def read(
        self,
        engine: Engine,
        ids: list[int],
        planned: int,
        *,
        name: str = "",
        cache: str = "full",
        attention: str = "exact",
        must_keep: bool = True,
        on_progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        on_wait: Waiting | None = None,
    ) -> Session:
        """Read `ids`, a prompt up to its document's end, and keep what was read. Returns the session that holds it:
        all of it, or what there is when `cancelled` (session.tokens tells).

        planned    tokens of the longest prompt to come and its answer
        name       what the document is called in lists
        must_keep  True: UserError where it cannot be kept, before any work where that is known; another process that
                   is reading the same document is waited for (on_wait is told its number). False: it is read all the
                   same, and `notes` say why it is not kept
        """
        layout, tokens, shaped, folder = self._place(engine, ids, planned, cache, attention)
        shown = name.encode("utf-8", "replace").decode()  # a file's name may be in another encoding
        manifest = {
            "version": VERSION, "document": {"name": shown or folder.name}, "model": engine.name,
            "created": time.time(), "tokens": len(ids), "capacity": layout.capacity, "piece": layout.piece,
            "fingerprint": shaped,
        }  # fmt: skip

        def plain() -> Session:
            return engine.session(planned, cache=cache, attention=attention)

        def unkept(reason: str) -> Session:
            if must_keep:
                raise UserError(reason)
            self._note(reason)
            session = self.find(engine, ids, planned, cache=cache, attention=attention) or plain()
            session.boundary = len(ids)
            session.read(ids, on_progress=on_progress, cancelled=cancelled)
            return session

        try:
            if reason := self._no_room(folder, layout.bytes_of(len(ids))):
                return unkept(reason)
            with locked(self._lock(folder), wait=must_keep, on_wait=on_wait, cancelled=cancelled):
                entry, good = self._existing(folder, len(ids))
                held = entry.usable(good, len(ids)) if entry is not None else 0
                good = [record for record in good if record.tokens <= held]
                if entry is not None and held:
                    session = self._open(engine, entry, ids, held, planned)
                else:
                    session = self._donor(engine, ids, tokens, planned, cache, attention, folder) or plain()
                if entry is None:
                    entry = Entry.create(folder, manifest, tokens, layout.arrays, layout.ends)
                keeper = Keeper(Appender(entry, good), session)
                self._read_on(session, ids, keeper, must_keep, on_progress, cancelled)
                entry.touch()
        except Busy as busy:
            if must_keep:  # cancelled while waiting
                return plain()
            return unkept(f"Another process ({busy.holder}) is reading the same document; this reading is not kept.")
        except OSError as error:
            return unkept(self._refusal(error))
        for old in self.prune(self.limit, spare=folder.name):
            size, limit = gigabytes(old.bytes), gigabytes(self.limit)
            self._note(f"{old.name} ({size}) is kept no longer, to stay within {limit}.")
        return session

    def folder_of(self, engine: Engine, ids: list[int], planned: int, *, cache: str, attention: str = "exact") -> Path:
        """Where a reading of exactly these tokens is kept; what is there may be unfinished or damaged. Arguments as
        `read`."""
        return self._place(engine, ids, planned, cache, attention)[3]

    def _place(
        self, engine: Engine, ids: list[int], planned: int, cache: str, attention: str
    ) -> tuple[Layout, np.ndarray, dict[str, Any], Path]:
        """What a reading consists of, its tokens, its fingerprint, and the folder named after all of them."""
        # Holes cost nothing: where angles do not depend on it, the planned size has room for any question to come.
        capacity = 2 * planned if attention == "pages" else max(planned, engine.window)
        if engine.network.config.rope.kind == "dynamic":
            capacity = planned
        layout = Layout.of(engine, capacity, cache, attention)
        tokens = np.asarray(ids, dtype=np.int32)
        shaped = layout.fingerprint(engine)
        return layout, tokens, shaped, self.folder / name_of(shaped, capacity, tokens)

    def _read_on(
        self,
        session: Session,
        ids: list[int],
        keeper: Keeper,
        must_keep: bool,
        on_progress: Progress | None,
        cancelled: Cancelled | None,
    ) -> None:
        """Read what the session does not hold yet, and keep it on the way."""

        def step(done: int, total: int) -> None:
            try:
                keeper.step()
            except OSError as error:
                reason = self._refusal(error, keeper.kept, total)
                if must_keep:
                    raise UserError(reason) from None
                self._note(reason)
            if on_progress is not None:
                on_progress(done, total)

        session.boundary = len(ids)
        try:
            session.read(ids, on_progress=step, cancelled=cancelled)
        except BaseException:
            with suppress(OSError):
                keeper.finish()
            raise
        try:
            keeper.finish()
        except OSError as error:
            reason = self._refusal(error, keeper.kept, len(ids))
            if must_keep:
                raise UserError(reason) from None
            self._note(reason)

    def _existing(self, folder: Path, length: int) -> tuple[Entry | None, list[Record]]:
        """An entry and its whole stretches; what is damaged beyond use is removed. The lock is held."""
        if not folder.exists():
            return None, []
        try:
            entry = Entry.open(folder)
            if not entry.readable:
                raise Damaged("the id of this version and the manifest of another")
            entry.tokens()
            records = entry.records()
            good = entry.verify(records, length)
            for name, array in entry.arrays.items():
                entry.allocate(name, array.shape, array.dtype)
        except Damaged:
            self._note(f"The kept reading {folder.name} is damaged and is made anew.")
            self._discard(folder)
            return None, []
        if len(good) < len(records):
            self._note_damage(entry, good[-1].tokens if good else 0)
        return entry, good

    def _donor(
        self, engine: Engine, ids: list[int], tokens: np.ndarray, planned: int, cache: str, attention: str, own: Path
    ) -> Session | None:
        """A session over another kept document that begins like this one, such as an earlier state of it."""
        for length, entry in self._matches(engine, tokens, planned, cache, attention):
            if entry.folder == own or length % int(entry.manifest["piece"]):
                continue
            with suppress(Damaged, OSError):
                held = entry.usable(entry.verify(entry.records(), length), length)
                if held and held % int(entry.manifest["piece"]) == 0:
                    return self._open(engine, entry, ids, held, planned)
        return None

    # ---- the folder -------------------------------------------------------------------------------------

    def entries(self) -> list[Kept]:
        """Every kept document, the latest used first."""
        kept = []
        for folder in self._folders():
            try:
                entry = Entry.open(folder)
            except Damaged:
                entry = Entry(folder, {"document": {"name": folder.name}})
            size, tokens, length, state = entry.disk_bytes, 0, 0, "damaged"
            shaped = entry.manifest.get("fingerprint", {})
            if entry.readable:
                tokens, length = entry.tokens_count, entry.length()
                state = "whole" if length == tokens else "unfinished"
            elif "version" in entry.manifest:
                state = "other version"
            cache, attention = str(shaped.get("cache", "")), str(shaped.get("attention", ""))
            kept.append(
                Kept(entry.id, entry.name, entry.model, tokens, length, size, entry.used, cache, attention, state)
            )
        return sorted(kept, key=lambda one: -one.used)

    def remove(self, which: str) -> list[Kept]:
        """Remove the kept document of this id (or the beginning of one id), or all of this name."""
        kept = self.entries()
        chosen = [one for one in kept if one.name == which] or [one for one in kept if one.id.startswith(which)]
        names = {one.name for one in chosen}
        if not chosen or not which:
            raise UserError(f"The library keeps no document {which!r}: `longverse library` lists what it keeps.")
        if len(names) > 1:
            raise UserError(f"{which!r} begins several ids ({', '.join(one.id for one in chosen)}): write more of it.")
        for one in chosen:
            if not self._remove(one.id):
                raise UserError(f"{one.name} is being read by another process: remove it when that is done.")
        return chosen

    def prune(self, limit: int, *, spare: str = "") -> list[Kept]:
        """Remove the documents used longest ago until all together take no more than `limit` bytes; those being read
        and the one with the id `spare` stay. Sweeps what killed processes left behind."""
        self._sweep()
        kept = self.entries()
        total = sum(one.bytes for one in kept)
        removed = []
        for one in reversed(kept):
            if total <= limit:
                break
            if one.id != spare and self._remove(one.id):
                total -= one.bytes
                removed.append(one)
        return removed

    @property
    def size(self) -> int:
        """Bytes that all kept documents take on the disk."""
        return sum(one.bytes for one in self.entries())

    def _folders(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:
            return []

    def _readable(self) -> list[Entry]:
        """The entries that this version can read."""
        entries = []
        for folder in self._folders():
            with suppress(Damaged):
                entry = Entry.open(folder)
                if entry.readable:
                    entries.append(entry)
        return entries

    def _lock(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.lock")

    def _remove(self, name: str) -> bool:
        """Remove one entry, unless it is being read. What other processes have mapped of it stays theirs."""
        folder = self.folder / name
        try:
            with locked(self._lock(folder), wait=False):
                self._discard(folder)
                self._lock(folder).unlink(missing_ok=True)
        except Busy:
            return False
        except OSError as error:
            raise UserError(f"{folder} cannot be removed ({error.strerror}): check its permissions.") from None
        return True

    def _discard(self, folder: Path) -> None:
        """Take an entry's name away at once; deleting gigabytes may take a while."""
        gone = folder.with_name(f".gone.{folder.name}.{time.time_ns()}")
        folder.rename(gone)
        remove_tree(gone)

    def _sweep(self) -> None:
        try:
            hidden = [path for path in self.folder.iterdir() if path.name.startswith(".")]
        except OSError:
            return
        for path in hidden:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > DAY or path.name.startswith(".gone."):
                    remove_tree(path)

    # ---- what a user reads ------------------------------------------------------------------------------

    def _no_room(self, folder: Path, needed: int) -> str:
        """Why a document of `needed` bytes cannot be kept, or nothing."""
        if needed > self.limit:
            return (
                f"Keeping this document takes {gigabytes(needed)} and the library's limit is {gigabytes(self.limit)}:"
                " raise it with LONGVERSE_LIBRARY_LIMIT (or `longverse read --limit`), or read with a smaller cache"
                " (--cache int8)."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        missing = needed - sum(blocks(path) for path in folder.glob("*.bin"))
        if missing > free:
            return (
                f"Keeping this document takes {gigabytes(missing)} and the disk of {self.folder} has"
                f" {gigabytes(free)} free: make room (`longverse library prune --limit 5GB`), or set LONGVERSE_CACHE to"
                " a folder on another disk."
            )
        return ""

    def _refusal(self, error: OSError, kept: int = 0, total: int = 0) -> str:
        if error.errno in FULL:
            done = f"; {kept:,} of {total:,} tokens are kept" if kept else ""
            return (
                f"The disk of {self.folder} is full{done}: make room and run the same command again"
                f"{', and reading goes on from there' if kept else ''}."
            )
        return (
            f"The library {self.folder} cannot be written ({error.strerror or error}): set LONGVERSE_CACHE to a folder"
            " that can."
        )

    def _note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.notes.append(text)

    def _note_damage(self, entry: Entry, good: int) -> None:
        if not entry.folder.is_dir():  # removed by another process since it was listed
            return
        rest = f"after {good:,} of its {entry.tokens_count:,} tokens" if good else "and cannot be used"
        self._note(f"The kept reading of {entry.name} ({entry.id}) is damaged {rest}; what is lost is read again.")
