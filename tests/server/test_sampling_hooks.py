"""What the server adds to sampling: OpenAI's two penalties, forbidden tokens, and a look at every choice."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse import UserError
from longverse.inference.sampling import Sampler, Sampling


class Only:
    """Allows the given tokens and keeps what was chosen."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.accepted = tokens, []

    def allowed(self, size: int) -> torch.Tensor:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[self.tokens] = True
        return mask

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.5, 2))
def test_penalties_are_those_of_the_formula(seed: int, presence: float, frequency: float, repetition: float) -> None:
    """OpenAI's: mu[j] -= count[j] * frequency + (count[j] > 0) * presence, over the tokens of the answer."""
    rows = torch.randn(12, 9, generator=torch.Generator().manual_seed(seed))
    prompt, written = [1, 1, 4], []
    sampler = Sampler(
        Sampling(presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition), prompt
    )
    for row in rows:
        expected = row.double().tolist()
        for j in set(prompt + written):
            expected[j] = expected[j] * repetition if expected[j] < 0 else expected[j] / repetition
        for j in set(written):
            expected[j] -= written.count(j) * frequency + presence
        token = sampler(row)
        assert math.isclose(expected[token], max(expected), abs_tol=1e-4)
        written.append(token)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sets(st.integers(0, 19), min_size=1), st.sampled_from([0.0, 0.7, 3.0]))
def test_only_allowed_tokens_are_chosen(seed: int, tokens: set[int], temperature: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    seen: list[tuple[int, torch.Tensor]] = []
    only = Only(sorted(tokens))
    sampling = Sampling(
        temperature=temperature, seed=seed, top_k=3, constraint=only, on_token=lambda t, row: seen.append((t, row))
    )
    token = Sampler(sampling, [])(logits)
    assert token in tokens
    if not temperature:
        assert token == max(tokens, key=lambda t: logits[t])
    assert only.accepted == [token]
    assert seen[0][0] == token
    assert torch.equal(seen[0][1], logits)  # the model's own, before the mask


def test_draws_among_the_allowed_keep_their_shares() -> None:
    logits = torch.tensor([0.5, 0.2, 0.3]).log()
    draws = [
        Sampler(Sampling(temperature=1.0, seed=s, constraint=Only([1, 2])), [])(logits) for s in range(600)
    ]  # 2 : 3
    assert 0.32 < draws.count(1) / 600 < 0.48


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_must_be_numbers(name: str) -> None:
    with pytest.raises(UserError, match=name):
        Sampling(**{name: float("nan")})
