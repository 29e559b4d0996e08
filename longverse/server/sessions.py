"""Sessions kept between requests, so that a document is read once however many ask about it.

A new request takes the session whose tokens begin most like its prompt. Taking one means writing over what follows the
common beginning, so a session is left alone where more would be lost than kept (a greeting must not wipe out a book).
Together they hold no more bytes than the limit; the one unused longest goes first.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import UserError
from ..inference.engine import Engine, Session, common_prefix
from ..inference.store_keys import planned_length as store_plan

SMALLEST_PLAN = 2048  # tokens
WORTH = 256  # tokens whose reading is too short to wait for, or to keep a session for
MOST = 64  # sessions kept

Open = Callable[[int], Session]


def planned_length(tokens: int, window: int) -> int:
    """The plan of a session for `tokens`: the next of 2048, 3072, 4096, 6144, 8192 …, at most the window.

    Few lengths, since under dynamic NTK two sessions agree only when their plans do; and a function of the request
    alone, so that an answer does not depend on who asked before.
    """
    size = SMALLEST_PLAN
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, window)


class Busy(Exception):
    """Not now: a session worth waiting for is in use, or memory is. `memory`: which of the two."""

    def __init__(self, memory: bool) -> None:
        super().__init__()
        self.memory = memory


@dataclass(eq=False)
class Entry:
    """A session, the tokens it holds or is about to hold, and the most it ever held (its memory stays touched)."""

    session: Session
    ids: list[int]
    high: int = 0
    in_use: bool = False
    used: float = field(default_factory=time.monotonic)


class Sessions:
    """The kept sessions. Not thread-safe: the worker holds its lock around every call."""

    def __init__(
        self, engine: Engine, limit_bytes: int, open_session: Open | None = None, window: int | None = None
    ) -> None:
        """window: the longest plan, where it is not the engine's (pages)."""
        self.engine = engine
        self.window = window or engine.window
        self.limit_bytes = limit_bytes
        self.open: Open = open_session or engine.session
        self.entries: list[Entry] = []
        self.evicted = 0
        self._per_token: int | None = None

    @property
    def bytes_per_token(self) -> int:
        """Of the caches that `open` makes; of those that do not say, the full-precision size."""
        if self._per_token is None:
            shape = self.engine.network.config
            full = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * self.engine.kept.itemsize
            cache = getattr(self.open(min(256, self.window)), "cache", None)
            self._per_token = getattr(cache, "bytes_per_token", None) or full
        return self._per_token

    @property
    def used_bytes(self) -> int:
        return sum(entry.high for entry in self.entries) * self.bytes_per_token

    def check(self, tokens: int) -> None:
        """UserError when `tokens` can never fit."""
        needed = tokens * self.bytes_per_token
        if needed > self.limit_bytes:
            raise UserError(
                f"The request needs {tokens:,} tokens, which take {needed / 2**30:.2f} GiB, and the server keeps at"
                f" most {self.limit_bytes / 2**30:.2f} GiB: shorten it, or start the server with more --cache-memory."
            )

    def held(self, ids: list[int], tokens: int, document: int = 0) -> int:
        """How many first tokens of `ids` a kept session holds."""
        planned = self.plan(tokens, document)
        return max((common_prefix(e.session.tokens, ids) for e in self.entries if self._fits(e, planned)), default=0)

    def plan(self, tokens: int, document: int = 0) -> int:
        """The plan for `tokens`, the first `document` of which are a document's: under dynamic NTK that of the store,
        so that what is kept on disk fits."""
        if document and self.engine.network.config.rope.kind == "dynamic":
            return store_plan(self.engine, document, tokens)
        return planned_length(tokens, self.window)

    def claim(self, ids: list[int], tokens: int, document: int = 0) -> Entry:
        """A session planned for at least `tokens`, marked as in use. Raises Busy, or UserError when it cannot be
        opened."""
        planned = self.plan(tokens, document)
        free: tuple[int, Entry | None] = (-1, None)
        shared = 0
        for entry in self.entries:
            if not self._fits(entry, planned):
                continue
            common = common_prefix(entry.ids if entry.in_use else entry.session.tokens, ids)
            if entry.in_use:
                shared = max(shared, common)
            elif common > free[0] and len(entry.session.tokens) - common <= max(common, WORTH):
                free = (common, entry)
        if shared - max(free[0], 0) > WORTH:
            raise Busy(memory=False)
        best = free[1]
        if self.engine.network.device.type != "cpu":
            tokens = planned  # a card gives a cache all of its memory at once, a CPU what is written
        high = max(tokens, best.high) if best is not None else tokens
        self._make_room(high - (best.high if best is not None else 0), best)
        entry = best or Entry(self.open(planned), ids)
        if best is None:
            self.entries.append(entry)
        entry.in_use, entry.ids, entry.high, entry.used = True, ids, high, time.monotonic()
        return entry

    def release(self, entry: Entry) -> None:
        entry.in_use, entry.used = False, time.monotonic()
        entry.ids = entry.session.tokens

    def drop(self, entry: Entry) -> None:
        """Forget it, in use or not."""
        self.entries.remove(entry)

    def _fits(self, entry: Entry, planned: int) -> bool:
        base = self.engine.network.config.rope.base
        own = entry.session.planned_tokens
        return own >= planned and base(own) == base(planned)

    def _make_room(self, more: int, keep: Entry | None) -> None:
        """Drop unused sessions, the oldest first, until `more` tokens fit."""
        idle = sorted((e for e in self.entries if not e.in_use and e is not keep), key=lambda e: e.used)
        running = sum(e.high for e in self.entries if e.in_use)
        held = running + (keep.high if keep is not None else 0)
        if running and (held + more) * self.bytes_per_token > self.limit_bytes:
            raise Busy(memory=True)  # even without the idle ones; with none running nothing would ever make room
        while idle and (self.used_bytes + more * self.bytes_per_token > self.limit_bytes or len(self.entries) >= MOST):
            self.drop(idle.pop(0))
            self.evicted += 1
