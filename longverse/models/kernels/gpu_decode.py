"""One token's attention over a cache on a card: split-K in Triton, straight from the cache's own layout.

Plain torch turns a stretch of an int8 or int4 past into floating point, writes it to memory and reads it again for the
products. Here each program reads a stretch of one key/value head as it is kept, turns it into floating point in
registers, and keeps a running softmax (flash decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html); the stretches' results are joined by their log-sum-exps.

Shapes: q [1, H, 1, D]; a layer's rows [G, C, row] (C capacity, G key/value heads, R = H / G queries share one), scales
[G, C, groups] for int8 and [G, C, groups, 2] for int4, the ends kept in full [G, 64, D]; see `cache.py`, `packing.py`.
The kernel itself is `split_k.py`; the reference is `KVCache._attend_past`.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cache import FIRST, RECENT
from . import turned_off

if TYPE_CHECKING:
    from ..cache import KVCache
    from ..sparse import Sparse

BLOCK = 64  # tokens at a time
WAVES = 8  # programs for each of the card's processors
_FORMS = {"full": 0, "int8": 1, "int4": 2}
_ARRAYS = (
    "keys", "key_scales", "values", "value_scales", "first_keys", "first_values", "recent_keys", "recent_values",
)  # fmt: skip


def available() -> bool:
    """Whether Triton is installed (torch's CUDA builds bring it) and kernels are wanted."""
    return not turned_off() and find_spec("triton") is not None


class SplitK:
    """Attention of one token over one cache, for queries of H heads."""

    def __init__(self, cache: KVCache, heads: int) -> None:
        self.cache = cache
        self.group = heads // cache.kv_heads
        card = cache.device.type == "cuda"
        processors = torch.cuda.get_device_properties(cache.device).multi_processor_count if card else 4
        self.most = max(1, WAVES * processors // cache.kv_heads)  # stretches of a head
        self._layers: dict[int, list[Tensor | None]] = {}

    @classmethod
    def of(cls, cache: KVCache, heads: int) -> SplitK | None:
        """None where it cannot run, and for full caches: their own fused attention was faster on an H200
        (benchmarks/results/gpu_check.json)."""
        return cls(cache, heads) if available() and cache.packing is not None and cache.head_dim >= 16 else None

    def attend(self, layer: int, q: Tensor, spans: tuple[int, int, int], sparse: Sparse | None = None) -> Tensor:
        """q [1, H, 1, D] after RoPE over the tokens of `layer`, the last of which is its own; returns [1, H, 1, D].
        spans: `KVCache.spans`. A card leaves nothing out, whatever `sparse` allows."""
        cache, packing = self.cache, self.cache.packing
        queries = q if packing is None else packing.rotate(q)
        end, first, recent = spans
        if packing is None:  # everything is in full, in `keys` and `values`
            first, recent = 0, end
        blocks = max(1, -(-(recent - first) // BLOCK))
        per_stretch = -(-blocks // self.most) * BLOCK
        ends = packing is not None  # one program more for what is kept in full
        stretches = max(1, -(-(recent - first) // per_stretch)) + ends
        heads, size = cache.kv_heads, cache.head_dim
        mixed = torch.empty((heads, stretches, self.group, size), dtype=torch.float32, device=q.device)
        weight = torch.empty((heads, stretches, self.group), dtype=torch.float32, device=q.device)
        from .split_k import split_k

        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # Triton launches on the current card
            split_k[heads, stretches](
                queries.contiguous(), *self._arrays(layer, mixed), mixed, weight,
                end, first, recent, per_stretch, cache.capacity, size**-0.5,
                FORM=_FORMS[cache.format], SIZE=size, PADDED=_power(size), GROUP=self.group,
                ROWS=max(16, _power(self.group)), SCALED=packing.group if packing else size, BLOCK=BLOCK,
                FIRST=FIRST, RING=RECENT, EXACT=q.dtype == torch.float32,
            )  # fmt: skip
        share = torch.exp2(weight - weight.amax(1, keepdim=True))[..., None]
        share = share / share.sum(1, keepdim=True)
        out = (share * mixed).sum(1).view(q.shape).to(q.dtype)
        return out if packing is None else packing.rotate(out)

    def _arrays(self, layer: int, unused: Tensor) -> list[Tensor]:
        """A layer's arrays in the kernel's order. unused: stands for those that this format has not; no program reads
        it."""
        if layer not in self._layers:
            storage = {name: part[layer, 0] for name, part in self.cache.storage().items() if name != "recent_tokens"}
            self._layers[layer] = [storage.get(name) for name in _ARRAYS]
        return [unused if array is None else array for array in self._layers[layer]]


def _power(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
