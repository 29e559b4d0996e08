"""What a user's files can do wrong: damaged items, sources, claims, decontamination files, things that changed."""

import json
import os

import numpy as np
import pytest

from longverse.data.config import build
from longverse.data.corpus import CorpusConfig, build_corpus
from longverse.data.long_sft.builder import build_sft
from longverse.data.long_sft.draft import Reject
from longverse.data.long_sft.gates import Contamination, supported
from longverse.data.long_sft.item import Evidence, Item, ShownDocument, parse_item, read_items
from longverse.data.long_sft.plan import SftConfig
from longverse.data.sources import Skipped, SourceConfig, read_source
from longverse.data.text import shingle_hashes
from longverse.errors import UserError
from tests.data.texts import novel, tokenizer_folder, write_jsonl


def good():
    content = "The lamp is red. The door is green.\n\nWhich colour has the door?"
    item = Item(
        "i", "single_doc_qa", "said", "en", 0, 50, 30, 50,
        [{"role": "user", "content": content}, {"role": "assistant", "content": "It is green."}],
        (ShownDocument("s", "d", "t", 0, 0, 35, 0, True),),
        (Evidence(0, 17, 35, "The door is green.", round(26 / 35, 4)),), (("green",),), False, "offline",
    )  # fmt: skip
    return json.loads(item.line())


def test_a_good_item():
    assert parse_item(good()).answers == (("green",),)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["messages"], ["a", "b"], "message 0 must be an object"),
        (["messages", 0, "content"], 5, "message 0 must be an object"),
        (["documents", 0, "start"], "0", "document 0: start is str, not int"),
        (["documents", 0, "origin"], -4, "document 0 begins at -4"),
        (["documents", 0, "complete"], 1, "document 0: complete is int, not bool"),
        (["documents"], [7], "document 0 must be an object"),
        (["evidence", 0, "depth"], "0.1", "evidence 0: depth is str, not float"),
        (["evidence", 0, "depth"], 0.1, "has depth 0.1 and lies at 0.7429"),
        (["evidence", 0, "depth"], float("nan"), "has depth nan"),
        (["evidence", 0, "start"], -18, "evidence 0 lies outside"),
        (["evidence", 0, "txt"], "x", "evidence 0: the field 'txt' is not known, did you mean 'text'"),
        (["answers"], [[5]], "answers 0 must be a list of texts"),
        (["answers"], ["green"], "answers 0 must be a list of texts"),
        (["language"], "xx", "language must be en or zh"),
        (["split"], "xx", "split must be train or heldout"),
    ],
)
def test_every_wrong_field_is_named(where, value, message, tmp_path):
    row = good()
    place = row
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(UserError, match=message):
        parse_item(row)
    (tmp_path / "f.jsonl").write_text(json.dumps(row) + "\n" + "[" * 100_000 + "\n")
    problems = [problem for *_, problem in read_items(tmp_path / "f.jsonl")]
    assert problems[1] == "the line is no JSON."


def test_deeply_nested_lines_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + "[" * 100_000 + '\n{"text": "two"}\n')
    skipped = Skipped()
    found = list(read_source(SourceConfig("a", "a.jsonl"), tmp_path, skipped))
    assert [d.text for d in found] == ["one", "two"]
    assert skipped.counts == {"not a JSON line": 1}


def test_damaged_zstandard_is_counted_and_frames_are_all_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(b'{"text": "number %d"}\n' % n) for n in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert len(list(read_source(SourceConfig("a", "a.jsonl.zst"), tmp_path, Skipped()))) == 3
    (tmp_path / "a.jsonl.zst").write_bytes(frames[0] + b"rubbish that is no frame")
    skipped = Skipped()
    assert len(list(read_source(SourceConfig("a", "a.jsonl.zst"), tmp_path, skipped))) <= 1
    assert skipped.counts == {"the file breaks off (EOFError)": 1}


@pytest.fixture
def sources(tmp_path):
    tokenizer_folder(tmp_path / "tok")
    write_jsonl(tmp_path / "en.jsonl", [{"id": f"n{i}", "title": f"Book {i}", "text": novel(i, 80)} for i in range(3)])
    return tmp_path


def sft(folder, **changes):
    values = {
        "out": str(folder / "out"), "tokenizer": "tok", "items": 3, "processes": 1, "languages": {"en": 1},
        "tasks": {"single_doc_qa": 1}, "lengths": [{"low": 1500, "high": 2000}],
        "sources": [{"name": "en", "path": "en.jsonl"}],
    }  # fmt: skip
    return build(SftConfig, values | changes)


