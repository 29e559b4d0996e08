"""Causal attention for training on CPU in bfloat16, forward and backward.

Shapes: H query heads, G key/value heads, g = H / G, T tokens, D head size, n of a document, b queries of a block.

`tile_attention` is for processors with AMX tiles and calls a kernel for all documents at once. `causal_attention` is
for the others, and what the kernel is compared with; it is built from matrix products.

Processors with bfloat16 instructions but without tiles multiply matrices faster than torch's CPU flash kernel attends.
So in `causal_attention` a block of b queries of the g heads that share a key is one matrix [g * b, D];
its scores against all earlier keys [g * b, end] stay in the processor's cache, and softmax and both products run over
them at once. Scores are held in bfloat16, as transformers' eager attention holds them; sums are float32. The backward
pass computes the scores anew (Dao et al. 2022, arXiv 2205.14135, without its inner blocks over keys).

Blocks are dealt to as many threads as torch has, each of which computes alone. Which block adds to which sum, and in
what order, is fixed, so a result is the same bit for bit every time.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longverse.models.checkpoint import cpu_has_bfloat16
from longverse.models.kernels import bfloat16_runs_here

ROWS = 384  # g * b: rows of one block of scores
PARTS = 2  # each document and key/value head is dealt out in so many parts


def fast_here(q: Tensor) -> bool:
    """Whether these paths beat the flash kernel: bfloat16 on a processor that multiplies it. Where that has AMX only
    the tiles do: torch's own calls use them too."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not cpu_has_bfloat16():
        return False
    return tiles_here(q) or not torch.cpu._is_amx_tile_supported()


def fastest_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int]) -> Tensor:
    """The faster of the two here, where `fast_here`. Arguments and result as in `causal_attention`."""
    if tiles_here(q):
        return tile_attention(q, k, v, list(bounds))[0]  # type: ignore[no-any-return]
    return causal_attention(q, k, v, list(bounds))  # type: ignore[no-any-return]


def tiles_here(q: Tensor) -> bool:
    """Whether `tile_attention` takes such queries. What it needs is imported only where it may."""
    if not bfloat16_runs_here():
        return False
    from longverse.models.kernels import training

    return training.runs_here(q)


def tile_bytes(tokens: int, heads: int, kv_heads: int, size: int) -> int:
    """What the backward pass of `tile_attention` takes for a row of so many tokens, beside what autograd keeps."""
    from longverse.models.kernels import training

    return training.working_bytes(tokens, heads, kv_heads, size, torch.get_num_threads())


