"""The doctor finds what each broken folder was broken with, and calls a good one good."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from longverse import commands_models
from longverse.errors import UserError
from longverse.models.convert import convert
from longverse.models.doctor import Finding, diagnose
from longverse.models.export import export
from tests.helpers import tiny_config
from tests.models.folders import save_folder
from tests.models.official_layout import make_official


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGVERSE_CACHE", str(tmp_path / "cache"))


def grave(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level in ("error", "warning")]


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def test_an_official_folder_and_its_cure(tmp_path: Path) -> None:
    folder, _ = make_official(tmp_path)
    found = {(finding.level, finding.about): finding for finding in grave(diagnose(folder))}
    assert "states no RoPE base" in found["error", "rope"].what
    assert "trained with 500,000" in found["error", "rope"].what
    assert "longverse convert" in found["error", "rope"].remedy
    assert "tokenizers below 0.19" in found["error", "tokenizer"].what
    assert "--tokenizer" in found["error", "tokenizer"].remedy
    assert "pickle" in found["warning", "weights"].what
    convert(str(folder), tmp_path / "converted")
    assert [(finding.level, finding.about) for finding in grave(diagnose(tmp_path / "converted"))] == [
        ("warning", "rope")  # dynamic NTK, which other engines run in other ways
    ]
    export(str(folder), tmp_path / "llama", check=False)
    findings = diagnose(tmp_path / "llama")
    assert grave(findings) == []
    assert any(finding.level == "ok" for finding in findings)


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"rope_theta": ...}, "rope", "states no RoPE base: every engine takes 10,000"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000}}, "rope", "two RoPE bases"),
    ({"rope_theta": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope", "without rope_theta"),
    ({"rope_theta": ..., "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope", "states no rope_theta"),
    ({"rotary_emb_base": 500_000}, "rope", "which no engine reads"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope", "recomputes that base"),
    ({"rope_scaling": {"type": "magic", "factor": 2.0}}, "rope", "'magic' is not supported"),
    ({"max_position_embeddings": ...}, "window", "no max_position_embeddings"),
    ({"max_position_embeddings": 200_000}, "window", "unlikely"),
    ({"use_cache": False}, "window", "use_cache is false"),
    ({"model_type": "mistral", "sliding_window": 64}, "window", "sliding window of 64"),
    ({"model_type": "mamba"}, "config", "not supported"),
    ({"intermediate_size": 100}, "weights", "where config.json asks for"),
    ({"num_hidden_layers": 4}, "weights", "tensors are missing"),
    ({"num_hidden_layers": 2}, "weights", "belong to no part"),
    ({"vocab_size": 90}, "tokenizer", "ids up to"),
    ({"eos_token_id": 77}, "special ids", "says eos is 77"),
]


@pytest.mark.parametrize(("changes", "about", "says"), CASES, ids=[case[2] for case in CASES])
def test_each_fault_of_a_config_is_found(tmp_path: Path, changes: dict[str, Any], about: str, says: str) -> None:
    save_folder(tmp_path / "m", tiny_config())
    edit(tmp_path / "m", **changes)
    assert any(f.about == about and says in f.what for f in grave(diagnose(tmp_path / "m"))), diagnose(tmp_path / "m")


def test_a_good_folder_is_called_good(tmp_path: Path) -> None:
    save_folder(tmp_path / "m", tiny_config())
    assert grave(diagnose(tmp_path / "m")) == []


def test_faults_of_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_folder(folder, tiny_config(), shards=3, extra={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    edit(folder, "tokenizer_config.json", model_max_length=64)
    (folder / "tokenizer.json.update").write_text((folder / "tokenizer.json").read_text() + "\n")
    whats = " ".join(finding.what for finding in diagnose(folder))
    assert "model_max_length 64" in whats
    assert "replaced by the .update files" in whats
    assert "1 rotary_emb.inv_freq" in whats
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert any("lacks model-00002-of-00003" in finding.what for finding in diagnose(folder))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.json.update").unlink()
    assert any(finding.about == "tokenizer" and finding.level == "error" for finding in diagnose(folder))


def test_gaps_in_the_vocabulary_and_no_end_token(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_folder(folder, tiny_config())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"][last] += 5
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(folder, "tokenizer_config.json", eos_token=...)
    whats = " ".join(finding.what for finding in diagnose(folder))
    assert "5 ids below" in whats
    assert "No file names an end token" in whats


NONSENSE: list[Any] = ["x", None, [], {}, -1, 0, True, 1.5, "gptq"]


@pytest.mark.parametrize("official", [True, False])
def test_no_value_of_a_config_is_too_strange(tmp_path: Path, official: bool) -> None:
    if official:
        folder, _ = make_official(tmp_path, shards=1)
    else:
        folder = tmp_path / "m"
        save_folder(folder, tiny_config())
    good = json.loads((folder / "config.json").read_text())
    more = ("context_window", "sliding_window", "quantization_config", "rope_scaling", "rope_parameters", "head_dim")
    for key in (*good, *more, "rope_theta", "use_sliding_window", "num_key_value_heads", "eos_token_id"):
        for value in NONSENSE[::4] if official else NONSENSE:
            (folder / "config.json").write_text(json.dumps(good | {key: value}))
            for finding in diagnose(folder):
                assert finding.what
    (folder / "config.json").write_text("{}")
    assert any(f.level == "error" for f in diagnose(folder))


def follow(remedy: str, folder: Path) -> list[Path]:
    """Do what a remedy says; returns the folders to look at afterwards."""
    commands = re.findall(r"longverse [^()]*[^() ,]", remedy.replace(", or longverse", " (or) longverse"))
    made = []
    for command in commands:
        arguments = shlex.split(command)[1:]
        assert run(*arguments)[0] == 0, command
        made.append(folder if "--tokenizer" in arguments else Path(arguments[2]))
    if patch := re.fullmatch(r"In config.json (?:delete (.*) and )?set (\{.*\})", remedy):
        edit(folder, **dict.fromkeys(filter(None, (patch[1] or "").split(", ")), ...), **json.loads(patch[2]))
        made.append(folder)
    assert made, f"nobody could follow: {remedy}"
    return made


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("XVERSE-13B-256K", {}),
        ("XVERSE-13B-256K", {"rope_theta": 10_000.0}),
        ("XVERSE-13B-256K", {"rope_theta": 10_000.0, "max_position_embeddings": 262_144}),
        ("XVERSE-13B-256K", {"rope_theta": 500_000.0}),
        ("XVERSE-13B-256K", {"rope_parameters": {"rope_type": "default", "rope_theta": 7_829_416.0}}),
        ("XVERSE-13B-256K", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500_000.0, "factor": 2.0}}),
        ("XVERSE-65B", {"max_position_embeddings": 8192}),
        ("XVERSE-65B", {"max_position_embeddings": 8192, "rope_theta": 10_000.0}),
    ],
)
def test_every_remedy_can_be_followed_and_cures(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    folder, _ = make_official(tmp_path, name, use_cache=True, **changes)
    for about in ("tokenizer", "rope", "window", "weights"):
        for finding in grave(diagnose(folder)):
            if finding.about != about:
                continue
            for made in follow(finding.remedy, folder):
                after = diagnose(made)
                assert finding.what not in [f.what for f in after]
                shutil.rmtree(made) if made != folder else None
                (tmp_path / name / "tokenizer.json.old").unlink(missing_ok=True)


def test_nothing_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        diagnose(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        diagnose(tmp_path / "empty")


# ---- the commands ------------------------------------------------------------------------------------------

app = Typer()
for command in (commands_models.convert, commands_models.quantize, commands_models.export, commands_models.doctor):
    app.command()(command)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_commands_go_round(tmp_path: Path) -> None:
    folder, _ = make_official(tmp_path)
    code, text = run("doctor", folder)
    assert code == 1
    assert "-> longverse convert" in text
    code, text = run("convert", folder, tmp_path / "converted", "--shard-size", 0.001)
    assert code == 0
    assert "states no RoPE; filled in" in text
    code, text = run("quantize", tmp_path / "converted", tmp_path / "int4", "--bits", 4, "--group", 32)
    assert code == 0
    code, text = run("export", tmp_path / "int4", tmp_path / "llama", "--window", 100_000)
    assert code == 0
    assert "equal to its source" in text
    code, text = run("doctor", tmp_path / "llama", "--json")
    assert code == 0
    assert {"level", "about", "what", "remedy"} == set(json.loads(text.splitlines()[0]))


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--rope", "dynamic"), "--rope out"), (("--no-check",), "--no-check out"), (("--shard-size", 1), "-size out")],
)
def test_options_that_gguf_has_not(tmp_path: Path, options: tuple[object, ...], says: str) -> None:
    save_folder(tmp_path / "m", tiny_config())
    with pytest.raises(UserError, match=says):
        run("export", tmp_path / "m", tmp_path / "m.gguf", "--to", "gguf", *options)
    with pytest.raises(UserError, match="leave --window out"):
        run("export", tmp_path / "m", tmp_path / "m.gguf", "--to", "gguf", "--window", 999_999)
    assert run("export", tmp_path / "m", tmp_path / "m.gguf", "--to", "gguf")[0] == 0


def test_convert_only_the_tokenizer(tmp_path: Path) -> None:
    folder, _ = make_official(tmp_path)
    assert run("convert", folder, "--tokenizer")[0] == 0
    assert not any("tokenizers below" in finding.what for finding in diagnose(folder))
    with pytest.raises(UserError, match="needs a folder to write to"):
        run("convert", folder)
