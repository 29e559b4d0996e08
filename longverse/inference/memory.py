"""What a session will take of the memory, against what is free: asked before any work, so that nothing is killed in it.

plan.py has the arithmetic for a config; here it is of a model that is loaded.
"""

from __future__ import annotations

from ..errors import UserError
from ..models import kernels
from ..models.cache import FORMATS
from ..models.network import NetworkConfig
from ..models.quant_linear import QuantLinear
from ..plan import CACHES, ROUNDED, SLACK, WIDTH, Shape, gigabytes, memory_of_machine
from .engine import Engine, free_on_card


def shape_of_network(name: str, config: NetworkConfig) -> Shape:
    """The sizes of a network as it runs."""
    return Shape(
        name, config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads,
        config.head_dim, config.vocab_size, config.window, config.tied,
    )  # fmt: skip


def requirements(engine: Engine, tokens: int) -> tuple[dict[str, float], int]:
    """Bytes that `tokens` tokens need on top of what a loaded model holds, by cache format, the most precise first;
    and the bytes that are free. Mapped weights count as needed, since the system only lends their pages; others are in
    memory already, and what is free is without them."""
    network = engine.network
    shape, form = shape_of_network(engine.name, network.config), weights_form(engine)
    width = engine.kept.itemsize
    on_card = network.device.type == "cuda"
    weights = 0 if on_card else network.mapped_bytes
    if (written := written_with(engine, shape, form)) in ROUNDED and not engine.holds_decoder:
        weights += shape.read_bytes(written)
    needs = {
        cache: weights
        + tokens * shape.cache_bytes_per_token(cache, width)
        + shape.buffer_bytes(form, cache, tokens, network.dtype.itemsize)
        for cache in CACHES
        if cache in FORMATS
    }
    free = free_on_card(network.device) if on_card else memory_of_machine()[1]
    return dict(needs), int(SLACK * free)


def weights_form(engine: Engine) -> str:
    """The weight format a loaded model runs in."""
    quantised = next((module for module in engine.network.modules() if isinstance(module, QuantLinear)), None)
    if quantised is not None:
        return f"int{quantised.form.bits}"
    return "float32" if engine.network.dtype.itemsize == WIDTH["float32"] else "bf16"


def written_with(engine: Engine, shape: Shape, form: str) -> str:
    """The form of the weights that an engine writes answers with (plan.Shape.written_with)."""
    on_card = engine.network.device.type != "cpu"
    if form not in WIDTH or on_card or kernels.unavailable():
        return form
    from ..models.kernels.decoder import settled

    rounded = settled(engine.network, engine._weights)
    return form if rounded == "full" else f"rounded {rounded}"


def check_fits(engine: Engine, tokens: int, cache: str, attention: str = "exact") -> None:
    """UserError where a cache of this format for `tokens` tokens does not fit what is free."""
    needs, free = requirements(engine, tokens)
    if needs.get(cache, 0.0) > free:
        smaller = [] if attention == "pages" or cache == "int4" else ["take a smaller cache (int8, int4)"]
        raise too_little(engine, tokens, cache, needs[cache], free, smaller)


def too_little(engine: Engine, tokens: int, cache: str, need: float, free: float, ways: list[str]) -> UserError:
    """The sentence where `tokens` tokens need more bytes than are free; `ways` out come before the usual ones."""
    ways = [*ways, "give a shorter document"]
    return UserError(
        f"{tokens:,} tokens need {gigabytes(need)} of memory with {engine.name} (cache: {cache}), and"
        f" {gigabytes(free)} are free: {', '.join(ways)} or close other programs."
    )
