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

    `on_end` is called once in every case: sent to the end, the client gone, or nothing read for STALL seconds.
    """

    def __init__(self, events: AsyncIterator[Any], keep_alive: float, on_end: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream")
        self.events, self.keep_alive, self.on_end = events, keep_alive, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        watch = asyncio.ensure_future(gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            pump = asyncio.ensure_future(self._pump(send))
            try:
                await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
                if pump.done():
                    pump.result()
            except TimeoutError:
                abort(scope)
            finally:
                pump.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await pump
        finally:
            watch.cancel()
            self.on_end()

    async def _pump(self, send: Send) -> None:
        following = asyncio.ensure_future(anext(self.events, None))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=self.keep_alive)
                if not done:
                    await self._send(send, b": keep-alive\n\n")
                    continue
                data = following.result()
                if data is None:
                    break
                await self._send(send, event(data))
                following = asyncio.ensure_future(anext(self.events, None))
        finally:
            following.cancel()
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        await asyncio.wait_for(send({"type": "http.response.body", "body": data, "more_body": more}), STALL)


async def gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def abort(scope: Scope) -> None:
    """Cut the connection without waiting for what it has not read."""
    cut = scope.get("state", {}).get("abort")
    if cut is not None:
        cut()
