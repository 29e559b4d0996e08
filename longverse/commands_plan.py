"""`longverse plan`: what a model and a length of text take, in every choice of formats, before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .commands_common import AsJson
from .errors import UserError, expand
from .plan import (
    PROCESS,
    Card,
    Json,
    Plan,
    Rates,
    Shape,
    card_rates,
    find_card,
    make_plan,
    memory_of_machine,
    parse_bytes,
    parse_tokens,
    prefill_seconds,
    say_bytes,
    token_seconds,
)

if TYPE_CHECKING:
    from .inference.engine import Engine, Session

WORTH_MEASURING = 8192  # tokens to read from which a first calibration of seconds is worth its time


def plan(
    model: Annotated[
        str,
        typer.Argument(help="An embedded name, a folder or config.json, a hub id, or a release like XVERSE-13B-256K."),
    ] = "smol",
    context: Annotated[str, typer.Option("--context", "-c", help="Prompt and answer together, like 256K.")] = "",
    gpu: Annotated[str | None, typer.Option("--gpu", help="Plan for a card instead: H100, 4090 … or 80GB.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Plan with this much memory, like 64GB.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A config.json to plan for.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's rates again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what fits: bytes and predicted seconds for every choice of weights and cache. Needs no weights.

    [bold]Examples[/bold]

    longverse plan smol --context 8K

    longverse plan XVERSE-13B-256K --context 256K --gpu 80GB
    """
    tokens = parse_tokens(context) if context else 0
    limit = parse_bytes(memory) if memory is not None else None
    card = find_card(gpu) if gpu is not None else None
    if card is not None and measure:
        raise UserError("--measure measures this machine's processor: leave it out with --gpu.")
    shape = shape_of(str(config) if config is not None else model)
    tokens = tokens or shape.window
    made = plan_for_card(shape, tokens, card[0], limit) if card else plan_for_cpu(shape, tokens, limit, measure)
    remarks = [card[1]] if card is not None and card[1] else []
    if tokens > shape.window:
        remarks.append(f"the window of {shape.name} is {shape.window:,} tokens")
    if as_json:
        console.json_line(made.to_json() | {"remarks": remarks})
        return
    show(made, remarks)


# ---- the model and the machine -------------------------------------------------------------------------------


def shape_of(model: str) -> Shape:
    """The sizes of a model from its config alone. Raises UserError for what has none."""
    from .models.releases import RELEASES, recognise

    plain = model.lower().removeprefix("xverse/")
    release = next((r for r in RELEASES if r.name.lower() == plain), None)
    path = expand(model)
    if os.path.isdir(path) and os.path.isfile(path / "config.json"):
        path = path / "config.json"
    if os.path.isfile(path) and path.suffix.lower() == ".json":
        name, config = path.resolve().parent.name, _read_config(path)
        if (known := recognise(config, name)) is not None:
            stated = {key: value for key, value in config.items() if value is not None}
            rope = ("rope_parameters", "rope_scaling", "rope_theta", "context_window")
            of_release = known.config()
            if any(key in stated for key in rope):  # a plan of its own
                of_release = {key: value for key, value in of_release.items() if key not in rope}
            config = of_release | stated
        if "model_type" in config:  # refuses what would not be loaded: its sizes mean something else
            from .inference.memory import shape_of_network
            from .models.network import NetworkConfig

            return shape_of_network(name, NetworkConfig.from_dict(config))
        return Shape.from_config(config, name)
    if release is not None and not os.path.exists(path):
        return Shape.from_config(release.config(), release.name)
    from .commands_rope import config_of
    from .inference.memory import shape_of_network

    name, network = config_of(model)
    return shape_of_network(name, network)


def _read_config(path: Path) -> Json:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no JSON object: give a model's config.json.")
    return config


def plan_for_card(shape: Shape, tokens: int, card: Card, limit: int | None) -> Plan:
    """A plan by published peaks."""
    return make_plan(shape, tokens, limit or card.memory, card_rates(card), device=card.name, gpu=True)


