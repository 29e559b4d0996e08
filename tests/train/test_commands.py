"""extend and finetune from the command line: what is said, what is left behind, and what they leave with."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from longverse.cli import main
from longverse.models.checkpoint import load
from longverse.train.trainer import read_log
from tests.train.common import tiny_folder, write_messages


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model")
    write_messages(folder / "m.jsonl", 12)
    stage = {"data": [{"messages": "m.jsonl"}], "steps": 3, "batch": 2, "warmup": 1, "max_tokens": 512}
    stages = [{**stage, "name": "one"}, {**stage, "name": "two", "rope": "abf:50000"}]
    (folder / "r.yaml").write_text(yaml.safe_dump({"model": "x", "precision": "fp32", "stages": stages}))
    return folder


def test_finetune(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", str(base / "model"), "--data", str(base / "m.jsonl"), "--out", str(tmp_path / "mine")]
    assert main([*command, "--steps", "3", "--rank", "4"]) == 0
    said = capsys.readouterr()
    assert "ok     labels stand where the chat format puts answers" in said.err
    assert "finetune 3/3  loss" in said.err
    assert f"Adapter: {tmp_path / 'mine' / 'adapter'}" in said.out
    assert len(read_log(tmp_path / "mine" / "log.jsonl")) == 3
    adapted = load(str(tmp_path / "mine" / "adapter"), dtype="float32").network.state_dict()
    plain = load(str(base / "model"), dtype="float32").network.state_dict()
    assert not adapted["model.layers.0.mlp.up_proj.weight"].equal(plain["model.layers.0.mlp.up_proj.weight"])
    assert main([*command, "--steps", "3", "--rank", "5"]) == 2
    assert "another recipe (lora.rank: 4 then, 5 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "is empty"),
        ("nonsense\n", "line 1 is no JSON"),
        ('{"messages": []}\n', "line 1: the conversation has no assistant message"),
        ('{"messages": [{"role": "user", "content": 3}]}\n', "line 1 has a message without role and content"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}\n',
         "line 1: every answer has weight 0"),
    ],
)  # fmt: skip
def test_finetune_on_what_is_no_data(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, said: str
) -> None:
    (tmp_path / "d.jsonl").write_text(lines)
    command = ["finetune", str(base / "model"), "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert error.startswith("longverse: ")


def test_extend_by_stages(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["extend", str(base / "model"), "--recipe", str(base / "r.yaml"), "--out", str(tmp_path)]
    assert main([*command, "--dry"]) == 0
    assert "Stage one: 3 steps" in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()
    assert main([*command, "--stages", "1"]) == 0
    assert "goes on with the next" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
    assert main([*command, "--merge"]) == 0
    said = capsys.readouterr()
    assert "Going on after step 3 of stage one." in said.err
    assert [(line["stage"], line["step"]) for line in read_log(tmp_path / "log.jsonl")][-1] == ("two", 3)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 50_000
    assert f"Checkpoint: {tmp_path / 'model'}" in said.out


def test_a_signal_ends_a_run_with_a_checkpoint(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longverse.train import trainer

    make_rows = trainer.make_rows
    monkeypatch.setattr(trainer, "make_rows", lambda *v: (os.kill(os.getpid(), signal.SIGTERM), make_rows(*v))[1])
    command = ["extend", str(base / "model"), "--recipe", str(base / "r.yaml"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 130
    assert "Stopped after step 0 of stage one; the same command goes on there." in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0
