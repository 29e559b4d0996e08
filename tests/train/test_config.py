"""Recipes: unknown keys, impossible values, schedules, fingerprints."""

import json
from pathlib import Path

import pytest

from longverse.data.config import build
from longverse.errors import UserError
from longverse.train.belonging import _difference
from longverse.train.config import Recipe, Stage

GOOD = {"model": "smol", "stages": [{"name": "a", "data": [{"messages": "m.jsonl"}], "steps": 5, "warmup": 1}]}


def changed(stage: dict | None = None, **top: object) -> dict:
    return {**GOOD, "stages": [{**GOOD["stages"][0], **(stage or {})}], **top}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed(lerning_rate=1), "unknown key 'lerning_rate'"),
        (changed({"learning_rates": 1e-3}), "did you mean 'learning_rate'"),
        (changed({"steps": 0}), "at least 1"),
        (changed({"warmup": 9}), "warm-up"),
        (changed({"schedule": "cosin"}), "did you mean 'cosine'"),
        (changed({"weighting": "tokens"}), "did you mean 'token'"),
        (changed({"data": []}), "at least one source"),
        (changed({"data": [{"messages": "a", "store": "b"}]}), "exactly one"),
        (changed({"name": "../x"}), "letters"),
        (changed({"min_tokens": 10, "max_tokens": 5}), "at least 10"),
        (changed(method="loar"), "did you mean 'lora'"),
        (changed(lora={"targets": ["q_prj"]}), "did you mean 'q_proj'"),
        (changed(lora={"rank": 0}), "at least 1"),
        (changed(stages=[GOOD["stages"][0]] * 2), "Two stages"),
        (changed(stages=[]), "at least one stage"),
        (changed(method="full", optimizer="moun"), "did you mean 'muon'"),
        (changed(method="lora", optimizer="muon"), "optimizer: adamw"),
    ],
)
def test_refuses(values: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(Recipe, values)


def test_load_places_paths_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: smol\nstages:\n- {name: a, data: [{messages: m.jsonl}], steps: 20, max_tokens: 4K}\n")
    recipe = Recipe.load(path)
    assert recipe.stages[0].data[0].messages == str(tmp_path / "m.jsonl")
    assert recipe.stages[0].max_tokens == 4096
    assert Recipe.load(path, model="other").model == "other"
    path.write_text(path.read_text().replace("steps: 20", "steps: 20, learning_rate: 2e-4"))  # a text, says YAML 1.1
    assert Recipe.load(path).stages[0].learning_rate == pytest.approx(2e-4)
    path.write_text("model: smol\nstages: [\n")
    with pytest.raises(UserError, match="line"):
        Recipe.load(path)


def test_rates() -> None:
    stage = build(Stage, {**GOOD["stages"][0], "steps": 110, "warmup": 10, "learning_rate": 1.0, "floor": 0.1})
    assert stage.rate(0) == pytest.approx(0.1)
    assert stage.rate(9) == stage.rate(10) == pytest.approx(1.0)
    assert stage.rate(60) == pytest.approx(0.55)
    assert stage.rate(109) == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(map(stage.rate, range(10, 109)), map(stage.rate, range(11, 110)), strict=True))


def test_fingerprint_leaves_out_what_changes_no_weight() -> None:
    recipe = build(Recipe, GOOD)
    assert recipe.fingerprint() == build(Recipe, changed({"micro_tokens": 99}, save_every=3)).fingerprint()
    assert recipe.fingerprint() != build(Recipe, changed({"learning_rate": 1e-5})).fingerprint()
    assert recipe.fingerprint() == "cd55b2ae92c5f309"  # what checkpoints in the world have


def test_another_optimizer_is_said_both_ways() -> None:
    adamw, muon = (build(Recipe, changed(method="full", optimizer=name)) for name in ("adamw", "muon"))
    kept = {
        recipe.optimizer: json.loads(json.dumps(recipe.to_dict())) for recipe in (adamw, muon)
    }  # as run.json has it
    assert _difference({"recipe": kept["adamw"]}, muon) == "optimizer: adamw then, muon now"
    assert _difference({"recipe": kept["muon"]}, adamw) == "optimizer: muon then, adamw now"
    older = {key: value for key, value in kept["adamw"].items() if key != "optimizer"}
    assert _difference({"recipe": older}, adamw) == ""


@pytest.mark.parametrize(
    ("rope", "counts"), [(None, False), ("abf:50000", False), ("dynamic:2:4096", False), ("abf:50000,dynamic:2", True)]
)
def test_a_window_counts_where_a_later_plan_starts_from_it(rope: str | None, counts: bool) -> None:
    def with_window(window: str) -> Recipe:
        first = {**GOOD["stages"][0], "window": window}
        return build(Recipe, {**GOOD, "stages": [first, {**GOOD["stages"][0], "name": "b", "rope": rope}]})

    assert (with_window("8K").fingerprint() != with_window("16K").fingerprint()) == counts
