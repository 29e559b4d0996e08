"""Where documents come from: text, Markdown, JSONL (plain, .gz, .zst), Parquet, folders, hub data sets.

`read_source` streams `Document`s in one fixed order (folders are walked sorted), so positions in the stream can be
used to resume. A damaged line or row is skipped and counted in `Skipped`, with the first few reasons kept for the
report; only a source that yields nothing, or a file that cannot be opened, is an error.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longverse.data.config import nearest, resolve
from longverse.data.text import LANGUAGES, detect_language
from longverse.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
CODE_SUFFIXES = (".py", ".pyi", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".go", ".rs", ".rb")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")


@dataclass(frozen=True)
class Document:
    """One text with where it came from. `id` is unique within its source."""

    id: str
    source: str
    language: str  # one of text.LANGUAGES
    title: str
    text: str


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents: a path (file or folder) or the name of a hub data set."""

    name: str
    path: str = ""  # a file or a folder, relative to the configuration's file
    hub: str = ""  # a data set of the hub by name, for instance "allenai/c4" (needs `datasets`)
    subset: str = ""  # the hub data set's configuration
    hub_split: str = "train"
    weight: float | None = None  # share of the tokens of the whole mixture; None: as large as the source is
    fraction: float | None = None  # this source's own fraction, in place of the global one
    language: str = "auto"  # one of text.LANGUAGES, or auto: seen from each document
    text_field: str = "text"
    id_field: str = "id"
    title_field: str = "title"
    suffixes: tuple[str, ...] = ()  # which files of a folder; empty: texts, JSONL and Parquet, not code
    exclude: tuple[str, ...] = ()  # folder or file names to leave out anywhere in a folder
    max_documents: int | None = None  # the first so many documents only

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("a source lacks a name; give each source a short one for the report.")
        if bool(self.path) == bool(self.hub):
            raise UserError(f"source {self.name!r} needs either 'path' or 'hub', and not both.")
        if self.weight is not None and not self.weight > 0:
            raise UserError(f"source {self.name!r}: weight must be above 0, not {self.weight}; drop the source.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UserError(f"source {self.name!r}: fraction must be in (0, 1], not {self.fraction}.")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(
                f"source {self.name!r}: max_documents must be at least 1, not {self.max_documents}; drop the source."
            )
        if self.language != "auto" and self.language not in LANGUAGES:
            raise UserError(
                f"source {self.name!r}: unknown language {self.language!r}{nearest(self.language, LANGUAGES)}"
            )


@dataclass
class Skipped:
    """What a source could not give: counts by reason, and the first few cases in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        if len(self.examples) < 10:
            self.examples.append(f"{where}: {reason}")


def read_source(config: SourceConfig, base: Path, skipped: Skipped) -> Iterator[Document]:
    """The documents of a source, in a fixed order. `base`: the folder relative paths start at. UserError when the
    source is missing or unreadable; damaged or empty documents are skipped and counted in `skipped`."""
    rows = _hub_rows(config) if config.hub else _path_rows(config, base, skipped)
    count = 0
    for where, row in rows:
        if config.max_documents is not None and count >= config.max_documents:
            return
        if row is None:
            continue
        text = row.get(config.text_field)
        if not isinstance(text, str):
            found = ", ".join(sorted(map(str, row))[:8]) or "nothing"
            skipped.add(f"no text in the field {config.text_field!r} (fields: {found})", where)
            continue
        text = _clean(text)
        if not text.strip():
            skipped.add("empty text", where)
            continue
        identity = row.get(config.id_field)
        identity = _whole(str(identity) if identity not in (None, "") else where)
        title = row.get(config.title_field)
        title = _whole(str(title)) if title not in (None, "") else _title(identity)
        language = detect_language(text) if config.language == "auto" else config.language
        yield Document(identity, config.name, language, title, text)
        count += 1


_COMMENT = re.compile(r"^[ \t]*<!--(?:(?!-->)[^\n])*-->[ \t]*\n", re.MULTILINE)


def _clean(text: str) -> str:
    """One newline convention, no byte-order mark, NUL or form feed, no line that is a comment of HTML or Markdown, and
    `_whole`."""
    text = (
        text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "").replace("\x0c", "\n")
    )
    if "<!--" in text:
        text = _COMMENT.sub("", text)
    return _whole(text)


def _whole(text: str) -> str:
    """The text with lone surrogates (damaged JSON escapes), which no file of UTF-8 holds, replaced."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _title(identity: str) -> str:
    """The title of a document that has only an identity: that, without the ending of a text file. Nothing else is cut,
    so that titles tell documents apart ("web.jsonl:7", "2301.00123")."""
    ending = next((end for end in TEXT_SUFFIXES if identity.lower().endswith(end)), "")
    return identity[: len(identity) - len(ending)].strip() or identity


