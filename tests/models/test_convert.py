"""Official folders: loaded, converted and exported with the right RoPE, against transformers' Llama class."""

import errno
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longverse.errors import UserError
from longverse.models import calibrate
from longverse.models import convert as module
from longverse.models.checkpoint import Loaded, load
from longverse.models.convert import convert
from longverse.models.export import export, export_gguf
from longverse.models.network import NetworkConfig
from longverse.models.quant_linear import QuantFormat, write_form
from longverse.models.quantize import quantize
from longverse.models.releases import licence_shown
from longverse.models.shards import TensorFolder
from tests.helpers import tiny_config
from tests.models.folders import save_folder
from tests.models.official_layout import make_official

IDS = torch.arange(4, 104).view(2, 50)
WINDOW = 262_144


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGVERSE_CACHE", str(tmp_path / "cache"))


def logits(loaded: Loaded, rope_length: int = WINDOW) -> torch.Tensor:
    with torch.no_grad():
        return loaded.network(IDS, rope_length=rope_length)


def llama_logits(tensors: dict[str, torch.Tensor], config: dict[str, Any], base: float) -> torch.Tensor:
    """The same weights in transformers' Llama class, run at a base of our choosing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "vocab_size",
    )
    parameters = {"rope_type": "default", "rope_theta": base}
    stated = LlamaConfig(**{key: config[key] for key in keys}, rope_parameters=parameters, tie_word_embeddings=False)
    model = LlamaForCausalLM(stated).float().eval()
    model.load_state_dict(tensors)
    with torch.no_grad():
        return model(IDS).logits


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old pickle"])
def test_an_official_folder_runs_at_its_own_base(tmp_path: Path, zipped: bool) -> None:
    folder, tensors = make_official(tmp_path, zipped=zipped)
    loaded = load(str(folder), dtype="float32", device="cpu")
    config = json.loads((folder / "config.json").read_text())
    base = loaded.network.config.rope.base(WINDOW)
    right = llama_logits(tensors, config, base)
    stock = llama_logits(tensors, config, 10_000.0)  # what an engine does that reads the config alone
    assert (logits(loaded) - right).abs().max() < 1e-4
    off = (stock.log_softmax(-1) - right.log_softmax(-1)).abs().max()
    print(f"\nstock loading of the same folder is off by {off:.2f} nats of log probability at worst")
    assert off > 0.1
    assert any("500,000" in note for note in loaded.notes)
    assert any("licence" in note for note in loaded.notes)
    licence_shown(loaded.notes)
    assert not any("licence" in note for note in load(str(folder), device="cpu").notes)
    assert loaded.chat.kind == "xverse"
    assert loaded.tokenizer.eos_ids == {3}


def test_a_base_release_continues_plain_text(tmp_path: Path) -> None:
    folder, _ = make_official(tmp_path, "XVERSE-13B-2", max_position_embeddings=8192)
    loaded = load(str(folder), device="cpu")
    assert loaded.chat.kind == "plain"
    assert any("base model" in note for note in loaded.notes)
    convert(str(folder), tmp_path / "out")
    assert load(str(tmp_path / "out"), device="cpu").chat.kind == "plain"


def test_a_converted_chat_model_answers_transformers_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, _ = make_official(tmp_path)
    convert(str(folder), tmp_path / "out")
    loaded = load(str(tmp_path / "out"), device="cpu")
    assert loaded.chat.kind == "xverse"
    turns = [{"role": "user", "content": "你好"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True).apply_chat_template(
        turns, add_generation_prompt=True
    )
    assert list(theirs["input_ids"]) == loaded.chat.encode(turns)


def test_special_ids_left_out_come_from_the_tokenizer(tmp_path: Path) -> None:
    folder, _ = make_official(tmp_path, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    (folder / "generation_config.json").unlink()
    loaded = load(str(folder), device="cpu")
    assert [loaded.config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [2, 3, 1]


class Evil:
    """Unpickling it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/longverse-was-fooled",)


