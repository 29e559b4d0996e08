"""Errors as OpenAI's clients expect them: a status, and `{"error": {message, type, param, code}}`."""

import difflib
import json
from typing import Any

from starlette.responses import Response

from .worker import Failed, QueueFull

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 415: "invalid_request_error",
    422: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error",
    507: "insufficient_storage",
}  # fmt: skip
FAILED = {"user": 400, "defect": 500, "memory": 503, "cancelled": 503, "stopping": 503}


class ApiError(Exception):
    """Ends a request with an error of ours. `more` goes into the error object."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: dict[str, str] | None = None, more: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers, self.more = headers or {}, more or {}

    def body(self) -> dict[str, Any]:
        fields = {"message": self.message, "type": TYPES.get(self.status, "server_error")}
        return {"error": {**fields, "param": self.param, "code": self.code, **self.more}}

    def response(self) -> Response:
        return JSON(self.body(), self.status, self.headers)


class JSON(Response):
    """A JSON response that no text can break: half a character becomes ?."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


def encode(content: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def too_long(prompt: int, answer: int, window: int, name: str, asked: bool) -> ApiError:
    """The prompt, alone or with the answer that was asked for, exceeds the window."""
    if prompt >= window or not asked:
        what = f"This prompt has {prompt:,} tokens and {name} reads {window:,}, the answer included: shorten it."
    else:
        what = (
            f"This prompt has {prompt:,} tokens, with {answer:,} for the answer {prompt + answer:,}, and {name} reads"
            f" {window:,}: shorten it or ask for a shorter answer."
        )
    return ApiError(
        400, what, code="context_length_exceeded", param="messages", more={"n_prompt_tokens": prompt, "n_ctx": window}
    )


def queue_full(error: QueueFull) -> ApiError:
    return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})


def failed(event: Failed) -> ApiError:
    status = FAILED[event.kind]
    message = "The server is stopping: try again later." if event.kind == "stopping" else event.message
    headers = {"Retry-After": "5"} if status == 503 else {}
    return ApiError(status, message, code=None if event.kind == "user" else event.kind, headers=headers)


def invalid(problems: list[dict[str, Any]], known: set[str]) -> ApiError:
    """One sentence from pydantic's list of problems. `known`: the request's fields, for a suggestion."""
    problem = problems[0] if problems else {"type": "", "loc": (), "msg": "it is not valid"}
    place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(place) or None
    if problem["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place[-1], known, n=1) if len(place) == 1 else []
        hint = f"; did you mean {close[0]}" if close else ""
        return ApiError(400, f"The field {param} is not known{hint}.", code="unknown_parameter", param=param)
    said = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    if param is None:
        return ApiError(400, f"The request is refused: {said[:1].lower() + said[1:]}.", code="invalid_value")
    return ApiError(400, f"The field {param[:200]} is wrong: {said}.", code="invalid_value", param=param[:200])
