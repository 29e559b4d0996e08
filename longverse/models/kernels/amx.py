"""The inner loop of attention over many queries, for processors with AMX: what `bf16.py` is for others.

One instruction multiplies 16 rows of 32 bfloat16 numbers by 32 rows of 16 and adds to 16 x 16 float32 sums, in
registers of their own that must be configured first. It makes both products cheap, so what is left is the softmax; that
is spelled out to take few instructions:

- powers of two come from a polynomial of degree 3 (8e-5 relative, a twentieth of what rounding the weights to bfloat16
  costs);
- the largest score of a row is renewed only when one stands 2 ** SLACK above it, so the sums so far are seldom scaled
  anew. The weights are the same up to that common factor;
- scores are computed keys by queries, so that a vector holds 16 queries and nothing is added up across it;
- while one unit's softmax is computed, the products of its neighbours are, between the same lines.

Shapes: D head size (a multiple of 32); a unit is TILE_ROWS queries against a block of BLOCK keys.

    queries  a tile of 16 is int32 [D / 2, 16]: elements 2 i and 2 i + 1 of a query in one number
    keys     a block is bf16 [BLOCK, D]
    values   a block is bf16 [D, BLOCK]
    acc      a tile is float32 [D, 16]; top and total have one float32 a query
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .bf16 import BLOCK
from .vectors import (
    F32,
    I8,
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
    filled,
    fma,
    intrinsic,
    larger,
    load_vector,
    pointer_to,
    row_stride_of,
    scratch,
    splat,
)  # fmt: skip

ROWS = 16  # of a tile register, and float32 numbers in one of its rows
DEPTH = 32  # bfloat16 numbers in one of its rows
TILES = 2  # of queries that are dealt with together, so that each tile of keys is loaded once for both
TILE_ROWS = TILES * ROWS
ITEM_TILES = 3  # as bf16.ITEM_TILES; neighbours must differ to run side by side, and 96 rows leave keys room
SLACK = 8.0
Steps = list[Callable[[], object]]
# Tile registers: sums, by which of two left tiles and which of two right ones; then what is multiplied.
SUMS = ((0, 1), (2, 3))
LEFT, RIGHT = (4, 5), (6, 7)
# 2 ** x for 0 <= x < 1, to 8e-5 relative: a polynomial, the highest power first.
POWER_OF_TWO = (0.07802446, 0.22606725, 0.6958335, 0.99992522)


@intrinsic
def begin_tiles(typing: Any) -> Any:
    """Configure this thread's tile registers: eight of 16 rows of 64 bytes."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        values = [0] * 64
        values[0] = 1  # the palette
        for tile in range(8):
            values[16 + 2 * tile] = 64  # bytes of a row
            values[48 + tile] = ROWS
        kind = ir.ArrayType(I8, 64)
        settings = cgutils.alloca_once(b, kind)
        b.store(ir.Constant(kind, values), settings)
        _call(b, "ldtilecfg", b.bitcast(settings, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def end_tiles(typing: Any) -> Any:
    """Give the tile registers back, so that the system need not save them."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _call(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic(prefer_literal=True)
def attend_tile(
    typing: Any, size: Any, masked: Any, scale: Any, queries: Any, row: Any, keys: Any, values: Any, block: Any,
    limits: Any, top: Any, total: Any, acc: Any,
) -> Any:  # fmt: skip
    """Fold one block of keys into the running softmax of TILE_ROWS queries from `row` on: as bf16.attend_tile."""
    if not all_literal(size, masked):
        return None
    masked_ = bool(masked.literal_value)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        data = [data_of(context, b, signature, args, n) for n in (3, 5, 6, 9, 10, 11)]
        unit = _Units(b, size.literal_value, args[2], *data)
        scores, weights = unit.scores_area(1), unit.weights_area(1)
        for step in unit.score_steps(args[4], args[7], scores):
            step()
        limits = data_of(context, b, signature, args, 8) if masked_ else None
        unit.softmax(args[4], scores, weights, limits, [])
        for step in unit.value_steps(args[4], args[7], weights):
            step()
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(size, masked, types.float32, queries, i64, keys, values, i64, limits, top, total, acc), emit


@intrinsic(prefer_literal=True)
def attend_tiles(
    typing: Any, size: Any, scale: Any, queries: Any, keys: Any, values: Any, rows: Any, blocks: Any, count: Any,
    top: Any, total: Any, acc: Any,
) -> Any:  # fmt: skip
    """`attend_tile` for the queries from rows[i] on and block blocks[i], i < count, no two neighbours in `rows` alike.

    While the softmax of one is computed, others are multiplied: the scores of the next, the values of the one before.
    """
    if not all_literal(size):
        return None

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        data = [data_of(context, b, signature, args, n) for n in (2, 3, 4, 8, 9, 10)]
        rows, blocks = (data_of(context, b, signature, args, n) for n in (5, 6))
        unit, count = _Units(b, size.literal_value, args[1], *data), args[7]
        scores, weights = unit.scores_area(2), unit.weights_area(2)

        def at(i: Any) -> tuple[Any, Any]:
            return b.load(b.gep(rows, [i])), b.load(b.gep(blocks, [i]))

        def half(area: Any, i: Any, length: int) -> Any:
            return b.gep(area, [b.mul(b.and_(i, I64(1)), I64(length))])

        with b.if_then(b.icmp_signed(">", count, I64(0))):
            for step in unit.score_steps(*at(I64(0)), scores):
                step()
            # There is no unit before the first: zero weights are added to the rows of the second, where there is one.
            for step in unit.clear_steps(half(weights, I64(1), unit.weights_length)):
                step()
            last = b.sub(count, I64(1))
            with cgutils.for_range(b, count, intp=I64) as loop:
                i = loop.index
                after = b.select(b.icmp_signed("<", i, last), b.add(i, I64(1)), last)
                before = b.select(b.icmp_signed(">", i, I64(0)), b.sub(i, I64(1)), after)
                steps = unit.value_steps(*at(before), half(weights, b.add(i, I64(1)), unit.weights_length))
                steps += unit.score_steps(*at(after), half(scores, b.add(i, I64(1)), unit.scores_length))
                unit.softmax(
                    at(i)[0], half(scores, i, unit.scores_length), half(weights, i, unit.weights_length), None, steps
                )
            for step in unit.value_steps(*at(last), half(weights, last, unit.weights_length)):
                step()
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(size, types.float32, queries, keys, values, rows, blocks, i64, top, total, acc), emit


@intrinsic(prefer_literal=True)
def weigh_tile(
    typing: Any, size: Any, masked: Any, scale: Any, queries: Any, row: Any, keys: Any, block: Any, limits: Any,
    top: Any, total: Any, column: Any,
) -> Any:  # fmt: skip
    """How much one block of keys weighs for each of TILE_ROWS queries: as bf16.weigh_tile."""
    if not all_literal(size, masked):
        return None
    masked_ = bool(masked.literal_value)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        queries, keys, limits, top, total = (data_of(context, b, signature, args, n) for n in (3, 5, 7, 8, 9))
        stride = row_stride_of(context, b, signature, args, 8)
        unit = _Units(b, size.literal_value, args[2], queries, keys, None, None, None, None)
        scores = unit.scores_area(1)
        for step in unit.score_steps(args[4], args[6], scores):
            step()
        for tile in range(TILES):
            limit = load_vector(b, limits, I64(tile * ROWS), VI) if masked_ else None
            highest = b.fmul(unit.highest(scores, tile, limit), unit.scale, ("fast",))
            shift, sums = b.fneg(highest), [filled(0.0) for _ in range(4)]
            for key in range(BLOCK):
                sums[key % 4] = b.fadd(sums[key % 4], unit.weight(scores, tile, key, shift, limit), ("fast",))
            added = _sum_of_four(b, sums)
            for i in range(ROWS):
                at = b.add(b.mul(b.add(args[4], I64(tile * ROWS + i)), stride), args[10])
                b.store(b.extract_element(highest, I32(i)), b.gep(top, [at]))
                b.store(b.extract_element(added, I32(i)), b.gep(total, [at]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(size, masked, types.float32, queries, i64, keys, i64, limits, top, total, i64), emit


class _Units:
    """Writes the code of a unit: TILE_ROWS queries against a block of keys. The scores lie as float32 [TILES, BLOCK,
    ROWS], the weights as pairs of keys int32 [TILES, BLOCK / 2, ROWS]; what multiplies is a list of steps, which
    the softmax of another unit puts between its own lines."""

    scores_length = TILES * BLOCK * ROWS
    weights_length = TILES * BLOCK // 2 * ROWS

    def __init__(
        self, b: ir.IRBuilder, size: int, scale: Any, queries: Any, keys: Any, values: Any, top: Any, total: Any,
        acc: Any,
    ) -> None:  # fmt: skip
        self.b, self.size, self.scale = b, size, splat(b, scale)
        self.queries, self.keys, self.values, self.top, self.total, self.acc = queries, keys, values, top, total, acc

    def scores_area(self, count: int) -> Any:
        return scratch(self.b, F32, count * self.scores_length)

    def weights_area(self, count: int) -> Any:
        return scratch(self.b, I32, count * self.weights_length)

    def score_steps(self, row: Any, block: Any, out: Any) -> Steps:
        """The products of the unit's keys and queries, not scaled."""
        b, size = self.b, self.size
        query_start = b.mul(row, I64(size // 2))
        key_start = b.mul(block, I64(BLOCK * size // 2))

        def clear() -> None:
            for sum_ in (*SUMS[0], *SUMS[1]):
                _call(b, "tilezero", I8(sum_))

        def multiply(first: int, depth: int) -> None:
            for side in range(2):
                at = b.add(key_start, I64(((first + side * ROWS) * size + depth) // 2))
                _load(b, LEFT[side], b.gep(self.keys, [at]), 2 * size)
            for tile in range(TILES):
                at = b.add(query_start, I64(tile * ROWS * size // 2 + depth // 2 * ROWS))
                _load(b, RIGHT[tile], b.gep(self.queries, [at]), 4 * ROWS)
            _multiply(b)

        def keep(first: int, side: int) -> None:
            for tile in range(TILES):
                place = b.gep(out, [I64((tile * BLOCK + first + side * ROWS) * ROWS)])
                _store(b, SUMS[side][tile], place, 4 * ROWS)

        steps: Steps = []
        for first in range(0, BLOCK, 2 * ROWS):
            steps.append(clear)
            steps += [partial(multiply, first, depth) for depth in range(0, size, DEPTH)]
            steps += [partial(keep, first, side) for side in range(2)]
        return steps

    def value_steps(self, row: Any, block: Any, weights: Any) -> Steps:
        """Add the unit's weighted values to acc."""
        b, size = self.b, self.size
        value_start = b.mul(block, I64(BLOCK // 2 * size))
        acc_start = b.mul(row, I64(size))

        def sums(first: int, side: int, move: Callable[[ir.IRBuilder, int, Any, int], None]) -> None:
            for tile in range(TILES):
                at = b.add(acc_start, I64((tile * size + first + side * ROWS) * ROWS))
                move(b, SUMS[side][tile], b.gep(self.acc, [at]), 4 * ROWS)

        def multiply(first: int, depth: int) -> None:
            for side in range(2):
                at = b.add(value_start, I64(((first + side * ROWS) * BLOCK + depth) // 2))
                _load(b, LEFT[side], b.gep(self.values, [at]), 2 * BLOCK)
            for tile in range(TILES):
                _load(b, RIGHT[tile], b.gep(weights, [I64((tile * BLOCK + depth) // 2 * ROWS)]), 4 * ROWS)
            _multiply(b)

        steps: Steps = []
        for first in range(0, size, 2 * ROWS):
            steps += [partial(sums, first, side, _load) for side in range(2)]
            steps += [partial(multiply, first, depth) for depth in range(0, BLOCK, DEPTH)]
            steps += [partial(sums, first, side, _store) for side in range(2)]
        return steps

    def clear_steps(self, weights: Any) -> Steps:
        """Weights of nothing."""
        zero = ir.Constant(VI, [0] * LANES)
        places = range(0, self.weights_length, LANES)
        return [partial(self.b.store, zero, pointer_to(self.b, weights, I64(at), VI), align=64) for at in places]

    def score(self, scores: Any, tile: int, key: int) -> Any:
        return self.b.load(pointer_to(self.b, scores, I64((tile * BLOCK + key) * ROWS), VF), align=64)

    def weight(self, scores: Any, tile: int, key: int, shift: Any, limit: Any) -> Any:
        """2 to the power of a scaled score and `shift`; nothing where the key is not seen."""
        weight = quick_exp2(self.b, fma(self.b, self.score(scores, tile, key), self.scale, shift))
        return weight if limit is None else self.b.select(_sees(self.b, limit, key), weight, filled(0.0))

    def highest(self, scores: Any, tile: int, limit: Any) -> Any:
        """The largest score of each query, not scaled; LOWEST where it sees no key."""
        found = [LOWEST] * 4
        for key in range(BLOCK):
            score = self.score(scores, tile, key)
            if limit is not None:
                score = self.b.select(_sees(self.b, limit, key), score, LOWEST)
            found[key % 4] = larger(self.b, found[key % 4], score)
        return larger(self.b, larger(self.b, found[0], found[1]), larger(self.b, found[2], found[3]))

    def softmax(self, row: Any, scores: Any, weights: Any, limits: Any, between: Steps) -> None:
        """From a unit's scores its weights, and their sums added to `total`; limits int32 [TILE_ROWS] or None."""
        b = self.b
        limit = [load_vector(b, limits, I64(t * ROWS), VI) if limits is not None else None for t in range(TILES)]
        tops = [pointer_to(b, self.top, b.add(row, I64(t * ROWS)), VF) for t in range(TILES)]
        highest = [b.fmul(self.highest(scores, t, limit[t]), self.scale, ("fast",)) for t in range(TILES)]
        # Does any score stand so far above its query's largest so far that the sums must be scaled anew?
        above = None
        for place, most in zip(tops, highest, strict=True):
            more = b.fcmp_ordered(">", most, b.fadd(b.load(place, align=4), filled(SLACK)))
            above = more if above is None else b.or_(above, more)
        mask = ir.IntType(LANES)
        with b.if_then(b.icmp_unsigned("!=", b.bitcast(above, mask), mask(0)), likely=False):
            for tile, (place, most) in enumerate(zip(tops, highest, strict=True)):
                before = b.load(place, align=4)
                now = larger(b, most, before)
                b.store(now, place, align=4)
                factor = exp2(b, b.fsub(before, now))
                first = b.add(row, I64(tile * ROWS))
                sums = [pointer_to(b, self.total, first, VF)]
                start = b.mul(first, I64(self.size))
                sums += [pointer_to(b, self.acc, b.add(start, I64(i * ROWS)), VF) for i in range(self.size)]
                for sum_ in sums:
                    b.store(b.fmul(b.load(sum_, align=4), factor, ("fast",)), sum_, align=4)

        done, emitted, count = 0, 0, TILES * BLOCK // 2
        for tile in range(TILES):
            shift, sums = b.fneg(b.load(tops[tile], align=4)), [filled(0.0) for _ in range(4)]
            for pair in range(BLOCK // 2):
                halves = []
                for key in (2 * pair, 2 * pair + 1):
                    weight = self.weight(scores, tile, key, shift, limit[tile])
                    sums[key % 4] = b.fadd(sums[key % 4], weight, ("fast",))
                    halves.append(b.add(b.bitcast(weight, VI), ir.Constant(VI, [0x8000] * LANES)))  # to be rounded
                low = b.lshr(halves[0], ir.Constant(VI, [16] * LANES))
                high = b.and_(halves[1], ir.Constant(VI, [-0x10000] * LANES))
                place = pointer_to(b, weights, I64((tile * BLOCK // 2 + pair) * ROWS), VI)
                b.store(b.or_(low, high), place, align=64)
                done += 1
                while emitted * count < done * len(between):
                    between[emitted]()
                    emitted += 1
            place = pointer_to(b, self.total, b.add(row, I64(tile * ROWS)), VF)
            b.store(b.fadd(b.load(place, align=4), _sum_of_four(b, sums), ("fast",)), place, align=4)


def quick_exp2(b: ir.IRBuilder, x: Any) -> Any:
    """2 ** x of a vector, to 8e-5 relative, for x from far below 0 up to SLACK."""
    mask, round_down = ir.Constant(I16, -1), I32(8 + 1)
    reduce_ = _wide(b, "reduce", VF, I32, VF, I16, I32)
    rest = b.call(reduce_, (x, round_down, x, mask, I32(4)))  # x less the whole number below it
    value: Any = filled(POWER_OF_TWO[0])
    for coefficient in POWER_OF_TWO[1:]:
        value = fma(b, value, rest, filled(coefficient))
    return b.call(_wide(b, "scalef", VF, VF, VF, I16, I32), (value, x, value, mask, I32(4)))


def _wide(b: ir.IRBuilder, name: str, *kinds: Any) -> Any:
    """One of AVX-512's functions of whole vectors."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(VF, kinds), f"llvm.x86.avx512.mask.{name}.ps.512")


def _sees(b: ir.IRBuilder, limit: Any, key: int) -> Any:
    """Which of 16 queries see a key of the block."""
    return b.icmp_signed(">", limit, ir.Constant(VI, [key] * LANES))


def _sum_of_four(b: ir.IRBuilder, sums: list[Any]) -> Any:
    return b.fadd(b.fadd(sums[0], sums[1], ("fast",)), b.fadd(sums[2], sums[3], ("fast",)), ("fast",))


def _multiply(b: ir.IRBuilder) -> None:
    """Add the products of both left tiles with both right ones to the four sums."""
    for side, sums in enumerate(SUMS):
        for tile, sum_ in enumerate(sums):
            _call(b, "tdpbf16ps", I8(sum_), I8(LEFT[side]), I8(RIGHT[tile]))


def _load(b: ir.IRBuilder, tile: int, place: Any, stride: int) -> None:
    _call(b, "tileloadd64", I8(tile), b.bitcast(place, I8.as_pointer()), I64(stride))


def _store(b: ir.IRBuilder, tile: int, place: Any, stride: int) -> None:
    _call(b, "tilestored64", I8(tile), b.bitcast(place, I8.as_pointer()), I64(stride))


def _call(b: ir.IRBuilder, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [x.type for x in args])
    b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), args)
