"""What documents hold and whether a model can read them, before anything costs time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..models.tokenizer import Tokenizer
from .ask import text_of
from .document import Document

FRAME = 96  # tokens that instructions and a question of some length add


@dataclass(frozen=True)
class Row:
    """One document."""

    name: str
    title: str
    format: str
    language: str
    pages: int | None  # None where the format has none
    unit: str
    paragraphs: int
    words: int
    tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Overview:
    """All of them. `tokens` is what a prompt with the whole takes, names of files included."""

    rows: tuple[Row, ...]
    tokens: int

    def fits(self, window: int, answer_tokens: int = 256) -> bool:
        """Whether a question about all of it, with its answer, fits a window of so many tokens."""
        return self.tokens + FRAME + answer_tokens <= window

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"documents": [row.__dict__ | {"notes": list(row.notes)} for row in self.rows], "tokens": self.tokens}


def overview(documents: Sequence[Document], tokenizer: Tokenizer) -> Overview:
    """Pages, words and tokens of documents, by the tokenizer of the model that would read them."""
    counts = [len(ids) for ids in tokenizer.encode_batch([document.text for document in documents])]
    rows = tuple(
        Row(
            document.name, document.title, document.format, document.language,
            document.pages if document.unit else None, document.unit, len(document.paragraphs), document.words, tokens,
            document.notes,
        )
        for document, tokens in zip(documents, counts, strict=True)
    )  # fmt: skip
    whole = counts[0] if len(documents) == 1 else len(tokenizer.encode(text_of(documents)))
    return Overview(rows, whole)