@torch.library.custom_op("longverse::tile_attention", mutates_args=())
def tile_attention(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
    """As `causal_attention`; beside the result the log-sums of all rows, from which the backward pass makes the weights
    anew."""
    from longverse.models.kernels import training

    return training.attend(q, k, v, tuple(bounds))


@tile_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
    from longverse.models.kernels import training

    rows = len(training.layout(tuple(bounds), q.shape[1] // k.shape[1]).rows)
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2), q.new_empty(
        k.shape[1], rows, dtype=torch.float32
    )


@torch.library.custom_op("longverse::tile_attention_backward", mutates_args=())
def tile_attention_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, bounds: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the result `out`, all shaped like q, k and v."""
    from longverse.models.kernels import training

    return training.backward(slope, q, k, v, out, log_sums, tuple(bounds))


@tile_attention_backward.register_fake
def _(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, bounds: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _keep_tiles(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.bounds = inputs[3]
    ctx.mark_non_differentiable(output[1])


def _tiles_backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, out, log_sums = ctx.saved_tensors
    return (*tile_attention_backward(slope, q, k, v, out, log_sums, ctx.bounds), None)


tile_attention.register_autograd(_tiles_backward, setup_context=_keep_tiles)


@torch.library.custom_op("longverse::causal_attention", mutates_args=())
def causal_attention(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    """q [1, H, T, D], k and v [1, G, T, D], all bfloat16; bounds: where documents begin, and T. Each query sees its own
    document up to itself. Returns [1, H, T, D]. Differentiable; an operator of torch's, so that activation
    checkpointing can keep its result."""
    qg, heads = _grouped(q, k), k.shape[1]
    out = torch.empty_like(qg)  # [G, g, T, D]

    def task(begin: int, end: int, head: int, part: int) -> None:
        kh, vh = k[0, head, begin:end], v[0, head, begin:end]  # [n, D]
        buffer = q.new_empty(ROWS * (end - begin))
        for first, last in _blocks(end - begin, qg.shape[1], part):
            queries = qg[head, :, begin + first : begin + last].flatten(0, 1)  # [g * b, D]
            weights = _weights(queries, kh[:last], first, buffer)  # [g * b, last]
            out[head, :, begin + first : begin + last] = (weights @ vh[:last]).unflatten(0, (qg.shape[1], -1))

    _deal(task, bounds, heads)
    return out.view(q.shape)


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("longverse::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the result, all shaped like q, k and v."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    qg, sg = _grouped(q, k), _shaped(slope, k)  # [G, g, T, D]
    dq = torch.empty_like(qg)
    dk = torch.zeros(PARTS, *k.shape[1:], dtype=torch.float32)  # [PARTS, G, T, D]
    dv = torch.zeros_like(dk)

    def task(begin: int, end: int, head: int, part: int) -> None:
        kh, vh = k[0, head, begin:end], v[0, head, begin:end]  # [n, D]
        buffers = q.new_empty(2, ROWS * (end - begin))
        for first, last in _blocks(end - begin, group, part):
            queries = qg[head, :, begin + first : begin + last].flatten(0, 1)  # [g * b, D]
            slopes = sg[head, :, begin + first : begin + last].flatten(0, 1)
            weights = _weights(queries, kh[:last], first, buffers[0])  # [g * b, last]
            dv[part, head, begin : begin + last] += weights.T @ slopes
            d_weights = buffers[1, : weights.numel()].view(weights.shape)
            torch.mm(slopes, vh[:last].T, out=d_weights)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dq[head, :, begin + first : begin + last] = (d_scores @ kh[:last]).unflatten(0, (group, -1))
            dk[part, head, begin : begin + last] += d_scores.T @ queries

    _deal(task, bounds, heads)
    return (dq * q.shape[-1] ** -0.5).view(q.shape), dk.sum(0)[None].to(k.dtype), dv.sum(0)[None].to(v.dtype)


@causal_attention_backward.register_fake
def _(slope: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.bounds = inputs[3]


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v = ctx.saved_tensors
    return (*causal_attention_backward(slope.contiguous(), q, k, v, ctx.bounds), None)


causal_attention.register_autograd(_backward, setup_context=_keep)


def _shaped(x: Tensor, k: Tensor) -> Tensor:
    """[1, H, T, D] -> [G, g, T, D]."""
    return x[0].unflatten(0, (k.shape[1], -1)).contiguous()


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """The same, scaled by 1 / sqrt(D)."""
    return _shaped(q * q.shape[-1] ** -0.5, k)


def _blocks(tokens: int, group: int, part: int) -> list[tuple[int, int]]:
    """The query blocks of one part: every PARTS-th, so that parts cost alike."""
    size = max(1, ROWS // group)
    starts = range(part * size, tokens, PARTS * size)
    return [(first, min(first + size, tokens)) for first in starts]


def _weights(queries: Tensor, keys: Tensor, first: int, buffer: Tensor) -> Tensor:
    """softmax over the keys each query may see. queries [g * b, D] stand at `first` and after; keys [last, D]."""
    last, rows = len(keys), len(queries)
    scores = torch.mm(queries, keys.T, out=buffer[: rows * last].view(rows, last))
    own = scores.view(-1, last - first, last)[:, :, first:]  # [g, b, b]
    own.masked_fill_(_future(last - first), float("-inf"))
    return torch.softmax(scores, -1)


@lru_cache(maxsize=64)
def _future(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def _deal(task: Callable[[int, int, int, int], None], bounds: list[int], heads: int) -> None:
    """Run the task for every document, head and part. More threads than one: each takes tasks, the dearest first."""
    tasks = [
        (begin, end, head, part)
        for begin, end in itertools.pairwise(bounds)
        for head in range(heads)
        for part in range(PARTS)
    ]
    tasks.sort(key=lambda t: t[0] - t[1])
    threads = torch.get_num_threads()
    with torch.no_grad():
        if threads == 1:
            for each in tasks:
                task(*each)
            return
        grad_free = torch.no_grad()(task)
        for done in [_threads(threads).submit(grad_free, *each) for each in tasks]:
            done.result()


@lru_cache(maxsize=4)
def _threads(number: int) -> ThreadPoolExecutor:
    """Threads in each of which torch computes alone. torch.set_num_threads speaks for its own thread, but leaves a mark
    that new threads and MKL take up; so all are started at once, and the number is set back."""
    started = threading.Barrier(number + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(number, "attention", initializer=alone)
    for _ in range(number):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(number)
    return pool
