"""Citations on the screen: numbered passages under an answer, with their place and how they were checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from . import console

if TYPE_CHECKING:
    from .documents.citations import Citation, Cited

LONGEST = 400  # characters of a passage that are shown; --json has all of them
_STYLES = {"verified": "green", "repaired": "yellow", "unverified": "red"}
_MEANINGS = {
    "verified": "verified",
    "repaired": "repaired: this is how it reads",
    "unverified": "unverified: it does not say this",
}


def show(cited: Cited, *, several: bool = False, indent: str = "") -> None:
    """The citations of an answer, or that it was not found. `several`: name the file of each."""
    if not cited.found:
        return
    screen = console.out()
    for number, citation in enumerate(cited.citations, start=1):
        where = f"{citation.name}, {citation.place}" if several else citation.place
        heading = f" · {citation.heading[-1]}" if citation.heading else ""
        screen.print(
            Text.assemble(
                f"{indent}[{number}] {where}{heading} · ", (_MEANINGS[citation.status], _STYLES[citation.status])
            )
        )
        screen.print(Text(f"{indent}    {quoted(citation)}", style="dim"))


def quoted(citation: Citation) -> str:
    """The passage on one line, its middle left out where it is long."""
    text = " ".join(citation.text.split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} […] {text[-LONGEST // 2 :]}"
    return f"“{text}”"


def record(cited: Cited | None) -> dict[str, object]:
    """The same for `--json`; None stands for no answer at all."""
    if cited is None or not cited.found:
        return {"found": False, "citations": [], "marked_answer": None}
    return {
        "found": True,
        "citations": [citation.record() for citation in cited.citations],
        "marked_answer": cited.marked,
    }
