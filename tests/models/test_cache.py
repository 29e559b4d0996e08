"""Caches of every format against the naive float32 reference, whatever the chunks, heads, lengths and interruptions."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longverse import UserError
from longverse.models import cache as cache_module
from longverse.models import compiled, kernels
from longverse.models.attention import reference_attention
from longverse.models.cache import FIRST, RECENT, KVCache
from longverse.models.compiled import attend_chunk
from longverse.models.packing import Packing, hadamard

# Relative error of an attention over independent normal keys and values, by format: the rounding of one value, as all
# weights are alike there. Real models do far better or worse by their outliers: benchmarks/kv_quality.py.
ALLOWED = {"full": 1e-5, "int8": 0.02, "int4": 0.25}
LAYERS = 2


class Run:
    """A cache and everything that was put into it."""

    def __init__(
        self,
        format: str,
        group: int,
        heads: int,
        size: int,
        capacity: int,
        dtype: torch.dtype,
        kept: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(size * heads + group)

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(LAYERS, 1, heads, capacity, size, generator=generator).to(dtype)

        self.q, self.k, self.v = draw(heads * group), draw(heads), draw(heads)
        self.cache = KVCache(LAYERS, heads, size, capacity, dtype, format=format, kept=kept)

    def read(self, tokens: int, *, layers: int = LAYERS) -> float:
        """Put `tokens` more through the layers; the worst relative error. Fewer layers: a pass broken off."""
        begin, end = self.cache.length, self.cache.length + tokens
        worst = 0.0
        for layer in range(layers):
            new = [x[layer][:, :, begin:end] for x in (self.q, self.k, self.v)]
            out = self.cache.attend(layer, *new).float()
            expected = reference_attention(new[0].float(), self.k[layer][:, :, :end], self.v[layer][:, :, :end])
            worst = max(worst, ((out - expected).norm() / expected.norm()).item())
        if layers == LAYERS:
            self.cache.advance(tokens)
        return worst


@pytest.fixture(params=["kernels", "torch"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernels, "unavailable", lambda: "this test asks for torch")
    elif kernels.unavailable():
        pytest.skip(f"no CPU kernels: {kernels.unavailable()}")
    return request.param


CHUNKS = st.lists(st.one_of(st.just(1), st.integers(2, 90)), min_size=1, max_size=8)


@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_every_format_gives_the_references_result_within_its_error(
    format: str, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "STRETCH", 50)  # so that the past takes several

    # Few shapes, since each number of query heads and head size is compiled; any chunks.
    @settings(max_examples=8, deadline=None)
    @given(
        shape=st.sampled_from([(3, 1, 64), (3, 2, 64)]), chunks=CHUNKS, back=st.floats(0, 1), broken=st.integers(1, 40)
    )
    @example(shape=(3, 1, 64), chunks=[200, 1, 1, 1], back=0.4, broken=1)
    @example(shape=(3, 2, 64), chunks=[FIRST + RECENT + 1, 1, RECENT, 1], back=1.0, broken=RECENT)
    def check(shape: tuple[int, int, int], chunks: list[int], back: float, broken: int) -> None:
        group, heads, size = shape
        run = Run(format, group, heads, size, 2 * sum(chunks) + broken + 1, torch.float32)
        errors = [run.read(tokens) for tokens in chunks]
        run.read(broken, layers=1)  # broken off: the cache is as it was
        errors.append(run.read(1))
        run.cache.truncate(int(back * run.cache.length))
        errors += [run.read(tokens) for tokens in chunks]
        assert max(errors) < ALLOWED[format]

    check()


@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_bfloat16_caches_add_no_more_than_their_rounding(
    format: str, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longverse.models.kernels.chunk.BUFFER", 1 << 15)  # so that the past takes several stretches

    @settings(max_examples=10, deadline=None)
    @given(heads=st.integers(1, 2), chunks=CHUNKS)
    @example(heads=1, chunks=[150, 1, 90, 1, 1])
    @example(heads=2, chunks=[64, 64, 2, 200])
    def check(heads: int, chunks: list[int]) -> None:
        run = Run(format, 3, heads, 64, sum(chunks), torch.bfloat16)
        assert max(run.read(tokens) for tokens in chunks) < ALLOWED[format] + 0.01

    check()


@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_a_float32_network_may_keep_its_cache_in_bfloat16(
    format: str, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MANY", 1)  # few keys go through the kernel, too
    run = Run(format, 3, 2, 64, 700, torch.float32, kept=torch.bfloat16)
    assert run.cache.bytes_per_token == KVCache(LAYERS, 2, 64, 700, torch.bfloat16, format=format).bytes_per_token
    assert max(run.read(tokens) for tokens in (1, 300, 1, 90, 1, 200, 1)) < ALLOWED[format] + 0.004
    if format == "full":
        keys, values = (x[1][:, :, 100:500].bfloat16() for x in (run.k, run.v))
        assert torch.equal(run.cache.keys_of(1, 100, 500), keys)
        assert torch.equal(run.cache.values_of(1, 100, 500), values)


def test_a_full_cache_kept_in_bfloat16_is_the_same_however_it_is_filled(runner: str) -> None:
    """A token sees itself as those after it do."""
    found = []
    for chunks in ((200,), (90, 1, 1, 108), (1, 199)):
        run = Run("full", 3, 2, 64, 200, torch.float32, kept=torch.bfloat16)
        parts = []
        for tokens in chunks:
            new = [x[0][:, :, run.cache.length : run.cache.length + tokens] for x in (run.q, run.k, run.v)]
            parts.append(run.cache.attend(0, *new))
            run.cache.advance(tokens)
        found.append(torch.cat(parts, 2))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_chunks_of_a_plain_past_go_through_the_same_kernel() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, 333, 64, generator=generator).bfloat16() for heads in (6, 2, 2))
    for new in (333, 100, 2):
        expected = reference_attention(q[:, :, -new:].float(), k, v)
        mixed = attend_chunk(q[:, :, -new:], k, v).float()
        assert ((mixed - expected).norm() / expected.norm()).item() < 0.004


def test_several_threads_and_another_shape() -> None:
    if kernels.unavailable():
        pytest.skip(f"no CPU kernels: {kernels.unavailable()}")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run = Run("int4", 1, 2, 128, 400, torch.float32)
        assert max(run.read(tokens) for tokens in (330, 1, 1)) < ALLOWED["int4"]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [40, 10])  # head sizes whose rows are no whole vectors: torch serves them
@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_odd_head_sizes_work(format: str, size: int) -> None:
    run = Run(format, 2, 2, size, 300, torch.float32)
    assert max(run.read(tokens) for tokens in (100, 1, 70, 1)) < ALLOWED[format]


def test_outlier_channels_are_spread_by_the_rotation() -> None:
    keys = torch.randn(1, 1, 512, 64, generator=torch.Generator().manual_seed(1))
    keys[..., 5] += 30  # a channel that is large in every token: what makes plain int4 keys useless
    packing = Packing("int4", 64)
    rotated = packing.rotate(keys)
    torch.testing.assert_close(packing.rotate(rotated), keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hadamard(64, 64) @ hadamard(64, 64), torch.eye(64), rtol=0, atol=1e-5)

    def error(x: torch.Tensor) -> float:
        return (packing.dequantize(*packing.quantize(x), torch.float32) - x).norm().item()

    assert error(rotated) < error(keys) / 2


@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_stated_bytes_are_those_of_the_arrays(format: str) -> None:
    def size(capacity: int) -> int:
        cache = KVCache(3, 2, 64, capacity, torch.bfloat16, format=format)
        return sum(x.numel() * x.element_size() for x in cache.storage().values())

    cache = KVCache(3, 2, 64, 100, torch.bfloat16, format=format)
    assert cache.bytes_per_token == size(101) - size(100)
    assert cache.bytes_per_token == 3 * 2 * 2 * {"full": 128, "int8": 66, "int4": 36}[format]


@pytest.mark.parametrize("format", ["full", "int8", "int4"])
@pytest.mark.parametrize("length", [20, 150])
def test_a_cache_goes_on_from_saved_storage_exactly(format: str, length: int) -> None:
    run = Run(format, 3, 1, 64, 300, torch.bfloat16)
    run.read(length)
    saved = {name: array[:, :, :, :length].clone() for name, array in run.cache.storage().items()}
    again = Run(format, 3, 1, 64, 300, torch.bfloat16)
    given_out = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        given_out[name] = torch.zeros(shape, dtype=dtype)
        return given_out[name]

    again.cache = KVCache(LAYERS, 1, 64, 300, torch.bfloat16, format=format, allocate=allocate)
    assert given_out.keys() == saved.keys()
    for name, array in saved.items():
        given_out[name][:, :, :, :length] = array
    again.cache.restore(length)
    for layer in range(LAYERS):
        for tokens in (1, 30):
            new = [x[layer][:, :, length : length + tokens] for x in (run.q, run.k, run.v)]
            assert torch.equal(run.cache.attend(layer, *new), again.cache.attend(layer, *new))


def test_a_shorter_prefix_of_saved_storage_forgets_the_ring_of_later_tokens() -> None:
    run = Run("int4", 3, 1, 64, 400, torch.float32)
    run.read(300)
    run.cache.restore(100)  # another document that shares its beginning: slots now hold tokens 236 .. 299
    assert run.read(1) < ALLOWED["int4"]
    exact = run.k[0][:, :, :100]
    close = run.cache.keys_of(0, 0, 100)
    assert ((close - exact).norm() / exact.norm()).item() < ALLOWED["int4"]


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_keys_and_values_are_given_back_and_the_ends_in_full(format: str) -> None:
    run = Run(format, 3, 2, 64, 400, torch.float32)
    for tokens in (300, 1, 20):
        run.read(tokens)
    for layer in range(LAYERS):
        for of, exact in ((run.cache.keys_of, run.k[layer]), (run.cache.values_of, run.v[layer])):
            error = (of(layer, 0, 321) - exact[:, :, :321]).abs().amax((0, 1, 3))  # by token
            assert error[:FIRST].max() < 1e-5
            assert error[321 - RECENT :].max() < 1e-5
            assert error[FIRST : 321 - RECENT].min() > 1e-4
            torch.testing.assert_close(of(layer, 90, 300), of(layer, 0, 321)[:, :, 90:300])


def test_what_was_written_is_never_written_again() -> None:
    run = Run("int4", 3, 1, 64, 400, torch.bfloat16)
    run.read(200)
    before = {name: run.cache.storage()[name][:, :, :, :200].clone() for name in ("keys", "key_scales", "values")}
    for tokens in (1, 100, 1):
        run.read(tokens)
    for name, array in before.items():
        assert torch.equal(run.cache.storage()[name][:, :, :, :200], array)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="no cache format 'int3': choose one of full, int8, int4"):
        KVCache(1, 1, 4, 3, torch.float32, format="int3")
    with pytest.raises(UserError, match=r"takes .* GiB and the machine refused it: plan a shorter"):
        KVCache(1000, 1000, 256, 1 << 30, torch.bfloat16, format="int4")
    run = Run("int8", 1, 1, 16, 8, torch.float32)
    run.cache = KVCache(LAYERS, 1, 16, 5, torch.float32, format="int8")
    run.read(4)
    with pytest.raises(UserError, match="would hold 6 tokens and was planned for 5"):
        run.read(2)


@pytest.mark.parametrize("size", [16, 32])
def test_heads_too_small_for_a_kernel_are_read_by_torch(size: int) -> None:
    run = Run("int4", 3, 2, size, 80, torch.bfloat16)
    assert max(run.read(tokens) for tokens in (30, 1, 40, 1)) < ALLOWED["int4"]


@pytest.mark.parametrize("format", ["full", "int8", "int4"])
def test_a_cache_that_lies_elsewhere_comes_a_stretch_at_a_time(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "STRETCH", 50)
    run = Run(format, 2, 2, 64, 400, torch.float32)
    here = run.cache
    away = KVCache(LAYERS, 2, 64, 400, torch.float32, format=format, home="cpu:0")  # another device, as torch has it
    assert here.at_home
    assert not away.at_home
    errors = []
    for cache in (here, away):
        run.cache = cache
        errors += [run.read(tokens) for tokens in (130, 1, 70, 1)]
        cache.truncate(150)
        errors += [run.read(tokens) for tokens in (1, 100, 1)]
    assert max(errors) < ALLOWED[format]
    for layer in range(LAYERS):
        assert torch.equal(away.keys_of(layer, 0, 252), here.keys_of(layer, 0, 252))
        assert torch.equal(away.values_of(layer, 90, 250), here.values_of(layer, 90, 250))


@pytest.mark.parametrize("format", list(ALLOWED))
def test_keys_of_one_head_are_those_of_all(format: str) -> None:
    run = Run(format, 2, 3, 64, FIRST + RECENT + 90, torch.float32)
    run.read(FIRST + RECENT + 90)
    everything = run.cache.keys_of(1, 5, FIRST + RECENT + 80)
    for head in range(3):
        one = run.cache.keys_of(1, 5, FIRST + RECENT + 80, slice(head, head + 1))
        assert torch.equal(one, everything[:, head : head + 1])


def test_a_broken_pass_at_the_mark_leaves_the_ring_as_it_was() -> None:
    """A Ctrl-C in the first chunk of a question: the mark holds, and is not made anew of what was half written."""
    end = FIRST + RECENT + 40
    run = Run("int8", 1, 2, 64, end + 100, torch.float32)
    run.read(end)
    cache = run.cache
    cache.mark()
    before = {name: array.clone() for name, array in cache.storage().items() if name.startswith("recent")}
    cache.attend(0, run.q[0, :, :, end : end + 60], run.k[0, :, :, end : end + 60], run.v[0, :, :, end : end + 60])
    cache.truncate(end)  # the second layer never came
    cache.mark()
    assert all(torch.equal(cache.storage()[name], array) for name, array in before.items())
    cache.truncate(end)
    assert cache.spans(end)[2] == end - RECENT
