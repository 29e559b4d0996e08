"""The inner loop of attention over many queries in float32, for any processor: what `bf16.py` is for bfloat16.

Both products add up vectors times single numbers in registers: GROUP_ROWS queries by 16 keys, then as many by
16 elements of values. So many sums hide the time that one takes, and with what is multiplied they fill AVX's sixteen
registers; AVX-512, whose registers hold a vector each, takes two vectors of keys at once. A tile's groups follow one
another over the same keys, which then lie in the first cache.

Shapes: D head size (a multiple of 16); a tile is TILE_ROWS queries against a block of BLOCK keys.

    queries  float32 [rows, D]
    keys     a block is float32 [D, BLOCK]
    values   a block is float32 [BLOCK, D]
    acc      float32 [rows, D]; top has one float32 a row, total LANES
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils

from .bf16 import BLOCK, begin_tiles, end_tiles, largest_score, seen_keys
from .vectors import (
    F32,
    I64,
    LANES,
    LOWEST,
    VF,
    all_literal,
    data_of,
    exp2,
    filled,
    fma,
    intrinsic,
    larger,
    load_vector,
    pointer_to,
    row_stride_of,
    scratch,
    splat,
    sum_of_all,
    variable,
)  # fmt: skip

__all__ = ["BLOCK", "ITEM_TILES", "TILE_ROWS", "attend_tile", "begin_tiles", "end_tiles", "weigh_tile"]

GROUP_ROWS = 6
TILE_ROWS = 4 * GROUP_ROWS
ITEM_TILES = 4  # as bf16.ITEM_TILES
WIDE = 2 if get_host_cpu_features().get("avx512f") else 1  # vectors of keys at once


@intrinsic(prefer_literal=True)
def attend_tile(
    typing: Any, size: Any, masked: Any, scale: Any, queries: Any, row: Any, keys: Any, values: Any, block: Any,
    limits: Any, top: Any, total: Any, acc: Any,
) -> Any:  # fmt: skip
    """Fold one block of keys into the running softmax of TILE_ROWS queries from `row` on: as bf16.attend_tile."""
    if not all_literal(size, masked):
        return None
    size_, masked_ = size.literal_value, bool(masked.literal_value)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        queries, keys, values = (data_of(context, b, signature, args, n) for n in (3, 5, 6))
        limits, top, total, acc = (data_of(context, b, signature, args, n) for n in (8, 9, 10, 11))
        weights, factors = scratch(b, F32, TILE_ROWS * BLOCK), scratch(b, F32, TILE_ROWS)
        row, start = args[4], b.mul(args[7], I64(size_ * BLOCK))
        first_query = b.gep(b.bitcast(queries, F32.as_pointer()), [b.mul(row, I64(size_))])
        _products(b, first_query, size_, b.gep(b.bitcast(keys, F32.as_pointer()), [start]), BLOCK, weights, None)
        scale = splat(b, args[2])
        zero = filled(0.0)
        with cgutils.for_range(b, I64(TILE_ROWS), intp=I64) as loop:
            r, places = b.add(row, loop.index), _row_of_weights(b, weights, loop.index)
            scores = [b.fmul(b.load(place, align=4), scale, ("fast",)) for place in places]
            seen = seen_keys(b, limits, loop.index) if masked_ else []
            if masked_:
                scores = [b.select(see, score, LOWEST) for see, score in zip(seen, scores, strict=True)]
            before = b.load(b.gep(top, [r]))
            now = larger(b, largest_score(b, scores), before)
            b.store(now, b.gep(top, [r]))
            factor, shift, added = exp2(b, splat(b, b.fsub(before, now))), splat(b, now), zero
            for j, (score, place) in enumerate(zip(scores, places, strict=True)):
                weight = exp2(b, b.fsub(score, shift))
                if masked_:
                    weight = b.select(seen[j], weight, zero)
                added = b.fadd(added, weight, ("fast",))
                b.store(weight, place, align=4)
            place = pointer_to(b, total, b.mul(r, I64(LANES)), VF)
            b.store(fma(b, b.load(place, align=4), factor, added), place, align=4)
            b.store(b.extract_element(factor, I64(0)), b.gep(factors, [loop.index]))
        first_sum = b.gep(acc, [b.mul(row, I64(size_))])
        _products(b, weights, BLOCK, b.gep(b.bitcast(values, F32.as_pointer()), [start]), size_, first_sum, factors)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(size, masked, types.float32, queries, i64, keys, values, i64, limits, top, total, acc), emit


@intrinsic(prefer_literal=True)
def weigh_tile(
    typing: Any, size: Any, masked: Any, scale: Any, queries: Any, row: Any, keys: Any, block: Any, limits: Any,
    top: Any, total: Any, column: Any,
) -> Any:  # fmt: skip
    """How much one block of keys weighs for each of TILE_ROWS queries, values apart: as bf16.weigh_tile."""
    if not all_literal(size, masked):
        return None
    size_, masked_ = size.literal_value, bool(masked.literal_value)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        queries, keys, limits, top, total = (data_of(context, b, signature, args, n) for n in (3, 5, 7, 8, 9))
        stride = row_stride_of(context, b, signature, args, 8)
        scores_of = scratch(b, F32, TILE_ROWS * BLOCK)
        start = b.mul(args[6], I64(size_ * BLOCK))
        first_query = b.gep(b.bitcast(queries, F32.as_pointer()), [b.mul(args[4], I64(size_))])
        _products(b, first_query, size_, b.gep(b.bitcast(keys, F32.as_pointer()), [start]), BLOCK, scores_of, None)
        scale = splat(b, args[2])
        with cgutils.for_range(b, I64(TILE_ROWS), intp=I64) as loop:
            places = _row_of_weights(b, scores_of, loop.index)
            scores = [b.fmul(b.load(place, align=4), scale, ("fast",)) for place in places]
            seen = seen_keys(b, limits, loop.index) if masked_ else []
            if masked_:
                scores = [b.select(see, score, LOWEST) for see, score in zip(seen, scores, strict=True)]
            highest = largest_score(b, scores)
            shift, added = splat(b, highest), filled(0.0)
            for j, score in enumerate(scores):
                weight = exp2(b, b.fsub(score, shift))
                if masked_:
                    weight = b.select(seen[j], weight, filled(0.0))
                added = b.fadd(added, weight, ("fast",))
            at = b.add(b.mul(b.add(args[4], loop.index), stride), args[10])
            b.store(highest, b.gep(top, [at]))
            b.store(sum_of_all(b, added), b.gep(total, [at]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(size, masked, types.float32, queries, i64, keys, i64, limits, top, total, i64), emit


def _products(b: ir.IRBuilder, x: Any, depth: int, y: Any, width: int, out: Any, factors: Any) -> None:
    """out = x y of x [TILE_ROWS, depth] and y [depth, width]; with factors [TILE_ROWS], out's rows times those more."""
    step = WIDE * LANES if width % (WIDE * LANES) == 0 else LANES
    with cgutils.for_range(b, I64(width // step), intp=I64) as column:
        first = b.mul(column.index, I64(step))
        with cgutils.for_range(b, I64(TILE_ROWS // GROUP_ROWS), intp=I64) as group:
            rows = [b.add(b.mul(group.index, I64(GROUP_ROWS)), I64(r)) for r in range(GROUP_ROWS)]
            begins = [b.add(b.mul(row, I64(width)), first) for row in rows]
            places = [[pointer_to(b, out, b.add(at, I64(j)), VF) for j in range(0, step, LANES)] for at in begins]
            sums = []
            for row, of_row in zip(rows, places, strict=True):
                if factors is None:
                    sums.append([variable(b, filled(0.0)) for _ in of_row])
                else:
                    factor = splat(b, b.load(b.gep(factors, [row])))
                    sums.append([variable(b, b.fmul(b.load(p, align=4), factor, ("fast",))) for p in of_row])
            starts = [b.mul(row, I64(depth)) for row in rows]
            with cgutils.for_range(b, I64(depth), intp=I64) as loop:
                at = b.add(b.mul(loop.index, I64(width)), first)
                right = [load_vector(b, y, b.add(at, I64(j)), VF) for j in range(0, step, LANES)]
                for start, slots in zip(starts, sums, strict=True):
                    left = splat(b, b.load(b.gep(x, [b.add(start, loop.index)])))
                    for slot, vector in zip(slots, right, strict=True):
                        b.store(fma(b, left, vector, b.load(slot)), slot)
            for of_row, slots in zip(places, sums, strict=True):
                for place, slot in zip(of_row, slots, strict=True):
                    b.store(b.load(slot), place, align=4)


def _row_of_weights(b: ir.IRBuilder, area: Any, row: Any) -> list[Any]:
    """Where the vectors of one row of [TILE_ROWS, BLOCK] lie."""
    start = b.mul(row, I64(BLOCK))
    return [pointer_to(b, area, b.add(start, I64(j)), VF) for j in range(0, BLOCK, LANES)]
