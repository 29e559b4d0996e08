"""What a cache and an engine call for one new token on a CPU: they hold the arrays, the kernels do the rest.

Shapes as in `cpu_decode.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .arrays import LAYOUTS, array
from .build import CacheForm, attention_kernel, stretches, team

if TYPE_CHECKING:
    from ..cache import KVCache
    from ..sparse import Sparse

EACH = 4.0  # times its even share of what may be left out is the most that a single page may weigh


class OneQuery:
    """Attention of one token over one cache. Make it with `of`, which gives None where no kernel fits."""

    def __init__(self, cache: KVCache, form: CacheForm) -> None:
        self.form = form
        self.parts = cache_arrays(cache)
        self.team = team(torch.get_num_threads())
        count = stretches(cache.kv_heads, self.team.size)
        self.partial = np.empty((cache.kv_heads, count, form.heads, form.size + 3), dtype=np.float32)

    @classmethod
    def of(cls, cache: KVCache, heads: int) -> OneQuery | None:
        """For queries of `heads` heads."""
        form = cache_form(cache, heads)
        return None if form is None else cls(cache, form)

    def attend(self, layer: int, q: Tensor, spans: tuple[int, int, int], sparse: Sparse | None = None) -> Tensor:
        """q [1, H, 1, D] after RoPE over the tokens of `layer`, the last of which is its own; returns [1, H, 1, D].
        sparse: values that weigh next to nothing are left out, and it is told how much."""
        queries = np.ascontiguousarray(q[0, :, 0].float().numpy())
        out = np.empty(queries.size, dtype=np.float32)
        kernel = attention_kernel(replace(self.form, sparse=sparse is not None))
        budget, lost = budget_of(sparse), np.zeros(len(self.partial))
        self.team.run(kernel, queries, layer, np.array(spans), budget, lost, self.parts, self.partial, out)
        if sparse is not None:
            sparse.count_written(lost.sum(), lost.size)
        return torch.from_numpy(out).view(q.shape).to(q.dtype)


def budget_of(sparse: Sparse | None) -> np.ndarray:
    """float32 [2] as `cpu_decode.py` reads it."""
    return np.array((1 - sparse.mass if sparse is not None else 0.0, EACH), dtype=np.float32)


def cache_form(cache: KVCache, heads: int) -> CacheForm | None:
    """What the kernels for one query need to know of a cache; None where they do not fit it."""
    kept = LAYOUTS.get(cache.kept)
    if kept is None or cache.device.type != "cpu":
        return None
    packed: dict[str, Any] = {}
    if cache.packing is not None:
        packed = {"packed": cache.format, "group": cache.packing.group, "rotated": cache.packing.rotation}
    form = CacheForm(cache.head_dim, heads // cache.kv_heads, kept, **packed)
    return form if form.runs else None


def cache_arrays(cache: KVCache) -> tuple[np.ndarray, ...]:
    """The arrays of a cache in the kernels' order, [layers * G, tokens, ...]; empty ones where it has none."""
    storage = cache.storage()

    def part(name: str) -> np.ndarray:
        if name not in storage:
            return np.empty((1, 1, 0), dtype=like(name))
        whole = array(storage[name])
        return whole.reshape(whole.shape[0] * whole.shape[2], whole.shape[3], -1)

    def like(name: str) -> Any:
        return np.uint16 if "scales" in name else array(storage["keys"]).dtype

    names = (
        "keys",
        "key_scales",
        "values",
        "value_scales",
        "first_keys",
        "first_values",
        "recent_keys",
        "recent_values",
    )
    return tuple(part(name) for name in names)