def corpus(folder):
    values = {"out": str(folder / "out"), "tokenizer": "tok", "processes": 1}
    return build(CorpusConfig, values | {"sources": [{"name": "en", "path": "en.jsonl"}]})


@pytest.mark.parametrize(("make", "run"), [(sft, build_sft), (corpus, build_corpus)])
def test_changed_sources_and_torn_claims_are_refused(sources, make, run):
    run(make(sources), sources)
    run(make(sources), sources)  # nothing to do
    os.utime(sources / "en.jsonl", ns=(1, 1))
    with pytest.raises(UserError, match="source 'en' changed since"):
        run(make(sources), sources)
    claim = sources / "out" / "config.json"
    claim.write_bytes(claim.read_bytes()[:50])
    with pytest.raises(UserError, match=r"config.json is damaged"):
        run(make(sources), sources)


@pytest.mark.parametrize("begun", [{"quote": True}, {"facts": ["work"]}, {"rivals": 0.5}])
def test_a_build_begun_with_a_value_is_not_gone_on_with_the_usual_one(sources, begun):
    tasks = {"tasks": {"stated_facts": 1}}
    build_sft(sft(sources, **tasks, **begun), sources)
    with pytest.raises(UserError, match=rf"begun with another configuration \({next(iter(begun))} differ\)"):
        build_sft(sft(sources, **tasks), sources)


def test_a_claim_older_than_a_key_is_of_its_usual_value(sources):
    result = build_sft(sft(sources), sources)
    path = sources / "out" / "config.json"
    claim = json.loads(path.read_bytes())
    for key in ("quote", "facts", "rivals", "real", "ask"):
        claim.pop(key)
    path.write_text(json.dumps(claim))
    assert build_sft(sft(sources), sources).path.read_bytes() == result.path.read_bytes()
    with pytest.raises(UserError, match="quote differ"):
        build_sft(sft(sources, quote=True), sources)


def test_a_finished_build_is_not_touched(sources):
    write_jsonl(sources / "bench.jsonl", [{"text": novel(77, 20)}])
    made = sft(sources, decontaminate=[str(sources / "bench.jsonl")])
    result = build_sft(made, sources)
    before = {file.name: file.stat().st_mtime_ns for file in (sources / "out").iterdir() if file.is_file()}
    assert json.loads((sources / "out" / "report.json").read_text())["seconds"] == result.report["seconds"]
    again = build_sft(made, sources)
    assert again.report == result.report
    after = {file.name: file.stat().st_mtime_ns for file in (sources / "out").iterdir() if file.is_file()}
    assert {k: v for k, v in before.items() if k != "builder.lock"} == {
        k: v for k, v in after.items() if k != "builder.lock"
    }
    (sources / "bench.jsonl").unlink()
    with pytest.raises(UserError, match=r"bench.jsonl changed since"):
        build_sft(made, sources)
    assert result.path.exists()


def test_a_missing_decontamination_file_leaves_the_folder_free(sources):
    with pytest.raises(UserError, match="does not exist"):
        build_sft(sft(sources, decontaminate=["none.txt"]), sources)
    assert not (sources / "out" / "config.json").exists()
    build_sft(sft(sources), sources)


def test_json_decontamination_files_are_read_by_their_strings(tmp_path):
    text = novel(5, 30) + "\n中文的内容也在这里，" * 40
    (tmp_path / "a.json").write_text(json.dumps({"rows": [{"context": text}]}, ensure_ascii=True))
    (tmp_path / "a.txt").write_text(text)
    one, two = (Contamination.of_files([tmp_path / name]) for name in ("a.json", "a.txt"))
    for script in ("en", "zh"):
        assert (one.grams[script] == two.grams[script]).all()
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b.json is no JSON"):
        Contamination.of_files([tmp_path / "b.json"])


def test_answers_across_documents_rest_on_the_evidence():
    evidence = ["The bridge of Arle was built in 1871 by Brenda.", "The tower was finished twelve years later."]
    assert supported("The bridge of Arle was built by Brenda, the tower finished later.", evidence, "en")
    assert not supported("The bridge was built in 1872.", evidence, "en")
    assert not supported("The bridge was built by Edmund.", evidence, "en")
    assert not supported("Paris is the capital city where everybody lives.", evidence, "en")
    assert supported("长堤三百里，柳树四百棵。", ["长堤三百里已修", "种了柳树四百棵"], "zh")
    assert not supported("皇帝很高兴。", ["长堤三百里已修", "种了柳树四百棵"], "zh")


