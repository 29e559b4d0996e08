"""`longverse read` and `longverse library`: documents read once and kept; and how `ask` finds them again.

    prompts -> where the documents end in them -> a kept reading, or a session that will read -> one line of plan

Nothing heavy is imported at the top.
"""

from __future__ import annotations

import os
import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .commands_common import AsJson, Loading, Quiet, with_options
from .errors import UserError
from .plan import gigabytes, parse_bytes

if TYPE_CHECKING:
    from .documents.ask import Prompts
    from .documents.overview import Overview
    from .inference.engine import Engine, Session
    from .inference.store import Kept, Store

PAST_THE_WINDOW = ("auto", "pages")  # attentions that may read more than the window
Keep = Annotated[bool, typer.Option("--keep", help="Keep what is read of documents on disk, as `longverse read` does.")]
CacheFormat = Annotated[
    str,
    typer.Option("--cache", help="Keys and values: full, int8, int4; auto is the most precise that the memory holds."),
]
Attention = Annotated[
    str,
    typer.Option(
        "--attention",
        help="exact; sparse: of a long past only what weighs (sparse:0.9 aims at nine tenths of the attention); or"
        " pages: in linear time, past the model's window. auto is exact, and pages only where it must.",
    ),
]
Limit = Annotated[str | None, typer.Option("--limit", help="The most that all kept documents may take, like 20GB.")]

