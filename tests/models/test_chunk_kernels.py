"""Attention of many queries by each kind of tiles, AMX, AVX-512 BF16 and float32, against the definition."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longverse.models import kernels
from longverse.models.attention import reference_attention
from longverse.models.cache import KVCache
from longverse.models.compiled import compiled_fits
from longverse.models.sparse import Sparse


class Tiles(NamedTuple):
    """A kind of tiles, the type it multiplies, and how far off the definition it may be."""

    name: str
    dtype: torch.dtype
    near: float

    def drawn(self, heads: int, tokens: int, size: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(1, heads, tokens, size, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


KINDS = (
    Tiles("amx", torch.bfloat16, 0.004), Tiles("bf16", torch.bfloat16, 0.004), Tiles("f32", torch.float32, 3e-6)
)  # fmt: skip


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tiles:
    if kernels.unavailable():
        pytest.skip(f"no CPU kernels: {kernels.unavailable()}")
    from longverse.models.kernels import chunk

    kind: Tiles = request.param
    runs = {"amx": chunk.amx_runs_here, "bf16": kernels.bfloat16_runs_here}.get(kind.name, lambda: True)
    if not runs():
        pytest.skip(f"this processor has no {kind.name} products")
    monkeypatch.setattr(chunk, "tiles_for", lambda q: kind.name)
    monkeypatch.setattr(chunk, "BUFFER", 1 << 16)  # so that the past takes several stretches
    monkeypatch.setattr(chunk, "SPARSE_BUFFER", 1 << 16)
    return kind


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.float() - expected).norm() / expected.norm()).item())


def test_any_shape_is_the_definition(tiles: Tiles) -> None:
    from longverse.models.kernels import chunk

    @settings(max_examples=25, deadline=None)
    @given(
        groups=st.integers(1, 2), form=st.sampled_from([(3, 64), (1, 96)]), new=st.integers(1, 200),
        past=st.integers(0, 300), sharpness=st.sampled_from([0.1, 1.0, 6.0]),
    )  # fmt: skip
    @example(groups=1, form=(1, 96), new=5, past=640, sharpness=1.0)  # a single tile of queries
    @example(groups=1, form=(1, 96), new=40, past=100, sharpness=1.0)  # one block of which one tile sees all
    @example(groups=2, form=(3, 64), new=400, past=0, sharpness=1.0)
    def check(groups: int, form: tuple[int, int], new: int, past: int, sharpness: float) -> None:
        share, size = form  # each is compiled: two are enough here
        q = tiles.drawn(groups * share, new, size) * sharpness
        k, v = tiles.drawn(groups, past + new, size, 1), tiles.drawn(groups, past + new, size, 2)
        before = q.clone()
        assert error(chunk.attend(q, k, v), reference_attention(q.float(), k, v)) < tiles.near
        assert torch.equal(q, before)

    check()


@pytest.mark.parametrize("rising", [True, False])
def test_scores_that_rise_and_fall_along_the_text(tiles: Tiles, rising: bool) -> None:
    """Rising ones make the running softmax scale what it holds anew, block by block."""
    from longverse.models.kernels import chunk

    tokens = 700
    q, k, v = tiles.drawn(3, 60, 64).abs(), tiles.drawn(1, tokens, 64, 1).abs(), tiles.drawn(1, tokens, 64, 2)
    height = torch.linspace(0.1, 6, tokens) if rising else torch.linspace(6, 0.1, tokens)
    k = (k * height[:, None]).to(tiles.dtype)
    assert error(chunk.attend(q, k, v), reference_attention(q.float(), k, v)) < tiles.near


@pytest.mark.parametrize("kind", KINDS[1:], ids=[kind.name for kind in KINDS[1:]])
def test_heads_that_are_no_whole_amx_tiles_take_the_other_kernel(kind: Tiles) -> None:
    from longverse.models.kernels import chunk

    q, k, v = kind.drawn(4, 100, 80), kind.drawn(2, 300, 80, 1), kind.drawn(2, 300, 80, 2)
    if not compiled_fits(q, None):
        pytest.skip(f"no kernel here for {kind.name}")
    assert chunk.tiles_for(q) == kind.name
    assert error(chunk.attend(q, k, v), reference_attention(q.float(), k, v)) < kind.near


def test_few_keys_in_float32_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.unavailable():
        pytest.skip(f"no CPU kernels: {kernels.unavailable()}")
    q = KINDS[2].drawn(3, 100, 64)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert [compiled_fits(q, keys) for keys in (4095, 4096, None)] == [False, True, True]
    assert not compiled_fits(q.repeat(2, 1, 1, 1), 5000)
    assert not compiled_fits(q[..., :40], 5000)
    assert not compiled_fits(q.double(), 5000)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert [compiled_fits(q, keys) for keys in (4096, None)] == [False, True]


def test_amx_is_left_alone_where_the_system_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.models.kernels import chunk

    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    chunk.amx_runs_here.cache_clear()
    try:
        assert chunk.tiles_for(KINDS[0].drawn(1, 1, 64)) == "bf16"
    finally:
        chunk.amx_runs_here.cache_clear()


def test_three_threads_and_torch_products_in_between(tiles: Tiles) -> None:
    """torch's own products configure the same tile registers; memory that was never written holds NaN here."""
    from longverse.models.kernels import chunk

    q, k, v = tiles.drawn(6, 130, 64), tiles.drawn(2, 400, 64, 1), tiles.drawn(2, 400, 64, 2)
    x, expected = tiles.drawn(1, 256, 256)[0, 0], reference_attention(q.float(), k, v)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    product = x @ x
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        for _ in range(3):
            assert error(chunk.attend(q, k, v), expected) < tiles.near
            assert torch.equal(x @ x, product)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_weights_next_to_nothing_make_no_nan(tiles: Tiles) -> None:
    from longverse.models.kernels import chunk

    q, k, v = tiles.drawn(3, 90, 64) * 40, tiles.drawn(1, 500, 64, 1) * 40, tiles.drawn(1, 500, 64, 2)
    found = chunk.attend(q, k, v)
    assert torch.isfinite(found).all()
    assert error(found, reference_attention(q.float(), k, v)) < 0.01


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_log_sums_of_blocks(tiles: Tiles, kept: torch.dtype) -> None:
    from longverse.models.kernels import chunk

    if kept == torch.float32 and tiles.dtype != kept:
        pytest.skip("keys in float32 want queries in float32")

    @settings(max_examples=15, deadline=None)
    @given(
        form=st.sampled_from([(3, 64), (1, 96)]), layer=st.integers(0, 1), groups=st.integers(1, 2),
        tokens=st.integers(1, 50), blocks=st.integers(1, 9), more=st.integers(0, 70),
        sharpness=st.sampled_from([0.1, 1.0, 20.0]),
    )  # fmt: skip
    def check(
        form: tuple[int, int], layer: int, groups: int, tokens: int, blocks: int, more: int, sharpness: float
    ) -> None:
        share, size = form
        end = 64 * blocks
        q = (tiles.drawn(groups * share, tokens, size) * sharpness)[0]
        drawn = tiles.drawn(2 * groups, end + more, size, 1).to(kept)
        keys = drawn.view(2, 1, groups, end + more, size)
        found = chunk.block_log_sums(q, keys, layer, end)
        rows = q.double().reshape(groups, share * tokens, size)
        scores = rows @ keys[layer, 0, :, :end].double().transpose(1, 2) * size**-0.5
        expected = scores.unflatten(2, (blocks, 64)).logsumexp(-1)
        near = 1e-4 if tiles.name == "amx" else 1e-5  # whose powers of two are within 8e-5 (amx.py), one and all alike
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=near)

    check()


@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_sparse_reading_keeps_the_share_it_is_asked_for(tiles: Tiles, format: str) -> None:
    """The share that the tiles measure is that of the attention itself."""
    kept = {}
    q, k, v = tiles.drawn(6, 900, 64) * 2, tiles.drawn(2, 900, 64, 1), tiles.drawn(2, 900, 64, 2)
    for mass in (0.6, 0.95, 1.0):
        cache = KVCache(1, 2, 64, 900, tiles.dtype, format=format)
        cache.sparse = Sparse(mass=mass)
        for begin, end in ((0, 500), (500, 900)):
            mixed = cache.attend(0, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
            cache.advance(end - begin)
        expected = reference_attention(q[:, :, 500:].float(), k, v)
        kept[mass] = (cache.sparse.mass_kept, cache.sparse.density, error(mixed, expected))
    assert kept[0.6][0] > 0.55
    assert kept[0.95][0] > 0.92
    assert kept[0.6][1] < kept[0.95][1] <= kept[1.0][1]
    assert kept[0.6][2] > kept[0.95][2] > kept[1.0][2] - 1e-3
    assert kept[1.0][0] == pytest.approx(1, abs=1e-3)