def test_answers_in_another_language_are_rejected():
    from longverse.data.long_sft.asking import _in_language
    from tests.data.test_rules import spec

    _in_language(spec("multi_doc_qa", "zh", 2_000), "1871")
    with pytest.raises(Reject, match="language does not match"):
        _in_language(spec("multi_doc_qa", "zh", 2_000), "the bridge")


def test_code_without_calls_across_files_is_refused_at_once(sources):
    (sources / "repo").mkdir()
    for n in range(30):
        (sources / "repo" / f"m{n}.py").write_text(f"def only_{n}(x):\n    return x + {n}\n\n\n" * 40)
    code = {"name": "code", "path": "repo", "suffixes": [".py"], "language": "code"}
    with pytest.raises(UserError, match="code_completion needs Python files that import one another"):
        build_sft(sft(sources, tasks={"code_completion": 1}, sources=[code]), sources)


def test_a_short_count_is_said_on_the_screen(sources, monkeypatch):
    from typer.testing import CliRunner

    from longverse.commands_data import app
    from longverse.data.long_sft import builder

    real = builder.build_one

    def fails_once(context, spec, attempts, contamination):
        made = real(context, spec, attempts, contamination)
        return builder.Built("", (), {"x": 1}, attempts, {"task": spec.task, "language": "en"}) if spec.index else made

    monkeypatch.setattr(builder, "build_one", fails_once)
    values = {
        "out": "out", "tokenizer": "tok", "items": 3, "processes": 1, "languages": {"en": 1},
        "tasks": {"single_doc_qa": 1}, "lengths": [{"low": 1500, "high": 2000}],
        "sources": [{"name": "en", "path": "en.jsonl"}],
    }  # fmt: skip
    (sources / "recipe.yaml").write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["sft", str(sources / "recipe.yaml"), "-q"])
    assert result.exit_code == 0, result.output
    assert "warning: only 1 of 3 items were built" in result.output
    assert "1 of 3 items" in (sources / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_copies": -1}, "max_copies must be at least 1"),
        ({"max_copies": float("nan")}, "max_copies must be a finite number"),
        ({"long_factor": float("inf")}, "long_factor must be a finite number"),
        ({"out": " "}, "out is empty"),
        ({"min_characters": -1}, "min_characters must not be negative"),
        ({"long_tokens": 0}, "long_tokens must be at least 1"),
        ({"sources": [{"name": "a", "path": "a", "max_documents": 0}]}, "max_documents must be at least 1"),
        ({"sources": [{"name": "a", "path": "a", "weight": float("nan")}]}, "weight must be a finite number"),
    ],
)
def test_bad_numbers_of_a_corpus(changes, message):
    values = {"out": "x", "sources": [{"name": "a", "path": "a"}]}
    with pytest.raises(UserError, match=message):
        build(CorpusConfig, values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": ""}, "out is empty"),
        ({"decontaminate_hits": 0}, "decontaminate_hits must be at least 1"),
        ({"recite": float("nan")}, "recite must be a finite number"),
        ({"teacher": {"url": "http://x", "model": "m", "temperature": -1}}, "temperature must not be negative"),
        ({"teacher": {"url": "http://x", "model": "m", "price_in": float("inf")}}, "price_in must be a finite"),
    ],
)
def test_bad_numbers_of_a_build(sources, changes, message):
    with pytest.raises(UserError, match=message):
        sft(sources, **changes)


def test_nobody_has_such_a_home(tmp_path):
    from longverse.data.config import resolve

    with pytest.raises(UserError, match="nobody's home folder"):
        resolve("~nobody-of-this-name/x", tmp_path)


def test_decontamination_keeps_one_in_eight_and_maps_it(tmp_path, monkeypatch):
    texts = [novel(n, 120) for n in range(3)]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    files = [tmp_path / f"{n}.txt" for n in range(3)]
    whole = Contamination.of_files(files)
    every = np.unique(np.concatenate([shingle_hashes(text, 60) for text in texts]))
    assert (whole.grams["en"] == every[every & np.uint64(7) == 0]).all()
    monkeypatch.setattr("longverse.data.long_sft.gates._FOLD", 100)  # folded many times on the way
    folded = Contamination.of_files(files)
    mapped = folded.mapped(tmp_path)
    for name in ("en", "zh"):
        assert (whole.grams[name] == folded.grams[name]).all()
        assert (whole.grams[name] == mapped.grams[name]).all()
    assert isinstance(mapped.grams["en"], np.memmap)
    assert 0.8 < mapped.hits(texts[1], "en") / np.unique(shingle_hashes(texts[1], 60)).size < 1.2
    assert mapped.hits(novel(9, 40), "en") < 64
