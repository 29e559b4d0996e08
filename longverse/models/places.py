"""Where longverse keeps files. Imports nothing heavy: commands that need no torch ask here too."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError


def cache_folder() -> Path:
    """Where longverse keeps what it can make again.

    $LONGVERSE_CACHE, else $XDG_CACHE_HOME/longverse, else ~/.cache/longverse.
    """
    try:
        if own := os.environ.get("LONGVERSE_CACHE"):
            return Path(own).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "longverse"
    except RuntimeError:  # a user without a home
        raise UserError("There is no home folder to keep files in: set LONGVERSE_CACHE to a folder.") from None
