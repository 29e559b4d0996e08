"""How documents come to stand in the session that answers: found on disk, read and kept there, or read; with which
attention and cache, by what the memory holds.

    prompts -> where the documents end in them -> a kept reading, or a session that will read -> one line of plan

Nothing heavy is imported at the top.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .errors import UserError
from .plan import gigabytes, parse_bytes

if TYPE_CHECKING:
    from .documents.ask import Prompts
    from .inference.engine import Engine, Session, Stats
    from .inference.store import Store

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
        help="exact; sparse: of a long past only what weighs (sparse:0.9 aims at nine tenths of the attention,"
        " sparse:0.9:0.1 in a tenth of the past at most); or pages: in linear time, past the model's window. auto is"
        " exact, and pages only where it must.",
    ),
]


@dataclass(frozen=True)
class Opened:
    """A session, and what came before it: how many tokens of its document were on disk, and the seconds that reading
    the rest onto it took; 0 where the first answer will read."""

    session: Session
    held: int = 0
    seconds: float = 0.0

    def correct(self, stats: Stats) -> None:
        """Count the reading in the figures of the first answer."""
        if self.seconds:
            stats.reused_tokens = min(stats.reused_tokens, self.held)
            stats.prefill_seconds += self.seconds


def open_kept(
    engine: Engine, prompts: Prompts, *, attention: str = "auto", cache: str = "auto", keep: bool = False,
    room: int = 0, quiet: bool,
) -> Opened:  # fmt: skip
    """The session that will answer `prompts`: over a kept reading where there is one, finishing or mending it where it
    is not whole; else one that reads, here and onto the disk with `keep`, or when it answers. Says in one line what is
    planned; UserError where the memory does not suffice.

    room  tokens to plan for where that is more than `prompts` take, for turns to come
    """
    from .inference.store_keys import ROOM, planned_length

    needed = prompts.planned_tokens
    attention = choose_attention(engine, needed, attention, quiet=quiet)
    end = document_end(engine, prompts)
    if (beside := choose_beside(engine, needed, cache, attention, room=room, quiet=quiet)) is not None:
        if keep:
            console.note("What lies in the machine's memory beside a card is not kept on disk.", quiet=quiet)
        form, planned = beside
        session = engine.session(planned, attention=attention, cache=form, home="machine")
        session.boundary = end
        say_plan(engine, session, needed, quiet=quiet)
        return Opened(session)
    if not end:  # every question has passages of its own
        if keep:
            console.note("Passages of one question are not kept on disk.", quiet=quiet)
        form = choose_cache(engine, needed, cache, attention, quiet=quiet)
        session = engine.session(needed, attention=attention, cache=form)
        say_plan(engine, session, needed, quiet=quiet)
        return Opened(session)
    if room > needed and all(need > free for need, free in cache_needs(engine, room, attention).values()):
        room = needed  # no room to grow, then
    dynamic = engine.network.config.rope.kind == "dynamic"
    usual = max(min(end + ROOM, engine.window), needed) if keep else needed
    own = planned_length(engine, end, usual, attention)  # as `longverse read` plans
    roomy = max(room, own)
    # What is kept follows from the plan under dynamic NTK, and how much it holds by pages.
    kept_plan = own if dynamic or attention == "pages" else roomy
    store = open_store(library_limit(None))
    ids = prompts.ids[0]

    def fitting(planned: int) -> list[str]:
        return [form for form, (need, free) in cache_needs(engine, planned, attention).items() if need <= free]

    def kept(forms: list[str] | None) -> Session | None:
        for planned in (own,) if dynamic else dict.fromkeys((roomy, min(roomy, 2 * own), own)):
            # What is kept is copied to a card, and has to fit there; on a CPU it is mapped.
            here = fitting(planned) if forms is None and engine.network.device.type != "cpu" else forms
            if (session := store.find(engine, ids, planned, cache=here, attention=attention)) is not None:
                return session
        return None

    if cache != "auto" and engine.network.device.type != "cpu":
        choose_cache(engine, kept_plan, cache, attention, quiet=quiet)  # refuses what does not fit
    found = kept(None if cache == "auto" else [cache])
    held = 0 if found is None else min(len(found.tokens), end)
    if found is not None and held < end and cache == "auto":
        # What is kept of another document that begins alike does not choose the format, unless it is most of this one.
        ours = store.folder_of(engine, ids[:end], kept_plan, cache=found.cache_format, attention=attention).is_dir()
        if found.cache_format not in fitting(kept_plan) or not (ours or 2 * held >= end):
            found = None
    if found is not None:
        form = found.cache_format
    else:
        form = choose_cache(engine, kept_plan if keep else roomy, cache, attention, quiet=quiet)
        found = kept([form])
        held = 0 if found is None else min(len(found.tokens), end)
    begun = store.folder_of(engine, ids[:end], kept_plan, cache=form, attention=attention).is_dir()
    if held == end or not (keep or begun):
        tell(store, quiet=quiet)
        session = found or engine.session(roomy, attention=attention, cache=form)
        session.boundary = end
        say_plan(engine, session, needed, quiet=quiet)
        return Opened(session)
    say_plan(engine, found or unread(engine, kept_plan, attention, form), needed, quiet=quiet)
    del found  # its files are written to now
    started = time.perf_counter()
    session = _read_and_keep(engine, store, prompts, end, kept_plan, form, attention, quiet=quiet)
    seconds = time.perf_counter() - started
    console.note(f"Read {end - held:,} tokens in {console.duration(seconds)}.", quiet=quiet)
    return Opened(session, held, seconds)


def _read_and_keep(
    engine: Engine, store: Store, prompts: Prompts, end: int, planned: int, form: str, attention: str, *, quiet: bool
) -> Session:
    """Read the first `end` tokens of the prompts, the documents, onto the disk, or say why they are not kept. A Ctrl-C
    ends it after a chunk, is told what of them is kept, and goes on as KeyboardInterrupt."""
    tell(store, quiet=quiet)
    ids, name = prompts.ids[0][:end], ", ".join(document.name for document in prompts.documents)
    with console.interruptible() as stopped, console.Task(f"Reading {name}", quiet=quiet) as task:
        session = store.read(
            engine, ids, planned, name=name, cache=form, attention=attention, must_keep=False, on_progress=task,
            cancelled=stopped,
        )  # fmt: skip
    tell(store, quiet=quiet)
    session.boundary = end
    if len(session.tokens) == end and not stopped():
        return session
    own = store.folder_of(engine, ids, planned, cache=form, attention=attention).name
    kept = next((entry.length for entry in store.entries() if entry.id == own), 0)
    said = f"{kept:,} of {end:,} tokens are kept: asking again reads on from there." if kept else "Nothing was kept."
    console.note(f"Stopped. {said}", quiet=quiet)
    raise KeyboardInterrupt


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


def choose_beside(
    engine: Engine, tokens: int, cache: str, attention: str, *, room: int = 0, quiet: bool
) -> tuple[str, int] | None:
    """The format of a cache that lies in the machine's memory because the model's card has room for none (or not for
    the given one), and the tokens to plan for, `room` where that fits; None where the card has room, where the machine
    has not either, and for pages."""
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
    most = SLACK * memory_of_machine()[1] // shape.cache_bytes_per_token(form, engine.kept.itemsize)
    if tokens > most:
        return None
    console.note(
        f"The card has {gigabytes(free)} free and {tokens:,} tokens need {gigabytes(wanted[form])} there (cache:"
        f" {form}): the cache is kept in the machine's memory, and every token reads it from there.",
        quiet=quiet,
    )
    return form, max(tokens, room) if room <= most else tokens


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
