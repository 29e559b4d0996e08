"""The inner loop of attention over many queries, for processors that multiply pairs of bfloat16 (AVX-512 BF16).

One instruction there multiplies 16 pairs of numbers and adds each pair's two products to a float32. torch's fused
attention on CPUs does not use it; this does, for both products, and keeps scores, softmax and sums in float32 between
them, as a fused kernel should. Processors with AMX have `amx.py`.

Shapes: D head size (a multiple of 16); a tile is TILE_ROWS queries against a block of BLOCK keys.

    queries  pairs int32 [rows, D / 2]
    keys     a block is int32 [D / 2, BLOCK]: elements 2 i and 2 i + 1 of a key in one number
    values   a block is int32 [BLOCK / 2, D]: the same element of keys 2 i and 2 i + 1 in one number
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .vectors import (
    I16,
    I32,
    I64,
    LANES,
    LOWEST,
    VF,
    VI,
    all_literal,
    data_of,
    exp2,
    fma,
    intrinsic,
    larger,
    largest_of_all,
    load_vector,
    row_stride_of,
    scratch,
    splat,
    sum_of_all,
    variable,
)  # fmt: skip

TILE_ROWS = 6  # times four vectors of keys: 24 sums in registers, and room for what is multiplied
ITEM_TILES = 8  # of rows that share the reading of a block from the processor's second cache
BLOCK = 64
VECTORS = BLOCK // LANES
VH = ir.VectorType(I16, LANES)


@intrinsic
def begin_tiles(typing: Any) -> Any:
    """What a thread does before its first tile: here nothing."""
    return types.void(), lambda context, b, signature, args: context.get_dummy_value()


@intrinsic
def end_tiles(typing: Any) -> Any:
    """What a thread does after its last tile: here nothing."""
    return types.void(), lambda context, b, signature, args: context.get_dummy_value()


@intrinsic(prefer_literal=True)
def attend_tile(
    typing: Any, size: Any, masked: Any, scale: Any, queries: Any, row: Any, keys: Any, values: Any, block: Any,
    limits: Any, top: Any, total: Any, acc: Any,
) -> Any:  # fmt: skip
    """Fold one block of keys into the running softmax of TILE_ROWS queries from `row` on.

    size, masked  constants; scale float32 of the scores, times log2(e)
    queries, keys, values  int32: blocks as above, one after another;  block: which
    limits    int32 [TILE_ROWS]: how many keys of the block each query sees, from the first on; read when masked
    top       float32 [rows], the largest score so far in powers of two; total [rows * LANES], a row's sum is
              that of the weights; acc [rows * D], the weighted values
    """
    if not all_literal(size, masked):
        return None
    size_, masked_ = size.literal_value, bool(masked.literal_value)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        queries, keys, values = (data_of(context, b, signature, args, n) for n in (3, 5, 6))
        limits, top, total, acc = (data_of(context, b, signature, args, n) for n in (8, 9, 10, 11))
        weights = scratch(b, I32, TILE_ROWS * BLOCK // 2)
        block = args[7]
        scale = splat(b, args[2])
        rows = [b.add(args[4], I64(r)) for r in range(TILE_ROWS)]
        zero = ir.Constant(VF, [0.0] * LANES)

        all_scores = _tile_scores(b, size_, scale, queries, rows, keys, block)

        # Softmax: weights, and what earlier weights must be multiplied by.
        factors = []
        for r, scores in enumerate(all_scores):
            seen = seen_keys(b, limits, I64(r)) if masked_ else []
            if masked_:
                scores = [b.select(see, score, LOWEST) for see, score in zip(seen, scores, strict=True)]
            before = b.load(b.gep(top, [rows[r]]))
            now = larger(b, largest_score(b, scores), before)
            b.store(now, b.gep(top, [rows[r]]))
            factor = exp2(b, splat(b, b.fsub(before, now)))
            factors.append(factor)
            shift = splat(b, now)
            added = None
            for j, score in enumerate(scores):
                weight = exp2(b, b.fsub(score, shift))
                if masked_:
                    weight = b.select(seen[j], weight, zero)
                added = weight if added is None else b.fadd(added, weight, ("fast",))
                bits = b.add(b.bitcast(weight, VI), ir.Constant(VI, [0x8000] * LANES))
                half = b.trunc(b.lshr(bits, ir.Constant(VI, [16] * LANES)), VH)
                place = b.gep(weights, [I64((r * BLOCK + j * LANES) // 2)])
                b.store(half, b.bitcast(place, VH.as_pointer()), align=4)
            place = b.bitcast(b.gep(total, [b.mul(rows[r], I64(LANES))]), VF.as_pointer())
            b.store(fma(b, b.load(place, align=4), factor, added), place, align=4)

        # Weighted values, four vectors of a row at a time.
        value_start = b.mul(block, I64(BLOCK // 2 * size_))
        starts = [b.mul(r, I64(size_)) for r in rows]
        for first in range(0, size_, VECTORS * LANES):
            width = min(VECTORS, (size_ - first) // LANES)
            places = [
                [b.bitcast(b.gep(acc, [b.add(start, I64(first + j * LANES))]), VF.as_pointer()) for j in range(width)]
                for start in starts
            ]
            held = [
                [variable(b, b.fmul(b.load(place, align=4), factor, ("fast",))) for place in of_row]
                for of_row, factor in zip(places, factors, strict=True)
            ]
            with cgutils.for_range(b, I64(BLOCK // 2), intp=I64) as loop:
                at = b.add(value_start, b.add(b.mul(loop.index, I64(size_)), I64(first)))
                vectors = [load_vector(b, values, b.add(at, I64(j * LANES)), VI) for j in range(width)]
                for r, slots in enumerate(held):
                    pair = _splat_int(b, b.load(b.gep(weights, [b.add(I64(r * BLOCK // 2), loop.index)])))
                    for slot, vector in zip(slots, vectors, strict=True):
                        b.store(_pair_products(b, b.load(slot), pair, vector), slot)
            for of_row, slots in zip(places, held, strict=True):
                for place, slot in zip(of_row, slots, strict=True):
                    b.store(b.load(slot), place, align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(size, masked, types.float32, queries, i64, keys, values, i64, limits, top, total, acc), emit


@intrinsic(prefer_literal=True)
def weigh_tile(
    typing: Any, size: Any, masked: Any, scale: Any, queries: Any, row: Any, keys: Any, block: Any, limits: Any,
    top: Any, total: Any, column: Any,
) -> Any:  # fmt: skip
    """How much one block of keys weighs for each of TILE_ROWS queries, values apart: top[row + r, column] the largest
    score in powers of two, total[row + r, column] the sum of 2 ** (score - top). float32 [rows, columns] both; the rest
    as in attend_tile."""
    if not all_literal(size, masked):
        return None
    size_, masked_ = size.literal_value, bool(masked.literal_value)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        queries, keys, limits, top, total = (data_of(context, b, signature, args, n) for n in (3, 5, 7, 8, 9))
        stride = row_stride_of(context, b, signature, args, 8)
        rows = [b.add(args[4], I64(r)) for r in range(TILE_ROWS)]
        for r, scores in enumerate(_tile_scores(b, size_, splat(b, args[2]), queries, rows, keys, args[6])):
            seen = seen_keys(b, limits, I64(r)) if masked_ else []
            if masked_:
                scores = [b.select(see, score, LOWEST) for see, score in zip(seen, scores, strict=True)]
            highest = largest_score(b, scores)
            shift, added = splat(b, highest), None
            for j, score in enumerate(scores):
                weight = exp2(b, b.fsub(score, shift))
                if masked_:
                    weight = b.select(seen[j], weight, ir.Constant(VF, [0.0] * LANES))
                added = weight if added is None else b.fadd(added, weight, ("fast",))
            at = b.add(b.mul(rows[r], stride), args[10])
            b.store(highest, b.gep(top, [at]))
            b.store(sum_of_all(b, added), b.gep(total, [at]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(size, masked, types.float32, queries, i64, keys, i64, limits, top, total, i64), emit


def _tile_scores(b: ir.IRBuilder, size: int, scale: Any, queries: Any, rows: list[Any], keys: Any, block: Any) -> Any:
    """The scaled scores of some rows against a block, VECTORS vectors a row."""
    zero = ir.Constant(VF, [0.0] * LANES)
    sums = [[variable(b, zero) for _ in range(VECTORS)] for _ in rows]
    starts = [b.mul(r, I64(size // 2)) for r in rows]
    key_start = b.mul(block, I64(size // 2 * BLOCK))
    with cgutils.for_range(b, I64(size // 2), intp=I64) as loop:
        at = b.add(key_start, b.mul(loop.index, I64(BLOCK)))
        vectors = [load_vector(b, keys, b.add(at, I64(j * LANES)), VI) for j in range(VECTORS)]
        for start, slots in zip(starts, sums, strict=True):
            pair = _splat_int(b, b.load(b.gep(queries, [b.add(start, loop.index)])))
            for slot, vector in zip(slots, vectors, strict=True):
                b.store(_pair_products(b, b.load(slot), pair, vector), slot)
    return [[b.fmul(b.load(slot), scale, ("fast",)) for slot in slots] for slots in sums]


def seen_keys(b: ir.IRBuilder, limits: Any, row: Any) -> list[Any]:
    """Which keys of the block a row of the tile sees."""
    limit = _splat_int(b, b.load(b.gep(limits, [row])))
    return [b.icmp_signed("<", ir.Constant(VI, list(range(j * LANES, (j + 1) * LANES))), limit) for j in range(VECTORS)]


def largest_score(b: ir.IRBuilder, scores: list[Any]) -> Any:
    """The largest of one row's scores in a block."""
    return largest_of_all(b, larger(b, larger(b, scores[0], scores[1]), larger(b, scores[2], scores[3])))


def _pair_products(b: ir.IRBuilder, total: Any, x: Any, y: Any) -> Any:
    """total + the two products of each of 16 pairs."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    products = cgutils.get_or_insert_function(b.module, ir.FunctionType(VF, [VF, VI, VI]), name)
    return b.call(products, (total, x, y))


def _splat_int(b: ir.IRBuilder, value: Any) -> Any:
    one = b.insert_element(ir.Constant(VI, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(VI, ir.Undefined), ir.Constant(VI, [0] * LANES))
