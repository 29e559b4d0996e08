"""What an HTTP error says, for all that speaks to model servers: the wait it names and its message."""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import time
import urllib.error


def named_wait(header: str) -> float | None:
    """Seconds that a Retry-After header names, as a number or as a date (RFC 9110, 10.2.3); None for neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def error_text(error: urllib.error.HTTPError) -> str:
    """The message in the body of an error, at most 200 characters in one line; the status's own words without one."""
    try:
        text = error.read(2_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        said = json.loads(text)["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError):
        said = text.strip()
    return " ".join(str(said or error.reason or "").split())[:200]