library_app = typer.Typer(invoke_without_command=True, help="List, remove and prune the documents that `read` kept.")


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
    """List the documents that `longverse read` kept, the latest used first.

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


def open_kept(
    engine: Engine, prompts: Prompts, *, attention: str = "auto", cache: str = "auto", keep: bool = False,
    room: int = 0, quiet: bool,
) -> Session:  # fmt: skip
    """The session that will answer `prompts`: over a kept reading where there is one, finishing or mending it where it
    is not whole; else one that reads, here and onto the disk with `keep`, or when it answers. Says in one line what is
    planned; UserError where the memory does not suffice.

    room  tokens to plan for where that is more than `prompts` take, for turns to come
    """
    from .inference.store_keys import ROOM, planned_length

    needed = max(room, prompts.planned_tokens)

    attention = choose_attention(engine, needed, attention, quiet=quiet)
    end = document_end(engine, prompts)
    if (beside := choose_beside(engine, needed, cache, attention, quiet=quiet)) is not None:
        if keep:
            console.note("What lies in the machine's memory beside a card is not kept on disk.", quiet=quiet)
        session = engine.session(needed, attention=attention, cache=beside, home="machine")
        session.boundary = end
        say_plan(engine, session, prompts.planned_tokens, quiet=quiet)
        return session
    if not end:  # every question has passages of its own
        if keep:
            console.note("Passages of one question are not kept on disk.", quiet=quiet)
        form = choose_cache(engine, needed, cache, attention, quiet=quiet)
        session = engine.session(needed, attention=attention, cache=form)
        say_plan(engine, session, prompts.planned_tokens, quiet=quiet)
        return session
    if keep:
        needed = max(min(end + ROOM, engine.window), needed)
    planned = planned_length(engine, end, needed, attention)
    store = open_store(library_limit(None))
    ids = prompts.ids[0]
    fitting = [form for form, (need, free) in cache_needs(engine, planned, attention).items() if need <= free]
    wanted: list[str] | None = None if cache == "auto" else [cache]
    if engine.network.device.type != "cpu":  # what is kept is copied to the card, and has to fit there
        wanted = fitting if cache == "auto" else [choose_cache(engine, planned, cache, attention, quiet=quiet)]
    found = store.find(engine, ids, planned, cache=wanted, attention=attention)
    held = 0 if found is None else len(found.tokens)
    if found is not None and held < end and cache == "auto":
        # What is kept of another document that begins alike does not choose the format, unless it is most of this one.
        own = store.folder_of(engine, ids[:end], planned, cache=found.cache_format, attention=attention).is_dir()
        if found.cache_format not in fitting or not (own or 2 * held >= end):
            found = None
    if found is not None:
        form = found.cache_format
    else:
        form = choose_cache(engine, planned, cache, attention, quiet=quiet)
        found = store.find(engine, ids, planned, cache=form, attention=attention)
        held = 0 if found is None else len(found.tokens)
    kept_in = store.folder_of(engine, ids[:end], planned, cache=form, attention=attention)
    reads = held < end and (keep or kept_in.is_dir())
    if reads:
        say_plan(engine, found or unread(engine, planned, attention, form), prompts.planned_tokens, quiet=quiet)
        found = None  # its files are written to now
        tell(store, quiet=quiet)
        started = time.perf_counter()
        try:
            with console.Task(f"Reading {prompts.documents[0].name}", quiet=quiet) as task:
                found = store.read(
                    engine, ids[:end], planned, name=", ".join(document.name for document in prompts.documents),
                    cache=form, attention=attention, must_keep=False, on_progress=task,
                )  # fmt: skip
        except KeyboardInterrupt:
            console.note("Stopped. What was read is kept: the same command reads on from there.", quiet=quiet)
            raise
        console.note(f"Read {end - held:,} tokens in {console.duration(time.perf_counter() - started)}.", quiet=quiet)
    tell(store, quiet=quiet)
    session = found or engine.session(planned, attention=attention, cache=form)
    session.boundary = end
    if not reads:
        say_plan(engine, session, prompts.planned_tokens, quiet=quiet)
    return session


def document_end(engine: Engine, prompts: Prompts) -> int:
    """How many tokens of each prompt are the same for every question: up to the documents' end. 0 where each question
    has passages of its own.

    Told from short prompts about the last words alone, since encoding a book twice takes seconds: what stands after
    the document is as long in them.
    """
    from .inference.engine import common_prefix
    from .wording import messages

    if any(places is not None for places in prompts.places):
        return 0
    tail = prompts.documents[-1].text.strip("\n")[-200:]
    own, *others = (
        engine.chat.encode(messages(tail, question, numbered=prompts.numbered))
        for question in (prompts.questions[0], "a", "问")
    )
    after = len(own) - min(common_prefix(own, other) for other in others)
    ids = prompts.ids[0]
    return len(ids) - after if ids[-after:] == own[-after:] else 0


def open_store(limit: int | None) -> Store:
    from .inference.store import Store

    return Store(limit_bytes=limit)


def library_limit(text: str | None) -> int | None:
    """Bytes of --limit or LONGVERSE_LIBRARY_LIMIT; None where neither says."""
    if text is not None:
        return parse_bytes(text)
    stated = os.environ.get("LONGVERSE_LIBRARY_LIMIT")
    try:
        return parse_bytes(stated) if stated else None
    except UserError as error:
        raise UserError(f"LONGVERSE_LIBRARY_LIMIT: {error}") from None


def tell(store: Store, *, quiet: bool) -> None:
    """Show what the store has to say, once."""
    for remark in store.notes:
        console.note(remark, quiet=quiet)
    store.notes.clear()


def check_attention(attention: str) -> None:
    """Refuse an --attention that does not exist: before a document is read and a model loads."""
    from .inference.engine import parse_attention

    if attention != "auto":
        parse_attention(attention)


def choose_attention(engine: Engine, tokens: int, attention: str, *, quiet: bool = False) -> str:
    """`attention`, or for auto exact where `tokens` fit the model's window, and pages past it, which is said."""
    if attention != "auto":
        return attention
    if tokens <= engine.window:
        return "exact"
    console.note(
        f"{tokens:,} tokens are more than the {engine.window:,} that {engine.name} reads at once: it is read by pages,"
        " and each question sees those that matter most to it.",
        quiet=quiet,
    )
    return "pages"


# ---- the plan's line -----------------------------------------------------------------------------------------


