"""Inner loops of the CPU kernels, as LLVM vectors of 16 floats, built into numba functions.

numba's own loops vectorise when LLVM happens to see through them; a decode step waits for these few lines alone, so
they are spelled out. LLVM makes of a vector what the processor has: one AVX-512 register, two of AVX, four of NEON.

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
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # its own annotation takes no account of the first argument, which numba gives
LANES = 16
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VF = ir.VectorType(F32, LANES)
VI = ir.VectorType(I32, LANES)
ELEMENT = {"f32": F32, "bf16": I16, "int8": I8, "int4": I8}
ROWS_AT_ONCE = 4  # of a matrix: they share the loads of the vector, and their sums do not wait for each other


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
        return b.atomic_rmw("add", _data(context, b, signature, args, 0), I64(1), "seq_cst")

    return types.int64(counter), emit


@intrinsic
def look(typing: Any, counter: Any) -> Any:
    """The first element of an int64 array as other threads left it."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.load_atomic(_data(context, b, signature, args, 0), "seq_cst", 8)

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
    if not _constants(layout, size, heads, group):
        return None
    layout_, size_, heads_, group_ = (x.literal_value for x in (layout, size, heads, group))
    groups = size_ // group_

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        q, sums, rows, scales, out = (_data(context, b, signature, args, i) for i in (4, 5, 6, 7, 10))
        stride = _row_stride(context, b, signature, args, 10)
        with cgutils.for_range(b, args[9], intp=I64) as loop:
            row = b.add(args[8], loop.index)
            sum_of: list[Any] = [None] * heads_
            rest: list[Any] = [None] * heads_
            for part in range(groups):
                vectors = _levels(b, layout_, group_, rows, _element(b, layout_, size_, group_, row, I64(part)))
                scale, low = _scales(b, layout_, scales, b.add(b.mul(row, I64(groups)), I64(part)))
                for head in range(heads_):
                    acc = None if scale is not None else sum_of[head]
                    for i, vector in enumerate(vectors):
                        acc = _fma(b, _load(b, q, I64(head * size_ + part * group_ + i * LANES), VF), vector, acc)
                    sum_of[head] = acc if scale is None else _fma(b, acc, _splat(b, scale), sum_of[head])
                    if low is not None:
                        rest[head] = _fma(b, low, b.load(b.gep(sums, [I64(head * groups + part)])), rest[head])
            for head in range(heads_):
                result = _total(b, sum_of[head])
                if rest[head] is not None:
                    result = b.fadd(result, rest[head], ("fast",))
                b.store(result, b.gep(out, [b.add(b.mul(stride, I64(head)), loop.index)]))
        return context.get_dummy_value()

    return types.void(layout, size, heads, group, q, sums, rows, scales, types.int64, types.int64, out), emit


