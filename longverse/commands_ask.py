"""`longverse ask` and `longverse summarize`: questions about documents, answered from them with checked citations.

options -> documents -> engine -> prompts -> session (commands_open) -> one answer a question (answer)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import commands_cite, console
from .commands_common import AsJson, Drawing, Loading, Quiet, with_options
from .commands_open import PAST_THE_WINDOW, Attention, CacheFormat, Keep, check_attention, choose_cache, open_kept
from .errors import UserError

if TYPE_CHECKING:
    from .documents.ask import Prompts
    from .documents.citations import Cited
    from .documents.reader import Document
    from .inference.engine import Cancelled, Session
    from .inference.sampling import Sampling

DOCUMENTS = frozenset(
    ("pdf", "docx", "doc", "epub", "html", "htm", "md", "txt", "csv", "tsv", "json", "xml", "rtf", "odt")
)

LONG = 20.0  # seconds of reading after which it is said how not to pay them again
Cite = Annotated[
    str,
    typer.Option(
        "--cite",
        help="How evidence is found: attention (of the answer over the document), numbers (the model names numbered"
        " paragraphs), auto (attention for small models, numbers for large ones), or off.",
    ),
]


@with_options()
def ask(
    file: Annotated[
        str, typer.Argument(help="PDF, DOCX, EPUB, HTML, Markdown, CSV, code, text; a folder; - for standard input.")
    ],
    questions: Annotated[
        list[str], typer.Argument(help="One or more questions, in quotes; more files may stand before them.")
    ],
    loading: Loading = Loading(),
    cite: Cite = "auto",
    select: Annotated[
        bool, typer.Option("--select", help="Answer from the passages that BM25 finds, not from the whole.")
    ] = False,
    drawing: Drawing = Drawing(),
    system: Annotated[str | None, typer.Option("--system", help="Other instructions than the built-in ones.")] = None,
    cache: CacheFormat = "auto",
    attention: Attention = "auto",
    keep: Keep = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Ask one or more questions about a document, or about several.

    The document is read once; every further question costs only its own words. Under the answer stand the passages
    it rests on, checked against the document. What the document does not answer is said to be not found.

    [bold]Examples[/bold]

    longverse ask report.pdf "Who is the chair?" "What did the audit cost?"

    longverse ask contract.docx annex.docx "When does it end?" --json

    longverse ask book.epub "Who is the captain?" --keep      # the next questions start at once

    longverse ask library/ "Which river is the longest?" --select

    cat letter.txt | longverse ask - "Who wrote this?"
    """
    files, asked = split_arguments(file, questions)
    check_attention(attention)
    documents = read_documents(files, quiet=quiet)
    settings = drawing.sampling()
    engine = loading.engine(quiet)
    from .documents.ask import prepare, way_for, with_stop

    way = way_for(engine, cite)
    settings = with_stop(settings, way, cite)
    if select:
        from .documents.select import prepare_selected

        prompts, selections = prepare_selected(engine, documents, asked, settings.max_new_tokens, system=system)
        for question, selection in zip(asked, selections, strict=True):
            about = f"For “{question}”: read" if len(asked) > 1 else "Read"
            console.note(f"{about} {selection.tokens:,} tokens of {selection.pages(prompts.index)}.", quiet=quiet)
        read = [selection.pages(prompts.index) for selection in selections]
    else:
        prompts = prepare(
            engine, documents, asked, settings.max_new_tokens, system=system, numbered=way == "numbers",
            limited=attention not in PAST_THE_WINDOW,
        )  # fmt: skip
        read = []
    opened = open_kept(engine, prompts, attention=attention, cache=cache, keep=keep, quiet=quiet)
    session, lost = opened.session, 0.0  # seconds of reading that are not kept
    for number, question in enumerate(prompts.questions):
        if not as_json and len(asked) > 1:
            console.out().print(console.Text(("\n" if number else "") + question, style="bold"))
        text, cited = answer(session, prompts, number, settings, way=way, shown=not as_json, quiet=quiet)
        if number == 0:
            opened.correct(session.stats)
            here = session.stats.reused_tokens < session.boundary and session.stats.cache_home == "device"
            lost = session.stats.prefill_seconds if here and not keep and not opened.seconds else 0.0
        if as_json:
            record: dict[str, object] = {"question": question, "answer": text, "model": engine.name}
            record |= {"document": _about(documents[0]), "documents": [_about(document) for document in documents]}
            record |= commands_cite.record(cited) if way != "off" else {}
            if cited is not None and (cited.first or not cited.found):
                record["model_answer"] = cited.first or cited.answer
            record |= {"read": read[number]} if read else {}
            console.json_line(record | {"stats": console.stats_record(session.stats)})
            continue
        if cited is not None:
            commands_cite.show(cited, several=len(documents) > 1)
        console.note(console.figures(session.stats), quiet=quiet)
    if lost > LONG and not as_json:
        console.note(
            f"It read for {console.duration(lost)}, which is forgotten now: with --keep the next question starts at"
            " once.", quiet=quiet,
        )  # fmt: skip


