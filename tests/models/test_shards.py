"""Tensor files: which file counts, what damage is seen, and that nothing is read from outside the folder."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longverse.errors import UserError
from longverse.models.shards import SAFETENSORS_INDEX, BinFile, SafetensorsWriter, TensorFolder, TensorInfo, is_finite
from tests.models.folders import save_folder

NAME = "model.norm.weight"


def copies(folder: Path) -> dict[str, torch.Tensor]:
    """A folder of three shards, all of which hold NAME, with different values; the index names the second."""
    tensors = save_folder(folder, shards=3)
    path = folder / SAFETENSORS_INDEX
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    for number, file in enumerate(files):
        stored = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        stored[NAME] = tensors[NAME] if number == 1 else torch.full_like(tensors[NAME], number)
        save_file(stored, folder / file)
    index["weight_map"][NAME] = files[1]
    path.write_text(json.dumps(index))
    return tensors


def test_the_index_says_which_copy_counts(tmp_path: Path) -> None:
    tensors = copies(tmp_path / "m")
    folder = TensorFolder(tmp_path / "m")
    assert torch.equal(folder.get(NAME), tensors[NAME])
    streamed = list(folder.stream())
    assert [name for name, _ in streamed].count(NAME) == 1
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in streamed)
    (tmp_path / "m" / SAFETENSORS_INDEX).unlink()
    with pytest.raises(UserError, match="no index that says which counts"):
        TensorFolder(tmp_path / "m")


@pytest.mark.parametrize("where", ["../out/x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "..", "."])
def test_an_index_cannot_point_outside(tmp_path: Path, where: str) -> None:
    save_folder(tmp_path / "m", shards=2)
    shutil.copytree(tmp_path / "m", tmp_path / "out")
    path = tmp_path / "m" / SAFETENSORS_INDEX
    index = json.loads(path.read_text())
    index["weight_map"][NAME] = where
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no file of this folder"):
        TensorFolder(tmp_path / "m")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old pickle"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_pickles_are_one_sentence(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3, 4), "b": torch.zeros(5)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    dice = random.Random(0)
    said = []
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(dice.choice([1, 1, 4])):
            broken[dice.randrange(min(len(broken), 900))] = dice.randrange(256)
        path.write_bytes(broken)
        try:
            BinFile(path)
        except UserError as error:
            said.append(str(error))
    assert len(said) > 30
    assert not any("\n" in text for text in said)


def test_what_is_finite() -> None:
    assert is_finite(torch.ones(3))
    assert is_finite(torch.ones(0))
    assert is_finite(torch.ones(3, dtype=torch.int32))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for number in (float("nan"), float("inf"), -float("inf")):
            assert not is_finite(torch.tensor([1.0, number, 2.0], dtype=dtype))


def test_the_writer_refuses_what_is_not_finite(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"w": TensorInfo((2,), torch.float16)})
    with pytest.raises(UserError, match="w holds numbers that are infinite or NaN"):
        writer.write("w", torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match="beyond what F16 can hold"):
        writer.write("w", torch.tensor([1.0, 1e5]))
    writer.write("w", torch.tensor([1.0, 6e4]))
    writer.close()


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "<!doctype html>\n"])
def test_a_pointer_or_a_page_is_not_called_dangerous(tmp_path: Path, text: str) -> None:
    (tmp_path / "pytorch_model.bin").write_text(text)
    with pytest.raises(UserError, match="such as a Git-LFS pointer or a web page"):
        BinFile(tmp_path / "pytorch_model.bin")