@intrinsic(prefer_literal=True)
def weighted_sum(
    typing: Any, layout: Any, size: Any, heads: Any, group: Any,
    weights: Any, rows: Any, scales: Any, begin: Any, n: Any, out: Any,
) -> Any:  # fmt: skip
    """out[h] += sum over i < n of weights[h, i] * row[begin + i], for all heads h.

    weights float32 [heads, at least n]; out float32 [heads, size]. One group of elements at a time, so that the sums of
    all heads stay in registers while the rows pass by.
    """
    if not _constants(layout, size, heads, group):
        return None
    layout_, size_, heads_, group_ = (x.literal_value for x in (layout, size, heads, group))
    groups = size_ // group_

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        weights, rows, scales, out = (_data(context, b, signature, args, i) for i in (4, 5, 6, 9))
        stride = _row_stride(context, b, signature, args, 4)
        for part in range(groups):
            places = [
                [I64(head * size_ + part * group_ + i * LANES) for i in range(group_ // LANES)]
                for head in range(heads_)
            ]
            held = [[_variable(b, _load(b, out, at, VF)) for at in of_head] for of_head in places]
            lows = [_variable(b, F32(0)) for _ in range(heads_)]
            with cgutils.for_range(b, args[8], intp=I64) as loop:
                row = b.add(args[7], loop.index)
                vectors = _levels(b, layout_, group_, rows, _element(b, layout_, size_, group_, row, I64(part)))
                scale, low = _scales(b, layout_, scales, b.add(b.mul(row, I64(groups)), I64(part)))
                for head in range(heads_):
                    weight = b.load(b.gep(weights, [b.add(b.mul(stride, I64(head)), loop.index)]))
                    if low is not None:
                        b.store(_fma(b, weight, low, b.load(lows[head])), lows[head])
                    factor = _splat(b, weight if scale is None else b.fmul(weight, scale, ("fast",)))
                    for slot, vector in zip(held[head], vectors, strict=True):
                        b.store(_fma(b, factor, vector, b.load(slot)), slot)
            for head in range(heads_):
                for slot, at in zip(held[head], places[head], strict=True):
                    value = b.load(slot)
                    if layout_ == "int4":
                        value = b.fadd(value, _splat(b, b.load(lows[head])), ("fast",))
                    b.store(value, _pointer(b, out, at, VF), align=1)
        return context.get_dummy_value()

    return types.void(layout, size, heads, group, weights, rows, scales, types.int64, types.int64, out), emit


@intrinsic(prefer_literal=True)
def matvec(
    typing: Any, layout: Any, group: Any,
    x: Any, sums: Any, rows: Any, scales: Any, groups: Any, begin: Any, end: Any, out: Any,
) -> Any:  # fmt: skip
    """out[i] = row[i] . x for begin <= i < end, of a matrix given by addresses.

    x float32 [groups * group]; sums float32 [groups], x's sum over each group (int4 reads them); rows and scales: where
    the matrix and its scales begin (int64); out float32.
    """
    if not _constants(layout, group):
        return None
    layout_, group_ = layout.literal_value, group.literal_value

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, sums, out = (_data(context, b, signature, args, i) for i in (2, 3, 9))
        rows = b.inttoptr(args[4], ELEMENT[layout_].as_pointer())
        scales = b.inttoptr(args[5], I16.as_pointer())
        groups, begin, end = args[6:9]
        size = b.mul(groups, I64(group_))

        def block(first: Any, many: int) -> None:
            """Rows first .. first + many - 1."""
            acc = [_variable(b, ir.Constant(VF, [0.0] * LANES)) for _ in range(many)]
            rest = [_variable(b, F32(0)) for _ in range(many)]
            with cgutils.for_range(b, groups, intp=I64) as loop:
                part = loop.index
                at = b.mul(part, I64(group_))
                parts = [_load(b, x, b.add(at, I64(i * LANES)), VF) for i in range(group_ // LANES)]
                for r in range(many):
                    row = b.add(first, I64(r))
                    vectors = _levels(b, layout_, group_, rows, _element(b, layout_, size, group_, row, part))
                    scale, low = _scales(b, layout_, scales, b.add(b.mul(row, groups), part))
                    total = None if scale is not None else b.load(acc[r])
                    for mine, vector in zip(parts, vectors, strict=True):
                        total = _fma(b, mine, vector, total)
                    if scale is not None:
                        total = _fma(b, total, _splat(b, scale), b.load(acc[r]))
                    b.store(total, acc[r])
                    if low is not None:
                        b.store(_fma(b, low, b.load(b.gep(sums, [part])), b.load(rest[r])), rest[r])
            for r in range(many):
                result = b.fadd(_total(b, b.load(acc[r])), b.load(rest[r]), ("fast",))
                b.store(result, b.gep(out, [b.add(first, I64(r))]))

        blocks = b.sdiv(b.sub(end, begin), I64(ROWS_AT_ONCE))
        with cgutils.for_range(b, blocks, intp=I64) as loop:
            block(b.add(begin, b.mul(loop.index, I64(ROWS_AT_ONCE))), ROWS_AT_ONCE)
        done = b.add(begin, b.mul(blocks, I64(ROWS_AT_ONCE)))
        with cgutils.for_range(b, b.sub(end, done), intp=I64) as loop:
            block(b.add(done, loop.index), 1)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(layout, group, x, sums, i64, i64, i64, i64, i64, out), emit


# ---- pieces ------------------------------------------------------------------------------------------------


def _constants(*given: Any) -> bool:
    return all(isinstance(x, types.Literal) for x in given)


def _element(b: ir.IRBuilder, layout: str, size: Any, group: int, row: Any, part: Any) -> Any:
    """Where group `part` of a row begins, in stored elements (two to a byte in int4)."""
    packing = 2 if layout == "int4" else 1
    length = I64(size // packing) if isinstance(size, int) else b.sdiv(size, I64(packing))
    return b.add(b.mul(row, length), b.mul(part, I64(group // packing)))


def _levels(b: ir.IRBuilder, layout: str, group: int, rows: Any, at: Any) -> list[Any]:
    """A group as vectors of LANES floats, in order; scale and low not yet applied."""
    if layout == "int4":
        low, high = [], []
        for i in range(group // 2 // LANES):
            raw = b.zext(_load(b, rows, b.add(at, I64(i * LANES)), ir.VectorType(I8, LANES)), VI)
            low.append(b.sitofp(b.and_(raw, ir.Constant(VI, [15] * LANES)), VF))
            high.append(b.sitofp(b.lshr(raw, ir.Constant(VI, [4] * LANES)), VF))
        return low + high
    vectors = []
    for i in range(group // LANES):
        here = b.add(at, I64(i * LANES))
        if layout == "f32":
            vectors.append(_load(b, rows, here, VF))
        elif layout == "bf16":
            raw = b.zext(_load(b, rows, here, ir.VectorType(I16, LANES)), VI)
            vectors.append(b.bitcast(b.shl(raw, ir.Constant(VI, [16] * LANES)), VF))
        else:
            vectors.append(b.sitofp(b.sext(_load(b, rows, here, ir.VectorType(I8, LANES)), VI), VF))
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


def _data(context: Any, b: ir.IRBuilder, signature: Any, args: Any, i: int) -> Any:
    """Where the array that is argument i begins."""
    return context.make_array(signature.args[i])(context, b, args[i]).data


def _row_stride(context: Any, b: ir.IRBuilder, signature: Any, args: Any, i: int) -> Any:
    """float32 elements from row to row of argument i."""
    array = context.make_array(signature.args[i])(context, b, args[i])
    return b.sdiv(cgutils.unpack_tuple(b, array.strides, 2)[0], I64(4))


def _pointer(b: ir.IRBuilder, base: Any, at: Any, kind: Any) -> Any:
    return b.bitcast(b.gep(base, [at]), kind.as_pointer())


def _load(b: ir.IRBuilder, base: Any, at: Any, vector: ir.VectorType) -> Any:
    return b.load(_pointer(b, base, at, vector), align=1)


def _variable(b: ir.IRBuilder, value: Any) -> Any:
    """A slot that holds `value` now; LLVM keeps it in a register."""
    slot = cgutils.alloca_once(b, value.type)
    b.store(value, slot)
    return slot


def _fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, or x * y where there is no z yet."""
    if z is None:
        return b.fmul(x, y, ("fast",))
    name = "llvm.fma.f32" if x.type == F32 else f"llvm.fma.v{LANES}f32"
    fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type] * 3), name)
    return b.call(fma, (x, y, z), fastmath=("fast",))


def _total(b: ir.IRBuilder, vector: Any) -> Any:
    """The sum of a vector's elements."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    total = cgutils.get_or_insert_function(b.module, ir.FunctionType(F32, [F32, VF]), name)
    return b.call(total, (F32(0), vector), fastmath=("fast",))


def _splat(b: ir.IRBuilder, value: Any) -> Any:
    one = b.insert_element(ir.Constant(VF, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(VF, ir.Undefined), ir.Constant(VI, [0] * LANES))
