"""Does a card compute what the references compute? Run it first on a new card: a minute.

    python benchmarks/gpu/check.py

Flash attention over the documents of a row against one call a document, with gradients; the split-K kernel for one
token against the cache's own plain torch, for the three cache formats, at a short and at a long past, with the time of
both. Writes benchmarks/results/gpu_check.json.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import table, write_results

from longverse.models.cache import KVCache
from longverse.models.kernels.gpu_decode import SplitK
from longverse.train.rows import document_attention

CARD = torch.device("cuda")


def documents(lengths: list[int]) -> dict[str, float]:
    """Largest difference of the result and of the gradients, relative to the largest value, in bfloat16."""
    torch.manual_seed(0)
    bounds = tuple(itertools.accumulate([0, *lengths]))
    shapes = ((1, 9, bounds[-1], 64), (1, 3, bounds[-1], 64), (1, 3, bounds[-1], 64))
    inputs = [torch.randn(shape, device=CARD, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    slope = torch.randn(shapes[0], device=CARD, dtype=torch.bfloat16)

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        out = attend(0, *inputs)
        out.backward(slope)
        found = [out.detach(), *(x.grad.clone() for x in inputs if x.grad is not None)]
        for x in inputs:
            x.grad = None
        return found

    def apart(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, enable_gqa=True)
            for a, b in itertools.pairwise(bounds)
        ]
        return torch.cat(parts, 2)

    together, one_by_one = run(document_attention(bounds)), run(apart)
    names = ("result", "dq", "dk", "dv")
    return {
        name: float((a - b).abs().max() / b.abs().max()) for name, a, b in zip(names, together, one_by_one, strict=True)
    }


def one_token(format: str, heads: int, kv_heads: int, size: int, past: int) -> dict[str, float]:
    """Largest relative difference between the kernel and plain torch, and the milliseconds of each."""
    torch.manual_seed(0)
    cache = KVCache(1, kv_heads, size, past + 64, torch.bfloat16, CARD, format=format)
    for begin in range(0, past, 4096):
        count = min(4096, past - begin)
        k, v = (torch.randn(1, kv_heads, count, size, device=CARD, dtype=torch.bfloat16) for _ in range(2))
        cache.attend(0, torch.randn(1, heads, count, size, device=CARD, dtype=torch.bfloat16), k, v)
        cache.advance(count)
    q = torch.randn(1, heads, 1, size, device=CARD, dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, 1, size, device=CARD, dtype=torch.bfloat16) for _ in range(2))
    kernel = SplitK(cache, heads)
    cache._kernel = lambda heads: None  # type: ignore[method-assign]
    expected = cache.attend(0, q, k, v)  # appends the token, too
    got = kernel.attend(0, q, cache.spans(past + 1))

    def plain() -> Tensor:
        """The same in torch, the token being held already."""
        if cache.packing is None:
            return cache._attend_past(0, q, past + 1)[0]
        return cache.packing.rotate(cache._attend_past(0, cache.packing.rotate(q), past + 1)[0])

    def milliseconds(work: Callable[[], Any]) -> float:
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(20):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) * 50

    return {
        "difference": float((got - expected).abs().max() / expected.abs().max()),
        "kernel_ms": milliseconds(lambda: kernel.attend(0, q, cache.spans(past + 1))),
        "torch_ms": milliseconds(plain),
    }


def main() -> None:
    found: dict[str, Any] = {"documents": {}}
    rows = []
    for lengths in ([700, 3, 1, 2048, 129], [512] * 8):
        found["documents"][str(lengths)] = differences = documents(lengths)
        rows.append([f"documents {lengths}"[:40], f"{max(differences.values()):.2e}", "", ""])
    found["one_token"] = {}
    for format in ("full", "int8", "int4"):
        for heads, kv_heads, size, past in ((9, 3, 64, 1000), (9, 3, 64, 65_536), (40, 40, 128, 65_536)):
            name = f"{format}, {heads}/{kv_heads} heads of {size}, {past:,} tokens"
            found["one_token"][name] = one = one_token(format, heads, kv_heads, size, past)
            rows.append([name, f"{one['difference']:.2e}", f"{one['kernel_ms']:.3f}", f"{one['torch_ms']:.3f}"])
    print(table(["", "difference", "kernel, ms", "torch, ms"], rows))
    print("written:", write_results("gpu_check", found))
    worst = [one["difference"] for one in found["one_token"].values()]
    worst += [value for one in found["documents"].values() for value in one.values()]
    assert max(worst) < 3e-2, "a kernel does not compute what its reference computes"


if __name__ == "__main__":
    main()
