"""What a cache calls for many new tokens on a CPU, in float32 or in bfloat16; the kernel is `cpu_prefill.py`.

Shapes: G key/value heads, h query heads of each, D head size, T new tokens after P past ones.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import sparse as sparse_module
from ..sparse import Sparse, sampled_tokens
from . import bfloat16_runs_here
from .arrays import LAYOUTS, array
from .build import CacheForm, chunk_kernel, team
from .one_token import cache_arrays, cache_form

if TYPE_CHECKING:
    from ..cache import KVCache

BUFFER = 1 << 20  # bytes of a key/value head's stretch, laid out for the kernel, which should stay in a second cache
SPARSE_BUFFER = 1 << 22  # of which few blocks are attended to, while every stretch costs a pass over all rows' sums


class Held(NamedTuple):
    """One layer of what a cache holds, as the kernels take it."""

    form: CacheForm
    parts: tuple[np.ndarray, ...]  # one_token.cache_arrays
    layer: int
    spans: tuple[int, int, int]  # tokens held, the end of the first ones in full, the beginning of the ring


@lru_cache(maxsize=1)
def amx_runs_here() -> bool:
    """Whether there are AMX tiles for bfloat16, and the system lets this process use them (it is asked here)."""
    if not (bfloat16_runs_here() and torch.cpu._is_amx_tile_supported()):
        return False
    from llvmlite.binding import get_host_cpu_features  # by which LLVM goes

    return bool(get_host_cpu_features().get("amx-bf16")) and torch.cpu._init_amx()


def attend_cache(cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor, sparse: Sparse | None = None) -> Tensor:
    """q [1, H, T, D] over the cache's tokens of `layer` and over k, v [1, G, T, D], which come after them; with
    `sparse` over the blocks of the past that it chooses.

    All in the cache's rotation. The cache's ring of newest tokens must not hold the new ones yet; its other parts may.
    """
    form = cache_form(cache, q.shape[1])
    assert form is not None
    past, first_end, recent = cache.spans(cache.length)
    return _attend(Held(form, cache_arrays(cache), layer, (past, first_end, recent)), q, k[0], v[0], sparse)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [1, H, T, D] over k, v [1, G, S, D], whose last T are the queries' own."""
    past = k.shape[2] - q.shape[2]
    k, v = k[0].contiguous(), v[0].contiguous()
    form = CacheForm(q.shape[3], q.shape[1] // k.shape[0], LAYOUTS[q.dtype])
    held = Held(form, _in_full(array(k), array(v)), 0, (past, 0, 0))
    return _attend(held, q, k[:, past:], v[:, past:])


def block_log_sums(q: Tensor, keys: Tensor, layer: int, end: int) -> Tensor:
    """Log-sum-exps of scores of q [H, T, D] against every BLOCK of the first `end` keys (whole blocks) that keys
    [layers, 1, G, tokens, D] hold of `layer`: float32 [G, h * T, blocks]."""
    layers, _, heads, _, size = keys.shape
    of_head, tokens = q.shape[0] // heads, q.shape[1]
    form = CacheForm(size, of_head, LAYOUTS[keys.dtype])
    rows = array(keys).reshape(layers * heads, -1, size)
    by_token, no_own = q.transpose(0, 1).contiguous(), q.new_empty(heads, 0, size)
    places = np.zeros(tokens * of_head, dtype=np.int64)
    top, total = _weigh(Held(form, _in_full(rows, rows), layer, (end, 0, 0)), by_token, no_own, places)
    sums = torch.from_numpy(total).log2_().add_(torch.from_numpy(top)).mul_(np.log(2))  # [G, rows, blocks]
    return sums[:, : tokens * of_head].unflatten(1, (tokens, of_head)).transpose(1, 2).flatten(1, 2)


def _in_full(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Keys and values [heads, tokens, D] as `one_token.cache_arrays` gives those of a cache in full precision."""
    none, no_scales = np.empty((1, 1, 0), dtype=keys.dtype), np.empty((1, 1, 0), dtype=np.uint16)
    return keys, no_scales, values, no_scales, none, none, none, none


def _attend(held: Held, q: Tensor, k: Tensor, v: Tensor, sparse: Sparse | None = None) -> Tensor:
    """q [1, H, T, D] over what is held and k, v [G, T, D]."""
    from .bf16 import BLOCK
    from .vectors import LANES

    assert BLOCK == sparse_module.BLOCK
    form, parts, layer, spans = held
    heads, tokens, size = k.shape
    k, v = k.contiguous(), v.contiguous()
    past, end = spans[0], spans[0] + tokens
    words = size * q.element_size() // 4  # of a key or value as the kernel has it
    buffer = BUFFER if sparse is None else SPARSE_BUFFER
    stretch = max(BLOCK, min(buffer // (8 * words), end + BLOCK - 1) // BLOCK * BLOCK)
    by_token = q[0].transpose(0, 1).contiguous()  # [T, H, D]
    kept = np.empty((0, 0, 0), dtype=np.uint8)
    if sparse is not None:
        kept = _choose(held, by_token, k, sparse)
    kind, threads = tiles_for(q), team(torch.get_num_threads())
    queries, rows = _queries(form, by_token, kind)
    out = torch.empty_like(by_token)
    top, total = torch.full((heads, rows), -3e38), torch.zeros(heads, rows * (1 if kind == "amx" else LANES))
    acc = torch.zeros(heads, rows * size)
    laid = [torch.empty(heads, stretch * words, dtype=torch.int32).numpy() for _ in range(2)]
    for begin in range(0, end, stretch):
        threads.run(
            chunk_kernel(form, kind, "fold_stretch"), np.zeros(1, dtype=np.int64), layer, begin,
            min(begin + stretch, end), past, np.array(spans), parts, array(k), array(v), kept,
            sparse_module.query_items(form.heads) * sparse_module.ITEM_ROWS, array(by_token), array(queries), *laid,
            array(top), array(total), array(acc), array(out),
        )  # fmt: skip
    return out.transpose(0, 1)[None]


def _choose(held: Held, by_token: Tensor, k: Tensor, sparse: Sparse) -> np.ndarray:
    """Which blocks of the past each query block attends to: uint8 [G, query blocks, past blocks]."""
    from .bf16 import BLOCK

    heads, tokens = k.shape[:2]
    form, past = held.form, held.spans[0]
    sampled = sampled_tokens(tokens, form.heads)  # [query blocks, samples + 1]
    count = sampled.shape[1] * form.heads
    places = sampled.flatten().repeat_interleave(form.heads).numpy()
    top, total = _weigh(held, by_token[sampled.flatten()], k, places)
    kept = np.empty((heads, sampled.shape[0], past // BLOCK), dtype=np.uint8)
    share = np.empty(kept.shape[:2], dtype=np.float64)
    kernel = chunk_kernel(form, tiles_for(by_token), "choose_blocks")
    most = sparse.limit(kept.shape[2])
    team(torch.get_num_threads()).run(kernel, past, sparse.mass, most, count, top, total, kept, share)
    sparse.count(torch.from_numpy(kept), torch.from_numpy(share))
    return kept


def _weigh(held: Held, q: Tensor, k: Tensor, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What every block of what is held and of k [G, T, D] weighs for queries q [n, H, D]: the largest scores and the
    sums of all weights beside those, float32 [G, at least n * h, blocks]. places: int64 [n * h], where in k each row
    is."""
    from .bf16 import BLOCK

    form, parts, layer, spans = held
    past, end = spans[0], spans[0] + k.shape[1]
    kind, threads = tiles_for(q), team(torch.get_num_threads())
    queries, rows = _queries(form, q, kind)
    every = np.zeros(rows, dtype=np.int64)
    every[: len(places)] = places
    top, total = (np.empty((k.shape[0], rows, -(-end // BLOCK)), dtype=np.float32) for _ in range(2))
    laid = torch.empty(threads.size, BLOCK * (queries.shape[1] // rows), dtype=torch.int32).numpy()
    threads.run(
        chunk_kernel(form, kind, "weigh_blocks"), np.zeros(1, dtype=np.int64), layer, end, past, np.array(spans), parts,
        array(k), every, array(q), array(queries), laid, top, total,
    )  # fmt: skip
    return top, total


def tiles_for(q: Tensor) -> str:
    """The kind of tiles that queries [..., D] go through: "f32", "bf16" or "amx"."""
    if q.dtype == torch.float32:
        return "f32"
    return "amx" if q.shape[-1] % 32 == 0 and amx_runs_here() else "bf16"


def _queries(form: CacheForm, by_token: Tensor, kind: str) -> tuple[Tensor, int]:
    """Memory for queries [T, H, D] as the kernel lays them out, int32 [G, rows * words], and how many rows that is."""
    from . import amx, bf16, f32

    tiles: Any = {"f32": f32, "bf16": bf16, "amx": amx}[kind]
    tile = tiles.TILE_ROWS
    assert sparse_module.ITEM_ROWS % (tiles.ITEM_TILES * tile) == 0
    tokens, heads, size = by_token.shape
    rows = -(-tokens * form.heads // tile) * tile
    words = size if kind == "f32" else size // 2
    return torch.empty(heads // form.heads, rows * words, dtype=torch.int32), rows
