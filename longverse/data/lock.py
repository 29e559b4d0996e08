"""One builder a folder, and disk errors in one sentence."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from longverse.errors import UserError


class FolderLock:
    """Creates the folder and holds it for this process. The operating system releases the lock when the process
    ends, however it ends, so a kill leaves nothing to clean up. UserError when another builder holds it."""

    NAME = "builder.lock"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> FolderLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.folder} is a file; give a folder as 'out'.") from None
        self._file = os.open(self.folder / self.NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(self._file)
        except OSError:
            holder = os.read(self._file, 32).decode(errors="replace").strip()
            os.close(self._file)
            raise UserError(
                f"another builder (process {holder or 'unknown'}) is writing {self.folder}; wait for it or choose "
                f"another 'out'."
            ) from None
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, str(os.getpid()).encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def read_claim(folder: Path) -> dict[str, Any] | None:
    """What a folder was begun with (its config.json), None for a folder not begun. UserError when it is damaged."""
    claim = folder / "config.json"
    try:
        values = json.loads(claim.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{claim} is damaged; delete the folder {folder} or choose another 'out'.")
    return values


def refuse_foreign(folder: Path, what: str) -> None:
    """UserError when an unclaimed folder holds files that no builder left there. A claim is the first file a builder
    writes; a kill may leave the half of it."""
    if any(path.name not in (FolderLock.NAME, "config.json.tmp") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no build of {what}; choose another 'out'.")


def refuse_changes(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError when a folder was begun with another configuration or its sources have changed since: what is
    already written would not go with what follows."""
    if changed := sorted(key for key in new if key != "stamps" and new[key] != old.get(key)):
        raise UserError(
            f"{folder} was begun with another configuration ({', '.join(changed)} differ); choose another 'out' or "
            f"delete the folder."
        )
    before = old.get("stamps", {})
    if changed := sorted(name for name, stamp in new["stamps"].items() if stamp != (before.get(name) or stamp)):
        raise UserError(
            f"{', '.join(changed)} changed since {folder} was begun (names, sizes or times of files differ); choose "
            f"another 'out' or delete the folder."
        )


def _lock(file: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full or read-only disk becomes a UserError that says how much room is left and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            place = folder if folder.exists() else Path()
            free = shutil.disk_usage(place).free / 1e9
            raise UserError(
                f"the disk of {folder} is full ({free:.1f} GB free); make room and run the same command again: "
                f"finished work is kept."
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{error.filename or folder} cannot be written ({error.strerror}).") from None
        raise
