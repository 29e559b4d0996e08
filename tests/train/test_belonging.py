"""Stages taken over from another run: the same run as if they had been trained, or one sentence why not."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

from longverse.data.config import build
from longverse.errors import UserError
from longverse.train.belonging import ASIDE
from longverse.train.config import Probe, Recipe
from longverse.train.run import Watch, run_recipe
from longverse.train.state import save_state
from longverse.train.trainer import read_log
from tests.train.common import recipe, tiny_folder


def three(base: Path, last: int = 3, first: float = 5e-3, **changes: Any) -> Recipe:
    data = [{"messages": str(base / "m.jsonl")}]
    common = {"data": data, "batch": 3, "warmup": 1, "max_tokens": 200}
    stages = [
        {**common, "name": "one", "steps": 3, "learning_rate": first, "rope": "abf:50000"},
        {**common, "name": "two", "steps": 2, "learning_rate": 4e-3},
        {**common, "name": "three", "steps": last, "learning_rate": 3e-3, "rope": "dynamic:2:64"},
    ]
    probe = {"lengths": [256], "facts": 1}
    return recipe(base / "model", base / "m.jsonl", stages=stages, keep_stages=True, probe=probe, **changes)


def losses(out: Path) -> list[tuple[str, int, float]]:
    return [(line["stage"], line["step"], line["loss"]) for line in read_log(out / "log.jsonl")]


@pytest.fixture(scope="module", params=["lora", "full"])
def old(base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("old") / "run"
    assert run_recipe(three(base, method=request.param), out).finished
    return out, request.param


def test_stages_taken_over_are_the_stages_trained(base: Path, old: tuple[Path, str], tmp_path: Path) -> None:
    place, method = old
    changed = three(base, last=4, method=method)
    whole = run_recipe(changed, tmp_path / "whole")
    taken = run_recipe(changed, tmp_path / "taken", stages_from=place)
    assert losses(tmp_path / "taken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "taken")) == 9
    assert list(taken.probes) == ["one", "two", "three"]
    assert taken.probes == whole.probes
    kind = "adapter" if method == "lora" else "model"
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    ours, theirs = (load_file(tmp_path / name / kind / file) for name in ("taken", "whole"))
    assert all(equal(ours[name], theirs[name]) for name in theirs)
    # The same command again finds its own checkpoints, and the old run is as it was.
    assert run_recipe(changed, tmp_path / "taken", stages_from=place).finished
    assert losses(tmp_path / "taken") == losses(tmp_path / "whole")
    assert len(losses(place)) == 8
    assert not (tmp_path / "taken" / ASIDE).exists()


def test_a_run_taken_over_can_be_taken_over(base: Path, old: tuple[Path, str], tmp_path: Path) -> None:
    place, method = old
    run_recipe(three(base, last=4, method=method), tmp_path / "second", stages_from=place, stages=2)
    run_recipe(three(base, last=1, method=method), tmp_path / "third", stages_from=tmp_path / "second")
    assert losses(tmp_path / "third")[:5] == losses(place)[:5]
    assert len(losses(tmp_path / "third")) == 6


def test_what_cannot_be_taken_over_is_said(base: Path, old: tuple[Path, str], tmp_path: Path) -> None:
    place, method = old
    out = tmp_path / "new"
    plan = three(base, last=4, method=method)
    with pytest.raises(UserError, match=r"is no folder of a run"):
        run_recipe(plan, out, stages_from=tmp_path / "nothing")
    with pytest.raises(UserError, match=r"begins otherwise \(stages\[0\].learning_rate: 0.005 then, 0.001 now"):
        run_recipe(three(base, first=1e-3, method=method), out, stages_from=place)
    with pytest.raises(UserError, match=r"another recipe \(stages\[2\].steps: 3 then, 4 now\).*--stages-from"):
        run_recipe(plan, place)
    tiny_folder(tmp_path / "other", max_position_embeddings=64, intermediate_size=72)
    with pytest.raises(UserError, match="another model"):
        run_recipe(dataclasses.replace(plan, model=str(tmp_path / "other")), out, stages_from=place)
    bare = dataclasses.replace(three(base, method=method), keep_stages=False)
    run_recipe(bare, tmp_path / "bare")
    with pytest.raises(UserError, match="had no keep_stages"):
        run_recipe(plan, out, stages_from=tmp_path / "bare")
    with pytest.raises(UserError, match="a run of its own, into which no stages"):
        run_recipe(plan, tmp_path / "bare", stages_from=place)
    with pytest.raises(UserError, match=r"begins otherwise \(seed: 0 then, 7 now"):
        run_recipe(dataclasses.replace(three(base, method=method), seed=7), out, stages_from=place)
    windowed = dataclasses.replace(plan.stages[0], window=300)
    with pytest.raises(UserError, match=r"begins otherwise \(stages\[0\].window"):
        run_recipe(dataclasses.replace(plan, stages=(windowed, *plan.stages[1:])), out, stages_from=place)
    shutil.copytree(place, tmp_path / "bared")
    shutil.rmtree(tmp_path / "bared" / "checkpoints")
    with pytest.raises(UserError, match="cannot take stages over from itself"):
        run_recipe(plan, tmp_path / "bared", stages_from=tmp_path / "bared")
    with pytest.raises(UserError, match="stages of a run whose checkpoints are gone"):
        run_recipe(plan, tmp_path / "bared", stages_from=place)
    assert (tmp_path / "bared" / "stages" / "02-three").exists()
    assert not (out / "checkpoints").exists()


def test_a_dry_run_looks_and_takes_nothing(base: Path, old: tuple[Path, str], tmp_path: Path) -> None:
    place, method = old
    out, notes = tmp_path / "new", []
    changed = three(base, last=4, method=method)
    with pytest.raises(UserError, match="is no folder of a run"):
        run_recipe(changed, out, dry=True, stages_from=tmp_path / "nothing")
    run_recipe(three(base, last=9, method=method), out, dry=True, stages_from=place, watch=Watch(note=notes.append))
    assert f"To be taken over: one, two from {place}." in notes
    assert not (out / "checkpoints").exists()
    # Nor does what a dry run left behind belong to its recipe.
    assert run_recipe(changed, out, stages_from=place).finished
    assert len(losses(out)) == 9


def test_a_kill_while_stages_are_taken_leaves_nothing_in_the_way(
    base: Path, old: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, method = old
    out, changed = tmp_path / "new", three(base, last=4, method=method)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("longverse.train.belonging.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(changed, out, stages_from=place)
    assert run_recipe(changed, out, stages_from=place).finished
    assert [line[:2] for line in losses(out)] == [line[:2] for line in losses(place)] + [("three", 4)]


def test_a_kill_before_a_stages_end_is_kept(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = three(base)

    def killed(folder: Path, *arguments: Any, **named: Any) -> Path:
        if folder.parent.name == "stages":
            raise KeyboardInterrupt
        return save_state(folder, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr("longverse.train.run.save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(plan, tmp_path / "cut", stages=1)
    assert run_recipe(plan, tmp_path / "cut", stages=1).step == 3
    taken = run_recipe(three(base, last=4), tmp_path / "new", stages_from=tmp_path / "cut", stages=1)
    assert taken.stage == "one"


def test_a_stage_that_ended_early_is_taken_over_as_ended(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longverse.train.run.has_stopped_growing", lambda windows, patience: True)
    probe = build(Probe, {"lengths": [256], "facts": 1, "every": 1, "patience": 1})
    plans = [dataclasses.replace(three(base, last), probe=probe) for last in (3, 4)]
    run_recipe(plans[0], tmp_path / "old", stages=2)
    assert [line[:2] for line in losses(tmp_path / "old")] == [("one", 1), ("two", 1)]
    run_recipe(plans[1], tmp_path / "new", stages_from=tmp_path / "old", stages=2)
    assert losses(tmp_path / "new") == losses(tmp_path / "old")