def answer(
    session: Session, prompts: Prompts, number: int, settings: Sampling, *, way: str, shown: bool, quiet: bool,
    cancelled: Cancelled | None = None, ids: list[int] | None = None,
) -> tuple[str, Cited | None]:  # fmt: skip
    """Answer one question: the text to give out, and its citations unless `way` is off or it was cancelled.

    With `shown` the answer appears as it is written, and where its passage says something else, that stands below it.
    Where the words of the question already make it doubtful that the document answers it, and where the model writes
    references, it waits for the check instead.

    ids  takes the tokens that the model wrote
    """
    from .documents.ask import doubtful, not_found, without_words
    from .documents.citations import is_refusal
    from .documents.second_look import checked, introduction

    waits = way == "numbers" or (way != "off" and doubtful(prompts, number))
    name = prompts.documents[0].name if len(prompts.documents) == 1 else f"{len(prompts.documents)} documents"
    text = ""
    ids = [] if ids is None else ids
    with console.Task(f"Reading {name}", quiet=quiet) as task:
        for piece in session.stream(prompts.ids[number], settings, on_progress=task, cancelled=cancelled, ids=ids):
            task.close()
            piece = piece if text else piece.lstrip()
            text += piece
            if shown and not waits:
                console.write(piece)
    cited = None
    if session.stats.finish_reason == "cancelled":
        if shown and text:
            console.write(f"{text}\n" if waits else "\n")
        return text.strip(), None
    if way != "off" and text.strip():
        cited = checked(session, prompts, number, text, ids, settings, cancelled=cancelled)
        if cancelled is not None and cancelled():  # in the second look: the first answer stands, unchecked
            session.stats.finish_reason = "cancelled"
            if shown:
                console.write(f"{text}\n" if waits else "\n")
            return text.strip(), None
        text = cited.answer if cited.found else not_found(prompts, number)
    elif way != "off":
        text = without_words(session, prompts, number)
        if shown and not waits:
            console.write(text)
    if not shown:
        return text.strip(), cited
    if waits:
        console.write(cited.marked if cited is not None and cited.found else text)
    elif cited is not None and not cited.found:
        console.write(f"\n{text}")
    elif cited is not None and cited.first:
        console.write(f"\n{introduction(text)}{cited.marked}")
    elif cited is not None and len(cited.marks) == 1:
        console.write(" " + "".join(f"[{mark}]" for mark in cited.marks[0][1]))
    console.write("" if text.endswith("\n") and not waits else "\n")
    if waits and cited is not None and not cited.found:
        guess = " ".join(cited.answer.split())
        guess = f"{guess[:200]} …" if len(guess) > 200 else guess
        if not is_refusal(guess):
            console.note(f"The model guessed, without a passage that bears it out: {guess}", quiet=quiet)
    return text.strip(), cited


def split_arguments(file: str, more: list[str]) -> tuple[list[str], list[str]]:
    """Documents and questions: what exists as a file or folder is a document, up to the first that does not. Raises
    UserError for what looks like a file and is none."""
    files = [file]
    for place, argument in enumerate(more):
        if argument == "-" or (argument and os.path.exists(os.path.expanduser(argument))):
            files.append(argument)
            continue
        if looks_like_a_file(argument):
            raise UserError(f"There is no file {argument}: check the name, or end it with a question mark to ask it.")
        questions = more[place:]
        for other in questions[1:]:
            if os.path.isfile(os.path.expanduser(other)):
                raise UserError(f"{other} is a file and stands behind a question: give all files before the questions.")
        return files, questions
    return files, []