def spoil(folder: Path, how: str) -> None:
    shard = folder / "pytorch_model-00002-of-00003.bin"
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "text":
        shard.write_text("<html>404</html>")
    elif how == "code":
        torch.save({"model.norm.weight": Evil()}, shard)
    elif how == "old code":
        shard.write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    elif how == "no tensors":
        torch.save({"epoch": 3}, shard)
    elif how == "index":
        path = folder / "pytorch_model.bin.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["lm_head.weight"] = "pytorch_model-00007-of-00007.bin"
        path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"lacks pytorch_model-00002-of-00003\.bin of 3 shards"),
        ("truncated", r"00002-of-00003\.bin is truncated"),
        ("empty", r"00002-of-00003\.bin is truncated"),
        ("text", r"00002-of-00003\.bin"),
        ("code", "would run code"),
        ("old code", "would run code"),
        ("no tensors", "other than a table of tensors"),
        ("index", r"lacks pytorch_model-00007-of-00007\.bin"),
    ],
)
def test_a_broken_bin_folder_is_one_sentence(tmp_path: Path, how: str, says: str) -> None:
    folder, _ = make_official(tmp_path)
    spoil(folder, how)
    with pytest.raises(UserError, match=says) as caught:
        load(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/longverse-was-fooled").exists()


# ---- converting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old pickle"])
def test_convert_keeps_every_weight(tmp_path: Path, zipped: bool) -> None:
    folder, tensors = make_official(tmp_path, zipped=zipped)
    steps: list[tuple[int, int]] = []
    report = lambda done, total: steps.append((done, total))  # noqa: E731
    written = convert(str(folder), tmp_path / "out", shard_bytes=200_000, on_progress=report)
    assert written.shards > 2
    assert steps[-1] == (written.written_bytes, written.written_bytes)
    out = TensorFolder(tmp_path / "out")
    assert set(out.infos) == set(tensors)
    assert all(torch.equal(out.get(name), tensor) for name, tensor in tensors.items())
    assert (tmp_path / "out" / "MODEL_LICENSE.pdf").exists()
    first, second = (load(str(path), dtype="float32", device="cpu") for path in (folder, tmp_path / "out"))
    assert torch.equal(logits(first), logits(second))
    assert first.tokenizer.encode("你好 12") == second.tokenizer.encode("你好 12")
    assert not any("RoPE" in note for note in second.notes)  # nothing is left to fill in
    assert sorted(path.name for path in tmp_path.iterdir()) == ["XVERSE-13B-256K", "out"]


def test_convert_changes_the_type(tmp_path: Path) -> None:
    tensors = save_folder(tmp_path / "m")
    convert(str(tmp_path / "m"), tmp_path / "out", dtype="bf16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="Unknown dtype"):
        convert(str(tmp_path / "m"), tmp_path / "other", dtype="int3")


@pytest.mark.parametrize("how", ["exists", "link", "no parent", "small disk", "full disk", "cancelled"])
def test_a_conversion_that_cannot_be_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    save_folder(tmp_path / "m")
    target = tmp_path / "out"
    says, kind = "^$", UserError
    cancelled = None
    if how == "exists":
        target.mkdir()
        (target / "mine").write_text("precious")
        says = "exists already"
    elif how == "link":  # to an empty folder: no renaming replaces it
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
        says = "exists already"
    elif how == "no parent":
        target, says = tmp_path / "a" / "b", "is no folder"
    elif how == "small disk":
        usage = type("Usage", (), {"free": 1_000_000})
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
        says = "GB free"
    elif how == "full disk":

        def full(self: object, name: str, tensor: torch.Tensor) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module.SafetensorsWriter, "write", full)
        says = "disk is full"
    else:
        kind = KeyboardInterrupt  # type: ignore[assignment]
        cancelled = iter([False, False, True]).__next__
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=says):
        convert(str(tmp_path / "m"), target, cancelled=cancelled)
    assert sorted(tmp_path.iterdir()) == before


# ---- exporting ---------------------------------------------------------------------------------------------


