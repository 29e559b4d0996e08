"""Block-sparse reading against exact attention: the dial, the measured share, chunks and formats."""

from collections.abc import Iterator

import pytest
import torch

from longverse import UserError
from longverse.models import kernels, sparse
from longverse.models.attention import reference_attention
from longverse.models.cache import KVCache
from longverse.models.compiled import compiled_fits
from longverse.models.sparse import Sparse

GROUP, SIZE, TOTAL = 3, 64, 1500


def heaped(seed: int = 0, heads: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q, k, v [1, heads, TOTAL, SIZE] whose attention is heaped up in places, as that of real text is: tokens of the
    same subject point the same way, and subjects come in runs."""
    generator = torch.Generator().manual_seed(seed)
    subjects = torch.randn(12, SIZE, generator=generator)
    of_token = torch.randint(0, 12, (TOTAL // 50,), generator=generator).repeat_interleave(50)

    def draw(heads: int, pull: float) -> torch.Tensor:
        x = torch.randn(1, heads, TOTAL, SIZE, generator=generator)
        return (x + pull * subjects[of_token]).to(dtype)

    return draw(heads * GROUP, 1.2), draw(heads, 1.2), draw(heads, 0.5)


def read(
    cache: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cache gives and the exact result for the last chunk."""
    for tokens in chunks:
        begin, end = cache.length, cache.length + tokens
        mixed = cache.attend(0, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
        cache.advance(tokens)
    return mixed.float(), reference_attention(q[:, :, begin:end].float(), k[:, :, :end], v[:, :, :end])


def heaped_for(path: str, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    """`heaped` as a path takes it: the compiled "bfloat16" or "float32", or "torch"; skips where there is none."""
    q, k, v = heaped(dtype=torch.bfloat16 if path == "bfloat16" else torch.float32)
    if path == "torch":
        monkeypatch.setattr(kernels, "unavailable", lambda: "this test asks for torch")
    elif not compiled_fits(q, None):
        pytest.skip(f"no kernel here for {path}")
    return q, k, v


def error(mixed: torch.Tensor, exact: torch.Tensor) -> float:
    return ((mixed - exact).norm() / exact.norm()).item()


CHUNKS = [(700, 500, 300), (1100, 400), (333, 333, 333)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("format", ["full", "int4"])
def test_the_whole_mass_is_exact_attention(format: str, chunks: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = heaped(dtype=dtype)
    plain, cache = (KVCache(1, 2, SIZE, TOTAL, dtype, format=format) for _ in range(2))
    cache.sparse = Sparse(mass=1.0)
    all_kept, _ = read(cache, q, k, v, chunks)
    exact, _ = read(plain, q, k, v, chunks)
    assert cache.sparse.density > 0.98  # rounding may call a block's mass nothing
    assert cache.sparse.mass_kept == pytest.approx(1.0, abs=1e-3)
    assert error(all_kept, exact) < (2e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("path", ["bfloat16", "float32", "torch"])
@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_the_dial_trades_blocks_for_mass(format: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heaped_for(path, monkeypatch)
    monkeypatch.setattr(sparse, "STRETCH", 256)
    monkeypatch.setattr("longverse.models.kernels.chunk.SPARSE_BUFFER", 1 << 17)
    results = {}
    for mass in (0.5, 0.8, 0.95):
        cache = KVCache(1, 2, SIZE, TOTAL, q.dtype, format=format)
        cache.sparse = Sparse(mass=mass)
        mixed, exact = read(cache, q, k, v, (700, 500, 300))
        results[mass] = (cache.sparse.density, cache.sparse.mass_kept, error(mixed, exact))
        assert cache.sparse.mass_kept == pytest.approx(max(mass, results[0.5][1]), abs=0.06)
    densities, shares, errors = zip(*(results[mass] for mass in (0.5, 0.8, 0.95)), strict=True)
    assert densities[0] < densities[1] < densities[2] < 0.8
    assert shares[0] < shares[1] < shares[2]
    assert errors[0] > errors[2]
    assert errors[2] < 0.25


@pytest.mark.parametrize("most", [1.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_the_compiled_choice_is_that_of_the_definition(
    dtype: torch.dtype, kept: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = heaped(dtype=dtype)
    if not compiled_fits(q, None):
        pytest.skip(f"no kernel here for {dtype}")
    found = []
    for stop in (False, True):
        if stop:
            monkeypatch.setattr(kernels, "unavailable", lambda: "this test asks for torch")
        cache = KVCache(1, 2, SIZE, TOTAL, dtype, kept=kept)
        cache.sparse = Sparse(0.9, most)
        mixed, _ = read(cache, q, k, v, (700, 500, 300))
        found.append((mixed, cache.sparse))
    (ours, compiled), (theirs, plain) = found
    assert compiled.blocks_all == plain.blocks_all
    assert abs(compiled.blocks_kept - plain.blocks_kept) <= 0.01 * plain.blocks_all  # ties fall either way
    assert compiled.mass_kept == pytest.approx(plain.mass_kept, abs=2e-3)
    assert error(ours, theirs) < 0.02


@pytest.mark.parametrize("path", ["bfloat16", "float32", "torch"])
def test_no_query_block_reads_more_of_the_past_than_allowed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heaped_for(path, monkeypatch)
    kept: list[torch.Tensor] = []
    count = Sparse.count
    monkeypatch.setattr(Sparse, "count", lambda self, one, share: (kept.append(one.clone()), count(self, one, share)))
    found = {}
    for mass, most in ((0.98, 1.0), (0.98, 0.5), (0.98, 0.3), (0.98, 0.01), (0.5, 0.3), (0.5, 1.0)):
        cache = KVCache(1, 2, SIZE, TOTAL, q.dtype)
        cache.sparse = Sparse(mass, most)
        kept.clear()
        mixed, exact = read(cache, q, k, v, (700, 500, 300))
        assert len(kept) == 2  # the first chunk has no past
        for chosen in kept:
            assert int(chosen.sum(-1).max()) <= max(sparse.FEW, round(most * chosen.shape[-1])) + 1  # and the first
        found[mass, most] = (cache.sparse.density, cache.sparse.mass_kept, error(mixed, exact), kept[-1])
    free, half, third, few = (found[0.98, most] for most in (1.0, 0.5, 0.3, 0.01))
    for more, less in ((free, half), (half, third), (third, few)):
        assert more[0] > less[0]
        assert more[1] > less[1]
        assert more[2] < less[2]
        assert bool((more[3].bool() | ~less[3].bool()).all())  # the heaviest stay
    assert int(few[3].sum(-1).min()) == sparse.FEW + 1
    assert found[0.5, 0.3][:2] == pytest.approx(found[0.5, 1.0][:2], abs=0.08)  # seldom wants more than a third


@pytest.mark.parametrize("path", ["bfloat16", "float32", "torch"])
def test_blocks_that_weigh_alike_are_taken_up_to_the_limit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heaped_for(path, monkeypatch)
    k[:] = 0
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(Sparse, "count", lambda self, one, share: kept.append(one.clone()))
    cache = KVCache(1, 2, SIZE, TOTAL, q.dtype)
    cache.sparse = Sparse(0.98, 0.5)
    read(cache, q, k, v, (1200, 300))
    assert set(kept[0].sum(-1).flatten().tolist()) == {1200 // 64 // 2 + 1}


def test_short_chunks_and_single_tokens_are_exact() -> None:
    q, k, v = heaped()
    cache = KVCache(1, 2, SIZE, TOTAL, torch.float32)
    cache.sparse = Sparse(mass=0.3)
    read(cache, q, k, v, (700, 400))
    kept = cache.sparse.blocks_all
    for tokens in (1, 200):
        begin, end = cache.length, cache.length + tokens
        mixed = cache.attend(0, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
        cache.advance(tokens)
        exact = reference_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
        torch.testing.assert_close(mixed, exact, rtol=1e-4, atol=1e-4)
    assert cache.sparse.blocks_all == kept


def test_a_dial_out_of_range_is_refused() -> None:
    for mass in (0, 1.5):
        with pytest.raises(UserError, match=r"choose one above 0 and up to 1"):
            Sparse(mass=mass)
    for most in (0, 2, float("nan")):
        with pytest.raises(UserError, match=r"cannot be read: choose one above 0 and up to 1"):
            Sparse(0.9, most)


def leave_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mass: float) -> tuple[torch.Tensor, float]:
    """The rule for one token and one key/value head, in float64: q [h, D], k, v [S, D]; the mix [h, D] and the share
    that was left out. Pages are 64 tokens, looked at in order by one thread."""
    scores = q.double() @ k.double().T / SIZE**0.5  # [h, S]
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    kept = torch.ones(len(k), dtype=torch.bool)
    seen, dropped = torch.zeros(len(q)).double(), torch.zeros(len(q)).double()
    each = 4 * (1 - mass) * 64 / max(len(k), 64)
    for begin in range(0, len(k), 64):
        added = weights[:, begin : begin + 64].sum(-1)
        seen += added
        if begin + 64 < len(k) and ((dropped + added) / seen).max() <= 1 - mass and (added / seen).mean() <= each:
            kept[begin : begin + 64] = False
            dropped += added
    shares = torch.where(kept, weights, 0)
    return shares @ v.double() / shares.sum(-1, keepdim=True), float((dropped / weights.sum(-1)).mean())


@pytest.mark.parametrize("mass", [0.6, 0.9, 0.99])
def test_writing_leaves_out_what_the_rule_says(mass: float) -> None:
    if kernels.unavailable():
        pytest.skip(f"no CPU kernels: {kernels.unavailable()}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, k, v = heaped(seed=3)
        cache = KVCache(1, 2, SIZE, TOTAL, torch.float32)
        cache.sparse = Sparse(mass=mass)
        read(cache, q, k, v, (1200,))
        for _ in range(4):
            end = cache.length + 1
            new = [x[:, :, end - 1 : end] for x in (q, k, v)]
            lost_before, count_before = cache.sparse.written_lost, cache.sparse.written_count
            cache.sparse.writing = True
            mixed = cache.attend(0, *new)[0].view(2, GROUP, SIZE)
            cache.sparse.writing = False
            cache.advance(1)
            ruled = [leave_out(new[0][0].view(2, GROUP, SIZE)[g], k[0, g, :end], v[0, g, :end], mass) for g in (0, 1)]
            for head, (expected, _) in enumerate(ruled):
                torch.testing.assert_close(mixed[head].double(), expected, rtol=1e-4, atol=1e-5)
            assert cache.sparse.written_count - count_before == 2
            assert cache.sparse.written_lost - lost_before == pytest.approx(sum(lost for _, lost in ruled), abs=1e-4)
        assert 0 < 1 - cache.sparse.mass_written <= 1 - mass + 1e-6
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Two key/value heads are then cut into three stretches each."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("format", ["full", "int4"])
def test_writing_keeps_the_mass_over_every_format_and_stretch(format: str, three_threads: None) -> None:
    if kernels.unavailable():
        pytest.skip(f"no CPU kernels: {kernels.unavailable()}")
    q, k, v = heaped(seed=4)
    lost, errors = [], []
    for mass in (0.6, 0.99, 1.0):
        cache = KVCache(1, 2, SIZE, TOTAL, torch.float32, format=format)
        cache.sparse = Sparse(mass=mass)
        read(cache, q, k, v, (1300,))
        cache.sparse.writing = True
        mixed, exact = read(cache, q, k, v, (1,) * 20)
        assert cache._kernel(2 * GROUP).partial.shape[:2] == (2, 3)
        lost.append(1 - cache.sparse.mass_written)
        errors.append(error(mixed, exact))
        assert lost[-1] <= 1 - mass + 1e-6
    assert lost[0] > lost[1] > lost[2]
    assert errors[2] < {"full": 1e-5, "int4": 0.25}[format]
    assert errors[1] < errors[2] + 0.05
