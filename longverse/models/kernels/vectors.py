"""Writing LLVM code for numba functions by hand: vectors of LANES floats and the pieces they are handled with.

LLVM makes of such a vector what the processor has: one AVX-512 register, two of AVX, four of NEON.
"""

from __future__ import annotations

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
LOG2_E = 1.4426950408889634
LOWEST = ir.Constant(VF, [-3e38] * LANES)
# 2 ** x for 0 <= x < 1, to 2e-7: a polynomial, the highest power first.
POWER_OF_TWO = (0.00187623, 0.00899258, 0.0558236, 0.24015453, 0.69315297, 0.99999993)


def all_literal(*given: Any) -> bool:
    """Whether numba knows the values of these arguments where the function is called."""
    return all(isinstance(x, types.Literal) for x in given)


def data_of(context: Any, b: ir.IRBuilder, signature: Any, args: Any, i: int) -> Any:
    """Where the array that is argument i begins."""
    return context.make_array(signature.args[i])(context, b, args[i]).data


def row_stride_of(context: Any, b: ir.IRBuilder, signature: Any, args: Any, i: int) -> Any:
    """float32 elements from row to row of argument i."""
    array = context.make_array(signature.args[i])(context, b, args[i])
    return b.sdiv(cgutils.unpack_tuple(b, array.strides, 2)[0], I64(4))


def row_of(context: Any, b: ir.IRBuilder, signature: Any, args: Any, i: int, row: Any) -> Any:
    """Where a row of the matrix that is argument i begins."""
    stride = row_stride_of(context, b, signature, args, i)
    return b.gep(data_of(context, b, signature, args, i), [b.mul(stride, row)])


def pointer_to(b: ir.IRBuilder, base: Any, at: Any, kind: Any) -> Any:
    return b.bitcast(b.gep(base, [at]), kind.as_pointer())


def load_vector(b: ir.IRBuilder, base: Any, at: Any, vector: ir.VectorType) -> Any:
    return b.load(pointer_to(b, base, at, vector), align=1)


def load_bf16(b: ir.IRBuilder, base: Any, at: Any) -> Any:
    """LANES bfloat16 numbers, given as bits, as floats."""
    bits = b.zext(load_vector(b, base, at, ir.VectorType(I16, LANES)), VI)
    return b.bitcast(b.shl(bits, ir.Constant(VI, [16] * LANES)), VF)


def read_ahead(b: ir.IRBuilder, base: Any, at: Any, distance: int) -> None:
    """Have the cache line `distance` bytes after base[at] brought near. It may lie past the array's end."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    place = b.gep(b.bitcast(b.gep(base, [at]), I8.as_pointer()), [I64(distance)])
    b.call(function, (place, I32(0), I32(3), I32(1)))  # to be read, into the nearest cache, as data


def variable(b: ir.IRBuilder, value: Any) -> Any:
    """A slot that holds `value` now; LLVM keeps it in a register."""
    slot = cgutils.alloca_once(b, value.type)
    b.store(value, slot)
    return slot


def scratch(b: ir.IRBuilder, kind: Any, count: int) -> Any:
    """Memory for `count` elements within a call, beginning with a cache line."""
    area = cgutils.alloca_once(b, ir.ArrayType(kind, count))
    area.align = 64
    return b.bitcast(area, kind.as_pointer())


def fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, or x * y where there is no z yet."""
    if z is None:
        return b.fmul(x, y, ("fast",))
    name = "llvm.fma.f32" if x.type == F32 else f"llvm.fma.v{LANES}f32"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type] * 3), name)
    return b.call(function, (x, y, z), fastmath=("fast",))


def call(b: ir.IRBuilder, name: str, *vectors: Any) -> Any:
    """One of LLVM's functions of whole vectors."""
    kind = ir.FunctionType(VF, [VF] * len(vectors))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"{name}.v{LANES}f32"), vectors, fastmath=("fast",))


