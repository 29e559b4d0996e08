"""Who computes next: a fair queue of waiting work, and a baton that running work hands round.

The engine is one and its threads fill the machine, so exactly one piece of work computes at any time. A long reading
passes the baton on after every chunk and an answer after some tokens, so that a short question does not wait for a
book to be read.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

QUANTUM = 0.1  # seconds: below it the baton stays, since handing it over costs a thread switch and warm caches

T = TypeVar("T")


class Baton:
    """A lock whose waiters get it in the order they came. `pass_on` lets the others have a turn."""

    def __init__(self, quantum: float = QUANTUM) -> None:
        self.quantum = quantum
        self._lock = threading.Lock()
        self._held = False
        self._since = 0.0
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> "Baton":
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.give()

    def take(self) -> None:
        with self._lock:
            gate = None
            if self._held:
                gate = threading.Lock()
                gate.acquire()
                self._waiting.append(gate)
            self._held = True
        if gate is not None:
            gate.acquire()  # until `give` opens it; the baton counts as held all the while
        self._since = time.monotonic()

    def give(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def pass_on(self) -> None:
        """Called by the holder between two steps."""
        if self._waiting and time.monotonic() - self._since >= self.quantum:
            self.give()
            self.take()


class FairQueue(Generic[T]):
    """Waiting work by client: clients take turns, and within one the oldest comes first. Not thread-safe."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()  # the client served longest ago first

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def waiting_of(self, client: str) -> int:
        return len(self._clients.get(client, ()))

    def push(self, client: str, item: T) -> None:
        self._clients.setdefault(client, deque()).append(item)

    def order(self) -> Iterator[tuple[str, T]]:
        """Everything in the order it should be tried: the first of every client, then the second of every client."""
        lines = [(client, list(items)) for client, items in self._clients.items()]
        for place in range(max((len(items) for _, items in lines), default=0)):
            for client, items in lines:
                if place < len(items):
                    yield client, items[place]

    def remove(self, client: str, item: T, *, served: bool = True) -> None:
        """Take it out; a served client goes to the end of the line. ValueError when it is not there."""
        items = self._clients.get(client, deque())
        items.remove(item)
        if not items:
            self._clients.pop(client, None)
        elif served:
            self._clients.move_to_end(client)
