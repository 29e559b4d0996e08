"""Questions about a document: the document stands first in the prompt and the question last, so that a session reads
the document once and every further question pays only for itself.

Each question is a conversation of its own: no answer depends on an earlier one.
"""

import re
from dataclasses import dataclass

from ..errors import UserError
from ..inference.engine import Engine
from .reader import Document

_CHINESE = re.compile(r"[\u4e00-\u9fff]")

# The wording was chosen by trying variants with the embedded model on generated reports: asked for the sentence, a
# small model copies what is written; asked for a few words, it makes them up.
SYSTEM = {
    "en": "You answer questions about a document. Every answer is a sentence copied from the document.",
    "zh": "你根据文档回答问题。",
}
_DOCUMENT = {"en": "Document:\n{text}\n\n", "zh": "文档：\n{text}\n\n"}
_QUESTION = {
    "en": "Question: {question}\nAnswer with the exact sentence of the document.",
    "zh": "问题：{question}\n请用文档中的原话回答。",
}


@dataclass(frozen=True)
class Prompts:
    """Every question's prompt, and the length that a session for them must be planned for."""

    questions: tuple[str, ...]
    ids: tuple[list[int], ...]
    planned_tokens: int  # the longest prompt and its answer


def messages(text: str, question: str, *, system: str | None = None) -> list[dict[str, str]]:
    """The conversation that asks `question` about `text`. The instructions before the document are in its language and
    those after it in the question's, so that questions in two languages share the document."""
    document = _language(text[:10_000])
    asked = _QUESTION[_language(question)].format(question=question)
    content = _DOCUMENT[document].format(text=text.strip("\n")) + asked
    return [{"role": "system", "content": system or SYSTEM[document]}, {"role": "user", "content": content}]


def _language(text: str) -> str:
    return "zh" if len(_CHINESE.findall(text)) * 5 > len(text) else "en"


def prepare(
    engine: Engine, document: Document, questions: list[str], max_new_tokens: int, *, system: str | None = None
) -> Prompts:
    """Encode the questions. Raises UserError, before anything is read, when one does not fit the model's window."""
    if not questions:
        raise UserError('There is no question: type one after the file, in quotes, like "Who wrote it?".')
    for question in questions:
        if not question.strip():
            raise UserError("A question is empty: type it in quotes after the file.")
    ids = tuple(engine.chat.encode(messages(document.text, question, system=system)) for question in questions)
    planned = max(map(len, ids)) + max_new_tokens
    if planned > engine.window:
        raise UserError(
            f"{document.name} takes {planned:,} tokens ({planned - max_new_tokens:,} with the question and"
            f" {max_new_tokens:,} for the answer) and {engine.name} reads {engine.window:,}: use a model with a larger"
            " window, widen this one with --rope (such as dynamic:2, at a cost in quality), or give a shorter document."
        )
    return Prompts(tuple(questions), ids, planned)
