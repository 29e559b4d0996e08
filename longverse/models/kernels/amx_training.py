"""The inner loop of attention's backward pass on AMX tiles: what `amx.py` is for the forward pass.

One unit is GROUP queries against a block of BLOCK keys. With the log-sum of every query known, its weights are made
anew from its scores (Dao et al. 2022, arXiv 2205.14135); then all products of the unit are, while everything it needs
lies in the nearest cache. Scores are computed keys by queries, as in `amx.py`.

    P  = 2 ** (K Q^T * scale - log_sums)        keys by queries
    dS = P * (V dO^T - means)                   means: of a query, the sum of dO * O
    dV += P dO     dK += dS Q     dQ^T += K^T dS

Shapes: D head size (a multiple of 32).

    queries, slopes        a tile of 16 is int32 [D / 2, 16]: elements 2 i and 2 i + 1 of a query (of dO) in one number
    query_pairs, slope_pairs  int32 [rows / 2, D]: an element of queries 2 i and 2 i + 1 in one number
    keys, values           a block is bf16 [BLOCK, D];  turned: a block's keys as bf16 [D, BLOCK]
    dq                     a tile is float32 [D, 16];  dk, dv float32 [BLOCK, D]
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .amx import DEPTH, LEFT, RIGHT, ROWS, SUMS, _call, _load, _multiply, _store, quick_exp2
from .bf16 import BLOCK
from .vectors import F32, I16, I32, I64, LANES, VF, VI, data_of, fma, intrinsic, load_vector, pointer_to, scratch, splat

GROUP = BLOCK  # queries of a unit: sums of keys are loaded and stored once for so many
TILES = GROUP // ROWS
NOTHING = ir.Constant(VF, [0.0] * LANES)


@intrinsic(prefer_literal=True)
def backward_unit(
    typing: Any, size: Any, masked: Any, scale: Any, queries: Any, slopes: Any, query_pairs: Any, slope_pairs: Any,
    row: Any, keys: Any, values: Any, turned: Any, block: Any, limits: Any, log_sums: Any, means: Any, dq: Any,
    dk: Any, dv: Any,
) -> Any:  # fmt: skip
    """Add what the queries from `row` on and one block of keys give to dq, dk and dv (not scaled).

    limits  int32 [GROUP], read if masked: how many keys of the block each query sees
    scale   log2(e) / sqrt(D);  log_sums, means  float32 a query, the former to base 2
    """
    if not (isinstance(size, types.Literal) and isinstance(masked, types.Literal)):
        return None

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        data = {n: data_of(context, b, signature, args, n) for n in (3, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 16, 17)}
        row, block, wide = args[7], args[11], size.literal_value
        scores, answers = (scratch(b, F32, TILES * BLOCK * ROWS) for _ in range(2))  # [TILES, BLOCK, ROWS]
        by_key, slope_by_key = (scratch(b, I16, BLOCK * GROUP) for _ in range(2))  # bf16 [BLOCK, GROUP]
        pairs = scratch(b, I32, TILES * BLOCK // 2 * ROWS)  # dS as [TILES, BLOCK / 2, ROWS]: keys 2 i and 2 i + 1
        at_row, at_block = b.mul(row, I64(wide // 2)), b.mul(block, I64(BLOCK * wide // 2))
        _keys_by_queries(b, wide, b.gep(data[8], [at_block]), b.gep(data[3], [at_row]), scores)
        _keys_by_queries(b, wide, b.gep(data[9], [at_block]), b.gep(data[4], [at_row]), answers)
        limits = data[12] if masked.literal_value else None
        log_sums, means = (b.gep(data[n], [row]) for n in (13, 14))
        scale = splat(b, args[2])
        _slopes_of_scores(b, scores, answers, scale, log_sums, means, limits, by_key, slope_by_key, pairs)
        at_pairs = b.mul(row, I64(wide // 2))
        _sums_of_keys(b, wide, by_key, b.gep(data[6], [at_pairs]), data[17])
        _sums_of_keys(b, wide, slope_by_key, b.gep(data[5], [at_pairs]), data[16])
        _sums_of_queries(b, wide, b.gep(data[10], [at_block]), pairs, b.gep(data[15], [b.mul(row, I64(wide))]))
        return context.get_dummy_value()

    i64, f32 = types.int64, types.float32
    return types.void(
        size, masked, f32, queries, slopes, query_pairs, slope_pairs, i64, keys, values, turned, i64, limits, log_sums,
        means, dq, dk, dv,
    ), emit  # fmt: skip


def _keys_by_queries(b: ir.IRBuilder, size: int, keys: Any, queries: Any, out: Any) -> None:
    """out float32 [TILES, BLOCK, ROWS] = keys (int32 words of bf16 [BLOCK, D]) by queries (tiles int32 [D / 2, 16])."""
    for first in range(0, BLOCK, 2 * ROWS):
        for tile in range(0, TILES, 2):
            for sum_ in (*SUMS[0], *SUMS[1]):
                _zero(b, sum_)
            for depth in range(0, size, DEPTH):
                for side in range(2):
                    _load(b, LEFT[side], _at(b, keys, ((first + side * ROWS) * size + depth) // 2), 2 * size)
                    _load(b, RIGHT[side], _at(b, queries, (tile + side) * ROWS * size // 2 + depth // 2 * ROWS), 64)
                _multiply(b)
            for side in range(2):
                for n in range(2):
                    _store(b, SUMS[side][n], _at(b, out, ((tile + n) * BLOCK + first + side * ROWS) * ROWS), 64)


def _slopes_of_scores(
    b: ir.IRBuilder, scores: Any, answers: Any, scale: Any, log_sums: Any, means: Any, limits: Any, by_key: Any,
    slope_by_key: Any, pairs: Any,
) -> None:  # fmt: skip
    """P and dS from the two products, rounded, as the next products want them."""
    for tile in range(TILES):
        shift = b.fneg(load_vector(b, log_sums, I64(tile * ROWS), VF))
        mean = load_vector(b, means, I64(tile * ROWS), VF)
        limit = load_vector(b, limits, I64(tile * ROWS), VI) if limits is not None else None
        with cgutils.for_range(b, I64(BLOCK // 2), intp=I64) as loop:
            halves = []
            for n in range(2):
                key = b.add(b.mul(loop.index, I64(2)), I64(n))
                at = b.add(b.mul(key, I64(ROWS)), I64(tile * BLOCK * ROWS))
                score = b.load(pointer_to(b, scores, at, VF), align=64)
                weight = quick_exp2(b, fma(b, score, scale, shift))
                if limit is not None:
                    seen = b.icmp_signed(">", limit, _every(b, b.trunc(key, I32)))
                    weight = b.select(seen, weight, NOTHING)
                answer = b.load(pointer_to(b, answers, at, VF), align=64)
                slope = b.fmul(weight, b.fsub(answer, mean, ("fast",)), ("fast",))
                place = b.add(b.mul(key, I64(GROUP)), I64(tile * ROWS))
                _store_half(b, _to_round(b, weight), by_key, place)
                halves.append(_to_round(b, slope))
                _store_half(b, halves[n], slope_by_key, place)
            low = b.lshr(halves[0], ir.Constant(VI, [16] * LANES))
            high = b.and_(halves[1], ir.Constant(VI, [-0x10000] * LANES))
            at = b.add(b.mul(loop.index, I64(ROWS)), I64(tile * BLOCK // 2 * ROWS))
            b.store(b.or_(low, high), pointer_to(b, pairs, at, VI), align=64)


def _sums_of_keys(b: ir.IRBuilder, size: int, by_key: Any, pairs: Any, sums: Any) -> None:
    """sums float32 [BLOCK, D] += by_key (bf16 [BLOCK, GROUP]) by what the queries have (int32 [GROUP / 2, D])."""
    for first in range(0, BLOCK, 2 * ROWS):
        for element in range(0, size, 2 * ROWS):
            _moved(b, _load, sums, first, element, size)
            for depth in range(0, GROUP, DEPTH):
                for side in range(2):
                    _load(b, LEFT[side], _at(b, by_key, (first + side * ROWS) * GROUP + depth), 2 * GROUP)
                    _load(b, RIGHT[side], _at(b, pairs, depth // 2 * size + element + side * ROWS), 4 * size)
                _multiply(b)
            _moved(b, _store, sums, first, element, size)


def _moved(b: ir.IRBuilder, move: Any, sums: Any, first: int, element: int, size: int) -> None:
    """Four tiles of float32 [.., D], to or from the registers."""
    for side in range(2):
        for n in range(2):
            move(b, SUMS[side][n], _at(b, sums, (first + side * ROWS) * size + element + n * ROWS), 4 * size)


def _sums_of_queries(b: ir.IRBuilder, size: int, turned: Any, pairs: Any, sums: Any) -> None:
    """sums (tiles float32 [D, 16]) += turned (int32 words of bf16 [D, BLOCK]) by pairs (int32 [TILES, BLOCK / 2,
    ROWS])."""

    def moved(move: Any, element: int, tile: int) -> None:
        for side in range(2):
            for n in range(2):
                move(b, SUMS[side][n], _at(b, sums, ((tile + n) * size + element + side * ROWS) * ROWS), 64)

    for element in range(0, size, 2 * ROWS):
        for tile in range(0, TILES, 2):
            moved(_load, element, tile)
            for depth in range(0, BLOCK, DEPTH):
                for side in range(2):
                    _load(b, LEFT[side], _at(b, turned, ((element + side * ROWS) * BLOCK + depth) // 2), 2 * BLOCK)
                    _load(b, RIGHT[side], _at(b, pairs, ((tile + side) * BLOCK + depth) // 2 * ROWS), 64)
                _multiply(b)
            moved(_store, element, tile)


def _at(b: ir.IRBuilder, base: Any, place: int) -> Any:
    return b.gep(base, [I64(place)])


def _zero(b: ir.IRBuilder, tile: int) -> None:
    _call(b, "tilezero", ir.IntType(8)(tile))


def _every(b: ir.IRBuilder, value: Any) -> Any:
    """A vector of the same int32 everywhere."""
    one = b.insert_element(ir.Constant(VI, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(VI, ir.Undefined), ir.Constant(VI, [0] * LANES))


def _to_round(b: ir.IRBuilder, x: Any) -> Any:
    """Bits whose upper halves are x in bfloat16."""
    return b.add(b.bitcast(x, VI), ir.Constant(VI, [0x8000] * LANES))


def _store_half(b: ir.IRBuilder, bits: Any, base: Any, at: Any) -> None:
    halves = ir.VectorType(I16, LANES)
    b.store(b.trunc(b.lshr(bits, ir.Constant(VI, [16] * LANES)), halves), pointer_to(b, base, at, halves), align=32)
