"""Probes on the way: they change no training, say what the tools of evaluation say, and end a stage by a clear rule."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.perplexity import token_losses
from longverse.inference.engine import Engine
from longverse.train.config import Probe
from longverse.train.plot import plot_log
from longverse.train.probe import Figures, Prober, has_stopped_growing, window
from longverse.train.run import Watch, run_recipe
from longverse.train.trainer import read_log, read_probes
from tests.train.common import recipe, tiny_folder, write_messages


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model", max_position_embeddings=256)
    write_messages(folder / "m.jsonl", 40)
    (folder / "held_out.txt").write_text("the red box in an 42 a 7 the in box red " * 60)
    return folder


def measured(base: Path, **changes: Any) -> Any:
    probe = {"text": str(base / "held_out.txt"), "text_tokens": 96, "texts": 3, "every": 2, **changes}
    return recipe(base / "model", base / "m.jsonl", {"steps": 7}, probe=probe, save_every=3)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out / "log.jsonl")]


def test_probes_change_no_training_and_survive_a_kill(base: Path, tmp_path: Path) -> None:
    plan = measured(base)
    run_recipe(dataclasses.replace(plan, probe=Probe()), tmp_path / "without")
    seen: list[tuple[int, Figures]] = []
    outcome = run_recipe(
        plan, tmp_path / "whole", watch=Watch(probed=lambda stage, step, found: seen.append((step, found)))
    )
    assert losses(tmp_path / "whole") == losses(tmp_path / "without")
    assert [step for step, _ in seen] == [2, 4, 6, 7]
    lines = read_probes(tmp_path / "whole" / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [Figures.from_dict(line["probe"]) for line in lines] == [figures for _, figures in seen[:3]]
    assert "Loss by position" in (outcome.adapter / "README.md").read_text()
    assert plot_log(tmp_path / "whole", outcome.probes).exists()

    class Killed(BaseException):
        pass

    def kill(report: Any) -> None:
        if report.step == 5:
            raise Killed

    with pytest.raises(Killed):
        run_recipe(plan, tmp_path / "cut", watch=Watch(step=kill))
    run_recipe(plan, tmp_path / "cut")
    assert read_probes(tmp_path / "cut" / "log.jsonl") == lines
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_loss_is_that_of_the_evaluation(base: Path, tmp_path: Path) -> None:
    outcome = run_recipe(measured(base), tmp_path, write_merged=True)
    engine = Engine.load(str(outcome.model), dtype="float32", window=4096)
    ids = engine.tokenizer.encode((base / "held_out.txt").read_text())[-288:]
    parts = [token_losses(EngineBackend(engine), ids[n : n + 96]) for n in (0, 96, 192)]
    expected = sum(sum(part) for part in parts) / sum(len(part) for part in parts)
    assert outcome.probes["sft"].mean_loss == pytest.approx(expected, rel=1e-4)
    blocks = outcome.probes["sft"].loss
    assert (blocks[0][0], blocks[-1][1]) == (1, 96)


def windows_of(monkeypatch: pytest.MonkeyPatch, windows: list[int]) -> None:
    """Let the probes of a run say these windows, one after the other."""
    left = list(windows)
    monkeypatch.setattr(Prober, "measure", lambda self: (Figures({"en": {"400": 1.0}}, [], left.pop(0)), {}))


def test_a_stage_ends_when_its_window_grows_no_longer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = measured(base, lengths=[400], text=None, every=1, patience=2)
    told: list[str] = []
    windows_of(monkeypatch, [0, 400, 400, 400, 400])
    outcome = run_recipe(plan, tmp_path, watch=Watch(note=told.append))
    assert outcome.finished
    assert "Stage sft ends after step 4: its window has stopped growing." in told
    assert len(losses(tmp_path)) == 4
    again = run_recipe(plan, tmp_path)
    assert again.finished
    assert len(losses(tmp_path)) == 4


def test_a_stopped_run_ends_its_stage_where_a_whole_one_does(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, seen = measured(base, lengths=[400], text=None, every=1, patience=2), []
    windows_of(monkeypatch, [400, 400, 400])
    outcome = run_recipe(plan, tmp_path, watch=Watch(step=seen.append, stop=lambda: len(seen) >= 2))
    assert outcome.interrupted
    windows_of(monkeypatch, [400, 400])
    assert run_recipe(plan, tmp_path).finished
    assert len(losses(tmp_path)) == 3


def test_window() -> None:
    plan = Probe(lengths=(400, 800, 1600), every=1, patience=1)
    assert window(plan, {"en": {"400": 1.0, "800": 0.9, "1600": 0.5}}) == 800
    assert window(plan, {"en": {"400": 0.5, "800": 1.0, "1600": 1.0}}) == 0
    assert window(plan, {"en": {"400": 1.0, "800": 0.8, "1600": 1.0}, "zh": {"400": 1.0, "800": 1.0}}) == 1600
    assert window(plan, {"en": {"400": None}}) == 0


@given(st.lists(st.sampled_from([0, 400, 800, 1600]), max_size=12), st.integers(0, 4))
def test_the_rule_in_plain_words(windows: list[int], patience: int) -> None:
    """Stop exactly when a window was reached and none of the last `patience` probes set a new record."""
    record, since = 0, 0
    for reached in windows:
        since = 0 if reached > record else since + 1
        record = max(record, reached)
    reached_before = max(windows[: len(windows) - patience], default=0) > 0
    expected = bool(patience) and reached_before and since >= patience
    assert has_stopped_growing(windows, patience) == expected


def test_tensorboard_reads_what_a_run_writes(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan, seen = measured(base), []
    run_recipe(plan, tmp_path, watch=Watch(step=seen.append, stop=lambda: len(seen) >= 4))
    time.sleep(1.1)  # TensorBoard reads files by name: the second, the process, and a counter of which 10 is before 9
    run_recipe(plan, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = events.Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 8))
    assert [event.value for event in found] == pytest.approx(losses(tmp_path), rel=1e-6)
    positions = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss by position/")]
    assert len(positions) == 8
    assert [event.step for event in events.Scalars(positions[0])] == [2, 4, 6, 7]


def test_the_share_of_the_peak_is_told(base: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    run_recipe(recipe(base / "model", base / "m.jsonl"), tmp_path, watch=Watch(step=seen.append))
    assert all(0 < report.mfu < 1 for report in seen)
    assert seen[0].mfu / seen[0].gflops == pytest.approx(seen[-1].mfu / seen[-1].gflops)


@pytest.mark.parametrize("also", [("embeddings",), ("norms",), ("embeddings", "norms")])
def test_probes_of_weights_that_are_held_in_two_types(base: Path, tmp_path: Path, also: tuple[str, ...]) -> None:
    """bfloat16 products with float32 weights beside: the probe's loss is that of the model that is written."""
    plan = measured(base, lengths=[300], facts=1)
    plan = dataclasses.replace(plan, precision="bf16", lora=dataclasses.replace(plan.lora, also=also))
    outcome = run_recipe(plan, tmp_path, write_merged=True)
    assert outcome.probes["sft"].found["en"]["300"] is not None
    engine = Engine.load(str(outcome.model), dtype="bfloat16", window=4096)
    ids = engine.tokenizer.encode((base / "held_out.txt").read_text())[-288:]
    parts = [token_losses(EngineBackend(engine), ids[n : n + 96]) for n in (0, 96, 192)]
    expected = sum(sum(part) for part in parts) / sum(len(part) for part in parts)
    assert outcome.probes["sft"].mean_loss == pytest.approx(expected, rel=0.01)
