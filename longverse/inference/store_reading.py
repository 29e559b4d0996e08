"""Between a session and the disk: what a cache consists of, and the thread that writes while it is filled."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import engine as engine_module
from .engine import Engine, Session, parse_attention
from .store_entry import Appender, Shares
from .store_keys import fingerprint

FLUSH_SECONDS = 20.0  # what a kill may cost


@dataclass(frozen=True)
class Layout:
    """What a cache of a certain capacity consists of, told without memory for it."""

    arrays: dict[str, tuple[tuple[int, ...], str]]  # shape [layers, 1, G, rows, ...] and dtype of what grows
    ends: dict[str, tuple[tuple[int, ...], str]]  # of what is kept in full of the first and the newest tokens
    cache: str
    attention: str
    capacity: int
    piece: int  # tokens a forward reads at once
    reading: str  # how the document is read, in words that change when the result would

    @classmethod
    def of(cls, engine: Engine, capacity: int, cache: str, attention: str) -> Layout:
        """Raises UserError for what `engine.session` refuses."""
        arrays = {}

        def note(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            arrays[name] = (tuple(shape), str(dtype).removeprefix("torch."))
            return torch.empty(shape, dtype=dtype, device="meta")

        attention = parse_attention(attention).name
        session = engine.session(capacity, cache=cache, attention=attention, allocate=note)
        pages = getattr(session, "pages", None)
        piece = pages.chunk if pages is not None else engine_module.CHUNK
        how = pages if pages is not None else attention
        if session.attention == "sparse":  # no limit is named where there is none: entries of before stay
            how = f"sparse {session.mass:g}" + (f" of {session.most:g}" if session.most < 1 else "")
        growing = row_counts(session.cache, 1)
        ends = {name: array for name, array in arrays.items() if name not in growing}
        arrays = {name: arrays[name] for name in growing}
        return cls(arrays, ends, cache, attention, capacity, piece, f"{piece} a forward; {how}")

    def fingerprint(self, engine: Engine) -> dict[str, Any]:
        """See store_keys.fingerprint."""
        return fingerprint(
            engine, capacity=self.capacity, cache=self.cache, attention=self.attention, reading=self.reading
        )

    def bytes_of(self, tokens: int) -> int:
        """Bytes that `tokens` tokens take on the disk."""
        total = 0
        for shape, dtype in self.arrays.values():
            total += int(np.prod(shape, dtype=np.float64)) * getattr(torch, dtype).itemsize
        return int(total * min(1.0, tokens / self.capacity))


class Keeper:
    """Puts on disk what a session reads, every FLUSH_SECONDS, while it reads on."""

    def __init__(self, appender: Appender, session: Session) -> None:
        self.appender, self.session = appender, session
        self.pool = ThreadPoolExecutor(1)
        self.running: Future[None] | None = None
        self.last = time.monotonic()
        self.failed = False

    @property
    def kept(self) -> int:
        return self.appender.length

    def step(self) -> None:
        """Between two forwards: begin to write when it is time. Raises OSError, once, when the last writing failed;
        nothing is written after that."""
        if self.failed:
            return
        self._settle(wait=False)
        if self.running is None and time.monotonic() - self.last >= FLUSH_SECONDS:
            self.last = time.monotonic()
            self.running = self.pool.submit(self._append, *self._now())

    def finish(self) -> None:
        """Write the rest. Raises OSError when that fails."""
        try:
            if not self.failed:
                self._settle(wait=True)
                self._append(*self._now())
        finally:
            self.pool.shutdown(wait=True)
            self.appender.close()

    def _settle(self, wait: bool) -> None:
        if self.running is not None and (wait or self.running.done()):
            running, self.running = self.running, None
            try:
                running.result()
            except OSError:
                self.failed = True
                raise

    def _now(self) -> tuple[int, dict[str, torch.Tensor], Shares]:
        """What the session holds at this moment of what it will write over: its length, the ends, what was measured."""
        cache = self.session.cache
        sparse = getattr(cache, "sparse", None)  # pages have none
        ends = {name: cache.storage()[name].clone() for name in self.appender.entry.ends}
        return cache.length, ends, (0.0, 0) if sparse is None else (sparse.share_sum, sparse.share_count)

    def _append(self, length: int, ends: dict[str, torch.Tensor], shares: Shares) -> None:
        # What was read is never written again, so it may be copied while the next tokens come in; the ends may not.
        cache = self.session.cache
        self.appender.append(cache.storage(), length, lambda n: row_counts(cache, n), ends, shares)


def row_counts(cache: Any, length: int) -> dict[str, int]:
    """How many rows of each growing array hold the first `length` tokens: one a token, but for a cache with summaries.
    Arrays left out keep the first and the newest tokens in full and are written over."""
    rows: Callable[[int], dict[str, int]] | None = getattr(cache, "rows", None)
    if rows is not None:
        return rows(length)
    return {name: length for name in cache.storage() if not name.startswith(("first_", "recent_"))}
