"""The running server: uvicorn with limits on silent connections, and a stop that lets answers finish.

Imports no torch, so that an address which is taken is said at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UserError

if TYPE_CHECKING:
    from .worker import Worker

SILENCE = 20.0  # seconds in which a connection must have sent a whole request's head
MOST_CONNECTIONS = 512


class Protocol(H11Protocol):
    """HTTP/1.1 that hangs up on connections which send nothing, or a head byte by byte, and can cut a connection whose
    client reads nothing."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle():
            self._wait()
        else:
            self._unset_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_deadline()
        super().connection_lost(exc)

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(SILENCE, self._hang_up)

    def _unset_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self) -> None:
        self._deadline = None
        if self._idle() and not self.transport.is_closing():
            self.transport.abort()


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT: no new work, `grace` seconds for what runs, then it is cancelled. A second signal
    cancels at once."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float) -> None:
        super().__init__(config)
        self.worker, self.grace = worker, grace

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """As uvicorn's, but the signal is not raised again at the end: the process leaves with 0."""
        if threading.current_thread() is not threading.main_thread():  # as in tests: nobody sends signals there
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.grace = 0.0
            self.worker.hurry()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:  # no new connections, while the old ones get their answers
            server.close()
        await asyncio.to_thread(self.worker.stop, self.grace)
        await super().shutdown(sockets)


def configured(app: ASGIApp) -> uvicorn.Config:
    """uvicorn as we want it: no names, no web sockets, no headers believed, little said."""
    return uvicorn.Config(
        app, http=Protocol, ws="none", loop="asyncio", lifespan="off", log_level="error", access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=15, timeout_graceful_shutdown=3,
    )  # fmt: skip


def serve(
    app: ASGIApp,
    worker: Worker,
    sock: socket.socket,
    *,
    grace: float = 10.0,
    on_start: Callable[[], None] | None = None,
) -> None:
    """Run until a signal; returns when everything has stopped."""
    server = Server(configured(app), worker, grace)
    if on_start is not None:
        on_start()
    server.run(sockets=[sock])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the address is taken or not ours. Port 0 takes any free one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"{host} is no address of this machine ({error.strerror}): use 127.0.0.1.") from None
    family, kind, _, _, address = found[0]
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"{host}:{port} cannot be listened at ({reason}): choose another --port, or 0.") from None
    sock.listen(256)
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL that the socket answers under."""
    name: Any = sock.getsockname()
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"http://{host}:{name[1]}"
