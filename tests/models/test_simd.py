"""The inner loops of the CPU kernels against numpy, for row counts that are no whole vectors too."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from numba import njit

from longverse.models.kernels.arrays import array
from longverse.models.kernels.simd import dots, exponentials, largest, matvec, weighted_sum
from longverse.models.packing import Packing

FORMS = [("f32", 32, 2, 32), ("bf16", 64, 3, 64), ("int8", 64, 3, 64), ("int8", 48, 1, 16), ("int4", 128, 2, 64)]
ROWS = 70


@lru_cache(maxsize=8)
def compiled(layout: str, size: int, heads: int, group: int) -> tuple[Any, Any]:
    options: dict[str, Any] = {"fastmath": True, "error_model": "numpy"}

    @njit(**options)  # type: ignore[untyped-decorator]
    def products(q: Any, sums: Any, rows: Any, scales: Any, begin: int, n: int, out: Any) -> None:
        dots(layout, size, heads, group, q, sums, rows, scales, begin, n, out)

    @njit(**options)  # type: ignore[untyped-decorator]
    def sums(weights: Any, rows: Any, scales: Any, begin: int, n: int, out: Any) -> None:
        weighted_sum(layout, size, heads, group, weights, rows, scales, begin, n, out)

    return products, sums


@lru_cache(maxsize=1)
def of_a_row() -> tuple[Any, Any]:
    return njit(lambda x, n: largest(x, 1, n)), njit(lambda x, n, top: exponentials(x, 1, n, top))


def stored(layout: str, size: int, group: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROWS rows as stored [1, ROWS, ..], their scales, and what they stand for in float32 [ROWS, D]."""
    x = torch.randn(ROWS, size, generator=torch.Generator().manual_seed(seed))
    none = np.empty((1, ROWS, 0), np.uint16)
    if layout in ("f32", "bf16"):
        rows = x if layout == "f32" else x.bfloat16()
        return array(rows)[None], none, rows.float().numpy()
    packing = Packing(layout, size, group)
    levels, scales = packing.quantize(x)
    meant = packing.dequantize(levels, scales, torch.float32).numpy()
    return array(levels)[None], array(scales.flatten(1))[None], meant


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), begin=st.integers(0, 40), n=st.integers(0, 30))
def test_rows_times_queries_and_weights_times_rows(form: Any, seed: int, begin: int, n: int) -> None:
    layout, size, heads, group = form
    rows, scales, meant = stored(layout, size, group, seed)
    random = np.random.default_rng(seed)
    q, weights = (random.standard_normal((heads, wide)).astype(np.float32) for wide in (size, n + 3))
    sums = q.reshape(heads, -1, group).sum(-1)
    products, weighted = compiled(*form)
    out = np.full((heads, n + 1), 7, np.float32)
    products(q, sums, rows, scales, begin, n, out)
    np.testing.assert_allclose(out[:, :n], q @ meant[begin : begin + n].T, rtol=1e-4, atol=1e-4)
    assert (out[:, n] == 7).all()  # nothing beyond
    acc = random.standard_normal((heads, size)).astype(np.float32)
    expected = acc + weights[:, :n] @ meant[begin : begin + n]
    weighted(weights, rows, scales, begin, n, acc)
    np.testing.assert_allclose(acc, expected, rtol=1e-4, atol=1e-4)


@given(st.lists(st.floats(-3e4, 3e4, width=32), min_size=48, max_size=48), st.sampled_from([0, 16, 48]))
@settings(max_examples=50, deadline=None)
def test_largest_and_exponentials(values: list[float], n: int) -> None:
    find, turn = of_a_row()
    x = np.zeros((2, 48), np.float32)
    x[1] = values
    top = np.float32(max(values[:n], default=0.0))
    assert find(x, n) == (top if n else np.float32(-3e38))
    expected = np.exp(np.maximum(x[1, :n].astype(np.float64) - top, -87.3))
    total = turn(x, n, top)
    np.testing.assert_allclose(x[1, :n], expected, rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    assert (x[0] == 0).all()
    assert (x[1, n:] == np.array(values[n:], np.float32)).all()


@pytest.mark.parametrize("layout", ["f32", "int8", "int4"])
def test_matrix_times_vector(layout: str) -> None:
    group = 32

    @njit
    def product(x: Any, sums: Any, rows: int, scales: int, begin: int, end: int, out: Any) -> None:
        matvec(layout, group, x, sums, rows, scales, x.size // group, begin, end, out)

    rows, scales, meant = stored(layout, 96, group, 1)
    x = np.random.default_rng(1).standard_normal(96).astype(np.float32)
    out = np.zeros(ROWS, np.float32)
    product(x, x.reshape(-1, group).sum(-1), rows.ctypes.data, scales.ctypes.data, 3, 40, out)
    np.testing.assert_allclose(out[3:40], meant[3:40] @ x, rtol=1e-4, atol=1e-4)
    assert (out[:3] == 0).all()
    assert (out[40:] == 0).all()
