"""The options of `longverse eval` that say who is asked, once for all its commands, and the back end they mean.

A command takes them as one parameter, `who: Who` (see `commands_common.with_options`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .commands_common import Device, Dtype, Model, Rope

if TYPE_CHECKING:
    from longverse.evaluation.backends import Backend

Window = Annotated[int | None, typer.Option("--window", help="Take this many tokens, beyond the model's window too.")]
Attention = Annotated[
    str, typer.Option("--attention", help="How the engine attends: exact, sparse, sparse:0.9, sparse:0.9:0.1 or pages.")
]
Cache = Annotated[str, typer.Option("--cache", help="How the engine keeps what it read: full, int8 or int4.")]
Processes = Annotated[
    int, typer.Option("--processes", help="Engines side by side, which share the cores: more rows an hour.")
]
BackendName = Annotated[str, typer.Option("--backend", help="engine (ours) or transformers.")]
_SERVED = "A model behind an endpoint"
Endpoint = Annotated[
    str | None,
    typer.Option(rich_help_panel=_SERVED, help="An OpenAI-compatible server instead, like http://127.0.0.1:8000/v1."),
]
TokenizerOf = Annotated[
    str | None, typer.Option(rich_help_panel=_SERVED, help="The served model, whose tokenizer counts lengths.")
]
KeyEnv = Annotated[str, typer.Option(rich_help_panel=_SERVED, help="The environment variable that holds the key.")]
Concurrency = Annotated[int, typer.Option(rich_help_panel=_SERVED, help="Requests at once.")]
Timeout = Annotated[float, typer.Option(rich_help_panel=_SERVED, help="Seconds to wait for one answer.")]
Retries = Annotated[int, typer.Option(rich_help_panel=_SERVED, help="Tries after the first.")]


@dataclass(frozen=True)
class Who:
    """Who is asked: the options that every measuring command takes."""

    model: Model = "smol"
    rope: Rope = None
    window: Window = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    attention: Attention = "exact"
    cache: Cache = "full"
    processes: Processes = 1
    backend: BackendName = "engine"
    endpoint: Endpoint = None
    tokenizer: TokenizerOf = None
    key_env: KeyEnv = "OPENAI_API_KEY"
    concurrency: Concurrency = 4
    timeout: Timeout = 600.0
    retries: Retries = 4

    @contextmanager
    def ask(self) -> Iterator[Backend]:
        """The back end of these options, loaded under a progress bar and closed again. UserError for options that do
        not go together."""
        from longverse.errors import UserError

        if self.backend not in ("engine", "transformers"):
            raise UserError(
                f"No back end is called {self.backend!r}: choose engine or transformers, or give --endpoint."
            )
        if self.endpoint is not None:
            self._only_defaults("change a model loaded here, not one behind --endpoint", "rope", "backend", "attention",
                                "cache", "processes")  # fmt: skip
            yield self._endpoint(self.endpoint)
            return
        if self.tokenizer is not None:
            raise UserError("--tokenizer belongs to --endpoint: a model loaded here brings its own.")
        if self.backend == "transformers":
            from longverse.evaluation.transformers_backend import TransformersBackend

            self._only_defaults("belong to the engine, not to --backend transformers", "rope", "window", "attention",
                                "cache", "processes")  # fmt: skip
            yield TransformersBackend(self.model, dtype=self.dtype, device=self.device)
            return
        from longverse.evaluation.engine_backend import EngineBackend, EngineProcesses
        from longverse.inference.engine import Engine, parse_attention

        parse_attention(self.attention)  # what is wrong with it is said before a model loads
        load: dict[str, Any] = {
            "rope": self.rope, "window": self.window, "dtype": self.dtype, "device": self.device,
        }  # fmt: skip
        title = f"Loading {Path(self.model).name}"
        if self.processes == 1:
            with console.Task(title, unit="bytes", at_once=True) as task:
                engine = Engine.load(self.model, **load, on_progress=task)
            _say(engine.notes)
            yield EngineBackend(engine, self.attention, self.cache)
            return
        with console.Task(f"{title}, {self.processes} times", unit="bytes", at_once=True) as task:
            several = EngineProcesses(
                self.model, processes=self.processes, attention=self.attention, cache=self.cache, **load,
                on_progress=task,
            )  # fmt: skip
        with several:
            _say(several.notes)
            yield several

    def _only_defaults(self, why: str, *names: str) -> None:
        from longverse.errors import UserError

        given = [f"--{o.name}" for o in fields(self) if o.name in names and getattr(self, o.name) != o.default]
        if given:
            raise UserError(f"{' and '.join(given)} {why}: leave out one or the other.")

    def _endpoint(self, url: str) -> Backend:
        from longverse.evaluation.backends import load_tokenizer
        from longverse.evaluation.endpoint import EndpointBackend

        tokenizer, chat = load_tokenizer(self.tokenizer) if self.tokenizer is not None else (None, None)
        served = EndpointBackend(
            url, self.model, key=os.environ.get(self.key_env), tokenizer=tokenizer, chat=chat, window=self.window,
            concurrency=self.concurrency, timeout=self.timeout, retries=self.retries,
        )  # fmt: skip
        served.check()
        return served


def _say(notes: list[str]) -> None:
    from longverse.models.releases import licence_shown

    for note in notes:
        console.note(note)
    licence_shown(notes)
