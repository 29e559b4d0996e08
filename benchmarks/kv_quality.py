"""What rounding the keys and values costs, on smol: KL and perplexity by layout, and needles of the formats we keep.

Every text is read in chunks over the cache under test, in float32 so that nothing else rounds; KL is against the full
cache, mean over the positions after the first 256. Layouts we do not keep are simulated here: what a cache holds is
rounded and restored on the spot, with the same first and newest tokens in full.

    python benchmarks/kv_quality.py [--tokens 4000] [--needles] [--lengths 1000 2000 4000] [--model smol]
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from common import table, write_results
from quant_quality import kl, texts
from torch import Tensor

from longverse.inference.engine import Engine
from longverse.models.attention import chunk_attention
from longverse.models.cache import FIRST, RECENT, KVCache
from longverse.models.packing import Packing
from longverse.models.rope import rotate

CHUNK = 512  # tokens read at once, which see each other in full: a short text must have several

SKIPPED = 256  # positions at the beginning, where nearly everything is in full


class Simulated(KVCache):
    """A full cache whose past is read through a rounding. `round_keys` and `round_values` take x [1, G, n, D] and the
    positions of its tokens; with `sealed` tokens to a group only whole groups are rounded."""

    sealed = 1
    row_bytes: tuple[float, float] = (0.0, 0.0)  # of a key and of a value of one head

    def __init__(self, *sizes: Any, round_keys: Callable[..., Tensor], round_values: Callable[..., Tensor]) -> None:
        super().__init__(*sizes)
        self.round_keys, self.round_values = round_keys, round_values
        self.rounded = [torch.empty_like(x) for x in (self.keys, self.values)]
        self.done = [0] * self.layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.length + k.shape[2]
        self.begin_pass(layer, end)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        begin, stop = self.done[layer], self.length // self.sealed * self.sealed
        if stop > begin:
            positions = torch.arange(begin, stop)
            self.rounded[0][layer, :, :, begin:stop] = self.round_keys(self.keys[layer, :, :, begin:stop], positions)
            self.rounded[1][layer, :, :, begin:stop] = self.round_values(
                self.values[layer, :, :, begin:stop], positions
            )
            self.done[layer] = stop
        seen = [x[layer, :, :, :end].clone() for x in (self.keys, self.values)]
        last = min(stop, self.length - RECENT)
        if last > FIRST:
            for whole, rounded in zip(seen, self.rounded, strict=True):
                whole[:, :, FIRST:last] = rounded[layer, :, :, FIRST:last]
        return chunk_attention(q, *seen)


def per_token(size: int, format: str, group: int, rotated: bool) -> Callable[..., Tensor]:
    packing = Packing(format, size, group)

    def through(x: Tensor, positions: Tensor) -> Tensor:
        y = packing.rotate(x) if rotated else x
        y = packing.dequantize(*packing.quantize(y), x.dtype)
        return packing.rotate(y) if rotated else y

    return through


def per_channel(engine: Engine, size: int, group: int, length: int) -> Callable[..., Tensor]:
    """Keys before RoPE, each channel of `group` tokens on a grid of its own (KIVI, Liu et al. 2024, arXiv 2402.02750,
    and KVQuant, Hooper et al. 2024, arXiv 2401.18079)."""
    packing = Packing("int4", group, group)
    rotary = engine.network.model.rotary

    def through(x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = rotary(positions[None], length)
        plain = rotate(x, cos, -sin) / (cos**2 + sin**2)  # the angles turned back; a scaling of YaRN is taken out too
        grouped = plain.unflatten(2, (-1, group)).transpose(-1, -2)  # [1, G, groups, D, group]
        rounded = packing.dequantize(*packing.quantize(grouped), x.dtype)
        return rotate(rounded.transpose(-1, -2).flatten(2, 3), cos, sin)

    return through


def layouts(engine: Engine, length: int) -> dict[str, Callable[[], KVCache]]:
    """Name to a maker of caches for texts of `length` tokens."""
    shape = engine.network.config
    size = shape.head_dim
    sizes = (shape.num_layers, shape.num_kv_heads, size, length, engine.network.dtype)

    def simulated(
        keys: Callable[..., Tensor], values: Callable[..., Tensor], sealed: int, row: tuple[float, float]
    ) -> Any:
        def make() -> KVCache:
            cache = Simulated(*sizes, round_keys=keys, round_values=values)
            cache.sealed, cache.row_bytes = sealed, row
            return cache

        return make

    def token(format: str, group: int, rotated: bool) -> Any:
        way = per_token(size, format, group, rotated)
        row = float(Packing(format, size, group).bytes_per_row)
        return simulated(way, way, 1, (row, row))

    def channel(group: int) -> Any:
        values, row = per_token(size, "int4", 64, False), float(Packing("int4", size, 64).bytes_per_row)
        return simulated(per_channel(engine, size, group, length), values, group, (size / 2 + 4 * size / group, row))

    return {
        "full": lambda: KVCache(*sizes),
        "int8 (ours)": lambda: KVCache(*sizes, format="int8"),
        "int8, not rotated": token("int8", 64, False),
        "int4 (ours)": lambda: KVCache(*sizes, format="int4"),
        "int4, groups of 32": token("int4", 32, True),
        "int4, not rotated": token("int4", 64, False),
        "int4, keys before RoPE by channel, 64 tokens": channel(64),
        "int4, keys before RoPE by channel, 32 tokens": channel(32),
    }


def read(engine: Engine, cache: KVCache, ids: list[int]) -> Tensor:
    """Log probabilities [T - SKIPPED, V] of a text read in chunks over a cache."""
    found = []
    with torch.inference_mode():
        for begin in range(0, len(ids), CHUNK):
            part = ids[begin : begin + CHUNK]
            positions = torch.arange(begin, begin + len(part))[None]
            logits = engine.network(torch.tensor([part]), positions, cache.rope_length, cache.attend)
            cache.advance(len(part))
            found.append(logits[0].log_softmax(-1))
    return torch.cat(found)[SKIPPED:]


def bytes_a_token(cache: KVCache) -> float:
    if isinstance(cache, Simulated):
        return cache.layers * cache.kv_heads * sum(cache.row_bytes)
    return cache.bytes_per_token * (0.5 if cache.format == "full" else 1)  # full is bf16 in ordinary work


def needles(model: str, lengths: tuple[int, ...]) -> dict[str, float | None]:
    """Share of facts found, by format."""
    from longverse.evaluation.engine_backend import EngineBackend
    from longverse.evaluation.needle import NeedleSettings, run_needle

    engine = Engine.load(model, dtype="float32", device="cpu")
    settings = NeedleSettings(lengths=lengths)
    return {
        name: run_needle(EngineBackend(engine, "exact", name), settings).found() for name in ("full", "int8", "int4")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000, help="of each text")
    parser.add_argument("--needles", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000], help="of the needle test")
    parser.add_argument("--model", default="smol")
    parser.add_argument("--only", nargs="+", help="layouts whose names begin so; full is always there")
    options = parser.parse_args()
    engine = Engine.load(options.model, dtype="float32", device="cpu")
    documents = {name: engine.tokenizer.encode(text)[: options.tokens] for name, text in texts().items()}
    rows: dict[str, dict[str, float]] = {}
    for text, ids in documents.items():
        reference: Tensor | None = None
        for name, make in layouts(engine, len(ids)).items():
            if name != "full" and options.only and not any(name.startswith(x) for x in options.only):
                continue
            cache = make()
            found = read(engine, cache, ids)
            reference = found if reference is None else reference
            row = rows.setdefault(name, {"bytes a token": bytes_a_token(cache)})
            row[f"KL {text}"] = kl(reference, found)
            targets = torch.tensor(ids[SKIPPED + 1 :])
            row[f"perplexity {text}"] = math.exp(float(torch.nn.functional.nll_loss(found[:-1], targets)))
    found_facts = needles(options.model, tuple(options.lengths)) if options.needles else {}
    header = ["layout", *next(iter(rows.values())), *(["facts found"] if found_facts else [])]
    lines = []
    for name, row in rows.items():
        cells = [
            f"{value:,.0f}" if "bytes" in key else f"{value:.5f}" if "KL" in key else f"{value:.3f}"
            for key, value in row.items()
        ]
        share = found_facts.get(name.split(" ")[0]) if "ours" in name or name == "full" else None
        lines.append([name, *cells, *(["–" if share is None else f"{share:.0%}"] if found_facts else [])])
    print(table(header, lines))
    results = {"model": options.model, "tokens": {name: len(ids) for name, ids in documents.items()}}
    print(write_results("kv_quality", {**results, "layouts": rows, "facts_found": found_facts}))


if __name__ == "__main__":
    main()
