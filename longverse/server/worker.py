"""The worker: it alone uses the engine. Requests come from the event loop, wait in a fair queue, get a session, and
take turns computing; what they yield goes back through `emit`, which must be callable from any thread.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..inference.engine import Engine, Session
from .sessions import Busy, Entry, Open, Sessions
from .turns import Baton, FairQueue

log = logging.getLogger("longverse.server")


class QueueFull(Exception):
    """No more work is taken now. `retry_after`: seconds after which it is worth trying again."""

    def __init__(self, waiting: int, retry_after: int, whose: str) -> None:
        super().__init__(f"{waiting} requests{whose}, the most this server keeps: try again in {retry_after} s.")
        self.retry_after = retry_after


class Stopping(Exception):
    """The server is on its way down."""


@dataclass(frozen=True)
class Progress:
    """Reading: `processed` of `total` prompt tokens are held, `cache` of them since before this request."""

    total: int
    cache: int
    processed: int
    time_ms: float


@dataclass(frozen=True)
class Failed:
    """The work ended without its result. kind: "user", "defect", "memory", "cancelled" or "stopping"."""

    kind: str
    message: str


@dataclass(eq=False)
class Task:
    """One piece of work.

    ids     the prompt: what a session is chosen by
    tokens  prompt and answers at most: what the session is planned for
    run     does the work on the session; called once, in a worker thread, with the baton held
    emit    receives Progress, whatever `run` emits, and Failed; from any thread
    """

    client: str
    ids: list[int]
    tokens: int
    run: Callable[[Session, "Turn"], None]
    emit: Callable[[Any], None]
    document: int = 0  # first tokens of the prompt that are a document's
    queued: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)
    reason: str = "cancelled"


class Turn:
    """What running work sees of the worker: `progress` and `cancelled` are the engine's two callbacks."""

    def __init__(self, task: Task, baton: Baton, entry: Entry) -> None:
        self.task, self.baton, self.entry = task, baton, entry
        self.emit = task.emit
        self.started = time.monotonic()
        self.total = 0  # of the whole prompt, where a part of it is read first
        self.queued_seconds = self.started - task.queued
        self._cache: int | None = None

    def cancelled(self) -> bool:
        return self.task.stop.is_set()

    def progress(self, done: int, total: int) -> None:
        """Report, and let others compute before the next chunk."""
        if self._cache is None:
            self._cache = done
        total = max(total, self.total)
        self.emit(Progress(total, self._cache, done, round(1000 * (time.monotonic() - self.started), 1)))
        self.baton.pass_on()

    def replace(self, session: Session) -> None:
        """Another session takes the place of the one that was claimed."""
        self.entry.session = session

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, others compute: for waiting on a disk."""
        self.baton.give()
        try:
            yield
        finally:
            self.baton.take()

    def pause(self) -> None:
        """Let others compute, between two tokens."""
        self.baton.pass_on()


class Worker:
    """Threads that run tasks on the engine, one computing at a time.

    slots        tasks in work at once, taking turns
    queue_limit  tasks that may wait; one client may fill at most half of it while another waits too
    cache_bytes  memory for kept sessions
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int = 4,
        queue_limit: int = 64,
        cache_bytes: int = 2**31,
        open_session: Open | None = None,
        window: int | None = None,
    ) -> None:
        self.engine = engine
        self.sessions = Sessions(engine, cache_bytes, open_session, window)
        self.slots, self.queue_limit = slots, queue_limit
        self.waiting: FairQueue[Task] = FairQueue()
        self.active: set[Task] = set()
        self.stopping = False
        self._deadline = 0.0
        self.seconds = 2.0  # a running mean of how long tasks compute, for Retry-After
        self._baton = Baton()
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, name=f"longverse-{n}", daemon=True) for n in range(max(1, slots))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, *tasks: Task) -> None:
        """Queue them all or none. Raises QueueFull, Stopping, or UserError when one can never fit in memory."""
        with self._changed:
            if self.stopping:
                raise Stopping
            for task in tasks:
                self.sessions.check(task.tokens)
            waiting = len(self.waiting)
            mine = self.waiting.waiting_of(tasks[0].client) if tasks else 0
            crowded = mine < waiting and mine + len(tasks) > max(1, self.queue_limit // 2)
            # As many as there are free threads do not have to wait at all.
            room = self.queue_limit + max(0, self.slots - len(self.active))
            if waiting + len(tasks) > room or crowded:
                ahead = (waiting + len(self.active)) / self.slots
                seconds = min(60, max(1, math.ceil(self.seconds * ahead)))
                if crowded:
                    raise QueueFull(mine, seconds, " of one client are waiting while others wait too")
                raise QueueFull(waiting, seconds, " are waiting")
            for task in tasks:
                self.waiting.push(task.client, task)
            self._changed.notify_all()

    def cancel(self, task: Task, reason: str = "cancelled") -> None:
        """Stop it: at once if it waits, else after its present chunk or token."""
        with self._changed:
            task.reason = task.reason if task.stop.is_set() else reason
            task.stop.set()
            with contextlib.suppress(ValueError):  # it is not waiting: it runs, or is done
                self.waiting.remove(task.client, task, served=False)
                task.emit(Failed(task.reason, "The request was stopped before its turn came."))
            self._changed.notify_all()

    def held(self, ids: list[int], tokens: int, document: int = 0) -> int:
        """How many first tokens of `ids` a kept session holds."""
        with self._changed:
            return self.sessions.held(ids, tokens, document)

    def stop(self, grace: float) -> None:
        """Take no more work, give what there is `grace` seconds, then cancel it. Returns when nothing runs, or after
        a few seconds more where one step of the engine takes longer than that."""
        self._deadline = time.monotonic() + grace
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
            while (len(self.waiting) or self.active) and (left := self._deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.2))
            for task in [*self.active, *(task for _, task in self.waiting.order())]:
                task.reason = "stopping"
                task.stop.set()
            self._changed.notify_all()
        latest = time.monotonic() + 5
        for thread in self._threads:
            thread.join(max(0.1, latest - time.monotonic()))

    def hurry(self) -> None:
        """End the grace of a running `stop`; takes no lock, so a signal handler may call it."""
        self._deadline = 0.0

    # ---- in the worker threads --------------------------------------------------------------------------

    def _serve(self) -> None:
        while (found := self._next()) is not None:
            task, entry = found
            turn = Turn(task, self._baton, entry)
            broken = True
            try:
                with self._baton:
                    turn.started = time.monotonic()
                    task.run(entry.session, turn)
                broken = False
            except UserError as error:
                task.emit(Failed("user", str(error)))
                broken = False
            except Exception as error:  # whatever it was, the server goes on, without this session
                self._report(task, error)
            finally:
                with self._changed:
                    self.sessions.drop(entry) if broken else self.sessions.release(entry)
                    self.active.discard(task)
                    self.seconds += (time.monotonic() - turn.started - self.seconds) / 8
                    self._changed.notify_all()
                del entry, found  # a dropped session's memory goes now, not with this thread's next task

    def _next(self) -> tuple[Task, Entry] | None:
        """The next task that can run, with its session; None when the worker ends."""
        with self._changed:
            while True:
                for client, task in self.waiting.order():
                    if task.stop.is_set():
                        self.waiting.remove(client, task, served=False)
                        task.emit(Failed(task.reason, "The request was stopped before its turn came."))
                        continue
                    try:
                        entry = self.sessions.claim(task.ids, task.tokens, task.document)
                    except Busy as busy:
                        if busy.memory:
                            break  # or what is small would pass by what is large for ever
                        continue
                    except Exception as error:  # the machine refused the memory
                        self.waiting.remove(client, task)
                        self._report(task, error)
                        continue
                    self.waiting.remove(client, task)
                    self.active.add(task)
                    return task, entry
                if self.stopping and not len(self.waiting):
                    self._changed.notify_all()
                    return None
                self._changed.wait()

    def _report(self, task: Task, error: Exception) -> None:
        full = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"  # torch's, of a card
        if isinstance(error, MemoryError | UserError) or full:
            message = str(error) or "The machine's memory does not suffice for this request."
            task.emit(Failed("memory", message))
            return
        log.error("A request failed.", exc_info=error)
        task.emit(Failed("defect", f"The server failed on this request ({type(error).__name__})."))
