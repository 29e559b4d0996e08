"""Inner loops of the CPU kernels, as LLVM vectors of 16 floats, built into numba functions.

numba's own loops vectorise when LLVM happens to see through them; a decode step waits for these few lines alone, so
they are spelled out.

A row (the key or value of a token and head, or a row of a weight matrix) of `size` elements has one of four layouts; a
group is `group` elements of a row that share a scale:

    f32   float32 [size]
    bf16  uint16  [size]      the upper half of a float32
    int8  int8    [size]      x = scale * level         scales: bf16 bits [size / group]
    int4  uint8   [size / 2]  x = scale * level + low   scales: bf16 bits [size / group, 2]; byte j of a group holds
                              element j in its low half and element j + group / 2 in its high half

Arguments named `layout`, `size`, `heads` and `group` must be constants where these functions are called.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .vectors import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    LOG2_E,
    VF,
    VI,
    all_literal,
    call,
    data_of,
    exp2,
    filled,
    fma,
    intrinsic,
    largest_of_all,
    load_bf16,
    load_vector,
    pointer_to,
    read_ahead,
    row_of,
    row_stride_of,
    splat,
    sum_of_all,
    variable,
)  # fmt: skip

ELEMENT = {"f32": F32, "bf16": I16, "int8": I8, "int4": I8}
HELD = 256  # floats whose sums stay in registers
AHEAD = 2048  # bytes before its turn that memory is asked for: what one core reads while a cache line is on its way
PACKED = ("int8", "int4")  # layouts whose groups have scales
IN_ORDER = [4 * (i % 4) + i // 4 for i in range(LANES)]  # where `_halve` left the sum of vector i


@intrinsic
def bf16_to_float(typing: Any, bits: Any) -> Any:
    """uint16 bits of a bfloat16 to float32."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.bitcast(b.shl(b.zext(args[0], I32), I32(16)), F32)

    return types.float32(types.uint16), emit


@intrinsic
def float_to_bf16(typing: Any, x: Any) -> Any:
    """float32 to the bits of the nearest bfloat16, ties to even, as torch rounds."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        bits = b.bitcast(args[0], I32)
        odd = b.and_(b.lshr(bits, I32(16)), I32(1))
        return b.trunc(b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16)), I16)

    return types.uint16(types.float32), emit


@intrinsic
def power_of_two(typing: Any, n: Any) -> Any:
    """2 ** n in float32 for whole n in -126 .. 127."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.bitcast(b.shl(b.add(args[0], I32(127)), I32(23)), F32)

    return types.float32(types.int32), emit


@intrinsic
def arrive(typing: Any, counter: Any) -> Any:
    """Add one to the first element of an int64 array, for all threads to see; returns what was there."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.atomic_rmw("add", data_of(context, b, signature, args, 0), I64(1), "seq_cst")

    return types.int64(counter), emit


@intrinsic
def look(typing: Any, counter: Any) -> Any:
    """The first element of an int64 array as other threads left it."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.load_atomic(data_of(context, b, signature, args, 0), "seq_cst", 8)

    return types.int64(counter), emit


