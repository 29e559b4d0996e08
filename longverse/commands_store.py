"""`longverse read` and `longverse library`: documents read once and kept. commands_open.py finds them again.

Nothing heavy is imported at the top.
"""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .commands_common import AsJson, Loading, Quiet, with_options
from .commands_open import (
    PAST_THE_WINDOW,
    Attention,
    CacheFormat,
    check_attention,
    choose_attention,
    choose_cache,
    document_end,
    library_limit,
    open_store,
    tell,
)
from .plan import gigabytes

if TYPE_CHECKING:
    from .documents.overview import Overview
    from .inference.engine import Engine
    from .inference.store import Kept

Limit = Annotated[str | None, typer.Option("--limit", help="The most that all kept documents may take, like 20GB.")]

library_app = typer.Typer(invoke_without_command=True, help="List, remove and prune the documents that were kept.")


@with_options()
def read(
    files: Annotated[list[str], typer.Argument(help="A document, or several to be asked about together.")],
    loading: Loading = Loading(),
    system: Annotated[
        str | None, typer.Option("--system", help="The instructions that `ask --system` will be given.")
    ] = None,
    cache: CacheFormat = "auto",
    attention: Attention = "auto",
    limit: Limit = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read a document and keep what was read, so that it is never read again.

    `longverse ask` with the same file and model finds it by itself. A reading that was stopped goes on where it was.

    [bold]Examples[/bold]

    longverse read report.pdf

    longverse ask report.pdf "Who is the chair?"

    longverse library
    """
    from .commands_ask import read_documents

    store_limit = library_limit(limit)
    check_attention(attention)
    documents = read_documents(files, quiet=quiet)
    engine = loading.engine(quiet)
    from .documents.ask import prepare, way_for
    from .documents.overview import overview
    from .inference.store_keys import ROOM, planned_length

    found = overview(documents, engine.tokenizer)
    show_overview(found, engine, quiet=quiet)
    numbered = way_for(engine, "auto") == "numbers"
    prompts = prepare(
        engine, documents, ["a"], 256, system=system, numbered=numbered, limited=attention not in PAST_THE_WINDOW
    )
    end = document_end(engine, prompts)
    way, attention = attention, choose_attention(engine, prompts.planned_tokens, attention, quiet=quiet)
    room = max(min(end + ROOM, engine.window), prompts.planned_tokens)
    planned = planned_length(engine, end, room, attention)
    cache = choose_cache(engine, planned, cache, attention, quiet=quiet)
    store = open_store(store_limit)
    name = ", ".join(document.name for document in documents)
    ids = prompts.ids[0][:end]
    held: list[int] = []
    started = time.perf_counter()
    with console.interruptible() as stopped, console.Task(f"Reading {name}", quiet=quiet) as task:

        def progress(done: int, total: int) -> None:
            held.append(done)
            task(done, total)

        session = store.read(
            engine, ids, planned, name=name, cache=cache, attention=attention, on_progress=progress, cancelled=stopped,
            on_wait=lambda holder: console.note(
                f"Another process ({holder}) is reading this document; waiting for it (Ctrl-C stops).", quiet=quiet
            ),
        )  # fmt: skip
    tell(store, quiet=quiet)
    seconds, done = time.perf_counter() - started, len(session.tokens)
    fresh = done - (held[0] if held else done)
    if done < end:
        kept_now = f"{done:,} of {end:,} tokens are kept: the same command reads on from there"
        console.note(f"Stopped. {kept_now if held else 'Nothing was read here'}.")
        raise KeyboardInterrupt
    own = store.folder_of(engine, ids, planned, cache=cache, attention=attention).name
    size = next((kept.bytes for kept in store.entries() if kept.id == own), 0)
    if as_json:
        console.json_line(
            {"document": name, "documents": found.record()["documents"], "model": engine.name,
             "tokens": end, "read_tokens": fresh, "seconds": round(seconds, 3),
             "bytes": size, "cache": cache, "attention": attention, "planned_tokens": session.planned_tokens}
        )  # fmt: skip
        return
    what = f"read {fresh:,} in {console.duration(seconds)}" if fresh else "nothing new to read"
    console.line(f"{name}: {end:,} tokens kept, {gigabytes(size)} ({what}).")
    same = [*loading.given(), *(["--system", system] if system is not None else [])]
    same += [] if way == "auto" else ["--attention", way]
    console.note(f'Next: longverse ask {shlex.join(files)} "…" {shlex.join(same)}'.rstrip(), quiet=quiet)


def show_overview(found: Overview, engine: Engine, *, quiet: bool) -> None:
    """What the files hold and whether the model can read it exactly, before the reading costs time."""
    for row in found.rows:
        place = f"{row.pages:,} {row.unit}{'' if row.pages == 1 else 's'}, " if row.pages is not None else ""
        console.note(f"{row.name}: {place}{row.words:,} words, {row.tokens:,} tokens.", quiet=quiet)
    fit = "fits" if found.fits(engine.window) else "does not fit"
    what = "It" if len(found.rows) == 1 else f"All of it, {found.tokens:,} tokens,"
    console.note(
        f"{what} {fit} {engine.name}'s window of {engine.window:,} tokens, with a question and its answer.", quiet=quiet
    )


# ---- library -------------------------------------------------------------------------------------------------


@library_app.callback()
def library(context: typer.Context, as_json: AsJson = False) -> None:
    """List the documents that are kept, the latest used first.

    [bold]Examples[/bold]

    longverse library

    longverse library remove report.pdf

    longverse library prune --limit 20GB
    """
    if context.invoked_subcommand is not None:
        return
    store = open_store(library_limit(None))
    kept = store.entries()
    if as_json:
        console.json_line(
            {"documents": [vars(one) for one in kept], "bytes": sum(one.bytes for one in kept), "limit": store.limit,
             "folder": str(store.folder)}
        )  # fmt: skip
        return
    if not kept:
        console.line(f"Nothing is kept in {store.folder}. `longverse read FILE` keeps a document.")
        return
    rows = [
        [one.id[:8], one.name, one.model, _length(one), gigabytes(one.bytes), _way(one), _ago(one.used)] for one in kept
    ]
    heads = ("id", "document", "model", "tokens", "size", "cache", "last used")
    console.out().print(console.table(heads, rows, right=(3, 4)))
    total = sum(one.bytes for one in kept)
    console.line(f"\n{gigabytes(total)} of {gigabytes(store.limit)}, in {store.folder}")


@library_app.command()
def remove(
    which: Annotated[list[str], typer.Argument(help="Ids, or names of documents, as `longverse library` lists them.")],
    as_json: AsJson = False,
) -> None:
    """Remove kept documents."""
    store = open_store(library_limit(None))
    removed = [kept for name in which for kept in store.remove(name)]
    _report(removed, as_json)


@library_app.command()
def prune(limit: Limit = None, as_json: AsJson = False) -> None:
    """Remove the documents used longest ago until the rest takes no more than the limit."""
    limit_bytes = library_limit(limit)
    store = open_store(limit_bytes)
    _report(store.prune(store.limit), as_json, left=store.size)


def _report(removed: list[Kept], as_json: bool, left: int | None = None) -> None:
    freed = sum(kept.bytes for kept in removed)
    if as_json:
        more = {} if left is None else {"left": left}
        console.json_line({"removed": [vars(kept) for kept in removed], "bytes": freed} | more)
        return
    for kept in removed:
        console.line(f"removed {kept.name} ({kept.id[:8]}), {gigabytes(kept.bytes)}")
    if left is not None:
        console.line(f"{gigabytes(freed)} removed; {gigabytes(left)} stay.")


def _length(kept: Kept) -> str:
    if kept.state == "unfinished":
        return f"{kept.length:,} of {kept.tokens:,}"
    return f"{kept.tokens:,}" if kept.state == "whole" else kept.state


def _way(kept: Kept) -> str:
    return kept.cache if kept.attention in ("", "exact") else f"{kept.cache}, {kept.attention}"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    if seconds < 60:
        return "now"
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "now"


# ---- what `ask` calls ----------------------------------------------------------------------------------------