def cache_needs(engine: Engine, tokens: int, attention: str) -> dict[str, tuple[float, float]]:
    """Of every cache format that an attention can have, the most precise first: bytes that are needed, and free."""
    from .inference.memory import requirements

    needs, free = requirements(engine, tokens)
    forms = ("full",) if attention == "pages" else tuple(needs)  # pages have a cache of their own
    return {form: (needs[form], free) for form in forms}


def choose_cache(engine: Engine, tokens: int, cache: str, attention: str = "exact", *, quiet: bool = False) -> str:
    """`cache`, or for auto the most precise format that the free memory holds. UserError where none or the given one
    does not fit: before any work, and in one sentence."""
    from .inference.memory import too_little

    found = cache_needs(engine, tokens, attention)
    needs, free = {form: need for form, (need, _) in found.items()}, next(iter(found.values()))[1]
    if cache != "auto" and cache not in needs:
        if attention == "pages":
            raise UserError(f"Pages keep their cache in full precision: leave out --cache {cache}.")
        raise UserError(f"There is no cache format {cache!r}: choose one of auto, {', '.join(needs)}.")
    form = next((form for form, need in needs.items() if need <= free), None) if cache == "auto" else cache
    if form is None or needs[form] > free:
        least = min(needs.items(), key=lambda item: item[1])
        ways = [] if form is None or needs[least[0]] > free else [f"take --cache {least[0]} ({gigabytes(least[1])})"]
        form = form or least[0]
        raise too_little(engine, tokens, form, needs[form], free, ways)
    if cache == "auto" and form != "full":
        console.note(
            f"A full cache would need {gigabytes(needs['full'])} and {gigabytes(free)} are free: the cache is {form}.",
            quiet=quiet,
        )
    return form


def choose_beside(engine: Engine, tokens: int, cache: str, attention: str, *, quiet: bool) -> str | None:
    """The format of a cache that lies in the machine's memory because the model's card has room for none (or not for
    the given one); None where the card has, where the machine has not either, and for pages."""
    from .inference.memory import requirements, shape_of_network
    from .plan import SLACK, memory_of_machine

    network = engine.network
    if network.device.type != "cuda" or attention == "pages":
        return None
    needs, free = requirements(engine, tokens)
    wanted = {form: need for form, need in needs.items() if cache in ("auto", form)}
    if not wanted or min(wanted.values()) <= free:
        return None
    form = min(wanted, key=lambda name: wanted[name])
    shape = shape_of_network(engine.name, network.config)
    size = tokens * shape.cache_bytes_per_token(form, engine.kept.itemsize)
    if size > SLACK * memory_of_machine()[1]:
        return None
    console.note(
        f"The card has {gigabytes(free)} free and {tokens:,} tokens need {gigabytes(wanted[form])} there (cache:"
        f" {form}): the cache is kept in the machine's memory, and every token reads it from there.",
        quiet=quiet,
    )
    return form


def unread(engine: Engine, planned: int, attention: str, cache: str = "full") -> Session:
    """A session of which only the plan is wanted: it takes no memory and reads nothing."""
    import torch

    def nothing(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return engine.session(planned, attention=attention, cache=cache, allocate=nothing)


def say_plan(engine: Engine, session: Session, tokens: int, *, quiet: bool) -> None:
    """One line before the work: tokens, what is kept of them, the cache's size, predicted seconds."""
    if quiet:
        return
    from .commands_plan import predict

    held = len(session.tokens)
    size: Any = session.cache.bytes_per_token * tokens
    parts = [f"{tokens:,} tokens" + (f" ({held:,} kept, not read again)" if held else "")]
    parts.append(f"{session.cache_format} cache {gigabytes(size)}")
    seconds = predict(engine, session, tokens)
    if seconds is not None:
        most = "at most" if session.attention == "sparse" else "about"
        parts.append(f"{most} {console.duration(seconds[0])} to read, {1 / seconds[1]:,.0f} tok/s to write")
    console.note("Plan: " + " · ".join(parts))
