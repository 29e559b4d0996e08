"""Whole runs: a recipe of several stages from a command to a finished result, killed twice on the way."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longverse.errors import UserError
from longverse.models.adapters import merge_adapter
from longverse.models.checkpoint import load, open_model
from longverse.models.network import NetworkConfig
from longverse.models.rope import RopePlan
from longverse.train import forecast
from longverse.train.config import Recipe
from longverse.train.results import rope_entries
from longverse.train.run import Outcome, Watch, run_recipe
from longverse.train.trainer import read_log
from tests.helpers import tiny_config
from tests.models.folders import save_folder
from tests.train.common import recipe, tiny_folder, write_messages

IDS = torch.randint(0, 90, (1, 60), generator=torch.Generator().manual_seed(0))


def two_stages(base: Path, **changes: Any) -> Recipe:
    """ABF, then dynamic NTK: the card's recipe in small."""
    data = [{"messages": str(base / "m.jsonl")}]
    common = {"data": data, "steps": 5, "batch": 3, "warmup": 1, "learning_rate": 5e-3}
    stages = [
        {**common, "name": "cpt", "rope": "abf:50000", "max_tokens": 100, "weighting": "sample"},
        {**common, "name": "sft", "rope": "dynamic:2:64", "max_tokens": 400},
    ]
    return recipe(base / "model", base / "m.jsonl", stages=stages, **changes)


