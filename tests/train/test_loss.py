"""The chunked loss equals the definition, value and gradients; weights do what they say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.train.examples import Example
from longverse.train.loss import token_nll, weighted_nll


@given(st.integers(0, 20), st.integers(1, 7), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_equals_the_definition(count: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 5, generator=generator, dtype=torch.float32, requires_grad=True)
    head = torch.randn(11, 5, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    ours = weighted_nll(hidden, head, targets, weights, chunk)
    (3 * ours).backward()
    mine = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    per_token = F.cross_entropy(F.linear(hidden, head), targets, reduction="none")
    reference = (per_token * weights).sum()
    (3 * reference).backward()
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, (hidden.grad, head.grad), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(token_nll(hidden.detach(), head.detach(), targets, chunk), per_token.detach())


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head = torch.randn(4, 5, requires_grad=True), torch.randn(11, 5)
    weighted_nll(hidden, head, torch.arange(4), torch.ones(4)).backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_no_labels_is_zero_and_differentiable() -> None:
    hidden = torch.randn(0, 5, requires_grad=True)
    loss = weighted_nll(hidden, torch.randn(11, 5), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("token", [0, 0, 1, 1, 0, 2, 2, 2]),
        ("sample", [0, 0, 1 / 8, 1 / 8, 0, 2 / 8, 2 / 8, 2 / 8]),
        ("answer", [0, 0, 1 / 2, 1 / 2, 0, 2 / 3, 2 / 3, 2 / 3]),
    ],
)
def test_weights(weighting: str, expected: list[float]) -> None:
    example = Example(np.arange(8), ((2, 4, 1.0), (5, 8, 2.0)), "x")
    assert example.weights(weighting) == pytest.approx(expected)
