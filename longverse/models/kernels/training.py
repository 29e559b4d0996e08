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

from .arrays import array
from .build import team, training_kernel
from .chunk import amx_runs_here

DEPTH = 32  # as amx.DEPTH


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


@lru_cache(maxsize=64)
def layout(bounds: tuple[int, ...], of_head: int) -> Layout:
    """bounds: where documents begin, and T; of_head: h."""
    from .amx import ITEM_TILES, TILE_ROWS
    from .amx_training import GROUP
    from .bf16 import BLOCK

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


@lru_cache(maxsize=64)
def shares(bounds: tuple[int, ...], of_head: int, threads: int) -> np.ndarray:
    """int64 [blocks, 3]: document, block of it, and the thread that adds up what its keys get. The dearest are dealt
    first, each to the thread that has least."""
    from .amx_training import GROUP
    from .bf16 import BLOCK

    items = []
    for number, (_, padded, _, whole) in enumerate(layout(bounds, of_head).documents):
        for block in range(whole):
            items.append([int(padded - block * BLOCK * of_head // GROUP * GROUP), number, block])
    items.sort(key=lambda item: (-item[0], item[1:]))
    loads, dealt = [0] * threads, []
    for cost, number, block in items:
        thread = loads.index(min(loads))
        loads[thread] += cost + GROUP
        dealt.append((number, block, thread))
    return np.array(dealt, dtype=np.int64)


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """q [1, H, T, D], k and v [1, G, T, D] in bfloat16: the attention of each query within its document, up to itself,
    [1, H, T, D]; and the log-sums [G, rows] that `backward` wants."""
    from .bf16 import BLOCK

    own, down = q.shape[-1], np.float32(q.shape[-1] ** -0.5)
    q, k, v = (_by_token(x) for x in (q, k, v))
    heads, size, of_head = k.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    where, threads = layout(bounds, of_head), team(torch.get_num_threads())
    rows, blocks = len(where.rows), len(where.blocks) * BLOCK
    out, log_sums = torch.empty_like(q), torch.empty(heads, rows)
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
    from .bf16 import BLOCK

    own, down = q.shape[-1], np.float32(q.shape[-1] ** -0.5)
    slope, q, k, v, out = (_by_token(x) for x in (slope, q, k, v, out))
    heads, size, of_head = k.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    where, threads = layout(bounds, of_head), team(torch.get_num_threads())
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    rows, blocks = len(where.rows), len(where.blocks) * BLOCK
    sums = torch.empty(threads.size, heads, rows * size)
    threads.run(
        training_kernel(size, of_head, "attend_backward"), *where[:4], shares(bounds, of_head, threads.size), down,
        *map(array, (q, k, v, out, slope, log_sums)), *(_words(heads, rows, size) for _ in range(4)),
        *(_words(heads, blocks, size) for _ in range(3)), array(torch.empty(heads, rows)), array(sums),
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
