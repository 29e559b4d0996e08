"""Sampling against transformers' own logits processors, draw for draw."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from longverse import UserError
from longverse.inference.sampling import Sampler, Sampling


def transformers_draw(logits: torch.Tensor, prompt: list[int], s: Sampling) -> int:
    scores, ids = logits[None], torch.tensor([prompt])
    if s.repetition_penalty != 1:
        scores = theirs.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scores)
    if s.temperature == 0:
        return int(scores.argmax())
    scores = theirs.TemperatureLogitsWarper(s.temperature)(ids, scores)
    if s.top_k:
        scores = theirs.TopKLogitsWarper(s.top_k)(ids, scores)
    if s.top_p < 1:
        scores = theirs.TopPLogitsWarper(s.top_p)(ids, scores)
    if s.min_p > 0:
        scores = theirs.MinPLogitsWarper(s.min_p)(ids, scores)
    generator = torch.Generator().manual_seed(s.seed or 0)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 5, 500]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    st.sampled_from([1.0, 1.1, 3.0, 0.7]),
)
def test_every_draw_is_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    logits = 4 * torch.randn(97, generator=torch.Generator().manual_seed(seed))
    prompt = [1, 5, 5, 60]
    chosen = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=seed
    )
    assert Sampler(chosen, prompt)(logits) == transformers_draw(logits, prompt, chosen)


def test_the_penalty_grows_with_the_answer() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    logits = torch.tensor([3.0, 2.0, 1.9])
    assert [sampler(logits) for _ in range(3)] == [1, 2, 0]  # each is halved once it has appeared


def test_no_seed_draws_anew() -> None:
    logits = torch.zeros(10_000)
    assert len({Sampler(Sampling(temperature=1.0), [])(logits) for _ in range(8)}) > 1


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad)).replace("stop", "stop text")):
        Sampling(**bad)


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([3.0, 20.0, -5.0])
    for temperature in (1e-40, 1e-30, 1e-3):
        assert Sampler(Sampling(temperature=temperature, seed=1), [])(logits) == 1
