"""Files an evaluation writes and reads: whole files atomically, rows in a journal that survives a kill.

A journal is a JSON-lines file whose first line holds the settings of the run; every further line is one
finished row. Rows are appended and flushed one by one, so a run that is killed loses at most the row it was
writing, and a run with other settings never continues a journal that is not its own.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longverse.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, then moves the file into place.

    The temporary name keeps the suffix of `path`, since matplotlib chooses the format by it. A folder that
    cannot be written raises UserError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; choose another folder.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; choose another folder.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON atomically, Chinese kept readable."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; a missing or damaged one raises UserError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); mend or remove the file."
        ) from error


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSON-lines file; blank lines are skipped.

    A line that is not a JSON object raises UserError naming file and line: a damaged row is never dropped.
    """
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path.") from error
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}: not UTF-8; mend or remove that line.") from None
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove that line."
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object; mend or remove that line.")
            yield number, row


class Journal:
    """Finished rows of one run, kept on disk under a key per row.

    path: the JSON-lines file; settings: what must be equal for a later run to continue it.
    UserError when the file belongs to other settings or is damaged before its last line.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        header = json.dumps({"settings": settings}, ensure_ascii=False, sort_keys=True)
        if path.exists():
            self._drop_torn_line()
        if path.exists() and path.stat().st_size:
            self._read(json.loads(header)["settings"])
        else:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(header + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"Cannot write {path}: {error.strerror}; choose another folder.") from error

    def _drop_torn_line(self) -> None:
        # A kill can leave the last line half written: it has no line feed, and its row is simply done again.
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            keep = data.rfind(b"\n") + 1
            with self.path.open("r+b") as handle:
                handle.truncate(keep)

    def _read(self, settings: dict[str, Any]) -> None:
        rows = read_rows(self.path)
        _, first = next(rows)
        stored = first.get("settings")
        if stored != settings:
            old = stored or {}
            changed = sorted(
                key for key in {*settings, *old} if (key in old, old.get(key)) != (key in settings, settings.get(key))
            )
            raise UserError(
                f"{self.path} was made with other settings ({', '.join(changed)}); choose another output "
                "folder, or remove this one to begin again."
            )
        for number, row in rows:
            if "key" not in row:
                raise UserError(f"{self.path}, line {number}: the row has no key; remove that line.")
            self.rows[row["key"]] = row

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Appends one finished row and flushes it to the disk; UserError where the disk takes no more."""
        kept = {"key": key, **row}
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(kept, ensure_ascii=False) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path}: {error.strerror}; make room and give the same command again."
            ) from error
        self.rows[key] = kept

    def done(self, key: str) -> bool:
        """True when the row is finished; a row recorded as failed is tried again by a later run."""
        return key in self.rows and "failed" not in self.rows[key]