def logits_of(outcome: Outcome, base: Path) -> torch.Tensor:
    if outcome.model is not None:
        return load(str(outcome.model), dtype="float32").network(IDS)
    assert outcome.adapter is not None
    network = load(str(base / "model"), dtype="float32").network
    merge_adapter(network, outcome.adapter)
    return network(IDS)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_kills_change_nothing(base: Path, tmp_path: Path, method: str) -> None:
    plan = two_stages(base, method=method)
    whole = run_recipe(dataclasses.replace(plan, keep_stages=True), tmp_path / "whole")
    kept = tmp_path / "whole" / "stages"
    assert sorted(path.name for path in kept.iterdir()) == ["00-cpt", "01-sft"]
    for stage, step in (("cpt", 3), ("sft", 4)):

        def kill(report: Any, at: tuple[str, int] = (stage, step)) -> None:
            if (report.stage, report.step) == at:
                raise Killed

        with pytest.raises(Killed):
            run_recipe(plan, tmp_path / "cut", watch=Watch(step=kill))
    resumed = run_recipe(plan, tmp_path / "cut")
    assert whole.finished
    assert resumed.finished
    logs = [
        [(li["stage"], li["step"], li["loss"]) for li in read_log(tmp_path / n / "log.jsonl")] for n in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 10
    assert torch.equal(logits_of(whole, base), logits_of(resumed, base))
    again = run_recipe(plan, tmp_path / "whole")
    assert again.finished
    assert [li["loss"] for li in read_log(tmp_path / "whole" / "log.jsonl")] == [loss for *_, loss in logs[0]]


def test_the_result_states_its_rope_and_window(base: Path, tmp_path: Path) -> None:
    outcome = run_recipe(two_stages(base), tmp_path, write_merged=True)
    assert outcome.adapter is not None
    assert outcome.model is not None
    loaded = load(str(outcome.model), dtype="float32")
    rope = loaded.network.config.rope
    assert (rope.kind, rope.theta, rope.original_window) == ("dynamic", 50_000, 64)
    assert loaded.network.config.window == 400
    network = load(str(base / "model"), dtype="float32").network
    merge_adapter(network, outcome.adapter)
    assert network.config == loaded.network.config
    card = (outcome.model / "README.md").read_text()
    assert "dynamic NTK" in card
    assert "| cpt | abf:50000 |" in card
    torch.testing.assert_close(network(IDS), loaded.network(IDS), rtol=0, atol=0.05)  # the adapter is kept in bf16


def test_transformers_and_peft_load_the_results(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan = recipe(base / "model", base / "m.jsonl", {"rope": "abf:50000"})
    outcome = run_recipe(plan, tmp_path, write_merged=True)
    ours = load(str(outcome.model), dtype="float32").network(IDS)
    theirs = AutoModelForCausalLM.from_pretrained(str(outcome.model), dtype=torch.float32).eval()
    assert theirs.config.rope_parameters["rope_theta"] == 50_000
    torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_kills_anywhere_change_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Random intervals between checkpoints, and kills at random moments: between rows, in the middle of a checkpoint
    and of its renaming, until the run gets through."""
    from longverse.train import state, trainer

    rng = random.Random(seed)
    plan = two_stages(base, save_every=rng.randint(1, 4), keep=rng.randint(1, 2), method=rng.choice(["lora", "full"]))
    whole = run_recipe(plan, tmp_path / "whole")
    places = {"rows": (trainer, "make_rows"), "weights": (state, "SafetensorsWriter"), "state": (state, "write_json")}
    places["rename"] = (state.os, "replace")
    for _ in range(5):
        module, name = places[rng.choice(list(places))]
        left, real = [rng.randint(1, 4)], getattr(module, name)

        def kill(*values: Any, left: list[int] = left, real: Callable[..., Any] = real, **named: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return real(*values, **named)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, kill)
            try:
                run_recipe(plan, tmp_path / "cut")
            except Killed:
                continue
            break
    resumed = run_recipe(plan, tmp_path / "cut")
    assert resumed.finished
    keys = ("stage", "step", "loss", "gradient_norm", "learning_rate", "tokens", "labels")
    logs = [[[line[key] for key in keys] for line in read_log(tmp_path / n / "log.jsonl")] for n in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert torch.equal(logits_of(whole, base), logits_of(resumed, base))
    assert not [path for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_damaged_checkpoint_is_passed_over(base: Path, tmp_path: Path) -> None:
    plan = two_stages(base, save_every=2, keep=3)
    whole = run_recipe(plan, tmp_path / "whole")

    def kill(report: Any) -> None:
        if (report.stage, report.step) == ("sft", 5):
            raise Killed

    with pytest.raises(Killed):
        run_recipe(plan, tmp_path / "cut", watch=Watch(step=kill))
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("01-*"))[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    told: list[str] = []
    resumed = run_recipe(plan, tmp_path / "cut", watch=Watch(note=told.append))
    assert "Going on after step 2 of stage sft." in told
    assert torch.equal(logits_of(whole, base), logits_of(resumed, base))
    for path in (tmp_path / "cut" / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="None of the checkpoints"):
        run_recipe(plan, tmp_path / "cut")


def test_a_stop_is_told_and_goes_on(base: Path, tmp_path: Path) -> None:
    plan, seen = two_stages(base), []
    outcome = run_recipe(plan, tmp_path, watch=Watch(step=seen.append, stop=lambda: len(seen) >= 3))
    assert not outcome.finished
    assert outcome.interrupted
    assert (outcome.stage, outcome.step) == ("cpt", 3)
    outcome = run_recipe(plan, tmp_path, stages=1)
    assert not outcome.finished
    assert not outcome.interrupted
    assert run_recipe(plan, tmp_path).finished


def test_a_folder_in_which_nothing_was_trained_is_free(base: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no conversation")
    with pytest.raises(UserError, match="no JSON"):
        run_recipe(recipe(base / "model", tmp_path / "bad.jsonl"), tmp_path / "out")
    assert run_recipe(recipe(base / "model", base / "m.jsonl"), tmp_path / "out").finished


def test_changed_data_is_refused_within_a_stage(base: Path, tmp_path: Path) -> None:
    data = shutil.copy(base / "m.jsonl", tmp_path / "m.jsonl")
    plan, seen = recipe(base / "model", data), []
    run_recipe(plan, tmp_path / "out", watch=Watch(step=seen.append, stop=lambda: len(seen) >= 3))
    write_messages(data, 40, seed=9)
    with pytest.raises(UserError, match="data of stage sft is not what this run was trained on up to step 3"):
        run_recipe(plan, tmp_path / "out")
    shutil.copy(base / "m.jsonl", data)
    assert run_recipe(plan, tmp_path / "out").finished


def test_other_weights_are_refused(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base / "model", tmp_path / "model")
    plan = recipe(model, base / "m.jsonl")
    run_recipe(plan, tmp_path / "out")
    [file] = model.glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": 2 * tensors["model.norm.weight"]}, file, {"format": "pt"})
    with pytest.raises(UserError, match="other weights of model"):
        run_recipe(plan, tmp_path / "out")


def test_dry_examines_and_forecasts(base: Path, tmp_path: Path) -> None:
    plans, findings = [], []
    watch = Watch(planned=lambda stage, plan: plans.append(plan), findings=lambda stage, found: findings.extend(found))
    outcome = run_recipe(two_stages(base), tmp_path, dry=True, watch=watch)
    assert not outcome.finished
    assert not (tmp_path / "log.jsonl").exists()
    [plan] = plans
    assert plan.steps == 5
    assert plan.tokens > 0
    assert plan.seconds > 0
    assert plan.activation_bytes > 0
    assert len(findings) == 3
    assert all(finding.passed for finding in findings)


def test_a_folder_belongs_to_one_recipe(base: Path, tmp_path: Path) -> None:
    run_recipe(two_stages(base), tmp_path, stages=1)
    with pytest.raises(UserError, match=r"another recipe \(seed: 0 then, 5 now\)"):
        run_recipe(two_stages(base, seed=5), tmp_path)
    other = tiny_folder(tmp_path.parent / "other", hidden_size=32, head_dim=8)
    with pytest.raises(UserError, match="another model"):
        run_recipe(dataclasses.replace(two_stages(base), model=str(other)), tmp_path)
    assert run_recipe(two_stages(base), tmp_path).finished


def test_a_rope_change_that_changes_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="changes nothing"):
        run_recipe(recipe(base / "model", base / "m.jsonl", {"rope": "abf:10000"}), tmp_path)


def test_a_run_begins_with_an_adapter_of_another(base: Path, tmp_path: Path) -> None:
    first = run_recipe(recipe(base / "model", base / "m.jsonl", {"rope": "abf:50000"}), tmp_path / "first")
    stage = {"name": "more", "data": [{"messages": str(base / "m.jsonl")}], "steps": 1, "batch": 2, "warmup": 0}
    values = {"model": str(base / "model"), "precision": "fp32", "lora": {"rank": 4, "start": "first/adapter"}}
    path = tmp_path / "recipe.json"  # JSON is YAML; the adapter's place is told from the recipe's own folder
    path.write_text(json.dumps({**values, "stages": [{**stage, "learning_rate": 1e-9, "max_tokens": 512}]}))
    second = run_recipe(Recipe.load(path), tmp_path / "second")
    assert second.adapter is not None
    torch.testing.assert_close(logits_of(second, base), logits_of(first, base), rtol=1e-4, atol=1e-5)
    stated = json.loads((second.adapter / "longverse.json").read_text())
    assert stated["config"]["rope_parameters"]["rope_theta"] == 50000  # its RoPE plan came with it
    values["lora"]["start"] = "nowhere"
    path.write_text(json.dumps({**values, "stages": [stage]}))
    with pytest.raises(UserError, match="nowhere"):
        run_recipe(Recipe.load(path), tmp_path / "third")


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longverse.train.forecast.available_memory", lambda device: 1000)
    with pytest.raises(UserError, match="lower max_tokens"):
        run_recipe(two_stages(base), tmp_path)


def test_a_store_of_another_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    info = {"format": 1, "tokenizer": {"fingerprint": "0", "name": "other"}}
    (tmp_path / "store" / "store.json").write_text(json.dumps(info))
    plan = recipe(base / "model", base / "m.jsonl", {"data": [{"store": str(tmp_path / "store")}]})
    with pytest.raises(UserError, match="tokenised by 'other'"):
        run_recipe(plan, tmp_path / "out")


def test_probe(base: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    plan = recipe(base / "model", base / "m.jsonl", probe={"lengths": [400], "facts": 1})
    outcome = run_recipe(plan, tmp_path)
    assert outcome.probes["sft"].found["en"].keys() == {"400"}
    assert "Needle probe" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("changes", [{"method": "full"}, {"lora": {"rank": 4, "also": ["norms", "embeddings"]}}])
def test_bf16_follows_fp32(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = []
    for precision in ("fp32", "bf16"):
        plan = recipe(base / "model", base / "m.jsonl", {"learning_rate": 3e-3}, precision=precision, **changes)
        run_recipe(plan, tmp_path / precision)
        runs.append([line["loss"] for line in read_log(tmp_path / precision / "log.jsonl")])
    assert runs[0] != runs[1]
    assert runs[1] == pytest.approx(runs[0], rel=0.05)


@pytest.mark.parametrize(("narrow", "timed"), [(9e9, [128, 16, 16, 128]), (1e8, [128, 16, 16])])
def test_a_type_without_products_is_not_timed_at_length(
    monkeypatch: pytest.MonkeyPatch, narrow: float, timed: list[int]
) -> None:
    """bfloat16 on an older processor: 20 seconds for one product; and what it could do at best is float32's."""
    seen: list[int] = []

    def product(dtype: torch.dtype, size: int) -> float:
        seen.append(size)
        return 4e9 if dtype == torch.float32 else narrow

    monkeypatch.setattr(forecast, "_product_flops", product)
    assert forecast.peak_flops(torch.device("cpu"), torch.bfloat16) == max(narrow, 4e9)
    assert seen == timed
    seen.clear()
    assert forecast.peak_flops(torch.device("cpu"), torch.float32) == 4e9
    assert seen == timed[:1]


def test_what_a_result_states_is_what_is_read_back() -> None:
    """YaRN's window is not its factor's, and sliding attention does not narrow what full attention was trained on."""
    config = tiny_config("mistral", sliding_window=64)
    shape = NetworkConfig.from_dict(config)
    for change, window in (("yarn:4:64", 100), ("abf:50000", 300), ("dynamic:2:64", 90)):
        plan = RopePlan.parse(change, shape.rope, shape.window)
        past = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
        read = NetworkConfig.from_dict(past | rope_entries(plan, window, config))
        assert (read.rope, read.window) == (plan, window)


def test_a_run_goes_on_where_only_a_key_is_new(base: Path, tmp_path: Path) -> None:
    run_recipe(two_stages(base), tmp_path, stages=1)
    path = tmp_path / "run.json"
    before = json.loads(path.read_text())
    for stage in before["recipe"]["stages"]:
        for source in stage["data"]:
            del source["facts"]
    path.write_text(json.dumps(before | {"fingerprint": "of an earlier version"}))
    assert run_recipe(two_stages(base), tmp_path).finished


def test_dry_over_a_finished_run_writes_nothing(base: Path, tmp_path: Path) -> None:
    run_recipe(two_stages(base), tmp_path)
    card = tmp_path / "adapter" / "README.md"
    card.write_text("mine")
    run_recipe(two_stages(base), tmp_path, dry=True)
    assert card.read_text() == "mine"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_model_of_xverse_is_taught_its_chat_format(base: Path, tmp_path: Path, method: str) -> None:
    """Conversations are trained in XVERSE's format, and what loads the result speaks it; text alone teaches none."""
    folder = tmp_path / "XVERSE-7B"
    save_folder(folder, {**tiny_config(max_position_embeddings=512), "model_type": "xverse"})
    opened = open_model(str(folder))
    assert opened.chat().kind == "plain"
    text = {"name": "cpt", "data": [{"made": "copy"}], "steps": 1, "warmup": 0}
    sft = {"name": "sft", "data": [{"messages": str(base / "m.jsonl")}], "steps": 2, "warmup": 0}
    stages = [{**stage, "batch": 2, "max_tokens": 256} for stage in (text, sft)]
    plan = recipe(folder, base / "m.jsonl", stages=stages, method=method, keep_stages=True)
    outcome = run_recipe(plan, tmp_path / "out", write_merged=True)
    first = tmp_path / "out" / "stages" / "00-cpt" / ("adapter" if method == "lora" else "model")
    for made, kind in ((first, "plain"), (outcome.adapter, "xverse"), (outcome.model, "xverse")):
        if made is not None:
            opened = open_model(str(made))
            assert opened.chat().kind == kind or made.name == "model"  # a model's name tells no release
            assert ("Human: " in str(opened.tokenizer.chat_template)) == (kind == "xverse")
            assert any("base model" in note for note in opened.notes) == (kind == "plain")
    cached = np.load(next((tmp_path / "out" / "tokens").glob("*.npz")))
    assert "Human: " in opened.tokenizer.decode([int(token) for token in cached["ids"][:200]])
    if method == "lora":  # who goes on from it with text goes on in its format
        further = recipe(folder, base / "m.jsonl", stages=stages[:1], lora={"rank": 4, "start": str(outcome.adapter)})
        assert open_model(str(run_recipe(further, tmp_path / "more").adapter)).chat().kind == "xverse"
