"""One kept document on disk.

    <library>/<id>/manifest.json   what it is: fingerprint, arrays, name; its time of change is the time of last use
                   tokens.bin      the ids it was read from, int32
                   keys.bin ...    one file an array of the cache, at its full planned size: holes cost nothing
                   ends-4096.bin   what a quantised cache keeps in full of its first and newest tokens, as it was then
                   progress.json   how far it is read, with a checksum of every stretch; the only file written again
    <library>/<id>.lock            held by the one process that reads it

Data are written first, made durable, and counted afterwards in a progress.json that is written aside and renamed. So
whenever the writing ends, what is counted is whole and the rest is overwritten by the next reading with the same bytes.
Arrays are [layers, 1, G, rows, ...]: a prefix of a document is the beginning of every strip [layer, 0, g].
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..models.shards import write_json
from .store_keys import VERSION, checksum, name_of, tensor_bytes

STRETCH = 4096  # tokens under one checksum, at most
READERS = 8  # stretches checked at once: a disk gives more when several are asked for
MANIFEST, TOKENS, PROGRESS = "manifest.json", "tokens.bin", "progress.json"
# A private map of more than the memory is fine: only what is touched or written is ever held.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Damaged(Exception):
    """A kept document whose files are not what was written; says which."""


Shares = tuple[float, int]  # their sum and count


@dataclass(frozen=True)
class Record:
    """A stretch that is whole on disk. `rows`: where it ends in each array; `total`: the checksum of its bytes and,
    where there are any, of the ends as they were when `tokens` were read. Reading can go on exactly from its end if it
    has them, or if the cache keeps none. `shares`: what sparse reading measured up to there (sparse.Sparse)."""

    tokens: int  # read at its end
    rows: dict[str, int]
    total: int
    ends: bool
    shares: Shares | None = None  # None: an earlier version did not note them


@dataclass(frozen=True)
class Entry:
    """A kept document as its manifest describes it."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Entry:
        """Read a manifest. Raises Damaged when there is none that can be read."""
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            entry = cls(folder, manifest)
            if manifest["version"] == VERSION and manifest.pop("check") != _check(manifest):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Damaged(f"{folder / MANIFEST} is not what was written") from None
        return entry

    @classmethod
    def create(
        cls,
        folder: Path,
        manifest: dict[str, Any],
        tokens: np.ndarray,
        arrays: dict[str, tuple[tuple[int, ...], str]],
        ends: dict[str, tuple[tuple[int, ...], str]],
    ) -> Entry:
        """Make the files of a new entry aside and give them their name at once."""
        for kind, shapes in (("arrays", arrays), ("ends", ends)):
            manifest = manifest | {kind: {name: {"shape": list(s), "dtype": d} for name, (s, d) in shapes.items()}}
        aside = folder.with_name(f".new.{folder.name}.{os.getpid()}")
        remove_tree(aside)
        aside.mkdir(parents=True)
        try:
            (aside / TOKENS).write_bytes(tokens.astype("<i4").tobytes())
            entry = cls(aside, manifest)
            for name, array in entry.arrays.items():
                with (aside / f"{name}.bin").open("wb") as file:
                    file.truncate(array.nbytes)
            write_progress(aside, [])
            write_json(aside / MANIFEST, manifest | {"check": _check(manifest)})
            os.rename(aside, folder)
        except BaseException:
            remove_tree(aside)
            raise
        return cls(folder, manifest)

    # ---- what it is -------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def readable(self) -> bool:
        """Whether this version of longverse wrote it."""
        return bool(self.manifest.get("version") == VERSION)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.manifest["fingerprint"]  # type: ignore[no-any-return]

    @property
    def name(self) -> str:
        """The document's."""
        return str(self.manifest.get("document", {}).get("name", self.id))

    @property
    def model(self) -> str:
        return str(self.manifest.get("model", "unknown"))

    @property
    def tokens_count(self) -> int:
        """Tokens of the prompt up to the document's end: how long the whole is."""
        return int(self.manifest["tokens"])

    @property
    def capacity(self) -> int:
        return int(self.manifest["capacity"])

    @property
    def arrays(self) -> dict[str, Strips]:
        return {
            name: Strips(self.folder / f"{name}.bin", tuple(array["shape"]), getattr(torch, array["dtype"]))
            for name, array in self.manifest["arrays"].items()
        }

    @property
    def ends(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what is kept in full, by name; empty for a cache in full precision."""
        return {
            name: (tuple(array["shape"]), getattr(torch, array["dtype"]))
            for name, array in sorted(self.manifest["ends"].items())
        }

    @property
    def used(self) -> float:
        """When it was last used, in seconds since 1970."""
        try:
            return (self.folder / MANIFEST).stat().st_mtime
        except OSError:
            return 0.0

    def touch(self) -> None:
        """Count it as used now; where that cannot be written it is merely pruned sooner."""
        with suppress(OSError):
            os.utime(self.folder / MANIFEST)

    @property
    def disk_bytes(self) -> int:
        """What it really takes on the disk, holes not counted."""
        return sum(blocks(path) for path in self.folder.iterdir()) if self.folder.is_dir() else 0

    def tokens(self) -> np.ndarray:
        """The ids, int32 [n]. Raises Damaged unless they and the fingerprint are those it is named after."""
        try:
            tokens = np.fromfile(self.folder / TOKENS, dtype="<i4")
        except OSError as error:
            raise Damaged(f"{self.folder / TOKENS} cannot be read ({error.strerror})") from None
        if name_of(self.fingerprint, self.capacity, tokens) != self.id or len(tokens) != self.tokens_count:
            raise Damaged(f"{self.folder} holds other tokens or another manifest than were written")
        return tokens

    def records(self) -> list[Record]:
        """The stretches that are whole. Raises Damaged when the list is not what was written."""
        return read_progress(self.folder)

    def length(self) -> int:
        """Tokens read so far; 0 where that cannot be told."""
        try:
            records = self.records()
        except Damaged:
            return 0
        return records[-1].tokens if records else 0

    def usable(self, records: list[Record], agreeing: int) -> int:
        """Of the first `agreeing` tokens, as many as can be taken over so that whatever is read after them comes out as
        if all had been read now: all there are, or else as many whole forwards."""
        if not records:
            return 0
        if records[-1].tokens <= agreeing:
            agreeing = records[-1].tokens
            if records[-1].ends or not self.ends:
                return agreeing
        piece = int(self.manifest["piece"])
        if self.ends:
            fitting = [r.tokens for r in records if r.ends and r.tokens <= agreeing and r.tokens % piece == 0]
            return max(fitting, default=0)
        return agreeing // piece * piece

    # ---- its data ---------------------------------------------------------------------------------------

    def verify(self, records: list[Record], up_to: int) -> list[Record]:
        """The leading records whose bytes are what was written, among those needed for the first `up_to` tokens.

        Reads the files rather than a map of them, so that a broken disk is an error here and no fault later.
        """
        arrays = self.arrays
        needed = [n for n in range(len(records)) if (records[n - 1].tokens if n else 0) < up_to]
        files = {}
        try:
            for name, array in arrays.items():
                files[name] = os.open(array.path, os.O_RDONLY)
                if os.fstat(files[name]).st_size != array.nbytes:
                    return []

            def whole(n: int) -> bool:
                total = 0
                try:
                    for name, array in sorted(arrays.items()):
                        begin = records[n - 1].rows[name] if n else 0
                        for place, size in array.strips(begin, records[n].rows[name]):
                            total = checksum(_pread(files[name], size, place), total)
                    if records[n].ends:
                        total = checksum(self._ends(records[n].tokens).read_bytes(), total)
                except (OSError, KeyError, ValueError):
                    return False
                return total == records[n].total

            with ThreadPoolExecutor(READERS) as pool:
                results = list(pool.map(whole, needed))
        except OSError:
            return []
        finally:
            for file in files.values():
                os.close(file)
        good = next((n for n, fine in enumerate(results) if not fine), len(results))
        return records[:good]

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An array of a cache, mapped privately: pages are read when they are touched, and what is written to it stays
        in this process's memory. Raises Damaged when the file has another shape."""
        array = self.arrays.get(name)
        if self.ends.get(name) == (tuple(shape), dtype):
            return torch.empty(shape, dtype=dtype)
        if array is None or array.shape != tuple(shape) or array.dtype != dtype:
            raise Damaged(f"{self.folder} was written with other arrays")
        if not array.nbytes:
            return torch.empty(shape, dtype=dtype)
        try:
            opened = array.path.open("rb")
        except OSError as error:
            raise Damaged(f"{array.path} cannot be read ({error.strerror})") from None
        with opened as file:
            if os.fstat(file.fileno()).st_size != array.nbytes:
                raise Damaged(f"{array.path} has another size than was written")
            flags = mmap.MAP_PRIVATE | _NORESERVE
            data = mmap.mmap(file.fileno(), array.nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def fill_ends(self, storage: dict[str, Tensor], tokens: int) -> None:
        """Put what was kept in full when `tokens` had been read into a cache's arrays. Raises Damaged."""
        if not self.ends:
            return
        try:
            data = np.fromfile(self._ends(tokens), dtype=np.uint8)
            place = 0
            for name, (shape, dtype) in self.ends.items():
                size = int(np.prod(shape)) * dtype.itemsize
                part = torch.from_numpy(data[place : place + size].copy()).view(dtype).view(shape)
                storage[name].copy_(part)
                place += size
        except (OSError, RuntimeError) as error:
            raise Damaged(f"{self._ends(tokens)} cannot be read ({type(error).__name__})") from None

    def _ends(self, tokens: int) -> Path:
        return self.folder / f"ends-{tokens}.bin"


@dataclass(frozen=True)
class Strips:
    """An array [layers, 1, G, rows, ...] in a file: layers * G strips of `rows` rows."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[4:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape[:4], dtype=np.int64)) * self.row_bytes

    def strips(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of rows begin .. end of every strip, in order."""
        if not 0 <= begin <= end <= self.shape[3]:
            raise ValueError((begin, end, self.shape))
        if begin == end:
            return
        row = self.row_bytes
        for strip in range(self.shape[0] * self.shape[1] * self.shape[2]):
            yield (strip * self.shape[3] + begin) * row, (end - begin) * row


class Appender:
    """Writes what a cache has taken in to the files of an entry, stretch by stretch."""

    def __init__(self, entry: Entry, records: list[Record]) -> None:
        self.entry, self.records = entry, list(records)
        self.arrays = entry.arrays
        self.files: dict[str, int] = {}

    @property
    def length(self) -> int:
        return self.records[-1].tokens if self.records else 0

    def append(
        self,
        storage: dict[str, Tensor],
        length: int,
        rows: Callable[[int], dict[str, int]],
        ends: dict[str, Tensor] | None = None,
        shares: Shares = (0.0, 0),
    ) -> None:
        """Write the tokens from `self.length` to `length` and count them. `ends`: what the cache keeps in full, as it
        is at `length`; `shares` as in Record. Raises OSError when the disk is full; what was counted before stays."""
        if length <= self.length:
            return
        if not self.files:
            self.files = {name: os.open(array.path, os.O_RDWR) for name, array in self.arrays.items()}
        records = list(self.records)
        while (begin := records[-1].tokens if records else 0) < length:
            end = min((begin // STRETCH + 1) * STRETCH, length)
            stops = rows(end)
            total = 0
            for name, array in sorted(self.arrays.items()):
                first = records[-1].rows[name] if records else 0
                # On a GPU one copy brings the stretch over; on a CPU these are views.
                part = storage[name][:, :, :, first : stops[name]].to("cpu").flatten(0, 2)  # [strips, rows, ...]
                for strip, (place, size) in zip(part, array.strips(first, stops[name]), strict=False):
                    data = tensor_bytes(strip)
                    assert len(data) == size
                    _pwrite(self.files[name], data, place)
                    total = checksum(data, total)
            with_ends = bool(ends) and end == length
            if with_ends:
                assert ends is not None
                data = np.concatenate([tensor_bytes(ends[name]) for name in self.entry.ends])
                write_durably(self.entry._ends(end), data)
                total = checksum(data, total)
            records.append(Record(end, stops, total, with_ends, shares))
        for file in self.files.values():
            os.fsync(file)
        write_progress(self.entry.folder, records)
        self.records = records

    def close(self) -> None:
        for file in self.files.values():
            os.close(file)
        self.files = {}


# ---- small files -------------------------------------------------------------------------------------------


def write_progress(folder: Path, records: list[Record]) -> None:
    """Count these stretches as whole: written aside, made durable, renamed."""
    listed = [
        {"tokens": r.tokens, "rows": r.rows, "total": f"{r.total:016x}", "ends": r.ends}
        | ({} if r.shares is None else {"shares": list(r.shares)})
        for r in records
    ]
    text = json.dumps({"records": listed, "check": _check(listed)})
    write_durably(folder / PROGRESS, np.frombuffer(text.encode(), np.uint8))


def write_durably(path: Path, data: np.ndarray) -> None:
    """Write a file aside, make it durable, and give it its name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def read_progress(folder: Path) -> list[Record]:
    """What `write_progress` wrote. Raises Damaged."""
    try:
        stated = json.loads((folder / PROGRESS).read_bytes())
        listed = stated["records"]
        if stated["check"] != _check(listed):
            raise ValueError
        return [
            Record(
                int(r["tokens"]), dict(r["rows"]), int(r["total"], 16), bool(r["ends"]),
                (float(r["shares"][0]), int(r["shares"][1])) if "shares" in r else None,
            )
            for r in listed
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(f"{folder / PROGRESS} is not what was written") from None


def _check(value: Any) -> str:
    """Of what a JSON file states besides."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def blocks(path: Path) -> int:
    """Bytes a file takes on the disk."""
    try:
        stat = path.stat()
    except OSError:
        return 0
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size


def remove_tree(folder: Path) -> None:
    """Delete a folder; what cannot be deleted stays."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _pread(file: int, size: int, place: int) -> bytes:
    data = os.pread(file, size, place)
    while len(data) < size:  # past 2 GiB a read may be short
        more = os.pread(file, size - len(data), place + len(data))
        if not more:
            raise OSError(errno.EIO, "the file is shorter than was written")
        data += more
    return data


def _pwrite(file: int, data: np.ndarray, place: int) -> None:
    view = memoryview(data)  # type: ignore[arg-type]
    while len(view):
        done = os.pwrite(file, view, place)
        view, place = view[done:], place + done


# ---- one reader at a time ----------------------------------------------------------------------------------

Waiting = Callable[[int], None]  # told the process that holds the lock, once


class Busy(Exception):
    """Another process holds the lock; `holder` is its number, or 0."""

    def __init__(self, holder: int) -> None:
        super().__init__(holder)
        self.holder = holder


@contextmanager
def locked(
    path: Path, *, wait: bool, on_wait: Waiting | None = None, cancelled: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Hold a lock file. The system lets go of it when the process ends, however it ends.

    wait       whether to wait for another holder; Busy is raised at once otherwise
    on_wait    called once, with the holder's process number, when it has to wait
    cancelled  asked while waiting; Busy is raised when it turns true
    """
    file = _acquire(path)
    told = False
    while file is None:
        holder = _holder(path)
        if not wait or (cancelled is not None and cancelled()):
            raise Busy(holder)
        if not told and on_wait is not None:
            on_wait(holder)
        told = True
        time.sleep(0.2)
        file = _acquire(path)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


def _acquire(path: Path) -> int | None:
    """An open, locked file, or None while another holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        raise UserError("Keeping documents needs file locks of a Unix-like system: ask without keeping.") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever removed the entry removed this file too, perhaps between our open and our lock.
        if os.fstat(file).st_ino == os.stat(path).st_ino:
            return file
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            return None
        raise
    os.close(file)
    return None


def _holder(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return 0
