"""`longverse serve`: the OpenAI-compatible server and its page."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .commands_common import Loading, Quiet, with_options
from .commands_open import Keep, library_limit
from .errors import UserError, expand

if TYPE_CHECKING:
    from .inference.engine import Engine, Session
    from .server.sessions import Open

KEY_VARIABLE = "LONGVERSE_API_KEY"
PAGES_WINDOW = 2**20  # tokens: with pages the model's window is no limit, but some limit there must be


@with_options()
def serve(
    loading: Loading = Loading(),
    host: Annotated[str, typer.Option("--host", help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="The port; 0 takes any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help=f"Ask clients for this key; better set as ${KEY_VARIABLE}, which `ps` hides."),
    ] = None,
    library: Annotated[Path | None, typer.Option("--library", help="The folder of uploaded documents.")] = None,
    attention: Annotated[
        str,
        typer.Option(
            "--attention", help="exact, sparse, sparse:0.9, sparse:0.9:0.1, or pages for documents past the window."
        ),
    ] = "exact",
    cache: Annotated[str, typer.Option("--cache", help="Format of the keys and values: full, int8 or int4.")] = "full",
    cache_memory: Annotated[
        float | None,
        typer.Option("--cache-memory", min=0.01, help="GiB for what was read; else 40% of free memory."),
    ] = None,
    keep: Keep = False,
    slots: Annotated[int, typer.Option("--slots", min=1, max=64, help="Requests that take turns computing.")] = 4,
    queue: Annotated[int, typer.Option("--queue", min=0, max=10_000, help="Requests that may wait.")] = 64,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", min=1, help="The longest answer where a client names none.")
    ] = 1024,
    upload_limit: Annotated[int, typer.Option("--upload-limit", min=1, help="The largest upload, in MB.")] = 256,
    body_limit: Annotated[int, typer.Option("--body-limit", min=1, help="The largest other request, in MB.")] = 8,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A further name that the server may be called by.")
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that answers get to finish at the stop.")
    ] = 10,
    quiet: Quiet = False,
) -> None:
    """Serve a model: a page for the browser, and OpenAI's interface for programs.

    [bold]Examples[/bold]

    longverse serve

    longverse serve --model path/to/model --port 8080

    curl http://127.0.0.1:8000/v1/files -F file=@report.pdf
    """
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    _check(host, key)
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"`longverse serve` needs {error.name}: install it with pip install 'longverse[server]'."
        ) from None
    from .inference.engine import parse_attention
    from .server.run import address_of, bind

    attention = parse_attention(attention).name
    kept_bytes = library_limit(None)
    sock = bind(host, port)  # before the model loads: a port that is taken is said at once
    engine = loading.engine(quiet)

    from .inference.store import Store
    from .models.checkpoint import cache_folder
    from .server.app import create_app
    from .server.keeping import Keeping
    from .server.library import Library
    from .server.run import serve as run
    from .server.service import Settings
    from .server.worker import Worker

    open_session = _opener(engine, attention, cache)
    folder = expand(library) if library is not None else cache_folder() / "documents"
    documents = Library(folder, engine.tokenizer.count)
    window = PAGES_WINDOW if attention == "pages" else engine.window
    worker = Worker(
        engine,
        slots=slots,
        queue_limit=queue,
        cache_bytes=_memory(cache_memory, engine),
        open_session=open_session,
        window=window,
    )
    settings = Settings(
        api_key=key,
        answer_tokens=answer_tokens,
        max_body=body_limit * 2**20,
        max_upload=upload_limit * 2**20 + 2**16,
        hosts=tuple(allow_host or ()),
        window=window,
        keeping=Keeping(engine, Store(limit_bytes=kept_bytes), keep, attention, cache),
    )
    app = create_app(engine, worker, documents, settings)
    url = address_of(sock)

    def started() -> None:
        console.line(f"{engine.name} reads {window:,} tokens. Open {url} in a browser; programs use {url}/v1.")
        console.note(f"Documents are kept in {folder}. Ctrl-C stops.", quiet=quiet)

    run(app, worker, sock, grace=grace, on_start=started)
    console.note("Stopped.", quiet=quiet)


def _check(host: str, key: str | None) -> None:
    """Who else could reach the server needs a key."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not key:
        raise UserError(
            f"On {host} others can reach the server: set a key in ${KEY_VARIABLE} or with --api-key, or listen at"
            " 127.0.0.1."
        )
    if key is not None and (not key.isascii() or not key.isprintable() or " " in key):
        raise UserError("The API key may hold printable ASCII characters without spaces.")


def _opener(engine: Engine, attention: str, cache: str) -> Open:
    """Sessions as the options want them. A first answer says now, and not to the first client, that an option is wrong,
    and compiles what a processor's kernels need."""
    from .inference.sampling import Sampling

    def open_session(tokens: int) -> Session:
        return engine.session(tokens, attention=attention, cache=cache)

    ids = engine.tokenizer.encode("A mill stands in a town.")[:64]
    open_session(min(256, engine.window)).complete(ids, Sampling(max_new_tokens=3))
    return open_session


def _memory(gib: float | None, engine: Engine) -> int:
    """Bytes for kept sessions, on the device that the model runs on."""
    if gib is not None:
        return int(min(gib, 2**20) * 2**30)
    if engine.network.device.type == "cuda":
        import torch

        return int(0.8 * torch.cuda.mem_get_info(engine.network.device)[0])
    import psutil

    return int(0.4 * psutil.virtual_memory().available)
