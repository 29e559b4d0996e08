"""The loop: it learns, resumes bit for bit from any step, stops on signals and on losses that are not finite."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longverse.errors import UserError
from longverse.models.checkpoint import load
from longverse.models.shards import SafetensorsFile
from longverse.train.config import Recipe
from longverse.train.examples import Conversations, Mixture
from longverse.train.forward import LossModel
from longverse.train.lora import add_lora
from longverse.train.state import checkpoints, latest, load_state, trained
from longverse.train.trainer import StageEnd, interruptible, make_optimizer, read_log, train_stage
from tests.train.common import recipe, tiny_folder, write_messages


class Killed(BaseException):
    """What a test throws to end a run as a power cut would: nothing is written any more."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model")
    write_messages(folder / "m.jsonl")
    return folder


def run(recipe: Recipe, out: Path, **options: Any) -> tuple[StageEnd, LossModel]:
    """Train a recipe's first stage from the newest checkpoint of `out`, or from the beginning."""
    loaded = load(recipe.model, dtype="float32")
    network = loaded.network
    if recipe.method == "lora":
        add_lora(network, recipe.lora, recipe.seed)
    else:
        for name, parameter in list(network.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, torch.nn.Parameter(parameter.detach().clone()))
    model = LossModel(network)
    optimizer = make_optimizer(model, recipe)
    stage = recipe.stages[0]
    source = Conversations.open(str(stage.data[0].messages), loaded.tokenizer, loaded.chat)
    mixture = Mixture([source], [1.0], stage.steps, stage.batch, recipe.seed)
    first = 0
    if (found := latest(out / "checkpoints")) is not None:
        first = found[1]["step"]
        load_state(found[0], network, optimizer, first)
    return train_stage(model, optimizer, mixture, stage, recipe, out, first_step=first, **options), model


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out / "log.jsonl")]


WAYS = [("lora", "adamw"), ("full", "adamw"), ("full", "muon")]


@pytest.mark.parametrize(("method", "optimizer"), WAYS)
def test_learns(base: Path, tmp_path: Path, method: str, optimizer: str) -> None:
    rate = 1e-2 if method == "lora" else 3e-3
    stage = {"steps": 25, "learning_rate": rate}
    plan = recipe(base / "model", base / "m.jsonl", stage, method=method, optimizer=optimizer)
    end, _ = run(plan, tmp_path)
    assert end.steps == 25
    assert not end.interrupted
    found = losses(tmp_path)
    assert sum(found[-5:]) < 0.6 * sum(found[:5])


@pytest.mark.parametrize(("method", "optimizer"), WAYS)
@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_resumes_bit_for_bit(base: Path, tmp_path: Path, method: str, optimizer: str, kill_at: int) -> None:
    plan = recipe(base / "model", base / "m.jsonl", method=method, optimizer=optimizer)
    _, whole = run(plan, tmp_path / "whole")

    def kill(report: Any) -> None:
        if report.step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        run(plan, tmp_path / "cut", on_step=kill)
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"number": 0, "ste')  # the kill fell into a write
    _, resumed = run(plan, tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    for (name, a), b in zip(trained(whole.network).items(), trained(resumed.network).values(), strict=True):
        assert torch.equal(a, b), name


def test_muon_keeps_one_moment_of_a_matrix_before_and_after_a_resume(base: Path, tmp_path: Path) -> None:
    plan = recipe(base / "model", base / "m.jsonl", method="full", optimizer="muon")
    run(plan, tmp_path)
    held = SafetensorsFile(latest(tmp_path / "checkpoints")[0] / "state.safetensors").infos  # type: ignore[index]
    name = "model.layers.0.mlp.up_proj.weight"
    assert f"exp_avg/{name}" in held
    assert f"exp_avg_sq/{name}" not in held
    assert "exp_avg_sq/lm_head.weight" in held
    network = load(plan.model, dtype="float32").network
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(LossModel(network), plan)
    load_state(latest(tmp_path / "checkpoints")[0], network, optimizer, 6)  # type: ignore[index]
    assert set(optimizer.state[network.get_parameter(name)]) == {"step", "exp_avg"}


def test_a_stop_writes_a_checkpoint_and_loses_nothing(base: Path, tmp_path: Path) -> None:
    plan = recipe(base / "model", base / "m.jsonl", save_every=100)
    run(plan, tmp_path / "whole")
    asked = iter([False, False, False, False, True])

    def stop() -> bool:
        return next(asked, True)

    end, _ = run(plan, tmp_path / "cut", stop=stop)
    assert end.interrupted
    assert 0 < end.steps < 6
    assert end.checkpoint is not None
    end, _ = run(plan, tmp_path / "cut")
    assert not end.interrupted
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruptible() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)  # the second one ends it
    assert signal.getsignal(number) == before


def test_not_finite_stops_before_the_update(base: Path, tmp_path: Path) -> None:
    plan = recipe(base / "model", base / "m.jsonl", {"steps": 20, "learning_rate": 1e30, "warmup": 0}, clip=0)
    with pytest.raises(UserError, match=r"step \d+: the loss is .*m\.jsonl, line \d+"):
        run(plan, tmp_path)
    found = latest(tmp_path / "checkpoints")
    if found is not None:
        tensors = json.loads((found[0] / "state.json").read_text())
        assert tensors["step"] < 20


def test_only_the_newest_checkpoints_are_kept(base: Path, tmp_path: Path) -> None:
    run(recipe(base / "model", base / "m.jsonl", {"steps": 8}, keep=2), tmp_path)
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["00-sft-000006", "00-sft-000008"]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_full_disk_loses_one_interval(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.train import state

    real: Callable[..., None] = state.write_json

    def full(path: Path, value: dict) -> None:
        if value.get("step") == 4:
            raise OSError(28, "No space left on device")
        real(path, value)

    monkeypatch.setattr(state, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        run(recipe(base / "model", base / "m.jsonl"), tmp_path)
    found = latest(tmp_path / "checkpoints")
    assert found is not None
    assert found[1]["step"] == 2
    monkeypatch.undo()
    end, _ = run(recipe(base / "model", base / "m.jsonl"), tmp_path)
    assert end.steps == 6


def test_a_checkpoint_of_another_run_is_refused(base: Path, tmp_path: Path) -> None:
    run(recipe(base / "model", base / "m.jsonl"), tmp_path)
    with pytest.raises(UserError, match="another"):
        run(recipe(base / "model", base / "m.jsonl", lora={"rank": 2}), tmp_path)
    with pytest.raises(UserError, match="another"):
        run(recipe(base / "model", base / "m.jsonl", lora={"rank": 4, "targets": ["q_proj"]}), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")


def test_micro_batches_do_not_change_the_run(base: Path, tmp_path: Path) -> None:
    for name, micro in (("a", 1), ("b", 10_000)):
        run(recipe(base / "model", base / "m.jsonl", {"micro_tokens": micro}), tmp_path / name)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)
    lines = read_log(tmp_path / "a" / "log.jsonl")
    assert min(line["rows"] for line in lines) > 1
    assert {line["rows"] for line in read_log(tmp_path / "b" / "log.jsonl")} == {1}
    assert all(line["tokens"] > line["labels"] > 0 for line in lines)
