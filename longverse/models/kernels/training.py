"""What training calls for attention over documents laid end to end, where there are AMX tiles; the kernels are in
`cpu_training.py`.

Shapes: G key/value heads, h query heads of each, H = G h, D head size, T tokens of all documents.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .amx import DEPTH, ITEM_TILES, TILE_ROWS
from .amx_training import GROUP
from .arrays import array
from .bf16 import BLOCK
from .build import team, training_kernel
from .chunk import amx_runs_here

FEW = 4  # layouts that are held: the layers of a row share one, and a long row's takes megabytes


class Layout(NamedTuple):
    """Where rows and blocks of some documents are, as in `cpu_training.py`."""

    rows: np.ndarray
    seen: np.ndarray
    blocks: np.ndarray
    documents: np.ndarray
    items: np.ndarray  # of the forward pass


def runs_here(q: Tensor) -> bool:
    """Whether the kernels take such queries."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and amx_runs_here()


@lru_cache(maxsize=FEW)
def layout(bounds: tuple[int, ...], of_head: int) -> Layout:
    """bounds: where documents begin, and T; of_head: h."""
    rows, seen, blocks, documents, items = [], [], [], [], []
    first_row = first_block = 0
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        count = (end - begin) * of_head
        padded = -(-count // GROUP) * GROUP
        whole = -(-(end - begin) // BLOCK)
        rows.append(np.r_[begin * of_head + np.arange(count), np.full(padded - count, -1)])
        seen.append(np.minimum(np.arange(padded) // of_head + 1, end - begin))
        starts = begin + BLOCK * np.arange(whole)
        blocks.append(np.stack([starts, np.minimum(BLOCK, end - starts)], 1))
        documents.append((first_row, padded, first_block, whole))
        for at in range(0, padded, ITEM_TILES * TILE_ROWS):
            items.append((at, number, first_row + at, min(ITEM_TILES * TILE_ROWS, padded - at)))
        first_row, first_block = first_row + padded, first_block + whole
    items.sort(key=lambda item: -item[0])  # those that see most first
    tables = (np.concatenate(part) for part in (rows, seen, blocks))
    return Layout(*(np.asarray(x, dtype=np.int64) for x in (*tables, documents, [item[1:] for item in items])))


@lru_cache(maxsize=FEW)
def shares(bounds: tuple[int, ...], of_head: int, heads: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """`items` and `slots` of the backward pass. All blocks of all heads stand in a line, which is cut where each thread
    gets as much to do; so a thread has sums of few heads, and all threads together of heads + threads - 1 at most."""
    costs, items = [], []
    for head in range(heads):
        for number, (_, padded, _, whole) in enumerate(layout(bounds, of_head).documents):
            for block in range(int(whole)):
                costs.append(int(padded) - block * BLOCK * of_head // GROUP * GROUP + GROUP)
                items.append((head, number, block))
    middles = np.cumsum(costs) - np.array(costs) / 2
    thread = np.minimum((middles * threads / sum(costs)).astype(np.int64), threads - 1)
    slots = list(dict.fromkeys((item[0], int(own)) for item, own in zip(items, thread, strict=True)))
    places = {slot: n for n, slot in enumerate(slots)}
    dealt = [(*item, places[item[0], int(own)]) for item, own in zip(items, thread, strict=True)]
    return np.array(dealt, dtype=np.int64), np.array(slots, dtype=np.int64)


def working_bytes(tokens: int, heads: int, kv_heads: int, size: int, threads: int) -> int:
    """About what `backward` takes beside its arguments and results, at most."""
    size += -size % DEPTH
    sums = min(kv_heads + threads - 1, kv_heads * threads) * (heads // kv_heads) * 4
    return tokens * size * (sums + 8 * heads + 6 * kv_heads)


def _check(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]) -> None:
    assert amx_runs_here(), "no AMX tiles here, or nobody may use them"
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert k.shape == v.shape
    assert q.shape[0] == k.shape[0] == 1
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2:] == k.shape[2:]
    assert bounds[0] == 0 < bounds[-1] == q.shape[2]


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """q [1, H, T, D], k and v [1, G, T, D] in bfloat16: the attention of each query within its document, up to itself,
    [1, H, T, D]; and the log-sums [G, rows] that `backward` wants."""
    _check(q, k, v, bounds)
    own, down = q.shape[-1], np.float32(q.shape[-1] ** -0.5)
    q, k, v = (_by_token(x) for x in (q, k, v))
    heads, size, of_head = k.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    where, threads = layout(bounds, of_head), team(torch.get_num_threads())
    rows, blocks = len(where.rows), len(where.blocks) * BLOCK
    out, log_sums = torch.empty_like(q), torch.empty(heads, rows, dtype=torch.float32)
    threads.run(
        training_kernel(size, of_head, "attend_documents"), np.zeros(1, dtype=np.int64), *where, down,
        *map(array, (q, k, v)), _words(heads, rows, size), *(_words(heads, blocks, size) for _ in range(2)),
        array(out), array(log_sums),
    )  # fmt: skip
    return _by_head(out, own), log_sums


def backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, bounds: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes of q, k and v from that of `attend`'s result `out`, all shaped like q, k and v."""
    _check(q, k, v, bounds)
    own, down = q.shape[-1], np.float32(q.shape[-1] ** -0.5)
    slope, q, k, v, out = (_by_token(x) for x in (slope, q, k, v, out))
    heads, size, of_head = k.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    where, threads = layout(bounds, of_head), team(torch.get_num_threads())
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    rows, blocks = len(where.rows), len(where.blocks) * BLOCK
    items, slots = shares(bounds, of_head, heads, threads.size)
    sums, means = (torch.empty(n, m, dtype=torch.float32) for n, m in ((len(slots), rows * size), (heads, rows)))
    threads.run(
        training_kernel(size, of_head, "attend_backward"), *where[:4], items, slots, down,
        *map(array, (q, k, v, out, slope, log_sums)), *(_words(heads, rows, size) for _ in range(4)),
        *(_words(heads, blocks, size) for _ in range(3)), array(means), array(sums),
        *map(array, (dq, dk, dv)),
    )  # fmt: skip
    return _by_head(dq, own), _by_head(dk, own), _by_head(dv, own)


def _by_token(x: Tensor) -> Tensor:
    """[1, H, T, D] to [T, H, D], which is how projections leave it; with zeros to whole tiles."""
    x = x[0].transpose(0, 1)
    return F.pad(x, (0, -x.shape[-1] % DEPTH)) if x.shape[-1] % DEPTH else x.contiguous()


def _by_head(x: Tensor, size: int) -> Tensor:
    """What `_by_token` came from; size: D without zeros."""
    return x[..., :size].contiguous().transpose(0, 1)[None]


def _words(heads: int, rows: int, size: int) -> np.ndarray:
    """Memory for rows in bfloat16, two elements in an int32."""
    return array(torch.empty(heads, rows * size // 2, dtype=torch.int32))