@intrinsic
def give_way(typing: Any) -> Any:
    """Let another thread have this processor."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if sys.platform != "win32":
            b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic(prefer_literal=True)
def dots(
    typing: Any, layout: Any, size: Any, heads: Any, group: Any,
    q: Any, sums: Any, rows: Any, scales: Any, begin: Any, n: Any, out: Any,
) -> Any:  # fmt: skip
    """out[h, i] = q[h] . row[begin + i] for all heads h and i < n: one reading of the rows serves all heads.

    q float32 [heads, size]; sums float32 [heads, size / group], q's sum over each group (int4 reads them); out float32
    [heads, at least n].
    """
    if not all_literal(layout, size, heads, group):
        return None
    layout_, size_, heads_, group_ = (x.literal_value for x in (layout, size, heads, group))
    groups = size_ // group_

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        q, sums, rows, scales, out = (data_of(context, b, signature, args, i) for i in (4, 5, 6, 7, 10))
        begin, n = args[8:10]
        stride = row_stride_of(context, b, signature, args, 10)
        every = range(size_ // LANES)
        queries = [[load_vector(b, q, I64(head * size_ + i * LANES), VF) for i in every] for head in range(heads_)]
        # What is summed apart: a head's whole product, or where groups have scales, each group's.
        parts = groups if layout_ in PACKED else 1

        def products(row: Any) -> list[Any]:
            """q . levels of a row, as vectors still to be added up: by head and part."""
            levels = []
            _ask_for(b, layout_, size_, rows, row)
            for part in range(groups):
                levels += _levels(b, layout_, group_, rows, _element(b, layout_, size_, group_, row, I64(part)))
            sums_of = []
            for head in range(heads_):
                for part in range(parts):
                    total = None
                    for i in range(len(levels) // parts * part, len(levels) // parts * (part + 1)):
                        total = fma(b, queries[head][i], levels[i], total)
                    sums_of.append(total)
            return sums_of

        # LANES rows at a time, four by four: what is half added up waits in memory.
        waiting = cgutils.alloca_once(b, ir.ArrayType(VF, heads_ * parts * 4))
        zero = I64(0)
        with cgutils.for_range(b, b.sdiv(n, I64(LANES)), intp=I64) as loop:
            first = b.add(begin, b.mul(loop.index, I64(LANES)))
            with cgutils.for_range(b, I64(4), intp=I64) as inner:
                row = b.add(first, b.mul(inner.index, I64(4)))
                four = [products(b.add(row, I64(i))) for i in range(4)]
                for slot in range(heads_ * parts):
                    one, other = (_halve(b, four[i][slot], four[i + 1][slot], 8) for i in (0, 2))
                    at = b.add(b.mul(inner.index, I64(heads_ * parts)), I64(slot))
                    b.store(_halve(b, one, other, 4), b.gep(waiting, [zero, at]))
            for head in range(heads_):
                result = None
                for part in range(parts):
                    slots = [I64(i * heads_ * parts + head * parts + part) for i in range(4)]
                    held = [b.load(b.gep(waiting, [zero, slot])) for slot in slots]
                    one, other = (_halve(b, held[i], held[i + 1], 2) for i in (0, 2))
                    total = _halve(b, one, other, 1)
                    total = b.shuffle_vector(total, ir.Constant(VF, ir.Undefined), ir.Constant(VI, IN_ORDER))
                    scale, low = _scales_of_rows(b, layout_, groups, scales, first, part)
                    if scale is not None:
                        total = fma(b, total, scale, result)
                    if low is not None:
                        total = fma(b, low, splat(b, b.load(b.gep(sums, [I64(head * groups + part)]))), total)
                    result = total
                at = b.add(b.mul(stride, I64(head)), b.mul(loop.index, I64(LANES)))
                b.store(result, pointer_to(b, out, at, VF), align=1)
        done = b.and_(n, I64(-LANES))
        with cgutils.for_range(b, b.sub(n, done), intp=I64) as loop:
            index = b.add(done, loop.index)
            row = b.add(begin, index)
            found = products(row)
            for head in range(heads_):
                result = None
                for part in range(parts):
                    total = sum_of_all(b, found[head * parts + part])
                    scale, low = _scales(b, layout_, scales, b.add(b.mul(row, I64(groups)), I64(part)))
                    if scale is not None:
                        total = fma(b, total, scale, result)
                    if low is not None:
                        total = fma(b, low, b.load(b.gep(sums, [I64(head * groups + part)])), total)
                    result = total
                b.store(result, b.gep(out, [b.add(b.mul(stride, I64(head)), index)]))
        return context.get_dummy_value()

    return types.void(layout, size, heads, group, q, sums, rows, scales, types.int64, types.int64, out), emit


@intrinsic(prefer_literal=True)
def weighted_sum(
    typing: Any, layout: Any, size: Any, heads: Any, group: Any,
    weights: Any, rows: Any, scales: Any, begin: Any, n: Any, out: Any,
) -> Any:  # fmt: skip
    """out[h] += sum over i < n of weights[h, i] * row[begin + i], for all heads h.

    weights float32 [heads, at least n]; out float32 [heads, size]. As many groups of elements at a time as have room in
    registers for the sums of all heads while the rows pass by.
    """
    if not all_literal(layout, size, heads, group):
        return None
    layout_, size_, heads_, group_ = (x.literal_value for x in (layout, size, heads, group))
    groups = size_ // group_

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        weights, rows, scales, out = (data_of(context, b, signature, args, i) for i in (4, 5, 6, 9))
        begin, n = args[7:9]
        stride = row_stride_of(context, b, signature, args, 4)
        together = min(groups, max(1, HELD // (heads_ * group_)))  # groups of a row whose sums are held at once
        area = ir.ArrayType(F32, heads_ * together * LANES)
        scaled = b.bitcast(cgutils.alloca_once(b, area), F32.as_pointer())

        def sweep(parts: range) -> None:
            """The sums of some groups."""
            units = [(head, part) for part in parts for head in range(heads_)]
            places = {
                (head, part): [I64(head * size_ + part * group_ + i * LANES) for i in range(group_ // LANES)]
                for head, part in units
            }
            held = {unit: [variable(b, load_vector(b, out, at, VF)) for at in places[unit]] for unit in units}
            lows = {unit: variable(b, filled(0.0)) for unit in units}

            def add(row: Any, factors: list[Any]) -> None:
                if parts[0] == 0:  # later sweeps find the rows in a cache
                    _ask_for(b, layout_, size_, rows, row)
                for part in parts:
                    vectors = _levels(b, layout_, group_, rows, _element(b, layout_, size_, group_, row, I64(part)))
                    for head in range(heads_):
                        factor = splat(b, factors[units.index((head, part))])
                        for slot, vector in zip(held[head, part], vectors, strict=True):
                            b.store(fma(b, factor, vector, b.load(slot)), slot)

            # LANES rows at a time, whose weights take their scales together.
            with cgutils.for_range(b, b.sdiv(n, I64(LANES)), intp=I64) as loop:
                offset = b.mul(loop.index, I64(LANES))
                first = b.add(begin, offset)
                plain = [load_vector(b, weights, b.add(b.mul(stride, I64(head)), offset), VF) for head in range(heads_)]
                steps = {part: _scales_of_rows(b, layout_, groups, scales, first, part) for part in parts}
                for number, (head, part) in enumerate(units):
                    weight, (scale, low) = plain[head], steps[part]
                    if low is not None:
                        b.store(fma(b, weight, low, b.load(lows[head, part])), lows[head, part])
                    if scale is not None:
                        weight = b.fmul(weight, scale, ("fast",))
                    b.store(weight, pointer_to(b, scaled, I64(number * LANES), VF), align=4)
                with cgutils.for_range(b, I64(LANES), intp=I64) as inner:
                    at = [b.gep(scaled, [b.add(inner.index, I64(number * LANES))]) for number in range(len(units))]
                    add(b.add(first, inner.index), [b.load(place) for place in at])
            done = b.and_(n, I64(-LANES))
            with cgutils.for_range(b, b.sub(n, done), intp=I64) as loop:
                index = b.add(done, loop.index)
                row = b.add(begin, index)
                factors = []
                for head, part in units:
                    scale, low = _scales(b, layout_, scales, b.add(b.mul(row, I64(groups)), I64(part)))
                    weight = b.load(b.gep(weights, [b.add(b.mul(stride, I64(head)), index)]))
                    if low is not None:
                        one = b.insert_element(filled(0.0), b.fmul(weight, low, ("fast",)), I32(0))
                        b.store(b.fadd(one, b.load(lows[head, part]), ("fast",)), lows[head, part])
                    factors.append(weight if scale is None else b.fmul(weight, scale, ("fast",)))
                add(row, factors)
            for unit in units:
                for slot, at in zip(held[unit], places[unit], strict=True):
                    value = b.load(slot)
                    if layout_ == "int4":
                        value = b.fadd(value, splat(b, sum_of_all(b, b.load(lows[unit]))), ("fast",))
                    b.store(value, pointer_to(b, out, at, VF), align=1)

        for start in range(0, groups, together):
            sweep(range(start, min(start + together, groups)))
        return context.get_dummy_value()

    return types.void(layout, size, heads, group, weights, rows, scales, types.int64, types.int64, out), emit


@intrinsic
def largest(typing: Any, x: Any, row: Any, n: Any) -> Any:
    """The largest of the first n elements of a row of float32 [.., at least n]; -3e38 for none. n: a multiple of 16."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        first = row_of(context, b, signature, args, 0, args[1])
        most = variable(b, filled(-3e38))
        with cgutils.for_range(b, b.sdiv(args[2], I64(LANES)), intp=I64) as loop:
            vector = load_vector(b, first, b.mul(loop.index, I64(LANES)), VF)
            b.store(call(b, "llvm.maxnum", b.load(most), vector), most)
        return largest_of_all(b, b.load(most))

    return types.float32(x, types.int64, types.int64), emit


