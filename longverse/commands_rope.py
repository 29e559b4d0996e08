"""`longverse rope`: the plan of a model as a table and as a picture."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console
from .errors import UserError, expand

if TYPE_CHECKING:
    from .models.network import NetworkConfig

LENGTHS = tuple(2**power * 1024 for power in range(3, 11))  # 8K … 1M tokens


def config_of(model: str) -> tuple[str, NetworkConfig]:
    """Name and shape of a model out of its config alone, with what its adapter changes: no weights are read, and of a
    hub model none downloaded."""
    from .models.network import NetworkConfig

    name, config = _completed_config(model)
    return name, NetworkConfig.from_dict(config)


def _completed_config(model: str) -> tuple[str, dict[str, Any]]:
    """A model's name and config, with what its release leaves out and its adapter states."""
    from .models import embedded, hub, releases
    from .models.adapters import adapted_config, base_of, is_adapter
    from .models.checkpoint import locate, read_config
    from .models.gguf import read_gguf
    from .models.tokenizer import read_json

    path, adapter = expand(model), None
    if os.path.isfile(path) and path.suffix.lower() == ".json":
        name, config = path.resolve().parent.name, read_json(path)
    elif not os.path.exists(path) and model not in embedded.EMBEDDED and hub.is_hub_id(model):
        name, config = model.split("/")[1], read_json(_hub_config(model))
    else:
        name, place = locate(model)
        if place.is_dir() and is_adapter(place):
            adapter, config = place, _completed_config(base_of(place))[1]
        else:
            adapter = embedded.adapter(name) if name == model and place.is_file() else None
            config = read_gguf(place).config if place.is_file() else read_config(place)
    config = releases.complete(config, name)[0]
    return name, config if adapter is None else adapted_config(config, adapter)


def _hub_config(hub_id: str) -> Path:
    """config.json of a hub model, from an earlier download where there is one."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    if isinstance(found := try_to_load_from_cache(hub_id, "config.json"), str):
        return Path(found)
    try:
        HfApi().model_info(hub_id, timeout=20)  # unlike a download this does not retry where there is no network
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # whatever its HTTP client of the day raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise UserError(
            f"The config of {hub_id} cannot be had from the hub ({reason}): give a folder with its config.json instead."
        ) from None


def record(name: str, config: NetworkConfig) -> dict[str, Any]:
    """The plan's figures: bases and longest wavelengths (tokens) by planned length."""
    plan = config.rope
    lengths = [
        {"tokens": length, "base": plan.base(length), "longest_wavelength": _longest(config, length)}
        for length in LENGTHS
    ]
    return {
        "model": name, "kind": plan.kind, "description": plan.describe(), "base": plan.theta, "factor": plan.factor,
        "original_window": plan.original_window, "window": config.window, "head_dim": plan.head_dim, "lengths": lengths,
    }  # fmt: skip


def show(name: str, config: NetworkConfig) -> None:
    """Print the plan."""
    plan = config.rope
    console.line(f"{name}: {plan.describe()}")
    console.line(f"window {config.window:,} tokens, head size {plan.head_dim}, {plan.head_dim // 2} frequencies\n")
    rows = [
        [_short(length), f"{plan.base(length):,.0f}", f"{_longest(config, length):,.0f}",
         "yes" if length <= config.window else "no"]
        for length in LENGTHS
    ]  # fmt: skip
    heads = ("tokens", "effective base", "longest wavelength", "in the window")
    console.out().print(console.table(heads, rows, right=(0, 1, 2)))


def _short(length: int) -> str:
    """A power of two of tokens: 8K, 1M."""
    return f"{length // 2**20}M" if length >= 2**20 else f"{length // 1024}K"


def _longest(config: NetworkConfig, length: int) -> float:
    """Tokens after which the slowest pair of a head has turned once."""
    return 2 * math.pi / float(config.rope.inv_freq(length)[-1])


def draw(name: str, config: NetworkConfig, target: Path) -> None:
    """Draw the wavelength of every pair at three lengths to a picture file. Raises UserError without matplotlib."""
    if target.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(
            f"A plot is written as .png, .svg or .pdf, not {target.suffix or 'without a suffix'}: rename {target}."
        )
    if not target.parent.is_dir():
        raise UserError(f"There is no folder {target.parent}: make it first or choose another for the plot.")
    try:
        import matplotlib
    except ImportError:
        raise UserError("A plot needs matplotlib: type `pip install matplotlib`.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    lengths = [config.window, 32 * 1024, 256 * 1024] if config.rope.kind == "dynamic" else [config.window]
    for length in sorted(set(lengths)):
        waves = [2 * math.pi / float(value) for value in config.rope.inv_freq(length)]
        axes.plot(
            range(len(waves)), waves, marker=".", label=f"{length:,} tokens, base {config.rope.base(length):,.0f}"
        )
    axes.axhline(config.window, color="grey", linestyle="--", label=f"window, {config.window:,} tokens")
    axes.set(
        yscale="log",
        xlabel="pair of dimensions",
        ylabel="wavelength (tokens)",
        title=f"{name}: {config.rope.describe()}",
    )
    axes.legend()
    beside = target.with_name(f".{target.name}.part{target.suffix}")
    try:
        figure.savefig(beside, dpi=120, bbox_inches="tight")
        os.replace(beside, target)
    except OSError as error:
        raise UserError(f"The plot cannot be written to {target} ({error.strerror}): choose another place.") from None
    finally:
        pyplot.close(figure)
        beside.unlink(missing_ok=True)
