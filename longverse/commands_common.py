"""What several commands share: their options, and how options become settings and a loaded model.

Nothing heavy is imported at the top: `longverse --help` must answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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


def make_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int | None,
    stop: list[str] | None,
) -> Sampling:  # fmt: skip
    """The settings of drawing, checked."""
    from .inference.sampling import Sampling

    return Sampling(max_new_tokens, temperature, top_k, top_p, min_p, penalty, seed, tuple(stop or ()))


def load_engine(model: str, dtype: str, device: str, rope: str | None, quiet: bool) -> Engine:
    """Load a model under a progress bar; what was filled in and the licence are said."""
    with console.Task(f"Loading {Path(model).name}", unit="bytes", quiet=quiet, at_once=True) as task:
        from .inference.engine import Engine

        engine = Engine.load(model, dtype=dtype, device=device, rope=rope, on_progress=task)
    for remark in engine.notes:
        console.note(remark, quiet=quiet)
    if not quiet:
        from .models.releases import licence_shown

        licence_shown(engine.notes)
    return engine