@intrinsic
def exponentials(typing: Any, x: Any, row: Any, n: Any, top: Any) -> Any:
    """Turn the first n elements of a row of float32 [.., at least n], none above `top`, into exp(x - top), to 2e-7
    relative, and return their sum. n: a multiple of 16."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        first, top = row_of(context, b, signature, args, 0, args[1]), splat(b, args[3])
        total = variable(b, filled(0.0))
        with cgutils.for_range(b, b.sdiv(args[2], I64(LANES)), intp=I64) as loop:
            at = b.mul(loop.index, I64(LANES))
            power = b.fmul(b.fsub(load_vector(b, first, at, VF), top, ("fast",)), filled(LOG2_E), ("fast",))
            value = exp2(b, power)
            b.store(value, pointer_to(b, first, at, VF), align=1)
            b.store(b.fadd(value, b.load(total), ("fast",)), total)
        return sum_of_all(b, b.load(total))

    return types.float32(x, types.int64, types.int64, types.float32), emit


@intrinsic(prefer_literal=True)
def matvec(
    typing: Any, layout: Any, group: Any,
    x: Any, sums: Any, rows: Any, scales: Any, groups: Any, begin: Any, end: Any, out: Any,
) -> Any:  # fmt: skip
    """out[i] = row[i] . x for begin <= i < end, of a matrix given by addresses.

    One row after the other: several at once would share the loads of x, but memory is read ahead only where it is read
    in order, and that is what a token waits for. Far enough ahead to keep up with us only where it is asked for: on
    some processors that makes twice the speed.

    x float32 [groups * group]; sums float32 [groups], x's sum over each group (int4 reads them); rows and scales: where
    the matrix and its scales begin (int64); out float32.
    """
    if not all_literal(layout, group):
        return None
    layout_, group_ = layout.literal_value, group.literal_value

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, sums, out = (data_of(context, b, signature, args, i) for i in (2, 3, 9))
        rows = b.inttoptr(args[4], ELEMENT[layout_].as_pointer())
        scales = b.inttoptr(args[5], I16.as_pointer())
        groups, begin, end = args[6:9]
        size = b.mul(groups, I64(group_))

        with cgutils.for_range(b, b.sub(end, begin), intp=I64) as rows_loop:
            row = b.add(begin, rows_loop.index)
            acc, rest = variable(b, filled(0.0)), variable(b, F32(0))
            with cgutils.for_range(b, groups, intp=I64) as loop:
                part = loop.index
                at = b.mul(part, I64(group_))
                first = _element(b, layout_, size, group_, row, part)
                read_ahead(b, rows, first, AHEAD)
                vectors = _levels(b, layout_, group_, rows, first)
                scale, low = _scales(b, layout_, scales, b.add(b.mul(row, groups), part))
                total = None if scale is not None else b.load(acc)
                for i, vector in enumerate(vectors):
                    total = fma(b, load_vector(b, x, b.add(at, I64(i * LANES)), VF), vector, total)
                b.store(total if scale is None else fma(b, total, splat(b, scale), b.load(acc)), acc)
                if low is not None:
                    b.store(fma(b, low, b.load(b.gep(sums, [part])), b.load(rest)), rest)
            result = b.fadd(sum_of_all(b, b.load(acc)), b.load(rest), ("fast",))
            b.store(result, b.gep(out, [row]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(layout, group, x, sums, i64, i64, i64, i64, i64, out), emit


# ---- pieces ------------------------------------------------------------------------------------------------


def _element(b: ir.IRBuilder, layout: str, size: Any, group: int, row: Any, part: Any) -> Any:
    """Where group `part` of a row begins, in stored elements (two to a byte in int4)."""
    packing = 2 if layout == "int4" else 1
    length = I64(size // packing) if isinstance(size, int) else b.sdiv(size, I64(packing))
    return b.add(b.mul(row, length), b.mul(part, I64(group // packing)))


def _ask_for(b: ir.IRBuilder, layout: str, size: int, rows: Any, row: Any) -> None:
    """Ask for what lies AHEAD of a row."""
    first = _element(b, layout, size, size, row, I64(0))
    stored = size // 2 if layout == "int4" else size
    for line in range(0, stored * (4 if layout == "f32" else ELEMENT[layout].width // 8), 64):
        read_ahead(b, rows, first, AHEAD + line)


def _levels(b: ir.IRBuilder, layout: str, group: int, rows: Any, at: Any) -> list[Any]:
    """A group as vectors of LANES floats, in order; scale and low not yet applied."""
    if layout == "int4":
        low, high = [], []
        for i in range(group // 2 // LANES):
            raw = b.zext(load_vector(b, rows, b.add(at, I64(i * LANES)), ir.VectorType(I8, LANES)), VI)
            low.append(b.sitofp(b.and_(raw, ir.Constant(VI, [15] * LANES)), VF))
            high.append(b.sitofp(b.lshr(raw, ir.Constant(VI, [4] * LANES)), VF))
        return low + high
    vectors = []
    for i in range(group // LANES):
        here = b.add(at, I64(i * LANES))
        if layout == "f32":
            vectors.append(load_vector(b, rows, here, VF))
        elif layout == "bf16":
            vectors.append(load_bf16(b, rows, here))
        else:
            vectors.append(b.sitofp(b.sext(load_vector(b, rows, here, ir.VectorType(I8, LANES)), VI), VF))
    return vectors


def _scales(b: ir.IRBuilder, layout: str, scales: Any, at: Any) -> tuple[Any, Any]:
    """(scale, low) of group number `at` as float32; None where the layout has none."""

    def read(offset: Any) -> Any:
        return b.bitcast(b.shl(b.zext(b.load(b.gep(scales, [offset])), I32), I32(16)), F32)

    if layout == "int8":
        return read(at), None
    if layout == "int4":
        start = b.mul(at, I64(2))
        return read(start), read(b.add(start, I64(1)))
    return None, None


def _scales_of_rows(b: ir.IRBuilder, layout: str, groups: int, scales: Any, first: Any, part: int) -> tuple[Any, Any]:
    """`_scales` of group `part` of LANES rows from `first` on, as vectors."""
    if layout not in PACKED:
        return None, None
    kind = I16 if layout == "int8" else I32  # scale and low of an int4 group are read as one
    start = b.bitcast(b.gep(scales, [b.mul(first, I64(groups * (kind.width // 16)))]), kind.as_pointer())
    wide = ir.VectorType(kind, LANES * groups)
    bits = load_vector(b, start, I64(0), wide)
    if groups > 1:
        places = ir.Constant(VI, [i * groups + part for i in range(LANES)])
        bits = b.shuffle_vector(bits, ir.Constant(wide, ir.Undefined), places)
    if layout == "int8":
        return b.bitcast(b.shl(b.zext(bits, VI), ir.Constant(VI, [16] * LANES)), VF), None
    scale = b.shl(bits, ir.Constant(VI, [16] * LANES))
    low = b.and_(bits, ir.Constant(VI, [0xFFFF0000] * LANES))
    return b.bitcast(scale, VF), b.bitcast(low, VF)


def _halve(b: ir.IRBuilder, x: Any, y: Any, distance: int) -> Any:
    """One step of adding up the elements of many vectors at once: x and y hold several sums, each still spread over
    2 * distance neighbours; the result holds the sums of both, over `distance` neighbours each.

    Distance 8 puts y's after x's, 4 too; 2 and 1 stay within quarters of a vector, where shuffles are cheapest, so that
    16 vectors end in the order IN_ORDER mends.
    """
    if distance == 8:
        near = [*range(8), *range(16, 24)]
    elif distance == 4:
        near = [*range(4), *range(8, 12), *range(16, 20), *range(24, 28)]
    elif distance == 2:
        near = [4 * quarter + i for quarter in range(4) for i in (0, 1, 16, 17)]
    else:
        near = [4 * quarter + i for quarter in range(4) for i in (0, 2, 16, 18)]
    one = b.shuffle_vector(x, y, ir.Constant(VI, near))
    other = b.shuffle_vector(x, y, ir.Constant(VI, [i + distance for i in near]))
    return b.fadd(one, other, ("fast",))
