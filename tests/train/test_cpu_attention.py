"""The CPU attention of training, from matrix products and on AMX tiles, against the float32 definition."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.models.attention import reference_attention
from longverse.models.kernels.chunk import amx_runs_here
from longverse.train import cpu_attention
from longverse.train.cpu_attention import causal_attention, tile_attention
from longverse.train.rows import document_attention, plain_attention

tiles_alone = pytest.mark.skipif(not amx_runs_here(), reason="this processor has no AMX tiles for bfloat16")


@contextmanager
def on_threads(number):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inputs(heads: int, kv_heads: int, tokens: int, size: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, tokens, size), (kv_heads, tokens, size), (kv_heads, tokens, size), (heads, tokens, size))
    return [torch.randn(1, *shape, generator=generator).to(torch.bfloat16) for shape in shapes]


def with_gradients(attend, q, k, v, slope):  # type: ignore[no-untyped-def]
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    out.backward(slope)
    return [x.float() for x in (out.detach(), q.grad, k.grad, v.grad)]


def definition(bounds):  # type: ignore[no-untyped-def]
    """Each document by the float32 reference."""

    def attend(q, k, v):  # type: ignore[no-untyped-def]
        parts = [reference_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts, 2)

    return attend


@settings(max_examples=25, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3]),
    kv_heads=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    size=st.sampled_from([8, 64]),
    rows=st.sampled_from([6, 48, 384]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 10**6),
)
def test_result_and_gradients_are_the_definitions(group, kv_heads, lengths, size, rows, threads, seed):  # type: ignore[no-untyped-def]
    bounds = [0, *itertools.accumulate(lengths)]
    data = inputs(group * kv_heads, kv_heads, bounds[-1], size, seed)
    held = cpu_attention.ROWS
    try:
        cpu_attention.ROWS = rows
        with on_threads(threads):
            ours = with_gradients(lambda q, k, v: causal_attention(q, k, v, bounds), *data)
    finally:
        cpu_attention.ROWS = held
    check(ours, bounds, data)


def check(ours, bounds, data):  # type: ignore[no-untyped-def]
    exact = with_gradients(definition(bounds), *(x.float() for x in data))
    for mine, true in zip(ours, exact, strict=True):
        assert (mine - true).norm() <= 0.02 * true.norm() + 1e-3  # bfloat16 keeps eight bits


@tiles_alone
@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(1, 1, 32), (4, 4, 32), (9, 3, 64), (3, 3, 48)]),  # each needs a kernel of its own
    lengths=st.lists(
        st.one_of(st.integers(1, 300), st.sampled_from([21, 22, 63, 64, 65, 128])), min_size=1, max_size=5
    ),
    scale=st.sampled_from([0.2, 1.0, 6.0]),
    threads=st.sampled_from([1, 2, 3]),
    by_token=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_on_tiles_result_and_gradients_are_the_definitions(heads, lengths, scale, threads, by_token, seed):  # type: ignore[no-untyped-def]
    bounds = [0, *itertools.accumulate(lengths)]
    q, k, v, slope = inputs(heads[0], heads[1], bounds[-1], heads[2], seed)
    data = [q * scale, k, v, slope]
    if by_token:  # as projections leave them
        data = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in data]
    with on_threads(threads):
        ours = with_gradients(lambda q, k, v: tile_attention(q, k, v, bounds)[0], *data)
    check(ours, bounds, data)


@tiles_alone
def test_on_tiles_documents_touch_no_other_and_threads_give_the_same_bits_every_time():
    data = inputs(9, 3, 700, 64, 3)
    with on_threads(2):
        runs = [with_gradients(lambda q, k, v: tile_attention(q, k, v, [0, 300, 700])[0], *data) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    parts = [[x[:, :, :300] for x in data], [x[:, :, 300:] for x in data]]
    with on_threads(2):
        alone = [with_gradients(lambda q, k, v: tile_attention(q, k, v, [0, q.shape[2]])[0], *part) for part in parts]
    for together, first, second in zip(runs[0], *alone, strict=True):
        assert torch.allclose(together, torch.cat([first, second], 2), rtol=1e-2, atol=1e-4)  # threads share otherwise


@tiles_alone
def test_on_tiles_every_last_number_is_finite_where_scores_are_huge():
    data = [x * 40 for x in inputs(4, 4, 200, 32, 5)]
    ours = with_gradients(lambda q, k, v: tile_attention(q, k, v, [0, 70, 200])[0], *data)
    assert all(torch.isfinite(x).all() for x in ours)
    exact = definition([0, 70, 200])(*(x.float() for x in data[:3]))
    assert (ours[0] - exact).norm() < 0.02 * exact.norm()


def test_same_bits_every_time_and_torch_keeps_its_threads():
    data = inputs(6, 2, 700, 16, 0)
    before = torch.get_num_threads()
    runs = [with_gradients(lambda q, k, v: causal_attention(q, k, v, [0, 300, 700]), *data) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.get_num_threads() == before


def test_operator_is_what_torch_expects_of_one():
    q, k, v, _ = inputs(4, 2, 60, 8, 1)
    arguments = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), [0, 20, 60])
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(causal_attention, arguments, test_utils=names)
    if amx_runs_here():
        torch.library.opcheck(tile_attention, arguments, test_utils=names)


@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=tiles_alone)])
def test_rows_take_it_for_bfloat16_alone(monkeypatch, tiles):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(cpu_attention, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_attention, "tiles_here", lambda q: tiles)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    q, k, v, _ = inputs(4, 2, 50, 8, 2)
    attend, bounds = document_attention((0, 20, 50)), [0, 20, 50]
    chosen = tile_attention(q, k, v, bounds)[0] if tiles else causal_attention(q, k, v, bounds)
    assert torch.equal(attend(0, q, k, v), chosen)
    exact = definition(bounds)(q.float(), k.float(), v.float())
    assert torch.allclose(attend(0, q.float(), k.float(), v.float()), exact, atol=1e-5)
    with pytest.raises(AssertionError):
        assert torch.equal(attend(0, q, k, v).float(), exact)


def test_where_there_are_tiles_and_no_kernel_torch_attends_itself(monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(cpu_attention, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_attention, "bfloat16_runs_here", lambda: False)  # as LONGVERSE_KERNELS=torch does
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    q, k, v, _ = inputs(4, 2, 50, 8, 2)
    assert not cpu_attention.fast_here(q)
    assert torch.equal(document_attention((0, 20, 50))(0, q, k, v), plain_attention([20, 30])(0, q, k, v))


@tiles_alone
def test_what_the_kernels_cannot_take_they_refuse():  # type: ignore[no-untyped-def]
    q, k, v, _ = inputs(4, 2, 50, 32, 2)
    for odd in (
        (q, k, v.float(), [0, 50]),
        (q[:, :3], k, v, [0, 50]),
        (q, k, v, [0, 40]),
        (q, k[:, :, :40], v, [0, 50]),
    ):
        with pytest.raises(AssertionError):
            tile_attention(*odd)


@tiles_alone
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    of_head=st.integers(1, 5),
    heads=st.integers(1, 5),
    threads=st.integers(1, 40),
)
def test_every_block_is_dealt_once_and_sums_are_few(lengths, of_head, heads, threads):  # type: ignore[no-untyped-def]
    from longverse.models.kernels.training import layout, shares

    bounds = (0, *itertools.accumulate(lengths))
    items, slots = shares(bounds, of_head, heads, threads)
    blocks = [(n, block) for n, length in enumerate(lengths) for block in range(-(-length // 64))]
    assert sorted(map(tuple, items[:, :3])) == [(head, *block) for head in range(heads) for block in blocks]
    assert (slots[items[:, 3], 0] == items[:, 0]).all()
    assert len(slots) <= heads + threads - 1
    assert slots[:, 1].max() < threads
    where = layout(bounds, of_head)
    assert (np.sort(where.rows[where.rows >= 0]) == np.arange(bounds[-1] * of_head)).all()
