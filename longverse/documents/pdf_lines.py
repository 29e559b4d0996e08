"""PDF to lines of text with their places, by PDFium in a process of its own.

PDFium is a large C++ library and a PDF may come from anybody: in a child process with limits, a file that crashes it,
or makes it run or grow without end, is one sentence and not the end of a server. The child is this very module run
with `python -c`; it takes the file on standard input and gives JSON lines, one a page.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

PAGES = 50_000
SECONDS = 600  # of processor time
MEMORY = 4 * 2**30  # bytes of address space
_PASSWORD = 4  # FPDF_ERR_PASSWORD


@dataclass(frozen=True)
class Line:
    """One line on a page; points (1/72 inch), y upwards. PDFium marks a hyphen that parts a word with \\x02."""

    text: str
    left: float
    right: float
    base: float  # y of the base line
    size: float  # of the font in its middle
    bold: bool


def pdf_lines(data: bytes, name: str) -> tuple[str, list[list[Line]], list[bool]]:
    """Title, the lines of every page, and whether each page shows pictures. UserError for what cannot be read."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "LONGVERSE_COMMAND": "1", "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    code = "from longverse.documents.pdf_lines import child; child()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=data, capture_output=True, env=environment, timeout=2 * SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} keeps the PDF reader busy without end: save it anew, or give its text.") from None
    records = [json.loads(line) for line in done.stdout.decode("utf-8", "replace").splitlines() if line[:1] == "{"]
    if records and "error" in records[-1]:
        raise _refusal(records[-1]["error"], name)
    if done.returncode or not records:
        if b"ModuleNotFoundError" in done.stderr and b"pypdfium2" in done.stderr:
            raise UserError(f"{name} is a PDF and pypdfium2, which reads it, is absent: pip install pypdfium2.")
        raise UserError(
            f"{name} stops the PDF reader (it is damaged, or far too large): save it anew from where it was made."
        )
    pages = [[Line(*line) for line in record["lines"]] for record in records[1:]]
    return records[0]["title"], pages, [bool(record["pictures"]) for record in records[1:]]


def _refusal(error: str, name: str) -> UserError:
    if error == "password":
        return UserError(f"{name} is a PDF locked with a password: save a copy without one.")
    if error == "empty":
        return UserError(f"{name} is a PDF without pages: give one that has some.")
    if error == "pages":
        return UserError(f"{name} has more than {PAGES:,} pages, the most that is read: give a part of it.")
    return UserError(f"{name} is a damaged PDF ({error}): get or save it anew.")


# ---- in the child -------------------------------------------------------------------------------------------


def child() -> None:
    """Read a PDF from standard input; write a record of the document and one a page, or {"error": ...} last."""
    data = sys.stdin.buffer.read()
    with contextlib.suppress(ImportError, ValueError, OSError):  # a system without such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + len(data), MEMORY + len(data)))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pypdfium2

    def say(record: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(record) + "\n")

    try:
        pdf = pypdfium2.PdfDocument(data)
        count = len(pdf)
        if not 0 < count <= PAGES:
            say({"error": "pages" if count else "empty"})
            return
        say({"title": (pdf.get_metadata_value("Title") or "")[:300]})
        for number in range(count):
            lines, pictures = _page(pdf, number)
            say({"lines": [astuple(line) for line in lines], "pictures": pictures})
    except pypdfium2.PdfiumError as error:
        code = getattr(error, "err_code", None)
        say({"error": "password" if code == _PASSWORD else " ".join(str(error).split()).rstrip(".")[:120]})


def _page(pdf: Any, number: int) -> tuple[list[Line], bool]:
    import ctypes

    import pypdfium2.raw as raw

    page = pdf[number]
    text = page.get_textpage()
    handle = text.raw
    boxes = [ctypes.c_double() for _ in range(4)]
    references = [ctypes.byref(box) for box in boxes]
    lines: list[Line] = []
    characters: list[str] = []
    places: list[int] = []  # indices of the line's visible characters

    def end_line() -> None:
        written = "".join(characters).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if places and written.strip():
            first, last = places[0], places[-1]
            raw.FPDFText_GetCharOrigin(handle, first, *references[:2])
            left, base = boxes[0].value, boxes[1].value
            raw.FPDFText_GetCharBox(handle, last, *references)
            middle = places[len(places) // 2]  # not the first: a bullet has a size of its own
            size = raw.FPDFText_GetFontSize(handle, middle) * _scale(raw, ctypes, handle, middle)
            bold = all(_bold(raw, ctypes, handle, place) for place in (first, last))
            left, right, base, size = (round(value, 2) for value in (left, boxes[1].value, base, max(size, 1.0)))
            lines.append(Line(written.strip(" \t"), left, right, base, size, bold))
        characters.clear()
        places.clear()

    count = text.count_chars()
    for index in range(count):
        code = raw.FPDFText_GetUnicode(handle, index)
        if code in (10, 13):
            end_line()
        elif code == 2 or raw.FPDFText_IsHyphen(handle, index) == 1:
            characters.append("\x02")
            places.append(index)
            end_line()
        elif code not in (0, 0xFFFE, 0xFFFF):
            characters.append(chr(code))
            if code > 32 and raw.FPDFText_IsGenerated(handle, index) != 1:
                places.append(index)
    end_line()
    pictures = any(True for _ in page.get_objects(filter=(raw.FPDF_PAGEOBJ_IMAGE,), max_depth=3))
    text.close()
    page.close()
    return lines, pictures


def _scale(raw: Any, ctypes: Any, handle: Any, index: int) -> float:
    """How much the page's matrix enlarges a font: many programs write at size 1 and scale."""
    matrix = raw.FS_MATRIX()
    if not raw.FPDFText_GetMatrix(handle, index, ctypes.byref(matrix)):
        return 1.0
    scale = (matrix.c**2 + matrix.d**2) ** 0.5
    return scale if 0.01 < scale < 1000 else 1.0


def _bold(raw: Any, ctypes: Any, handle: Any, index: int) -> bool:
    if raw.FPDFText_GetFontWeight(handle, index) >= 600:
        return True
    name = ctypes.create_string_buffer(128)
    flags = ctypes.c_int()
    raw.FPDFText_GetFontInfo(handle, index, name, 128, ctypes.byref(flags))
    return b"bold" in name.value.lower() or b"heavy" in name.value.lower()
