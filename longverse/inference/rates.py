"""How fast this machine is with networks of a shape: the rates a plan divides by (plan.py).

A few layers of the shape are made with random weights and run by the very code that will run the model: a chunk of a
prompt through the layers, its attention over a past, and single tokens after a short and after a long past. Layers
wider than WIDEST are made narrower in proportion, since their rates no longer depend on the width.

Only the figures that are asked for are measured, each once: about two seconds for those of one answer on an idle
machine, and the time that compiled kernels need at their very first use. They are kept in the cache folder under all
that they depend on. What a busy machine gives is used and not kept; after LIMIT seconds those still lacking are left
out, but for the first of each kind.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..models import kernels
from ..models.cache import FORMATS, KVCache
from ..models.network import CausalLM, NetworkConfig
from ..models.places import cache_folder
from ..models.quant_linear import quantize_network
from ..models.rope import RopePlan
from ..models.shards import write_json
from ..plan import CHUNK, ROUNDED, Rates, Shape

VERSION = 6  # of the kernels' speed: rates that slower ones gave are measured anew
WIDEST = 2048  # hidden size
PAST = 8192  # tokens attended over
AT_LEAST = 64 << 20  # bytes of weights and of cache, so that they come from memory and not from the processor's caches
SECONDS = 0.15  # a figure
LIMIT = 8.0  # seconds for all
BUSY = 0.7  # share of its threads' time below which other programs had the rest
NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "bf16"}

Figure = tuple[str, str]  # kind (linear, attention, weights, cache) and format


def all_figures(dtype: torch.dtype) -> list[Figure]:
    """What a whole plan asks for, the most important first."""
    native = NAMES[dtype]
    figures: list[Figure] = [("linear", native), ("attention", "full"), ("weights", ROUNDED[0]), ("cache", "full")]
    figures += [(kind, form) for form in FORMATS[1:] for kind in ("attention", "cache")]
    figures += [(kind, form) for form in ("int8", "int4") for kind in ("linear", "weights")]
    return [*figures, ("weights", native)]


def rates_for(
    shape: Shape, dtype: torch.dtype, wanted: Iterable[Figure], *, measure: bool = True, again: bool = False
) -> Rates:
    """Rates of this machine's CPU for a shape that runs in `dtype`; full caches are measured in bfloat16.

    wanted   figures that are measured when they are not known yet, unless `measure` is off
    again    measure them though they are known
    """
    threads = torch.get_num_threads()
    key = _key(shape, dtype, threads)
    known: dict[str, float] = {} if again else dict(_all().get(key, {}))
    lacking = [figure for figure in wanted if " ".join(figure) not in known]
    if lacking and measure:
        found, idle = measure_figures(shape, dtype, lacking)
        known |= {" ".join(figure): rate for figure, rate in found.items()}
        if idle and found:
            _keep(key, known)
    kinds: dict[str, dict[str, float]] = {"linear": {}, "attention": {}, "weights": {}, "cache": {}}
    for name, rate in known.items():
        kind, _, form = name.partition(" ")
        kinds[kind][form] = rate
    device = f"this CPU ({threads} thread{'s' if threads > 1 else ''})"
    return Rates(device, kinds["linear"], kinds["attention"], kinds["weights"], kinds["cache"])


def measure_figures(shape: Shape, dtype: torch.dtype, wanted: list[Figure]) -> tuple[dict[Figure, float], bool]:
    """Measure now: what was found, and whether the machine was idle enough to believe it. A figure that does not exist
    here (sizes that no kernel and no group fits) is left out."""
    bench = _Bench(narrowed(shape), dtype)
    found: dict[Figure, float] = {}
    begun = time.monotonic()
    with torch.inference_mode():
        for kind, form in wanted:
            if time.monotonic() - begun > LIMIT and any(kind == known for known, _ in found):
                continue
            rate = getattr(bench, kind)(form)
            if rate is not None:
                found[kind, form] = rate
    return found, bench.share() >= BUSY


def narrowed(shape: Shape) -> Shape:
    """The same proportions at a hidden size of at most WIDEST, with as many layers as AT_LEAST asks for."""
    scale = max(1.0, shape.hidden / WIDEST)
    group = shape.heads // shape.kv_heads
    kv_heads = max(1, round(shape.kv_heads / scale))

    def rounded(size: float) -> int:
        return max(64, round(size / scale / 64) * 64)

    if scale > 1:
        shape = replace(shape, hidden=rounded(shape.hidden), mlp=rounded(shape.mlp))
    shape = replace(shape, kv_heads=kv_heads, heads=kv_heads * group, vocab=64)
    return replace(shape, layers=max(1, min(16, AT_LEAST // shape.layer_weights)))


class _Bench:
    """A network of random weights; each method named after a kind of figure measures one."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.networks: dict[str, CausalLM | None] = {}
        self.worked = self.passed = 0.0

    def share(self) -> float:
        """Of the processor's time that all threads could have had while operations ran that use all of them."""
        return self.worked / (self.passed * torch.get_num_threads()) if self.passed else 1.0

    def network(self, form: str) -> CausalLM | None:
        """In a format of weights; None where the sizes do not fit it."""
        if form not in self.networks:
            shape = self.shape
            config = NetworkConfig(
                shape.vocab, shape.hidden, shape.mlp, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, 1e-5,
                shape.window, RopePlan("default", 10_000.0, shape.head_dim),
            )  # fmt: skip
            made: CausalLM | None = CausalLM(config).to(self.dtype).requires_grad_(False).eval()
            if form in ("int8", "int4") and made is not None and quantize_network(made, int(form[3:])):
                made = None
            self.networks[form] = made
        return self.networks[form]

    def linear(self, form: str) -> float | None:
        """Operations a second of a chunk through the layers, with all that comes with it but the attention over a past:
        norms, gates, writing into a cache, the chunk's look at itself."""
        network = self.network(form)
        if network is None:
            return None
        chunk = torch.randn(1, CHUNK, self.shape.hidden).to(self.dtype)
        positions, cache = torch.arange(CHUNK)[None], self._cache("full", self.shape.layers)

        def forward() -> None:
            cache.restore(0)
            network.model(chunk, positions, CHUNK, cache.attend)

        seconds = _typical(forward)
        self._watch(chunk[0])
        return 2.0 * self.shape.layers * self.shape.layer_weights * CHUNK / seconds

    def _watch(self, chunk: Tensor) -> None:
        """Notice how much of the processor this process gets, by products, which use all threads all the time."""
        matrix = torch.randn(self.shape.hidden, self.shape.mlp).to(self.dtype)
        worked, passed = time.process_time(), time.perf_counter()
        _typical(lambda: chunk @ matrix)
        self.worked += time.process_time() - worked
        self.passed += time.perf_counter() - passed

    def attention(self, form: str) -> float | None:
        """Operations a second of a chunk's attention over PAST tokens."""
        if form not in FORMATS:
            return None
        shape, cache = self.shape, self._cache(form, layers=1)
        q = torch.randn(1, shape.heads, CHUNK, shape.head_dim).to(self.dtype)
        k = torch.randn(1, shape.kv_heads, CHUNK, shape.head_dim).to(self.dtype)

        def chunk() -> None:
            cache.restore(PAST)
            cache.attend(0, q, k, k)

        pairs = CHUNK * PAST + CHUNK * (CHUNK + 1) / 2
        return 4.0 * shape.heads * shape.head_dim * pairs / _typical(chunk)

    def weights(self, form: str) -> float | None:
        """Bytes of weights a second while one token is written."""
        seconds = self._token(form, "full", 16)
        return None if seconds is None else self.shape.read_bytes(form) / seconds

    def cache(self, form: str) -> float | None:
        """Bytes of a cache a second while one token is written."""
        if form not in FORMATS:
            return None
        weights = ROUNDED[0] if self._token(ROUNDED[0], form, 16) is not None else NAMES[self.dtype]
        short, long = (self._token(weights, form, length) for length in (16, PAST))
        assert short is not None
        assert long is not None
        size = (PAST - 16) * self.shape.cache_bytes_per_token(form)
        return size / max(long - short, 0.02 * long)

    def _token(self, form: str, cache_format: str, length: int) -> float | None:
        """Seconds of one token after `length` others; None where nothing runs it."""
        network = self.network(form if form in ("int8", "int4") else NAMES[self.dtype])
        if network is None:
            return None
        decoder = None
        if not kernels.unavailable() and form not in ("int8", "int4"):
            from ..models.kernels.decoder import Decoder

            decoder = Decoder.of(network, form.removeprefix("rounded ") if form in ROUNDED else "full")
        if decoder is None and form in ROUNDED:
            return None
        cache = self._cache(cache_format, self.shape.layers)
        token, position = torch.tensor([[5]]), torch.tensor([[length]])

        def step() -> None:
            cache.restore(length)
            if decoder is None or decoder.step(5, cache) is None:
                network.lm_head(network.model(token, position, cache.rope_length, cache.attend))

        return _typical(step)

    def _cache(self, form: str, layers: int) -> KVCache:
        shape = self.shape
        cache = KVCache(
            layers, shape.kv_heads, shape.head_dim, PAST + CHUNK, self.dtype, format=form, kept=torch.bfloat16
        )
        cache.expect(cache.capacity)
        for array in cache.storage().values():
            if array.is_floating_point():
                array.normal_(std=0.02)
            elif array.dtype != torch.int64:
                array.random_(0, 100)
        return cache


def _typical(work: Callable[[], Any]) -> float:
    """Seconds of a call, the median of several: a plan is for runs as they usually go, not for the luckiest one."""
    work()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < SECONDS:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
        if sum(taken) > 5 * SECONDS:
            break
    return median(taken)


# ---- kept figures --------------------------------------------------------------------------------------------


def _file() -> Path:
    return cache_folder() / "rates.json"


def _all() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, figures: dict[str, float]) -> None:
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), _all() | {key: figures})
    except OSError:
        pass  # a folder that cannot be written only means measuring again


def _key(shape: Shape, dtype: torch.dtype, threads: int) -> str:
    proxy = narrowed(shape)
    sizes = (proxy.hidden, proxy.mlp, proxy.heads, proxy.kv_heads, proxy.head_dim)
    kernel = kernels.unavailable() or "compiled"
    return f"{VERSION} {sizes} {NAMES[dtype]} {threads} of {os.cpu_count()} torch {torch.__version__} {kernel}"
