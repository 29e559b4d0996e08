"""Sources that need optional packages: Parquet, Zstandard; and the commands."""

import json
import os

import pytest
from typer.testing import CliRunner

from longverse.commands_data import app
from longverse.data.sources import Skipped, SourceConfig, read_source
from longverse.errors import UserError
from tests.data.texts import law, novel, tokenizer_folder, write_jsonl


def read(path, **settings):
    skipped = Skipped()
    found = list(read_source(SourceConfig("s", path=path.name, **settings), path.parent, skipped))
    return found, skipped


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"body": ["one text", None, "天地"], "id": ["a", "b", "c"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    found, skipped = read(tmp_path / "t.parquet", text_field="body")
    assert [(d.id, d.text) for d in found] == [("a", "one text"), ("c", "天地")]
    assert sum(skipped.counts.values()) == 1
    with pytest.raises(UserError, match="no column 'text'; known: body, id"):
        read(tmp_path / "t.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(tmp_path / "bad.parquet")


def test_rows_without_a_title_have_one_of_their_own(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}, {"id": "2301.00123", "text": "c"}, {"id": "x/war.TXT", "text": "d"}]
    rows.append({"id": "n", "title": "Half \ud83d", "text": "e"})
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [d.title for d in read(tmp_path / "web.jsonl")[0]] == [
        "web.jsonl:1", "web.jsonl:2", "2301.00123", "x/war", "Half ?",
    ]  # fmt: skip


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)).encode()
    (tmp_path / "t.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    assert len(read(tmp_path / "t.jsonl.zst")[0]) == 50


def test_hub_data_sets(tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    def load_dataset(name, subset, split, streaming):
        if name != "some/set":
            raise FileNotFoundError("no such set\nat all")
        assert (subset, split, streaming) == (None, "train", True)
        return ({"text": f"row {i}"} for i in range(9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = list(read_source(SourceConfig("s", hub="some/set", max_documents=4), tmp_path, Skipped()))
    assert [d.text for d in found] == [f"row {i}" for i in range(4)]
    with pytest.raises(UserError, match=r"'some/sett' did not open \(no such set\)"):
        list(read_source(SourceConfig("s", hub="some/sett"), tmp_path, Skipped()))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(read_source(SourceConfig("s", hub="some/set"), tmp_path, Skipped()))


def test_text_kinds_and_encodings(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark\r\nand lines\x00")
    (tmp_path / "f" / "b.md").write_bytes(b"\xff\xfe broken")
    (tmp_path / "f" / "c.py").write_text("x = 1")
    found, skipped = read(tmp_path / "f")
    assert [d.text for d in found] == ["with a mark\nand lines"]
    assert skipped.counts == {"not UTF-8": 1}
    found, _ = read(tmp_path / "f", suffixes=(".py",))
    assert [(d.id, d.language) for d in found] == [("c.py", "other")]


@pytest.fixture
def folder(tmp_path):
    tokenizer_folder(tmp_path / "tok")
    write_jsonl(tmp_path / "en.jsonl", [{"id": f"n{i}", "title": f"Book {i}", "text": novel(i, 150)} for i in range(3)])
    write_jsonl(tmp_path / "zh.jsonl", [{"id": f"l{i}", "title": law(i)[0], "text": law(i)[1]} for i in range(8)])
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={**os.environ, "COLUMNS": "100"})


def test_the_commands(folder):
    sources = "sources:\n  - {name: en, path: en.jsonl}\n  - {name: zh, path: zh.jsonl}\n"
    (folder / "corpus.yaml").write_text(f"out: store\ntokenizer: tok\nprocesses: 1\n{sources}")
    done = run("corpus", folder / "corpus.yaml", "--quiet")
    assert done.exit_code == 0, done.output
    assert "| en | 3 |" in done.output
    (folder / "sft.yaml").write_text(
        "out: items\ntokenizer: tok\nitems: 4\nprocesses: 1\ntasks: {multi_doc_qa: 1, single_doc_qa: 1}\n"
        "languages: {en: 1}\n"
        f"lengths: [{{low: 2K, high: 3K}}]\n{sources}"
    )
    done = run("sft", folder / "sft.yaml", "--quiet")
    assert done.exit_code == 0, done.output
    assert "| multi_doc_qa | 2 |" in done.output
    done = run("inspect", folder / "items" / "items.jsonl", "--tokenizer", folder / "tok", "--samples", 1)
    assert done.exit_code == 0, done.output
    assert "4 good items" in done.output
    assert "characters⟩" in done.output
    (folder / "items" / "items.jsonl").write_text("{}\n")
    done = run("inspect", folder / "items" / "items.jsonl")
    assert done.exit_code == 1
    assert "line 1: the field 'id' is missing" in done.output


def test_a_mistake_is_a_user_error(folder):
    (folder / "bad.yaml").write_text("out: [\n")
    done = run("corpus", folder / "bad.yaml")
    assert isinstance(done.exception, UserError)
    assert "line 2" in str(done.exception)
