"""Genuine files of tokenizers 0.13 and 0.15 (made by tests/fixtures/make_old_tokenizer.py) load with the old ids."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from longverse.errors import UserError
from longverse.models.chat import ChatFormat
from longverse.models.tokenizer import Tokenizer
from longverse.models.tokenizer_migration import migrate_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
OLD = FIXTURES / "old_tokenizer"
HARD = json.loads((FIXTURES / "hard_strings.json").read_text())
ANSWERS = json.loads((OLD / "ids.json").read_text())
REFUSED = [name for name in ANSWERS if not name.endswith("prefix")]
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


def folder(path: Path, name: str) -> Path:
    path.mkdir(exist_ok=True)
    shutil.copy(OLD / f"{name}.json", path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_todays_library_refuses_the_old_file(name: str) -> None:
    with pytest.raises(Exception, match=r"prepend_scheme|untagged enum"):
        tokenizers.Tokenizer.from_file(str(OLD / f"{name}.json"))


@pytest.mark.parametrize("name", ANSWERS)
def test_old_ids_from_an_old_folder(name: str, tmp_path: Path) -> None:
    before = folder(tmp_path, name)
    content = (before / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_folder(before)
    assert [tokenizer.encode(text, special=True) for text in HARD] == ANSWERS[name]["ids"]
    assert [tokenizer.decode(ids, skip_special=False) for ids in ANSWERS[name]["ids"]] == ANSWERS[name]["text"]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (2, {3})
    assert bool(tokenizer.notes) == (name in REFUSED)
    assert (before / "tokenizer.json").read_bytes() == content


@pytest.mark.parametrize("name", ANSWERS)
def test_migrated_folder_in_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    changes = migrate_tokenizer(folder(tmp_path / "old", name), tmp_path / "new")
    assert len(changes) == (2 if name in REFUSED else 0)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert [theirs.encode(text, add_special_tokens=False) for text in HARD] == ANSWERS[name]["ids"]
    assert theirs.eos_token_id == 3
    assert migrate_tokenizer(tmp_path / "new") == []


def test_in_place_keeps_the_old_file_and_happens_once(tmp_path: Path) -> None:
    old = folder(tmp_path, "0.15.2-nfkc")
    (old / "tokenizer_config.json").write_text("{}")
    content = (old / "tokenizer.json").read_bytes()
    changes = migrate_tokenizer(old)
    assert "tokenizer.json: decoder Metaspace add_prefix_space false became prepend_scheme never" in changes
    assert changes[-1] == "tokenizer_config.json: tokenizer_class PreTrainedTokenizerFast added"
    assert (old / "tokenizer.json.old").read_bytes() == content
    assert migrate_tokenizer(old) == []
    assert Tokenizer.from_folder(old).notes == []
    assert sorted(file.name for file in old.iterdir()) == [
        "tokenizer.json",
        "tokenizer.json.old",
        "tokenizer_config.json",
        "tokenizer_config.json.old",
    ]


def test_update_files_are_used(tmp_path: Path) -> None:
    """The official way: both `.update` files replace their namesakes, here one with another pad token."""
    old = folder(tmp_path / "official", "0.15.2-plain")
    fixed = migrate_tokenizer(folder(tmp_path / "other", "0.13.3-nfkc"), tmp_path / "new")
    assert fixed
    shutil.copy(tmp_path / "new" / "tokenizer.json", old / "tokenizer.json.update")
    (old / "tokenizer_config.json.update").write_text(json.dumps(SETTINGS | {"pad_token": "<pad>"}))
    tokenizer = Tokenizer.from_folder(old)
    assert tokenizer.pad_id == 1
    assert len(tokenizer.notes) == 2
    assert [tokenizer.encode(text, special=True) for text in HARD] == ANSWERS["0.13.3-nfkc"]["ids"]
    assert migrate_tokenizer(old) == tokenizer.notes
    assert (old / "tokenizer.json").read_bytes() == (old / "tokenizer.json.update").read_bytes()
    assert migrate_tokenizer(old) == Tokenizer.from_folder(old).notes == []
    assert Tokenizer.from_folder(old).pad_id == 1


def test_an_old_tokenizer_talks(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder(tmp_path, "0.15.2-plain"))
    chat = ChatFormat.for_model(tokenizer, {"model_type": "xverse"}, "XVERSE-13B-256K")
    ids = chat.encode([{"role": "user", "content": "报告在哪里？<|endoftext|>"}])
    assert 3 not in ids
    assert tokenizer.decode(ids) == "Human: 报告在哪里？<|endoftext|>\n\nAssistant: "
    assert not tokenizer.decode(ids[:1]).startswith(" ")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        migrate_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        migrate_tokenizer(tmp_path)
    for content, words in (
        (b'{"version": "1.0", "mod', "no valid JSON"),
        (b"[1]", "no file of an older version"),
        (b'{"version": "1.0", "model": {"type": "Strange"}}', "no file of an older version"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=words):
            migrate_tokenizer(tmp_path)


def test_another_models_tokenizer_is_not_overwritten(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(OLD / "0.15.2-plain.json", tmp_path / name / "tokenizer.json")
    mine = (tmp_path / "b" / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        migrate_tokenizer(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == mine
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["tokenizer.json"]


def test_the_old_file_is_kept_byte_by_byte(tmp_path: Path) -> None:
    old = (OLD / "0.15.2-plain.json").read_bytes()
    (tmp_path / "tokenizer.json.update").write_bytes(old)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe no UTF-8\r\n")
    migrate_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json.old").read_bytes() == b"\xff\xfe no UTF-8\r\n"
