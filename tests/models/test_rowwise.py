"""The norm, the rotation and the gate of a bfloat16 network on a CPU, beside the same in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longverse.models import kernels, rope, rows, rowwise
from longverse.models.network import CausalLM, NetworkConfig
from tests.helpers import tiny_config

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "FEW", 1)
    if kernels.unavailable():
        pytest.skip(f"needs the kernels: {kernels.unavailable()}")
    if not kernels.bfloat16_runs_here():
        pytest.skip("needs a processor with AVX-512 BF16")


def drawn(*shape: int, seed: int = 0, times: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * times).to(BF16)


def assert_rounded(found: Tensor, exact: Tensor, room: float = 0.0) -> None:
    """Within half a step of bfloat16 (2 ** -8), and what computing in float32 loses: `room` of the operands' size."""
    assert found.dtype == BF16
    off = (found.double() - exact).abs()
    assert (off <= exact.abs() * (2**-8 + 2e-4) + room + 1e-30).all(), float((off - exact.abs() * 2**-8).max())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.sampled_from([(1, 1), (1, 7), (2, 300), (1, 2100), (1, 5, 3)]), size=st.sampled_from([32, 96, 576]),
    times=st.sampled_from([1e-3, 1.0, 1e4]), eps=st.sampled_from([1e-6, 1e-5]),
)  # fmt: skip
def test_norm(lead: tuple[int, ...], size: int, times: float, eps: float) -> None:
    x, weight = drawn(*lead, size, times=times), drawn(size, seed=1)
    with torch.inference_mode():
        found = rowwise.rms_norm(x, weight, eps)
    assert found.shape == x.shape
    assert_rounded(found, F.rms_norm(x.double(), (size,), weight.double(), eps))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 5), tokens=st.sampled_from([1, 2, 33, 4200]),
    size=st.sampled_from([32, 64, 128]), by_head=st.booleans(), part=st.booleans(),
)  # fmt: skip
def test_rotation(batch: int, heads: int, tokens: int, size: int, by_head: bool, part: bool) -> None:
    """Of both layouts that occur, of a part of a cache, and by angles that are a part of a table."""
    if by_head:
        x = drawn(batch, heads, tokens + 3, size)[:, :, 3:] if part else drawn(batch, heads, tokens, size)
    else:
        x = drawn(batch, tokens, heads, size).transpose(1, 2)
    cos, sin = (drawn(1, 1, tokens + 9, size, seed=seed)[:, :, 5 : 5 + tokens] for seed in (1, 2))
    with torch.inference_mode():
        found = rowwise.rotate(x, cos, sin)
    exact = rope.rotate(x.double(), cos.double(), sin.double())
    assert_rounded(found, exact, room=1e-6 * float(x.double().abs().max()) * 4)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 31, 900]), size=st.sampled_from([32, 160, 1600]), times=st.sampled_from([0.1, 3.0, 60.0])
)
def test_gate(rows: int, size: int, times: float) -> None:
    gate, up = drawn(1, rows, size, times=times), drawn(1, rows, size, seed=1)
    with torch.inference_mode():
        found = rowwise.swiglu(gate, up)
    assert_rounded(found, F.silu(gate.double()) * up.double())


def test_gates_that_are_closed_or_huge() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30], dtype=BF16).repeat(4)
    with torch.inference_mode():
        found = rowwise.swiglu(gate, torch.ones_like(gate))
    torch.testing.assert_close(found, F.silu(gate), rtol=2**-8, atol=1e-6)


def test_what_is_no_number_stays_none() -> None:
    x = drawn(1, 4, 64)
    x[0, 1, 5] = float("nan")
    with torch.inference_mode():
        found = rowwise.rms_norm(x, torch.ones(64, dtype=BF16), 1e-5), rowwise.swiglu(x, x)
    assert found[0][0, 1].isnan().all()
    assert found[1][0, 1, 5].isnan()
    assert all(x[0, n].isfinite().all() for x in found for n in (0, 2, 3))


@pytest.mark.parametrize("case", ["odd size", "few", "float32", "mixed", "gradients", "compiling"])
def test_what_the_kernels_do_not_take_is_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "_run", lambda *args: pytest.fail("a kernel ran"))
    if case == "few":
        monkeypatch.setattr(rowwise, "FEW", 10_000)
    if case == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    size = 40 if case == "odd size" else 64
    x, other = drawn(1, 3, 6, size), drawn(1, 1, 6, size, seed=1)
    if case == "float32":
        x = x.float()
    if case in ("float32", "mixed"):
        other = other.float()
    up, weight = other.expand_as(x), other[0, 0, 0]
    with torch.inference_mode(case != "gradients"):
        assert torch.equal(rowwise.rotate(x, other, other), rows.rotate(x, other, other))
        assert torch.equal(rowwise.swiglu(x, up), rows.swiglu(x, up))
        if case != "mixed":
            assert torch.equal(rowwise.rms_norm(x, weight, 1e-5), rows.rms_norm(x, weight, 1e-5))


def test_sizes_that_do_not_fit_are_torchs_mistakes() -> None:
    x = drawn(1, 2, 6, 64)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="shape"):
            rowwise.rms_norm(x, drawn(32), 1e-5)
        with pytest.raises(RuntimeError, match="size"):
            rowwise.swiglu(x, drawn(1, 2, 5, 64))
        with pytest.raises(RuntimeError, match="size"):
            rowwise.rotate(x, drawn(1, 1, 6, 64), drawn(1, 1, 5, 64))


def test_a_network_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float32 than torch's own lines are."""
    torch.manual_seed(0)
    config = NetworkConfig.from_dict(
        tiny_config(num_attention_heads=2, num_key_value_heads=2, hidden_size=64, intermediate_size=96)
    )
    network = CausalLM(config).requires_grad_(False)
    ids = torch.randint(0, config.vocab_size, (1, 200))
    with torch.inference_mode():
        exact = network(ids)
        rounded = copy.deepcopy(network).to(BF16)
        found = rounded(ids)
        monkeypatch.setattr(rowwise, "FEW", 1 << 60)
        plain = rounded(ids)
    assert not torch.equal(found, plain)
    assert (found - exact).norm() < 1.1 * (plain - exact).norm()