def looks_like_a_file(argument: str) -> bool:
    """Whether what is no file was probably meant as one: no blank, no question mark, and an ending like that of a file;
    with Chinese letters in it, which have no blanks, that of a document."""
    ending = Path(argument).suffix[1:].lower()
    if not argument or " " in argument or argument.endswith(("?", "？", "。")):
        return False
    chinese = any("\u4e00" <= letter <= "\u9fff" for letter in argument)
    return ending in DOCUMENTS if chinese else ending.isascii() and ending.isalnum() and len(ending) <= 5


def read_documents(files: list[str], *, quiet: bool) -> list[Document]:
    """Read files and folders; what is passed over or looks wrong is said."""
    from .documents.reader import read_many

    skipped: list[str] = []

    def pass_over(name: str, reason: str) -> None:
        if name.endswith(os.sep) or Path(name).suffix.lower() in (".pdf", ".docx", ".epub"):  # these, with the reason
            console.note(f"Passed over: {reason}", quiet=quiet)
        else:
            skipped.append(name)

    documents = read_many(files, skipped=pass_over)
    if skipped:
        few = ", ".join(skipped[:5]) + (" …" if len(skipped) > 5 else "")
        console.note(f"{len(skipped)} files are no documents and were passed over: {few}.", quiet=quiet)
    for document in documents:
        for remark in document.notes:
            console.note(f"{document.name}: {remark}", quiet=quiet)
    return documents


def _about(document: Document) -> dict[str, object]:
    return {
        "name": document.name, "title": document.title, "encoding": document.encoding, "words": document.words,
        "language": document.language, "format": document.format,
        "pages": document.pages if document.unit else None,
    }  # fmt: skip


@with_options()
def summarize(
    file: Annotated[str, typer.Argument(help="A document, or - for standard input.")],
    loading: Loading = Loading(),
    sections: Annotated[
        bool, typer.Option("--sections", help="Section by section, also where the whole would fit.")
    ] = False,
    drawing: Drawing = Drawing(),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Summarise a document: whole where it fits the model's window, else part by part, saying which.

    [bold]Examples[/bold]

    longverse summarize report.pdf

    longverse summarize book.epub --sections --json
    """
    from .documents.reader import read

    document = read(file)
    settings = drawing.sampling()
    engine = loading.engine(quiet)
    from .documents import summarize as module

    tasks: list[console.Task] = []

    def cache_for(tokens: int) -> str:
        return choose_cache(engine, tokens, "auto", quiet=quiet)

    def on_part(number: int, count: int, part: module.Part) -> console.Task:
        for task in tasks:
            task.close()
        where = f" ({part.place})" if part.place else ""
        title = f"Part {number} of {count}{where}" if count > 1 else f"Reading {document.name}"
        tasks.append(console.Task(title, quiet=quiet))
        return tasks[-1]

    made = 0
    for summary in module.summarize(
        engine, document, settings, by_parts=sections, cache_for=cache_for, on_part=on_part
    ):
        tasks[-1].close()
        part, made = summary.part, made + (summary.of == "part")
        if as_json:
            record = {"of": summary.of, "title": part.title, "place": part.place, "start_char_index": part.start}
            record |= {"end_char_index": part.end, "summary": summary.text, "tokens": summary.tokens}
            record["finish_reason"] = summary.finish_reason
            console.json_line(record | {"model": engine.name})
            continue
        if summary.of == "part":
            console.out().print(
                console.Text(f"{part.title} ({part.place})" if part.title else part.place, style="bold")
            )
        elif summary.of == "parts":
            console.out().print(console.Text("All parts, by their summaries", style="bold"))
        console.line(summary.text or "(the model wrote nothing)")
        if summary.finish_reason == "length":
            console.note("This summary was cut at --max-new-tokens.", quiet=quiet)
        if summary.of == "part":
            console.line()
    if made > 1 and summary.of == "part":
        console.note(
            "The parts' summaries are too long to be summed up together: they stand for the whole.", quiet=quiet
        )
