"""Muon against its definition by singular values and against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.train.muon import Muon, orthogonal


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), size=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 99)
)
def test_a_matrix_turns_into_one_whose_singular_values_are_alike(
    rows: int, columns: int, size: float, seed: int
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = orthogonal(matrix)
    along = torch.diagonal(left.T @ turned @ right.T)
    strong = values > 0.02 * values.max()  # five iterations lift those below not all the way
    assert ((along > 0.6) & (along < 1.3))[strong].all()
    off = left.T @ turned @ right.T - torch.diag(along)
    assert off.abs().max() < 1e-3


def test_a_matrix_without_gradient_stays_as_it_is() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    table = torch.nn.Parameter(torch.ones(4, 4))
    mine = Muon(
        [{"params": [ours], "weight_decay": 0.1, "muon": True}, {"params": [table], "weight_decay": 0.0}], lr=1e-2
    )
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw_table = torch.nn.Parameter(torch.ones(4, 4))
    adamw = torch.optim.AdamW([adamw_table], lr=1e-2, weight_decay=0.0)
    for _ in range(4):
        slope = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = slope.clone(), slope.clone()
        table.grad, adamw_table.grad = torch.ones(4, 4), torch.ones(4, 4)
        for optimizer in (mine, reference, adamw):
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch iterates in bfloat16
    assert torch.equal(table, adamw_table)
