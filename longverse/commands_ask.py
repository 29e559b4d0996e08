"""`longverse ask`: questions about a document, each answered from it.

    options -> documents -> engine -> prompts -> session (open_session) -> one answer a question (Asker)

How a document comes to stand in a session is `open_session`'s business alone: a plain session reads it, others may
bring it along already read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .commands_common import (
    AsJson,
    Device,
    Dtype,
    MaxNewTokens,
    MinP,
    Model,
    Penalty,
    Quiet,
    Rope,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    load_engine,
    make_sampling,
)  # fmt: skip

if TYPE_CHECKING:
    from .documents.ask import Prompts
    from .documents.reader import Document
    from .inference.engine import Engine, Session


def ask(
    file: Annotated[str, typer.Argument(help="A .txt or .md file, or - for standard input.")],
    questions: Annotated[list[str], typer.Argument(help="One or more questions, in quotes.")],
    model: Model = "smol",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    system: Annotated[str | None, typer.Option("--system", help="Other instructions than the built-in ones.")] = None,
    rope: Rope = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Ask one or more questions about a document.

    The document is read once; every further question costs only its own words.

    [bold]Examples[/bold]

    longverse ask report.txt "Who is the chair?" "What did the audit cost?"

    longverse ask notes.md "What was decided?" --json

    cat letter.txt | longverse ask - "Who wrote this?"
    """
    from .documents.reader import read

    document = read(file)
    settings = make_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
    engine = load_engine(model, dtype, device, rope, quiet)
    from .documents.ask import prepare

    prompts = prepare(engine, document, questions, max_new_tokens, system=system)
    session = open_session(engine, document, prompts, quiet=quiet)
    for number, (question, ids) in enumerate(zip(prompts.questions, prompts.ids, strict=True)):
        if not as_json and len(questions) > 1:
            console.out().print(console.Text(("\n" if number else "") + question, style="bold"))
        with console.Task(f"Reading {document.name}", quiet=quiet) as task:
            answer = ""
            for piece in session.stream(ids, settings, on_progress=task):
                task.close()
                piece = piece if answer else piece.lstrip()
                answer += piece
                if not as_json:
                    console.write(piece)
        if as_json:
            about = {"name": document.name, "title": document.title, "encoding": document.encoding}
            about |= {"words": document.words, "language": document.language}  # type: ignore[dict-item]
            record = {"question": question, "answer": answer.strip(), "model": engine.name, "document": about}
            console.json_line(record | {"stats": console.stats_record(session.stats)})
            continue
        console.write("" if answer.endswith("\n") else "\n")
        console.note(console.figures(session.stats), quiet=quiet)


def open_session(engine: Engine, document: Document, prompts: Prompts, *, quiet: bool) -> Session:
    """The session that will answer. What it returns has Session's surface: stream, complete, stats, tokens.

    Options that change how the document is attended, cached or stored come here as arguments, and here alone.
    """
    return engine.session(prompts.planned_tokens)
