"""Loss by position equals one plain forward; sliding counts every token once; effective windows."""

import json
import math
from pathlib import Path

import pytest
import torch

from longverse.errors import UserError
from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.haystack import generated_text
from longverse.evaluation.perplexity import LossResult, loss_by_length, loss_by_position, sliding_loss, token_losses
from longverse.inference.engine import Engine


@pytest.fixture(scope="module")
def backend(engine: Engine) -> EngineBackend:
    return EngineBackend(engine)


@pytest.fixture(scope="module")
def ids(engine: Engine) -> list[int]:
    return engine.tokenizer.encode(generated_text("en", 5, 6000))[:1400]


def plain_losses(engine: Engine, ids: list[int]) -> torch.Tensor:
    """One forward without cache or chunks, log-probabilities by hand."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logits = engine.network(tokens, torch.arange(len(ids))[None], len(ids))[0].double()
    return -logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), tokens[0, 1:]]


def test_chunks_give_the_losses_of_one_forward(backend: EngineBackend, ids: list[int]) -> None:
    ours = torch.tensor(token_losses(backend, ids), dtype=torch.float64)
    torch.testing.assert_close(ours, plain_losses(backend.engine, ids), atol=2e-4, rtol=0)
    assert token_losses(backend, ids, skip=700) == ours[700:].tolist()


def test_blocks_are_means_of_positions(backend: EngineBackend, ids: list[int]) -> None:
    result = loss_by_position(backend, ids, length=500, texts=2, blocks=4)
    both = [plain_losses(backend.engine, ids[start : start + 500]) for start in (0, 900)]
    mean = (both[0] + both[1]) / 2
    assert result.tokens == 2 * 499
    assert result.mean == pytest.approx(float(mean.mean()), abs=1e-4)
    for begin, end, loss, texts in result.blocks:
        assert texts == 2
        assert loss == pytest.approx(float(mean[begin - 1 : end - 1].mean()), abs=2e-4)
    assert result.perplexity == pytest.approx(math.exp(result.mean))


def test_sliding_scores_every_token_once_with_enough_context(backend: EngineBackend, ids: list[int]) -> None:
    result = sliding_loss(backend, ids, context=300, stride=100, blocks=5)
    assert result.tokens == len(ids) - 1
    expected = plain_losses(backend.engine, ids[:300]).tolist()
    begin = 100
    while len(expected) < len(ids) - 1:
        expected += plain_losses(backend.engine, ids[begin : begin + 300])[len(expected) - begin :].tolist()
        begin += 100
    assert result.mean == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert result.effective_window() is None


def test_by_length_the_same_tokens_are_scored(backend: EngineBackend, ids: list[int]) -> None:
    result = loss_by_length(backend, ids, lengths=(150, 400, 900), scored=100, texts=2)
    assert [block[1] for block in result.blocks] == [150, 400, 900]
    for _, length, loss, texts in result.blocks:
        expected = [plain_losses(backend.engine, ids[end - length : end])[-100:].mean() for end in (900, 1400)]
        assert texts == 2
        assert loss == pytest.approx(float(sum(expected)) / 2, abs=2e-4)
    with pytest.raises(UserError, match="more than the 256"):
        loss_by_length(backend, ids, lengths=(256,))


def test_one_text_names_no_window(backend: EngineBackend, ids: list[int]) -> None:
    assert loss_by_position(backend, ids, length=200).effective_window() is None
    assert "No effective window" in loss_by_position(backend, ids, length=200).markdown()


def result_of(losses: list[float]) -> LossResult:
    blocks = [(100 * i, 100 * (i + 1), loss, 4) for i, loss in enumerate(losses)]
    return LossResult("whole", {"model": "m", "window": 300}, {"length": 500}, blocks, 1.0, 500)


def test_effective_windows() -> None:
    assert result_of([3, 2.5, 2.4, 2.4]).effective_window() == 400
    assert result_of([3, 2.5, 2.4, 4, 5]).effective_window() == 300
    assert result_of([3, 2.5, 4, 2.4, 2.4]).effective_window() == 500  # one hard passage is no end
    assert result_of([3, 2.5, 2.4, 4]).effective_window() == 300


def test_results_are_written(tmp_path: Path) -> None:
    result = result_of([3, 2.5, 2.4, 4, 5])
    paths = result.save(tmp_path)
    again = LossResult.from_dict(json.loads(paths[0].read_text()))
    assert again == result
    assert "Effective window: 300 tokens." in paths[1].read_text()
    pytest.importorskip("matplotlib")
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_bad_lengths_are_refused(backend: EngineBackend, ids: list[int]) -> None:
    with pytest.raises(UserError, match="exceeds the window"):
        loss_by_position(backend, ids, length=5000)
    with pytest.raises(UserError, match="has 1,400 tokens and 2,000"):
        loss_by_position(backend, ids, length=2000)
    with pytest.raises(UserError, match="at least 2"):
        loss_by_position(backend, ids, length=1)
    with pytest.raises(UserError, match="--stride"):
        sliding_loss(backend, ids, context=100, stride=100)
    with pytest.raises(UserError, match="--blocks at least 1"):
        sliding_loss(backend, ids, context=100, stride=50, blocks=0)
    with pytest.raises(UserError, match="longer text"):
        token_losses(backend, [1])