def test_an_exported_llama_runs_right_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = make_official(tmp_path)
    written, check = export(str(folder), tmp_path / "llama", window=WINDOW)
    assert check is not None
    assert check.passed
    assert check.equal_ids == check.texts
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    loaded = load(str(folder), dtype="float32", device="cpu")
    base = loaded.network.config.rope.base(WINDOW)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": base}
    assert config["rope_theta"] == base
    assert config["max_position_embeddings"] == WINDOW
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert (model(IDS).logits - logits(loaded)).abs().max() < 1e-4
    text = "北京的景点:故宫、天坛、万里长城等。\n深圳的景点:"
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")(text).input_ids == loaded.tokenizer.encode(text)
    assert any("fixed base" in note for note in written.notes)


def test_dynamic_is_kept_when_asked_for(tmp_path: Path) -> None:
    folder, _ = make_official(tmp_path)
    _, check = export(str(folder), tmp_path / "llama", rope="dynamic")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert check is not None
    assert check.passed
    assert config["rope_parameters"] == {"rope_type": "dynamic", "rope_theta": 500_000.0, "factor": 2.0}
    assert config["rope_scaling"]["type"] == "dynamic"
    assert config["max_position_embeddings"] == 32768


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_family_is_exported_as_a_class_that_holds_it(tmp_path: Path, family: str) -> None:
    save_folder(tmp_path / "m", tiny_config(family, tie_word_embeddings=True))
    _, plain = export(str(tmp_path / "m"), tmp_path / "plain")
    _, own = export(str(tmp_path / "m"), tmp_path / "own", layout="xverse")
    for check in (plain, own):
        assert check is not None
        assert check.passed, check


