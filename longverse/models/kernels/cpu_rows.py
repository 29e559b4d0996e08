# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated"
"""What a bfloat16 network does between its products on a CPU, each in one pass over its rows.

torch makes several passes of a norm, a rotation or a gate, each with a temporary the size of its input, and together
they take as long as the products, where those run on AMX tiles. Here a row is read once, computed in float32 and
rounded once. `rows.py` has the same in plain torch; `rowwise.py` decides which runs.

Compiled by `team.specialise`; all threads of a team share out the rows. Numbers are bits of bfloat16, as uint16; rows
are whole vectors of LANES numbers.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .vectors import (
    I16,
    I64,
    LANES,
    LOG2_E,
    VF,
    VI,
    call,
    data_of,
    exp2,
    filled,
    fma,
    intrinsic,
    load_bf16,
    pointer_to,
    splat,
    sum_of_all,
    variable,
)  # fmt: skip


def norm_rows(rank, team, counter, x, weight, eps, out):
    """out[i] = x[i] / sqrt(mean of x[i] ** 2 + eps) * weight. x, out [rows, C]; weight [C]."""
    rows, size = x.shape
    for row in range(rows * rank // team, rows * (rank + 1) // team):
        mean = sum_of_squares(x, row * size, size) / np.float32(size)
        scale_row(x, row * size, size, np.float32(1) / np.sqrt(mean + eps), weight, out)


def turn_rows(rank, team, counter, x, each, cos, sin, out):
    """Half-split rotation. x, out [rows, D]; row i has the position i // each % T of cos, sin [T, D]."""
    rows, size = x.shape
    for row in range(rows * rank // team, rows * (rank + 1) // team):
        turn_row(x, row * size, size // 2, cos, sin, row // each % cos.shape[0] * size, out)


def gate_rows(rank, team, counter, gate, up, out):
    """out = gate * sigmoid(gate) * up, all [n * LANES]."""
    vectors = gate.size // LANES
    begin, end = vectors * rank // team * LANES, vectors * (rank + 1) // team * LANES
    gate_row(gate, up, begin, end - begin, out)


# ---- inner loops: `at` is a place in the flat array, `n` a multiple of LANES ----------------------------------


@intrinsic
def sum_of_squares(typing: Any, x: Any, at: Any, n: Any) -> Any:
    """The sum of x[i] ** 2 for n numbers from x[at] on, as float32."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x = data_of(context, b, signature, args, 0)
        total = variable(b, filled(0.0))
        with cgutils.for_range(b, b.sdiv(args[2], I64(LANES)), intp=I64) as loop:
            vector = load_bf16(b, x, b.add(args[1], b.mul(loop.index, I64(LANES))))
            b.store(fma(b, vector, vector, b.load(total)), total)
        return sum_of_all(b, b.load(total))

    return types.float32(x, types.int64, types.int64), emit


@intrinsic
def scale_row(typing: Any, x: Any, at: Any, n: Any, factor: Any, weight: Any, out: Any) -> Any:
    """out[at + i] = x[at + i] * factor * weight[i] for i < n."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, weight, out = (data_of(context, b, signature, args, i) for i in (0, 4, 5))
        factor = splat(b, args[3])
        with cgutils.for_range(b, b.sdiv(args[2], I64(LANES)), intp=I64) as loop:
            i = b.mul(loop.index, I64(LANES))
            place = b.add(args[1], i)
            scaled = b.fmul(load_bf16(b, x, place), factor, ("fast",))
            _store(b, b.fmul(scaled, load_bf16(b, weight, i), ("fast",)), out, place)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, types.float32, weight, out), emit


@intrinsic
def turn_row(typing: Any, x: Any, at: Any, n: Any, cos: Any, sin: Any, turn: Any, out: Any) -> Any:
    """A row of 2 n numbers from x[at] on, by the angles from cos[turn] and sin[turn] on."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, cos, sin, out = (data_of(context, b, signature, args, i) for i in (0, 3, 4, 6))
        with cgutils.for_range(b, b.sdiv(args[2], I64(LANES)), intp=I64) as loop:
            i = b.mul(loop.index, I64(LANES))
            one, other = (b.add(base, i) for base in (args[1], b.add(args[1], args[2])))
            first, second = load_bf16(b, x, one), load_bf16(b, x, other)
            turned = b.fmul(second, load_bf16(b, sin, b.add(args[5], i)), ("fast",))
            _store(
                b, b.fsub(b.fmul(first, load_bf16(b, cos, b.add(args[5], i)), ("fast",)), turned, ("fast",)), out, one
            )
            i = b.add(args[2], i)
            turned = b.fmul(first, load_bf16(b, sin, b.add(args[5], i)), ("fast",))
            _store(b, fma(b, second, load_bf16(b, cos, b.add(args[5], i)), turned), out, other)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, cos, sin, types.int64, out), emit


@intrinsic
def gate_row(typing: Any, gate: Any, up: Any, at: Any, n: Any, out: Any) -> Any:
    """out[i] = gate[i] * sigmoid(gate[i]) * up[i] for n numbers from `at` on."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        gate, up, out = (data_of(context, b, signature, args, i) for i in (0, 1, 4))
        with cgutils.for_range(b, b.sdiv(args[3], I64(LANES)), intp=I64) as loop:
            place = b.add(args[2], b.mul(loop.index, I64(LANES)))
            g = load_bf16(b, gate, place)
            # Of exp(-|g|), which never overflows: sigmoid is 1 / (1 + it), or for negative g it / (1 + it).
            small = exp2(b, b.fmul(call(b, "llvm.fabs", g), filled(-LOG2_E), ("fast",)))
            above = b.select(b.fcmp_ordered(">=", g, filled(0.0)), filled(1.0), small)
            below = _inverse(b, b.fadd(small, filled(1.0), ("fast",)))
            product = b.fmul(b.fmul(g, above, ("fast",)), b.fmul(load_bf16(b, up, place), below, ("fast",)), ("fast",))
            _store(b, product, out, place)
        return context.get_dummy_value()

    return types.void(gate, up, types.int64, types.int64, out), emit


def _inverse(b: ir.IRBuilder, x: Any) -> Any:
    """1 / x to 6e-5 relative, far below what rounding to bfloat16 leaves, in a fifth of a division's time."""
    kind = ir.FunctionType(VF, [VF, VF, I16])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.rcp14.ps.512")
    return b.call(function, (x, filled(0.0), I16(-1)))


def _store(b: ir.IRBuilder, x: Any, base: Any, at: Any) -> None:
    """LANES floats, rounded as `simd.float_to_bf16` does."""
    bits = b.bitcast(x, VI)
    odd = b.and_(b.lshr(bits, _every(16)), _every(1))
    rounded = b.lshr(b.add(bits, b.add(odd, _every(0x7FFF))), _every(16))
    halves = ir.VectorType(I16, LANES)
    b.store(b.trunc(rounded, halves), pointer_to(b, base, at, halves), align=1)


def _every(value: int) -> Any:
    return ir.Constant(VI, [value] * LANES)