def sum_of_all(b: ir.IRBuilder, vector: Any) -> Any:
    """The sum of a vector's elements."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(F32, [F32, VF]), name)
    return b.call(function, (F32(0), vector), fastmath=("fast",))


def largest_of_all(b: ir.IRBuilder, vector: Any) -> Any:
    """The largest of a vector's elements."""
    name = f"llvm.vector.reduce.fmax.v{LANES}f32"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(F32, [VF]), name)
    return b.call(function, (vector,), fastmath=("fast",))


def larger(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """The larger of each two elements."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def filled(value: float) -> Any:
    """A vector of the same constant everywhere."""
    return ir.Constant(VF, [value] * LANES)


def splat(b: ir.IRBuilder, value: Any) -> Any:
    """A vector of the same float everywhere."""
    one = b.insert_element(ir.Constant(VF, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(VF, ir.Undefined), ir.Constant(VI, [0] * LANES))


def exp2(b: ir.IRBuilder, x: Any) -> Any:
    """2 ** x of a vector with x <= 0, to 2e-7 relative; below 2 ** -125 a number next to nothing, and none of those
    that processors take long for."""
    x = call(b, "llvm.maxnum", x, filled(-125.0))
    whole = call(b, "llvm.floor", x)
    rest = b.fsub(x, whole, ("fast",))
    value: Any = filled(POWER_OF_TWO[0])
    for coefficient in POWER_OF_TWO[1:]:
        value = fma(b, value, rest, filled(coefficient))
    exponent = b.shl(b.fptosi(whole, VI), ir.Constant(VI, [23] * LANES))
    return b.bitcast(b.add(b.bitcast(value, VI), exponent), VF)


@intrinsic
def transpose_words(typing: Any, rows: Any, first: Any, at: Any, out: Any, place: Any, stride: Any) -> Any:
    """Turn 16 rows of 16 words of four bytes into columns: rows, a matrix of any type, from its row `first` and word
    `at` on; out, of any type of four bytes, its rows `stride` apart from out[place] on."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        out = data_of(context, b, signature, args, 3)
        words, width = _words(context, b, signature, args)
        begins = [b.add(b.mul(b.add(args[1], I64(i)), width), args[2]) for i in range(LANES)]
        vectors = [load_vector(b, words, begin, VI) for begin in begins]
        step = 1
        while step < LANES:  # square blocks of `step` change places
            low = [i if not i & step else LANES + i - step for i in range(LANES)]
            high = [i + step if not i & step else LANES + i for i in range(LANES)]
            for i in range(LANES):
                if not i & step:
                    one, other = vectors[i], vectors[i + step]
                    vectors[i] = b.shuffle_vector(one, other, ir.Constant(VI, low))
                    vectors[i + step] = b.shuffle_vector(one, other, ir.Constant(VI, high))
            step *= 2
        for i, vector in enumerate(vectors):
            b.store(vector, pointer_to(b, out, b.add(args[4], b.mul(args[5], I64(i))), VI), align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, i64, i64, out, i64, i64), emit


@intrinsic
def copy_words(typing: Any, rows: Any, first: Any, out: Any, place: Any, count: Any) -> Any:
    """out[place : place + count] = the first `count` words of a row as in `transpose_words`."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        out = data_of(context, b, signature, args, 2)
        words, width = _words(context, b, signature, args)
        start = b.mul(args[1], width)
        with cgutils.for_range(b, args[4], intp=I64) as loop:  # which LLVM makes vectors of
            word = b.load(b.gep(words, [b.add(start, loop.index)]), align=2)
            b.store(word, b.gep(out, [b.add(args[3], loop.index)]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, i64, out, i64, i64), emit


def _words(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> tuple[Any, Any]:
    """Where the matrix that is argument 0 begins, as words of four bytes, and how many words its rows are apart."""
    array = context.make_array(signature.args[0])(context, b, args[0])
    width = b.sdiv(cgutils.unpack_tuple(b, array.strides, 2)[0], I64(4))
    return b.bitcast(array.data, I32.as_pointer()), width
