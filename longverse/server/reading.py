"""A file to a document in a process of its own, with a limit on time and memory: a hostile PDF may crash or exhaust
its reader, and must not take the server with it.

    python -m longverse.server.reading SOURCE TARGET NAME

reads SOURCE, calls it NAME, and writes TARGET as JSON. A UserError is one line on standard output and exit code 2.
"""

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..documents.reader import Document, Paragraph, decode
from ..errors import UserError

SECONDS = 300  # of computing; a 1,000-page PDF takes a few
MEMORY = 6 * 2**30  # bytes of address space


def read_apart(source: Path, target: Path, name: str, seconds: float = SECONDS) -> Document:
    """The document in `source`; it is also written to `target`. Raises UserError for what is no readable document."""
    command = [sys.executable, "-m", "longverse.server.reading", str(source), str(target), name]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"LONGVERSE_COMMAND": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": paths}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=seconds, env=environment, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} was not read within {seconds:.0f} seconds: give a part of it, or its text.") from None
    if done.returncode == 2:
        raise UserError(done.stdout.decode("utf-8", "replace").strip() or f"{name} cannot be read.")
    if done.returncode != 0 or not target.exists():
        raise UserError(f"{name} broke the program that reads documents: it is damaged or hostile; save it anew.")
    return load(target)


def load(path: Path) -> Document:
    """A document as `save` wrote it. Raises ValueError, KeyError, TypeError or OSError for anything else."""
    fields: dict[str, Any] = json.loads(path.read_bytes())
    text = fields["text"]
    paragraphs = []
    for paragraph in fields.pop("paragraphs"):
        paragraph["text"] = text[paragraph["start"] : paragraph["end"]]
        paragraphs.append(Paragraph(**_tuples(paragraph)))
    return Document(paragraphs=tuple(paragraphs), **_tuples(fields))


def save(document: Document, path: Path) -> None:
    """As JSON; paragraphs without their text, which their offsets give."""
    fields = asdict(document)
    for paragraph in fields["paragraphs"]:
        del paragraph["text"]
    path.write_bytes(json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _main(source: str, target: str, name: str) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        save(decode(Path(source).read_bytes(), name), Path(target))
    except UserError as error:
        sys.stdout.write(str(error))
        return 2
    except (MemoryError, RecursionError):
        sys.stdout.write(f"{name} takes more memory than a document may: give a part of it.")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:4]))