def plan_for_cpu(shape: Shape, tokens: int, limit: int | None, again: bool) -> Plan:
    """A plan by what this machine was measured to do."""
    with console.Task("Measuring this machine", at_once=True):
        import torch

        from .inference.rates import all_figures, rates_for
        from .models.checkpoint import cpu_has_bfloat16

        native = cpu_has_bfloat16()
        dtype = torch.bfloat16 if native else torch.float32
        rates = rates_for(shape, dtype, all_figures(dtype), again=again)
    forms = ("bf16", "int8", "int4") if native else ("float32", "int8", "int4")
    return make_plan(shape, tokens, limit or memory_of_machine()[0], rates, forms=forms)


# ---- the screen ----------------------------------------------------------------------------------------------


def show(made: Plan, remarks: list[str]) -> None:
    """Print a plan."""
    shape = made.shape
    console.line(f"{shape.name}: {_count(shape.parameters)} parameters, window {shape.window:,} tokens")
    linear, attention = shape.linear_flops(made.context), shape.attention_flops(made.context)
    console.line(
        f"{made.context:,} tokens on {made.device}, {say_bytes(made.memory)}: {linear:.1e} operations in linear maps"
        f" and {attention:.1e} in attention to read them\n"
    )
    rows = [
        [f"{option.weights:7} {say_bytes(option.weights_bytes):>9}",
         f"{option.cache:5} {say_bytes(option.cache_bytes):>9}",
         say_bytes(option.total_bytes),
         "-" if option.prefill_seconds is None else console.duration(option.prefill_seconds),
         "-" if option.token_seconds is None else _speed(option.token_seconds),
         "chosen" if option == made.choice else "yes" if option.fits else "no"]
        for option in made.options
    ]  # fmt: skip
    heads = ("weights", "cache", "in all", "reading", "writing", "fits")
    console.out().print(console.table(heads, rows, right=(2, 3, 4)))
    console.line(f"\n{made.reason}")
    if made.measured:
        console.line("Times by this machine's measured rates; --measure measures them again.")
    elif made.options and made.options[0].prefill_seconds is not None:
        console.line(
            "Times are predictions, never measured here: published peaks by usual shares, in quantised formats by what"
            " an H200 reached."
        )
    for remark in remarks:
        console.line(f"Note: {remark}.")


def _speed(seconds: float) -> str:
    return f"{1 / seconds:,.1f} tok/s" if seconds < 2 else f"{seconds:,.1f} s/tok"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 10**9 else f"{parameters / 1e6:.0f} M"


# ---- what `ask` and `read` plan with -------------------------------------------------------------------------


def predict(engine: Engine, session: Session, tokens: int) -> tuple[float, float] | None:
    """Seconds to read what `session` does not hold of `tokens`, and to write one token; None where nothing is known.

    A CPU is measured when it never was and the text is long enough for that to be worth it.
    """
    from .inference.memory import shape_of_network, weights_form, written_with

    shape, form = shape_of_network(engine.name, engine.network.config), weights_form(engine)
    written, cache = written_with(engine, shape, form), session.cache_format
    if session.home == "machine":  # how fast a link is, is not known
        return None
    rates = _rates(engine, shape, (form, written, cache), tokens - len(session.tokens))
    if rates is None or form not in rates.linear or cache not in rates.attention:
        return None
    if written not in rates.weights or cache not in rates.cache:
        return None
    pages = getattr(session, "pages", None)
    reach = pages.first + pages.window + pages.chunk // 2 if pages is not None else None
    seen = min(tokens, session.reach) if pages is not None else tokens  # type: ignore[attr-defined]
    return (
        prefill_seconds(shape, tokens, rates, form, cache, begin=len(session.tokens), reach=reach),
        token_seconds(shape, seen, rates, written, cache, engine.kept.itemsize),
    )


def _rates(engine: Engine, shape: Shape, forms: tuple[str, str, str], fresh: int) -> Rates | None:
    import torch

    if engine.network.device.type == "cuda":
        try:
            return card_rates(find_card(torch.cuda.get_device_name(engine.network.device))[0])
        except UserError:
            return None
    from .inference.rates import rates_for

    form, written, cache = forms
    wanted = [("linear", form), ("attention", cache), ("weights", written), ("cache", cache)]
    return rates_for(shape, engine.network.dtype, wanted, measure=fresh >= WORTH_MEASURING)


__all__ = ["PROCESS", "Json", "plan", "predict", "shape_of", "show"]
