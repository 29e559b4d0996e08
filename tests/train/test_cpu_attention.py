"""The CPU attention of training against the float32 definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.models.attention import reference_attention
from longverse.train import cpu_attention
from longverse.train.cpu_attention import causal_attention
from longverse.train.rows import document_attention


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
    before, held = torch.get_num_threads(), cpu_attention.ROWS
    try:
        torch.set_num_threads(threads)
        cpu_attention.ROWS = rows
        ours = with_gradients(lambda q, k, v: causal_attention(q, k, v, bounds), *data)
    finally:
        cpu_attention.ROWS = held
        torch.set_num_threads(before)
    exact = with_gradients(definition(bounds), *(x.float() for x in data))
    for mine, true in zip(ours, exact, strict=True):
        assert (mine - true).norm() <= 0.02 * true.norm() + 1e-3  # bfloat16 keeps eight bits


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


def test_rows_take_it_for_bfloat16_alone(monkeypatch):
    monkeypatch.setattr(cpu_attention, "cpu_has_bfloat16", lambda: True)
    q, k, v, _ = inputs(4, 2, 50, 8, 2)
    attend = document_attention((0, 20, 50))
    assert torch.equal(attend(0, q, k, v), causal_attention(q, k, v, [0, 20, 50]))
    exact = definition([0, 20, 50])(q.float(), k.float(), v.float())
    assert torch.allclose(attend(0, q.float(), k.float(), v.float()), exact, atol=1e-5)
    with pytest.raises(AssertionError):
        assert torch.equal(attend(0, q, k, v).float(), exact)
