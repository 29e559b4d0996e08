"""An OpenAI-compatible HTTP endpoint as a back end: vLLM, llama.cpp's server, longverse serve, a hosted model.

Only the standard library speaks HTTP here. What may pass (no connection, a timeout, 408, 425, 429, 5xx, a
torn or empty reply) is tried again with growing pauses; what stays wrong is a Failure of that row. The interface knows
no answer that is already begun: a request's lead stands at the end of the question.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from longverse.errors import UserError
from longverse.evaluation.backends import Failure, Lane, Message, Reply, Request
from longverse.web import error_text, named_wait

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_PAUSE = 60.0  # seconds between two tries, whatever the server asks for


@dataclass
class EndpointBackend:
    """url: up to and including /v1; model: the name the server knows; key: bearer token, kept out of results.

    tokenizer and chat (longverse's classes, from the served model's folder) are needed only where prompts are
    fitted to a length or cut; without them such a run is refused. timeout: seconds for one try; retries: tries
    after the first; pause: seconds before the first retry, doubled each time, with up to a quarter of chance.
    """

    url: str
    model: str
    key: str | None = None
    tokenizer: Any = None
    chat: Any = None
    window: int | None = None
    concurrency: int = 4
    timeout: float = 600.0
    retries: int = 4
    pause: float = 1.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{self.url!r} is no endpoint; write it like http://127.0.0.1:8000/v1.")
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise UserError("--concurrency must be at least 1, --timeout above 0 and --retries 0 or more.")
        self.url = self.url.rstrip("/")
        self.key = (self.key or "").strip() or None
        if self.key and not (self.key.isascii() and self.key.isprintable()):  # the client's own error would show it
            raise UserError("The key of --key-env holds characters that no key has: set the variable to the key alone.")

    @property
    def name(self) -> str:
        return self.model

    @property
    def lanes(self) -> Sequence[Lane]:
        return (self,) * self.concurrency

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"backend": "endpoint", "model": self.model, "window": self.window}
        if self.tokenizer is not None:  # by which texts are fitted and cut
            about |= {"tokenizer": self._vocabulary, "chat": self.chat.kind}
        return about

    @cached_property
    def _vocabulary(self) -> str:
        """16 hex digits that tell tokenizers apart: by the vocabulary in the order of ids, and by the chat template."""
        entries = self.tokenizer.backend.get_vocab(with_added_tokens=True)
        text = json.dumps([sorted((i, token) for token, i in entries.items()), self.tokenizer.chat_template])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self) -> None:
        """Asks the endpoint for its models once, so that a wrong address or name fails before any work.

        UserError when nothing answers or the name is not served; a server without /models is let pass.
        """
        try:
            served = self._send("GET", "/models", None)
        except _Refused as refused:
            if refused.status in (401, 403):
                raise UserError(f"{self.url} refuses the key ({refused}); set it with --key-env.") from None
            return
        except _Passing as error:
            raise UserError(f"{self.url} does not answer ({error}); start the server or mend --endpoint.") from None
        names = [row.get("id") for row in served.get("data") or () if isinstance(row, dict)]
        if names and self.model not in names:
            raise UserError(
                f"{self.url} serves no model called {self.model!r}; it serves {', '.join(map(str, names[:8]))}."
            )

    def _needs_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UserError(
                "Lengths are counted in the model's own tokens; give the served model's folder with --tokenizer."
            )
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        return self._needs_tokenizer().encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._needs_tokenizer().decode(list(ids), skip_special=True)

    def count(self, request: Request) -> int:
        tokenizer = self._needs_tokenizer()
        request = _lead_in_question(request)
        if request.messages is not None:
            return len(self.chat.encode(list(request.messages)))
        return len(tokenizer.encode(request.prompt))

    def answer(self, request: Request) -> Reply:
        request = _lead_in_question(request)
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
            "stream": False,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.messages is not None:
            path, body["messages"] = "/chat/completions", list(request.messages)
        else:
            path, body["prompt"] = "/completions", request.prompt
        start = time.perf_counter()
        reply = self._with_retries(path, body)
        choice = reply["choices"][0]
        text = _text_of(choice)
        if request.end_line:
            # The public interface has no "not as the first token": the first line after leading feeds is the
            # same answer wherever the model does not insist on an empty one.
            text = text.lstrip("\n").split("\n")[0]
        usage = reply["usage"] if isinstance(reply.get("usage"), dict) else {}
        return Reply(
            text=text,
            prompt_tokens=usage.get("prompt_tokens"),
            new_tokens=usage.get("completion_tokens"),
            finish_reason=choice.get("finish_reason") or "stop",
            seconds=time.perf_counter() - start,
        )

    def _with_retries(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        pause, tried = self.pause, 0
        while True:
            tried += 1
            try:
                reply = self._send("POST", path, body)
                choices = reply.get("choices")
                if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                    raise _Passing("the reply holds no choices")
                if _text_of(choices[0]) is None:
                    raise _Passing("the reply holds no text")
                return reply
            except _Passing as error:
                if tried > self.retries:
                    raise Failure(f"{error}, after {tried} tries") from None
                self.sleep(min(LONGEST_PAUSE, max(error.wait or 0.0, pause * (1 + random.random() / 4))))
                pause = min(2 * pause, LONGEST_PAUSE)
            except _Refused as error:
                if error.status in (401, 403):
                    raise UserError(f"{self.url} refuses the key ({error}); set it with --key-env.") from None
                if error.status in (404, 405) and path == "/completions":
                    raise UserError(
                        f"{self.url} has no /completions, which prompts without a chat template need ({error}); "
                        "use another server or leave those tasks out with --tasks."
                    ) from None
                raise Failure(str(error)) from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                raw = response.read()
        except urllib.error.HTTPError as error:
            said = _whole(error_text(error))
            if error.code in _PASSING:
                raise _Passing(f"HTTP {error.code}: {said}", named_wait(error.headers.get("Retry-After", ""))) from None
            raise _Refused(error.code, f"HTTP {error.code}: {said}") from None
        except TimeoutError:
            raise _Passing(f"no answer within {self.timeout:g} seconds") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Passing(f"no answer within {self.timeout:g} seconds") from None
            raise _Passing(f"no connection ({error.reason})") from None
        except (http.client.HTTPException, ConnectionError, OSError) as error:
            raise _Passing(f"the connection broke ({type(error).__name__})") from None
        try:
            reply = json.loads(raw)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise _Passing(f"the reply is not JSON ({raw[:60]!r})" if raw else "the reply is empty") from None
        if not isinstance(reply, dict):
            raise _Passing("the reply is not a JSON object")
        return reply


class _Passing(Exception):
    """Worth another try. wait: seconds the server asked for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _Refused(Exception):
    """A definite no: the same request would be refused again."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _text_of(choice: dict[str, Any]) -> Any:
    message: Message | None = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return _whole(text) if isinstance(text, str) else None


def _whole(text: str) -> str:
    """The text with lone surrogates replaced: a reply cut inside an emoji may hold one, and no file of UTF-8 does."""
    return text.encode("utf-8", "replace").decode()


def _lead_in_question(request: Request) -> Request:
    if not request.lead:
        return request
    if request.messages is None:
        return replace(request, prompt=(request.prompt or "") + request.lead, lead="")
    *before, last = request.messages
    return replace(request, messages=(*before, {**last, "content": last["content"] + request.lead}), lead="")