def test_a_wrong_export_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.models import export as exporter

    save_folder(tmp_path / "m")
    real = exporter.both_spellings

    def wrong(plan: Any) -> dict[str, Any]:
        written = real(plan)
        written["rope_parameters"]["rope_theta"] = written["rope_theta"] = 99_000.0
        return written

    monkeypatch.setattr(exporter, "both_spellings", wrong)
    with pytest.raises(UserError, match="base 99,000, and plain RoPE, base 10,000 was meant"):
        export(str(tmp_path / "m"), tmp_path / "out", check=False)
    monkeypatch.setattr(module, "differs", lambda *both: None)
    with pytest.raises(UserError, match="base 99,000"):  # seen in the loaded model too
        export(str(tmp_path / "m"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_changed_weight_is_seen_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longverse.models import export as exporter

    save_folder(tmp_path / "m")
    real = exporter.dequantised
    monkeypatch.setattr(exporter, "dequantised", lambda *a: ((n, t * 1.05) for n, t in real(*a)))
    with pytest.raises(UserError, match="The export differs from its source"):
        export(str(tmp_path / "m"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(("copies", "compared"), [(1.2, "float32"), (0.6, "bfloat16"), (0.4, None)])
def test_the_check_needs_memory_for_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: float, compared: str | None
) -> None:
    from longverse.models import export as exporter

    tensors = save_folder(tmp_path / "m")
    free = int(copies * sum(tensor.nbytes for tensor in tensors.values()))
    memory = type("Memory", (), {"available": free})
    monkeypatch.setattr(exporter.psutil, "virtual_memory", lambda: memory)
    written, check = export(str(tmp_path / "m"), tmp_path / "out")
    assert (None if check is None else check.dtype) == compared
    assert any("Not compared" in note for note in written.notes) == (compared is None)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3", "dynamic"])
@pytest.mark.parametrize("layout", ["llama", "xverse"])
def test_every_rope_is_read_back_as_it_was(tmp_path: Path, kind: str, layout: str) -> None:
    more = {
        "linear": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
        "dynamic": {"factor": 2.0, "bucket": 16},
    }
    rope = {"rope_type": kind, "rope_theta": 50_000.0, **more.get(kind, {})}
    save_folder(tmp_path / "m", tiny_config(rope_theta=None, rope_parameters=rope, context_window=100))
    export(str(tmp_path / "m"), tmp_path / "out", layout=layout, rope="dynamic", check=False)
    first, second = (
        NetworkConfig.from_dict(json.loads((tmp_path / name / "config.json").read_text())) for name in ("m", "out")
    )
    assert first.window == second.window == 100
    assert first.rope.base(90) == second.rope.base(90) or layout == "llama"
    assert torch.equal(first.rope.inv_freq(96), second.rope.inv_freq(96))
    assert first.rope.attention_scaling == second.rope.attention_scaling


# ---- broken sources ----------------------------------------------------------------------------------------


def rewrite(folder: Path, changes: dict[str, Any], drop: str = "", **tensors: torch.Tensor) -> None:
    """Change the config of a one-file folder, drop a tensor, add or replace others."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    stored = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items() if n != drop} | tensors
    save_file(stored, folder / "model.safetensors")


UP, BIAS = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj.bias"
BROKEN: dict[str, tuple[bool, dict[str, Any], str, dict[str, torch.Tensor], str]] = {
    "shape": (False, {"intermediate_size": 64}, "", {}, "where config.json asks for"),
    "extra": (False, {}, "", {BIAS: torch.ones(64)}, "does not account for"),
    "missing": (False, {}, f"{UP}.weight", {}, "lacks the tensor"),
    "integers": (False, {}, "", {f"{UP}.weight": torch.ones(96, 64, dtype=torch.int8)}, "a quantised form"),
    "scale": (True, {}, f"{UP}.weight_scale", {}, "up_proj.weight_scale"),
    "packed": (True, {}, f"{UP}.weight_packed", {}, "up_proj.weight"),
    "group": (True, {"quantization_config": write_form(QuantFormat(4, 64, False), [])}, "", {}, "config.json asks for"),
    "form": (True, {"quantization_config": "gptq"}, "", {}, "quantised by gptq"),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("step", ["convert", "quantize", "export", "gguf"])
def test_a_broken_source_is_said_before_anything_is_written(tmp_path: Path, how: str, step: str) -> None:
    quantised, changes, drop, tensors, says = BROKEN[how]
    save_folder(tmp_path / "m")
    if quantised:
        quantize(str(tmp_path / "m"), tmp_path / "q", bits=4, group=32)
        if step == "quantize":
            says = "quantis"
    folder = tmp_path / ("q" if quantised else "m")
    rewrite(folder, changes, drop, **tensors)
    before = sorted(path.name for path in tmp_path.iterdir())
    steps: dict[str, Any] = {
        "convert": lambda: convert(str(folder), tmp_path / "out"),
        "quantize": lambda: quantize(str(folder), tmp_path / "out", bits=8),
        "export": lambda: export(str(folder), tmp_path / "out", check=False),
        "gguf": lambda: export_gguf(str(folder), tmp_path / "out.gguf"),
    }
    with pytest.raises(UserError, match=says):
        steps[step]()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(tmp_path / "m")
    weight = load_file(tmp_path / "m" / "model.safetensors")[f"{UP}.weight"].clone()
    weight[3, 5] = number
    rewrite(tmp_path / "m", {}, **{f"{UP}.weight": weight})
    says = f"{UP}.weight holds numbers that are infinite or NaN"
    with pytest.raises(UserError, match=says):
        convert(str(tmp_path / "m"), tmp_path / "out")
    for bits, symmetric in ((8, True), (8, False), (4, None)):
        with pytest.raises(UserError, match=says):
            quantize(str(tmp_path / "m"), tmp_path / "out", bits=bits, group=32, symmetric=symmetric)
    monkeypatch.setattr(calibrate, "SAMPLE", 64)
    with pytest.raises(UserError, match=says):
        quantize(str(tmp_path / "m"), tmp_path / "out", bits=4, group=32, calibration="the thin thane " * 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_float16_that_would_become_infinite_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path / "m")
    rewrite(tmp_path / "m", {}, **{f"{UP}.weight": torch.full((96, 64), 1e6)})
    with pytest.raises(UserError, match=r"up_proj.weight holds numbers beyond what F16 can hold \(65,504\)"):
        convert(str(tmp_path / "m"), tmp_path / "out", dtype="float16")
    convert(str(tmp_path / "m"), tmp_path / "out", dtype="bfloat16")


# ---- what goes along and what does not -----------------------------------------------------------------------


def test_a_yi_folder_comes_out_as_llama(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_yi.YiForCausalLM"}
    save_folder(tmp_path / "m", tiny_config("Yi", auto_map=code, architectures=["YiForCausalLM"]))
    (tmp_path / "m" / "modeling_yi.py").write_text("raise RuntimeError")
    for name in ("License.txt", "license", "NOTICE", "Readme.md"):
        (tmp_path / "m" / name).write_text(name)
    convert(str(tmp_path / "m"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"License.txt", "license", "NOTICE", "Readme.md"} < names
    assert "modeling_yi.py" not in names


def test_a_sliding_window_is_said_and_kept(tmp_path: Path) -> None:
    save_folder(tmp_path / "m", tiny_config("mistral", sliding_window=64))
    written, check = export(str(tmp_path / "m"), tmp_path / "out")
    assert check is not None
    assert any("sliding window of 64" in note for note in written.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 64
    assert any("sliding window of 64" in note for note in export_gguf(str(tmp_path / "m"), tmp_path / "m.gguf"))
    assert load(str(tmp_path / "m.gguf"), device="cpu").network.config.window == 64


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layout": "onnx"}, "Unknown layout"),
        ({"rope": "magic"}, "Unknown RoPE"),
        ({"window": 9000}, "leave --window out"),
        ({"window": 0}, "leave --window out"),
    ],
)
def test_requests_that_cannot_be(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    save_folder(tmp_path / "m")
    with pytest.raises(UserError, match=says):
        export(str(tmp_path / "m"), tmp_path / "out", **options)
    if "window" in options:
        with pytest.raises(UserError, match=says):
            export_gguf(str(tmp_path / "m"), tmp_path / "out.gguf", **options)


def test_windows_of_a_dynamic_plan(tmp_path: Path) -> None:
    folder, _ = make_official(tmp_path)
    for write, target in ((export, tmp_path / "out"), (export_gguf, tmp_path / "out.gguf")):
        with pytest.raises(UserError, match="A window of 0 tokens"):
            write(str(folder), target, window=0)  # type: ignore[operator]
    notes = export_gguf(str(folder), tmp_path / "out.gguf", window=300_000)
    assert any("more than the 262,144" in note for note in notes)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        export_gguf(str(folder), tmp_path / "file" / "out.gguf")


SNIPPET = """
import sys
sys.modules["longverse"] = None  # as if it were not installed
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM
tokenizer = AutoTokenizer.from_pretrained("{path}")
options = dict(trust_remote_code=True, torch_dtype=torch.bfloat16, device_map='auto')
model = AutoModelForCausalLM.from_pretrained("{path}", **options)
model = model.eval()
inputs = tokenizer('北京的景点:故宫、天坛、万里长城等。\\n深圳的景点:', return_tensors='pt').input_ids
generated_ids = model.generate(inputs, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id, repetition_penalty=1.1)
print(tokenizer.batch_decode(generated_ids, skip_special_tokens=True))
print(type(model).__module__, generated_ids.shape[1] - inputs.shape[1], model.config.rope_parameters["rope_theta"])
"""


@pytest.fixture
def clean_environment(tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LONGVERSE")}
    return {**kept, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}


def test_the_model_cards_snippet_runs_without_longverse(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    pytest.importorskip("accelerate")
    folder, _ = make_official(tmp_path)
    convert(str(folder), tmp_path / "converted")
    code = SNIPPET.format(path=tmp_path / "converted")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    place, new, theta = run.stdout.strip().splitlines()[-1].split()
    assert place.startswith("transformers_modules")
    assert 1 <= int(new) <= 64
    assert float(theta) == 500_000


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    folder, _ = make_official(tmp_path)
    with zipfile.ZipFile(folder / "pytorch_model-00001-of-00003.bin", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(UserError, match=r"00001-of-00003\.bin"):
        load(str(folder), device="cpu")
