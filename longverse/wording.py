"""The words in which questions about documents are put to a model, here and in the data that teaches it."""

import re

_CHINESE = re.compile(r"[\u4e00-\u9fff]")

# The wording was chosen by trying variants with the embedded model on generated reports: asked for the sentence, a
# small model copies what is written; asked for a few words, it makes them up.
SYSTEM = {
    "en": "You answer questions about a document. Every answer is a sentence copied from the document.",
    "zh": "你根据文档回答问题。",
}
DOCUMENT = {"en": "Document:\n{text}\n\n", "zh": "文档：\n{text}\n\n"}
_QUESTION = {
    "en": "Question: {question}\nAnswer with the exact sentence of the document.",
    "zh": "问题：{question}\n请用文档中的原话回答。",
}
SYSTEM_NUMBERS = {
    "en": (
        "You answer questions about a document whose paragraphs are numbered. After every statement give the number of"
        " the paragraph it rests on in square brackets, like [12]. Where the document does not hold the answer, say so."
    ),
    "zh": "你根据文档回答问题，文档的段落有编号。每句话后用方括号注明所依据的段落编号，例如[12]。没有答案时请说明。",
}
_QUESTION_NUMBERS = {
    "en": "Question: {question}\nAnswer, and give the numbers of the paragraphs in square brackets.",
    "zh": "问题：{question}\n请回答，并用方括号注明段落编号。",
}

# What smol says where a document does not answer: the words its training used (data/long_sft/prompts).
NOT_STATED = ("The text does not say.", "文中没有提到。")

# Before what a passage says, where the model's first answer did not say it.
SAYS = {"en": "The document says: ", "zh": "原文说："}


def messages(text: str, question: str, *, system: str | None = None, numbered: bool = False) -> list[dict[str, str]]:
    """The conversation that asks `question` about `text`. The instructions before the document are in its language and
    those after it in the question's, so that questions in two languages share the document."""
    document = language_of(text[:10_000])
    content = DOCUMENT[document].format(text=text.strip("\n")) + asked(question, numbered=numbered)
    own = (SYSTEM_NUMBERS if numbered else SYSTEM)[document]
    return [{"role": "system", "content": system or own}, {"role": "user", "content": content}]


def asked(question: str, *, numbered: bool = False) -> str:
    """The lines below the document: the question, and what is wanted of the answer."""
    return (_QUESTION_NUMBERS if numbered else _QUESTION)[language_of(question)].format(question=question)


def language_of(text: str) -> str:
    """en or zh: what a text or a question is written in."""
    return "zh" if len(_CHINESE.findall(text)) * 5 > len(text) else "en"
