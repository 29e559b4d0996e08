"""An OpenAI-compatible endpoint as a teacher: every request is paid once.

Replies are kept in a file beside the build, keyed by the request, and flushed as they come: a killed build asks nothing
twice. Requests wait for the rate limit; 429 and 5xx, refused connections and timeouts are tried again after the time
the server names, or after 1, 2, 4 ... seconds; what cannot pass (a wrong key, an unknown model) is a UserError at once.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.web import error_text, named_wait

Messages = list[dict[str, str]]
_LONGEST_WAIT = 3_600.0  # seconds that a build waits because an endpoint asks it to


@dataclass(frozen=True)
class TeacherConfig:
    """Where the teacher is and how it may be used."""

    url: str  # for instance http://localhost:8000/v1
    model: str
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key, if one is needed
    concurrency: int = 8  # requests in flight
    requests_per_minute: int = 0  # 0: no limit of our own
    timeout_seconds: float = 120.0
    retries: int = 6
    temperature: float = 0.7
    max_tokens: int = 1024
    chunk_tokens: int = 3_000  # how much of a document a question is made from
    closed_book: bool = True  # drop questions that the teacher answers without the document
    price_in: float = 0.0  # money for a million prompt tokens
    price_out: float = 0.0  # money for a million reply tokens

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"teacher: url must begin with http:// or https://, not {self.url!r}.")
        if not self.model:
            raise UserError("teacher: give the name of the model as the endpoint knows it.")
        for name in ("concurrency", "retries", "max_tokens", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"teacher: {name} must be at least 1, not {getattr(self, name)}.")
        for name in ("temperature", "price_in", "price_out"):
            if not getattr(self, name) >= 0:
                raise UserError(f"teacher: {name} must not be negative, not {getattr(self, name)}.")
        if self.requests_per_minute < 0 or not self.timeout_seconds > 0:
            raise UserError("teacher: requests_per_minute must not be negative and timeout_seconds must be above 0.")


@dataclass
class Spent:
    """What a build has used so far. `kept`: replies taken from an earlier run."""

    requests: int = 0
    kept: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    seconds: float = 0.0  # waiting for the endpoint, over all requests

    def money(self, config: TeacherConfig) -> float:
        """Price of the tokens so far."""
        return (self.prompt_tokens * config.price_in + self.reply_tokens * config.price_out) / 1e6


class Unusable(Exception):
    """The endpoint answered, but not with what was asked for; `gate` names it in the report."""

    def __init__(self, gate: str) -> None:
        super().__init__(gate)
        self.gate = gate


@dataclass
class Teacher:
    """Thread-safe. store: the file that replies are kept in."""

    config: TeacherConfig
    store: Path
    sleep: Callable[[float], None] = time.sleep
    spent: Spent = field(default_factory=Spent)
    _replies: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: float = 0.0

    def __post_init__(self) -> None:
        if self.store.exists():
            whole = 0
            with self.store.open("rb") as lines:
                for line in lines:
                    try:
                        row = json.loads(line)
                        self._replies[row["key"]] = row["reply"]
                    except (ValueError, KeyError, TypeError):
                        break  # the torn end of a killed run
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
            with self.store.open("rb+") as file:
                file.truncate(whole)
        self._file = self.store.open("ab")

    def close(self) -> None:
        """Release the file of replies."""
        self._file.close()

    def ask(self, messages: Messages, *, attempt: int = 0) -> dict[str, Any]:
        """The JSON object that the teacher replies with. attempt: another one is another request for the same question.
        Unusable when the reply holds no JSON object; UserError when the endpoint cannot be used."""
        body = {
            "model": self.config.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            "seed": attempt,
        }
        key = hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
        with self._lock:
            reply = self._replies.get(key)
            if reply is not None:
                self.spent.kept += 1
        if reply is None:
            reply = self._send(body)
            with self._lock:
                self._replies[key] = reply
                self._file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False).encode() + b"\n")
                self._file.flush()
        return _object(reply)

    def _send(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.config.key_variable, "").strip():
            if not (key.isascii() and key.isprintable()):  # the client's own error would show the key
                raise UserError(f"{self.config.key_variable} holds characters no key has; set it to the key alone.")
            headers["Authorization"] = f"Bearer {key}"
        url = self.config.url.rstrip("/") + "/chat/completions"
        problem = ""
        for turn in range(self.config.retries + 1):
            self._wait_turn()
            began = time.monotonic()
            wait = min(2.0**turn, 60.0) * random.uniform(0.8, 1.2)
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self.config.timeout_seconds) as answer:
                    reply = self._content(answer.read(), time.monotonic() - began)
                if reply is not None:
                    return reply
                problem = "its answer is no chat completion"
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error_text(error)}"
                if error.code in (400, 413, 422) and self._replies:  # others were taken: it is this passage
                    raise Unusable("endpoint refused the passage") from None
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise UserError(
                        f"the endpoint {url} refused the request ({problem}); correct url, model or key."
                    ) from None
                named = named_wait(error.headers.get("Retry-After", "") if error.headers else "")
                if named is not None and named > _LONGEST_WAIT:
                    raise UserError(
                        f"the endpoint {url} asks to wait {named / 60:,.0f} minutes ({problem}); run the same command "
                        f"again after that: what was paid for is kept."
                    ) from None
                wait = wait if named is None else named
            except TimeoutError:
                problem = f"no answer within {self.config.timeout_seconds:g} s"
            except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke, of TLS too
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            with self._lock:
                self.spent.retries += 1
                self.spent.seconds += time.monotonic() - began
            if turn < self.config.retries:
                self.sleep(wait)
        raise UserError(
            f"the endpoint {url} failed {self.config.retries + 1} times ({problem}); mend it and run the same "
            f"command again: what was paid for is kept."
        )

    def _wait_turn(self) -> None:
        if not self.config.requests_per_minute:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 60.0 / self.config.requests_per_minute
        if start > now:
            self.sleep(start - now)

    def _content(self, data: bytes, seconds: float) -> str | None:
        try:
            answer = json.loads(data)
            reply = answer["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return None
        if not isinstance(reply, str):
            return None
        usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
        with self._lock:
            self.spent.requests += 1
            self.spent.seconds += seconds
            self.spent.prompt_tokens += int(usage.get("prompt_tokens") or 0)
            self.spent.reply_tokens += int(usage.get("completion_tokens") or 0)
        return reply


def _object(reply: str) -> dict[str, Any]:
    """The JSON object in a reply, whatever fence or talk surrounds it."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        value = json.loads(reply[start : end + 1])
    except (ValueError, RecursionError):
        raise Unusable("endpoint reply is no JSON") from None
    if not isinstance(value, dict):
        raise Unusable("endpoint reply is no JSON")
    return value
