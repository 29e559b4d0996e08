"""What several commands share: their options, and how options become settings and a loaded model.

Nothing heavy is imported at the top: `longverse --help` must answer at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console

if TYPE_CHECKING:
    from .inference.engine import Engine
    from .inference.sampling import Sampling

Model = Annotated[
    str, typer.Option("--model", "-m", help="An embedded name, a folder, a .gguf file or a hub id.", show_default=True)
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest word; higher varies more.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens up to this probability.")]
MinP = Annotated[float, typer.Option(min=0, max=1, help="Drop tokens below this share of the likeliest one.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", min=0, help="Above 1 repeats less.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed draws the same answer.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be repeated.")]
Rope = Annotated[str | None, typer.Option("--rope", help="Change the RoPE plan, such as abf:500000 or dynamic:2.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no figures.")]


@dataclass(frozen=True)
class Loading:
    """Options of every command that loads a model here."""

    model: Model = "smol"
    rope: Rope = None
    dtype: Dtype = "auto"
    device: Device = "auto"

    def given(self) -> list[str]:
        """The options that are not as they are by default, as they are typed."""
        values = ((f"--{each.name}", getattr(self, each.name), each.default) for each in fields(self))
        return [word for name, value, usual in values if value != usual for word in (name, value)]

    def engine(self, quiet: bool) -> Engine:
        """Load the model under a progress bar; what was filled in and the licence are said."""
        with console.Task(f"Loading {Path(self.model).name}", unit="bytes", quiet=quiet, at_once=True) as task:
            from .inference.engine import Engine

            engine = Engine.load(self.model, dtype=self.dtype, device=self.device, rope=self.rope, on_progress=task)
        for remark in engine.notes:
            console.note(remark, quiet=quiet)
        if not quiet:
            from .models.releases import licence_shown

            licence_shown(engine.notes)
        return engine


@dataclass(frozen=True)
class Drawing:
    """Options of every command that writes answers: how long, and how words are drawn."""

    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: Penalty = 1.0
    seed: Seed = None
    stop: Stop = None

    def sampling(self) -> Sampling:
        """The settings of drawing, checked."""
        from .inference.sampling import Sampling

        return Sampling(
            self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            self.seed, tuple(self.stop or ()),
        )  # fmt: skip


def with_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Lets a command take a dataclass of options as one parameter: each of its fields becomes an option in that place.

        @app.command()
        @with_options()
        def ask(file: ..., drawing: Drawing = Drawing(), quiet: Quiet = False) -> None: ...

    A parameter's default gives the fields' defaults. `left_out` names fields that this command does not offer.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        every: list[inspect.Parameter] = []
        groups: dict[str, tuple[Any, list[str]]] = {}  # of a dataclass parameter: its default, and the fields offered
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if not is_dataclass(parameter.annotation):
                every.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            kind: Any = parameter.annotation
            default = kind() if parameter.default is inspect.Parameter.empty else parameter.default
            shown = [
                option.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=getattr(default, option.name))
                for option in inspect.signature(type(default), eval_str=True).parameters.values()
                if option.name not in left_out
            ]
            groups[parameter.name] = default, [option.name for option in shown]
            every += shown

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for name, (default, offered) in groups.items():
                given[name] = replace(default, **{option: given.pop(option) for option in offered})
            command(**given)

        # typer reads the options off the signature.
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return run

    return wrap