def stamp(paths: list[Path]) -> str:
    """A digest of the names, sizes and times of files: equal while nobody touches them, "" where one is missing."""
    digest = hashlib.blake2b(digest_size=12)
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            return ""
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\1".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def source_stamps(sources: Sequence[SourceConfig], base: Path) -> dict[str, str]:
    """`stamp` of each source that is a file or a folder (of a hub data set nothing is known without reading it)."""
    stamps = {}
    for source in sources:
        if source.path:
            path = resolve(source.path, base)
            stamps[f"source {source.name!r}"] = stamp(_folder_files(source, path) if path.is_dir() else [path])
    return stamps


Rows = Iterator[tuple[str, dict[str, Any] | None]]  # (where, fields or None when it was skipped)


def _path_rows(config: SourceConfig, base: Path, skipped: Skipped) -> Rows:
    path = resolve(config.path, base)
    if not path.exists():
        raise UserError(f"source {config.name!r}: {path} does not exist; correct its path.")
    if path.is_file():
        yield from _file_rows(path, path.name, config, skipped)
        return
    files = _folder_files(config, path)
    if not files:
        raise UserError(f"source {config.name!r}: {path} holds no file ending in {', '.join(_suffixes(config))}.")
    for file in files:
        yield from _file_rows(file, file.relative_to(path).as_posix(), config, skipped)


def _suffixes(config: SourceConfig) -> tuple[str, ...]:
    return config.suffixes or (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")


def _folder_files(config: SourceConfig, folder: Path) -> list[Path]:
    """The files of a folder that a source reads, in order."""
    suffixes, excluded = _suffixes(config), {*config.exclude, "__pycache__", ".git"}
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.lower().endswith(suffixes)
        and not excluded.intersection(file.relative_to(folder).parts)
        and file.is_file()
    ]


def _file_rows(path: Path, name: str, config: SourceConfig, skipped: Skipped) -> Rows:
    low = path.name.lower()
    if low.endswith((".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz")):
        yield from _jsonl_rows(path, name, skipped)
    elif low.endswith(".parquet"):
        yield from _parquet_rows(path, name, config)
    elif low.endswith((*TEXT_SUFFIXES, *CODE_SUFFIXES, *config.suffixes)) or config.suffixes:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped.add("not UTF-8", name)
            return
        except OSError as error:
            raise UserError(f"source {config.name!r}: {path} cannot be read ({error.strerror}).") from None
        yield name, {config.text_field: text, config.id_field: name, config.title_field: name}
    else:
        raise UserError(
            f"source {config.name!r}: {path.name} is of a kind not known here (texts, .jsonl, .parquet); "
            f"list its ending under 'suffixes' to read it as text."
        )


class _Zstandard(io.RawIOBase):
    """A zstandard stream whose damage is an EOFError, as that of gzip is."""

    def __init__(self, reader: Any, damage: type[Exception]) -> None:
        self._reader, self._damage = reader, damage

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._reader.readinto(buffer)
        except self._damage as error:
            raise EOFError(str(error)) from None

    def close(self) -> None:
        self._reader.close()
        super().close()


def _open_lines(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ModuleNotFoundError:
            raise UserError(f"{path.name} needs the package zstandard: pip install zstandard.") from None
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(_Zstandard(reader, zstandard.ZstdError))
    return path.open("rb")


def _jsonl_rows(path: Path, name: str, skipped: Skipped) -> Rows:
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{name}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested deeper than Python reads
                    skipped.add("not a JSON line", where)
                    yield where, None
                    continue
                if not isinstance(row, dict):
                    skipped.add("a JSON line that is not an object", where)
                    row = None
                yield where, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        # What came before the damage has been read and is good; the loss is stated in the report.
        skipped.add(f"the file breaks off ({type(error).__name__})", name)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None


def _parquet_rows(path: Path, name: str, config: SourceConfig) -> Rows:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{path.name} needs the package pyarrow: pip install pyarrow.") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({_first_line(error)}).") from None
    names = table.schema_arrow.names
    if config.text_field not in names:
        raise UserError(
            f"{path.name} has no column {config.text_field!r}{nearest(config.text_field, names)} Set text_field."
        )
    columns = [c for c in (config.text_field, config.id_field, config.title_field) if c in names]
    number = 0
    batches = table.iter_batches(batch_size=64, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path} is damaged after {number:,} rows ({_first_line(error)}): get the file anew."
            ) from None
        if batch is None:
            return
        for row in batch.to_pylist():
            yield f"{name}:{number}", row
            number += 1


def _hub_rows(config: SourceConfig) -> Rows:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"source {config.name!r} needs the package datasets: pip install datasets.") from None
    try:
        rows = datasets.load_dataset(config.hub, config.subset or None, split=config.hub_split, streaming=True)
    except Exception as error:  # the hub's client raises many kinds; each is the user's name or network
        raise UserError(
            f"source {config.name!r}: the data set {config.hub!r} did not open ({_first_line(error)})."
        ) from None
    number, rows = 0, iter(rows)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # as above
            raise UserError(
                f"source {config.name!r}: the data set {config.hub!r} broke off after {number:,} rows"
                f" ({_first_line(error)}): run the same command again."
            ) from None
        if row is None:
            return
        yield f"{config.hub}:{number}", row
        number += 1


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
