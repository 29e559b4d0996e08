"""What every request passes first: whose page sent it, with which key, and how much it may send.

The server listens on this machine, but so do the web pages its user visits: a page may send requests to 127.0.0.1, and
by DNS rebinding it may even become "same origin". So the Host must be a name of this server, an Origin must be the
server's own, and no CORS header is ever sent. Plain ASGI, since wrapping responses would hide when a client leaves.
"""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics

SILENCE = 30.0  # seconds between two pieces of a request's body
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", PAGE_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
]
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/files", "/health", "/metrics")


class Guard:
    """Middleware around the whole app."""

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, hosts: Iterable[str], max_body: int, max_upload: int,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self.app, self.metrics = app, metrics
        self.key = api_key.encode() if api_key else None
        self.hosts = {"localhost", "testserver", socket.gethostname().lower(), *(host.lower() for host in hosts)}
        self.hosts.discard("testserver")
        self.max_body, self.max_upload = max_body, max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))  # of a header that comes twice, the first
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
                self.metrics.count(
                    "longverse_requests_total", path=_label(scope["path"]), status=str(message["status"])
                )
            await send(message)

        try:
            self._check(scope, headers)
            limit = self.max_upload if scope["path"].rstrip("/") == "/v1/files" else self.max_body
            await self.app(scope, _limited(receive, headers, limit), answer)
        except ApiError as error:
            if not started:
                await error.response()(scope, receive, answer)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.knows(host):
            raise ApiError(
                403,
                f"This server is not known as {host[:100]!r}: use its address, or start it with --allow-host.",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin")
        if origin is not None and not _same_host(origin.decode("latin-1"), host):
            raise ApiError(403, "Requests from other web pages are refused.", code="origin_not_allowed")
        path = scope["path"]
        if self.key is not None and (path.startswith("/v1") or path in ("/metrics", "/openapi.json")):
            given = headers.get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            # Compared in constant time, also where there is none.
            if not hmac.compare_digest(key.strip(), self.key) or scheme.lower() != b"bearer":
                raise ApiError(
                    401,
                    "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server. An address written in digits cannot be rebound, a name can."""
        try:
            parts = urlsplit(f"//{host}")
            name = (parts.hostname or "").lower()
            _ = parts.port
        except ValueError:
            return False
        if not name or parts.path or parts.username is not None or parts.query or parts.fragment:
            return False
        if name.rstrip(".") in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _same_host(origin: str, host: str) -> bool:
    """Whether an Origin is this server's own page; its scheme may be that of a proxy before it."""
    scheme, separator, rest = origin.lower().partition("://")
    return bool(separator) and scheme in ("http", "https") and rest == host.lower()


def _label(path: str) -> str:
    """A path as a label: few values, whatever clients ask for."""
    for route in ROUTES:
        if path == route:
            return route
        if path.startswith(route + "/"):
            return route + "/*"
    return "page" if path == "/" or path.startswith("/static/") else "other"


def _limited(receive: Receive, headers: dict[bytes, bytes], limit: int) -> Receive:
    """`receive` that raises ApiError when the body exceeds the limit or stops coming."""
    stated = headers.get(b"content-length", b"0")
    if stated.isdigit() and int(stated[:20]) > limit:
        raise _too_large(limit)
    seen = 0
    whole = False

    async def read() -> Any:
        nonlocal seen, whole
        if whole:
            return await receive()  # only the news that the client has left
        try:
            message = await asyncio.wait_for(receive(), SILENCE)
        except TimeoutError:
            raise ApiError(408, f"The body stopped coming for {SILENCE:.0f} seconds.", code="timeout") from None
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > limit:
                raise _too_large(limit)
        return message

    return read


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"The body is larger than {limit / 2**20:,.0f} MB, the most this server takes.", code="body_too_large"
    )
