"""Server-sent events to a client that may read slowly, say nothing for minutes, or vanish."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import encode

STALL = 60.0  # seconds that a client may leave what was sent unread


def event(data: Any) -> bytes:
    """One event: JSON, or a plain word such as [DONE]."""
    return b"data: " + (data.encode() if isinstance(data, str) else encode(data)) + b"\n\n"


class EventStream(Response):
    """A response that sends events as they come and a comment whenever `keep_alive` seconds pass without one.

    `on_end` is called once in every case: sent to the end, the client gone, or nothing read for STALL seconds. One
    clock watches over silence and stalls, since timers for every token would cost more than the tokens' HTTP.
    """

    def __init__(self, events: AsyncIterator[Any], keep_alive: float, on_end: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream")
        self.events, self.keep_alive, self.on_end = events, keep_alive, on_end
        self.sent = 0.0  # when the last sending ended
        self.sending: list[float] = []  # when those that last began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        parts: list[asyncio.Future[None]] = []
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            self.sent = asyncio.get_running_loop().time()
            parts = [asyncio.ensure_future(part) for part in (self._pump(send), gone(receive), self._watch(send))]
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            if parts[2] in done:
                abort(scope)
            if parts[0] in done:
                parts[0].result()
        finally:
            for part in parts:
                part.cancel()
            for part in parts:
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await part
            self.on_end()

    async def _pump(self, send: Send) -> None:
        async for data in self.events:
            await self._send(send, event(data))
        await self._send(send, b"", more=False)

    async def _watch(self, send: Send) -> None:
        """Returns when the client has read nothing for too long."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(self.keep_alive, STALL) / 4)
            if self.sending:
                if now() - self.sending[0] > STALL:
                    return
            elif now() - self.sent >= self.keep_alive:
                comment = asyncio.ensure_future(self._send(send, b": keep-alive\n\n"))
                await asyncio.wait({comment}, timeout=STALL)
                if not comment.done():
                    comment.cancel()
                    return

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        now = asyncio.get_running_loop().time
        self.sending.append(now())
        try:
            await send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            self.sending.pop(0)
            self.sent = now()


async def gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    kind = ""
    while kind != "http.disconnect":
        kind = (await receive())["type"]


def abort(scope: Scope) -> None:
    """Cut the connection without waiting for what it has not read."""
    cut = scope.get("state", {}).get("abort")
    if cut is not None:
        cut()
