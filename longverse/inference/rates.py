"""How fast this machine is with networks of a shape: the rates a plan divides by (plan.py).

One layer of the shape is made with random weights and run by the very code that will run the model: a chunk of a
prompt and a single token, each through every weight format, and attention over every cache format. Layers wider than
WIDEST are made narrower in proportion, since their rates no longer depend on the width. Takes about two seconds on an
idle machine; the result is kept in the cache folder under all that it depends on. What a busy machine gives is used
once and not kept, and after LIMIT seconds the figures still lacking are left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.cache import FORMATS, KVCache
from ..models.network import Layer, NetworkConfig
from ..models.places import cache_folder
from ..models.quant_linear import quantize_network
from ..models.rope import RopePlan
from ..models.shards import write_json
from ..plan import CHUNK, Rates, Shape

VERSION = 1
WIDEST = 2048  # hidden size
PAST = 8192  # tokens attended over
AT_LEAST = 64 << 20  # bytes read in a row, so that they come from memory and not from the processor's caches
SECONDS = 0.12  # a figure
LIMIT = 6.0  # seconds for all
BUSY = 0.7  # share of its threads' time below which other programs had the rest
NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "bf16"}


def rates_for(shape: Shape, dtype: torch.dtype, *, again: bool = False) -> Rates:
    """Rates of this machine's CPU for a shape whose full precision is `dtype`: kept ones, or measured now."""
    known = None if again else kept_rates(shape, NAMES[dtype], torch.get_num_threads())
    if known is not None:
        return known
    rates, idle = measure(shape, dtype)
    if not idle:
        return rates
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, _all() | {_key(shape, NAMES[dtype], torch.get_num_threads()): rates.to_json()})
    except OSError:
        pass  # a folder that cannot be written only means measuring again
    return rates


def kept_rates(shape: Shape, dtype: str, threads: int) -> Rates | None:
    """Rates measured earlier, or None."""
    try:
        return Rates(**_all()[_key(shape, dtype, threads)])
    except (KeyError, TypeError):
        return None


def measure(shape: Shape, dtype: torch.dtype) -> tuple[Rates, bool]:
    """Measure now: the rates, and whether the machine was idle enough to believe them. The first of each kind is there
    however long it takes."""
    proxy = narrowed(shape)
    native = NAMES[dtype]
    threads = torch.get_num_threads()
    begun = time.monotonic()
    linear: dict[str, float] = {}
    weights: dict[str, float] = {}
    attention: dict[str, float] = {}
    cache: dict[str, float] = {}
    with torch.inference_mode():
        worked, passed = time.process_time(), time.perf_counter()
        for form, kept in ((native, "full"), ("int8", "int8"), ("int4", "int4")):
            if linear and time.monotonic() - begun > LIMIT:
                break
            if (rate := _weights_rates(proxy, dtype, form)) is not None:
                linear[form], weights[form] = rate
            if kept == "full":
                share = (time.process_time() - worked) / (time.perf_counter() - passed) / threads
            if kept in FORMATS and (not cache or time.monotonic() - begun <= LIMIT):
                attention[kept], cache[kept] = _cache_rates(proxy, dtype, kept)
    rates = Rates(f"this CPU ({threads} thread{'s' if threads > 1 else ''})", linear, attention, weights, cache)
    return rates, share >= BUSY and len(linear) + len(cache) >= 4


def narrowed(shape: Shape) -> Shape:
    """The same proportions at a hidden size of at most WIDEST, as one layer."""
    scale = max(1.0, shape.hidden / WIDEST)
    group = shape.heads // shape.kv_heads
    kv_heads = max(1, round(shape.kv_heads / scale))

    def rounded(size: float) -> int:
        return max(64, round(size / scale / 64) * 64)

    if scale > 1:
        shape = replace(shape, hidden=rounded(shape.hidden), mlp=rounded(shape.mlp))
    return replace(shape, layers=1, kv_heads=kv_heads, heads=kv_heads * group, vocab=64)


def _layer(shape: Shape, dtype: torch.dtype, form: str) -> nn.Module | None:
    """A layer with random weights in a format; None where its sizes do not fit the format."""
    config = NetworkConfig(
        shape.vocab, shape.hidden, shape.mlp, 1, shape.heads, shape.kv_heads, shape.head_dim, 1e-5, shape.window,
        RopePlan("default", 10_000.0, shape.head_dim),
    )  # fmt: skip
    layer = Layer(config, 0).to(dtype).requires_grad_(False).eval()
    if form in ("int8", "int4") and quantize_network(layer, int(form[3:])):
        return None
    return layer


def _weights_rates(shape: Shape, dtype: torch.dtype, form: str) -> tuple[float, float] | None:
    """Operations a second over a chunk, and bytes of weights a second for one token; all but attention included."""
    layer = _layer(shape, dtype, form)
    if layer is None:
        return None
    cos = sin = torch.ones(1, 1, 1, shape.head_dim, dtype=dtype)

    def nothing(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q

    chunk = torch.randn(1, CHUNK, shape.hidden).to(dtype)
    linear = 2.0 * shape.layer_weights * CHUNK / _best(lambda: layer(chunk, cos, sin, nothing))
    size = sum(tensor.nbytes for tensor in layer.state_dict().values())
    copies = [layer] + [_copy(layer) for _ in range(min(40, AT_LEAST // size))]
    token = chunk[:, :1].contiguous()

    def one_token() -> None:
        x = token
        for each in copies:
            x = each(x, cos, sin, nothing)

    return linear, len(copies) * size / _best(one_token)


def _copy(layer: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(layer)


def _cache_rates(shape: Shape, dtype: torch.dtype, form: str) -> tuple[float, float]:
    """Operations a second of a chunk's attention over PAST tokens, and bytes a second of one query's."""
    per_token = shape.cache_bytes_per_token(form, dtype.itemsize)
    layers = max(1, min(16, AT_LEAST // (per_token * PAST)))
    cache = KVCache(layers, shape.kv_heads, shape.head_dim, PAST + CHUNK, dtype, format=form)
    for array in cache.storage().values():
        if array.is_floating_point():
            array.normal_(std=0.02)
        elif array.dtype != torch.int64:
            array.random_(0, 100)

    def attend(layer: int, new: int) -> None:
        q = queries[:, :, :new]
        cache.attend(layer, q, keys[:, :, :new], keys[:, :, :new])

    queries = torch.randn(1, shape.heads, CHUNK, shape.head_dim).to(dtype)
    keys = torch.randn(1, shape.kv_heads, CHUNK, shape.head_dim).to(dtype)
    pairs = CHUNK * PAST + CHUNK * (CHUNK + 1) / 2

    def chunk() -> None:
        cache.restore(PAST)
        attend(0, CHUNK)

    def token() -> None:
        cache.restore(PAST)
        for layer in range(layers):
            attend(layer, 1)

    operations = 4.0 * shape.heads * shape.head_dim * pairs
    return operations / _best(chunk), layers * PAST * per_token / _best(token)


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls: other programs only ever make one slower."""
    work()
    best, begun = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - begun > SECONDS:
            return best


def _file() -> Path:
    return cache_folder() / "rates.json"


def _all() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(shape: Shape, dtype: str, threads: int) -> str:
    proxy = narrowed(shape)
    sizes = (proxy.hidden, proxy.mlp, proxy.heads, proxy.kv_heads, proxy.head_dim)
    return f"{VERSION} {sizes} {dtype} {threads} of {os.cpu_count()} {torch.__version__}"
