"""The commands end to end on a tiny model, the page of results, and what a user may get wrong."""

import json
import shutil
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from longverse.commands_eval import app
from longverse.errors import UserError
from longverse.evaluation.longbench import metrics
from longverse.evaluation.plots import short_length
from longverse.evaluation.report import markdown, page, read_runs

from .conftest import write_jsonl

pytest.importorskip("jieba", reason="the Chinese metrics need the extra `eval`")


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=True)


def refused(*words: object) -> str:
    result = call(*words)
    assert isinstance(result.exception, UserError), result.exception
    message = str(result.exception)
    assert "\n" not in message
    return message


@pytest.fixture
def model(model_folder: Path) -> tuple[str, ...]:
    return ("--model", str(model_folder), "--dtype", "float32", "--device", "cpu")


def test_everything_and_one_page(model: tuple[str, ...], bench: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    needle = call("needle", *model, "--lengths", "500,800", "--depths", 2, "--repeats", 1, "--max-new-tokens", 4,
                  "-l", "en,zh", "-o", runs / "needle", "--json")  # fmt: skip
    assert needle.exit_code == 0, needle.exception
    assert len(json.loads(needle.stdout)["trials"]) == 8
    longbench = (
        "longbench",
        *model,
        "--data",
        bench,
        "--tasks",
        "trec,hotpotqa",
        "--max-length",
        200,
        "-o",
        runs / "lb",
    )
    first = call(*longbench)
    assert first.exit_code == 0, first.exception
    assert "| few-shot | trec |" in first.stdout
    scored = call("longbench", "--score", runs / "lb", "--data", bench, "--json")
    assert scored.exit_code == 0, scored.exception
    here = json.loads((runs / "lb" / "longbench.json").read_text())["scores"]
    there = json.loads(scored.stdout)["scores"]
    assert {t: s["score"] for t, s in there.items()} == {t: s["score"] for t, s in here.items()}
    ruler = call("ruler", *model, "--lengths", "500", "--tasks", "niah_single_1", "--samples", 1, "-o", runs / "ruler")
    assert ruler.exit_code == 0, ruler.exception
    loss = call("loss", *model, "--length", 300, "-o", runs / "loss")
    assert loss.exit_code == 0, loss.exception
    assert "nats a token" in loss.stdout
    slide = call("loss", *model, "--length", 100, "--stride", 50, "-o", runs / "slide")
    assert slide.exit_code == 0, slide.exception
    by_length = call("loss", *model, "--length", 600, "--by-length", "-o", runs / "by_length")
    assert by_length.exit_code == 0, by_length.exception
    target = tmp_path / "page.html"
    report = call("report", runs, "-o", target)
    assert report.exit_code == 0, report.exception
    assert "6 results compared" in report.stdout
    check_page(target.read_text())
    assert call("report", runs, "-o", tmp_path / "page.md").exit_code == 0
    assert "## LongBench" in (tmp_path / "page.md").read_text()


def check_page(text: str) -> None:
    """Well-formed enough to close what it opens, and nothing is loaded from elsewhere."""
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "line", "rect", "polyline"):
                opened.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Parser().feed(text)
    assert not opened
    for word in ("http:", "https:", "src=", "<script", "@import"):
        assert word not in text
    assert "<svg" in text
    assert 'class="heat"' in text


def test_transformers_and_a_users_haystack(model: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("清晨，花匠慢慢走过小小的码头。" * 50, encoding="gb18030")
    small = ("--lengths", 500, "--depths", 1, "--repeats", 1, "-l", "zh", "--max-new-tokens", 4)
    book = ("--haystack", tmp_path / "book.txt", "-o", tmp_path / "n")
    done = call("needle", *model, "--backend", "transformers", *small, *book)
    assert done.exit_code == 0, done.exception
    assert json.loads((tmp_path / "n" / "needle.json").read_text())["settings"]["haystack_name"] == "book.txt"


def test_names_that_do_not_exist(bench: Path, tmp_path: Path, model: tuple[str, ...]) -> None:
    assert "--data" in refused("longbench")
    assert "did you mean trec" in refused("longbench", "--data", bench, "--tasks", "trek")
    assert "does not exist" in refused("longbench", "--data", tmp_path / "absent")
    assert "no prompt for musique" in refused("longbench", "--data", bench, "--tasks", "musique")
    assert "not a folder" in refused("longbench", "--score", tmp_path / "absent")
    assert "choose one" in refused("longbench", "--e", "--v2")
    assert "--data" in refused("longbench", "--v2")
    assert "no list of numbers" in refused("needle", "--lengths", "1k,many")
    assert "not 'fr'" in refused("needle", "-l", "fr")
    assert "No mode" in refused("needle", "--mode", "magic")
    assert "There is no file" in refused("needle", "--haystack", tmp_path / "absent.txt")
    assert "--depths" in refused("needle", "--depths", 0)
    assert "engine or transformers" in refused("needle", "--backend", "llama.cpp")
    assert "is no endpoint" in refused("needle", "--endpoint", "localhost:1")
    assert "does not answer" in refused("needle", "--endpoint", "http://127.0.0.1:9/v1")
    served = ("--endpoint", "http://127.0.0.1:9/v1")
    assert "--rope and --processes change" in refused("needle", *served, "--rope", "abf:5", "--processes", 2)
    assert "--cache belong to the engine" in refused("ruler", "--backend", "transformers", "--cache", "int4")
    assert "--processes must be" in refused("needle", *model, "--processes", 0)
    assert "nobody's home" in refused("report", "~nobody-of-that-name/x")
    assert "belongs to --endpoint" in refused("needle", "--tokenizer", "smol")
    assert "'vtt'" in refused("ruler", "--tasks", "vtt")
    assert "There is no file" in refused("loss", tmp_path / "absent.txt")
    assert "exceed" in refused("loss", *model, "--length", 9000)
    assert "does not exist" in refused("report", tmp_path / "absent")
    assert "neither .html nor .md" in refused("report", tmp_path, "-o", "x.pdf")
    (tmp_path / "empty").mkdir()
    assert "No results" in refused("report", tmp_path / "empty")


def test_predictions_of_other_data_are_refused(bench: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "trec.jsonl", [{"pred": "x", "answers": ["Sport"], "all_classes": ["Sport"], "length": 1}])
    assert "do not belong together" in refused("longbench", "--score", tmp_path, "--data", bench)
    assert call("longbench", "--score", tmp_path).exit_code == 0


def test_a_file_that_cannot_be_written_is_said(model: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("needle", *model, "--lengths", 400, "--depths", 1, "--repeats", 1, "-o", tmp_path / "file")
    assert "Cannot write" in message


def test_runs_of_one_model_are_told_apart(tmp_path: Path) -> None:
    for name, loss in (("before", 3.0), ("after", 2.0)):
        value = {"kind": "loss", "way": "whole", "model": {"model": "m<i>"}, "settings": {"length": 9}, "mean": loss,
                 "tokens": 8, "blocks": [[1, 5, loss, 1], [5, 9, loss, 1]]}  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "loss.json").write_text(json.dumps(value))
    (tmp_path / "other.json").write_text("[1]")
    runs = read_runs([tmp_path])
    assert [r.name for r in runs] == ["m<i> (after)", "m<i> (before)"]
    assert "m&lt;i&gt; (after)" in page(runs)
    assert "| m<i> (after) | by position |" in markdown(runs)
    (tmp_path / "broken.json").write_text('{"kind": "loss"}')
    with pytest.raises(UserError, match=r"broken\.json is a damaged result"):
        read_runs([tmp_path])


def test_plans_of_rope_are_told_apart_in_the_report(tmp_path: Path) -> None:
    plans = [{"kind": "dynamic", "theta": 5e5, "factor": factor, "original_window": window, "head_dim": 8}
             for factor, window in ((2.0, 8192), (4.0, 8192), (2.0, 2048))]  # fmt: skip
    plans.append({"kind": "default", "theta": 5e5, "factor": 1.0})  # of a result from before the whole plan was kept
    for number, plan in enumerate(plans):
        value = {"kind": "loss", "way": "whole", "model": {"model": "m", "rope": plan}, "settings": {"length": 9},
                 "mean": 1.0, "tokens": 8, "blocks": [[1, 9, 1.0, 1]]}  # fmt: skip
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "loss.json").write_text(json.dumps(value))
    text = markdown(read_runs([tmp_path]))
    for plan in ("dynamic, base 500,000, factor 2 from 8,192", "dynamic, base 500,000, factor 4 from 8,192",
                 "dynamic, base 500,000, factor 2 from 2,048", "default, base 500,000"):  # fmt: skip
        assert text.count(f"| {plan} |") == 1


def test_the_config_beside_a_zip_is_found(
    model: tuple[str, ...], bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder that holds data.zip and config, and of the zip itself."""
    monkeypatch.setenv("LONGVERSE_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(bench / "data.zip", "w") as archive:
        archive.write(bench / "data" / "trec.jsonl", "data/trec.jsonl")
    shutil.rmtree(bench / "data")
    for number, data in enumerate((bench, bench / "data.zip")):
        done = call("longbench", *model, "--data", data, "--tasks", "trec", "--limit", 1, "--max-length", 200,
                    "-o", tmp_path / str(number))  # fmt: skip
        assert done.exit_code == 0, done.exception


def test_a_missing_jieba_is_said_before_a_model_is_loaded(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (bench / "data" / "hotpotqa.jsonl").read_text().replace("hotpotqa", "dureader")
    (bench / "data" / "dureader.jsonl").write_text(rows)
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        table = json.loads((bench / "config" / name).read_text(encoding="utf-8"))
        (bench / "config" / name).write_text(json.dumps(table | {"dureader": table["hotpotqa"]}), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "jieba", None)
    metrics._jieba.cache_clear()
    absent = ("longbench", "--model", bench / "absent", "--data", bench)
    assert "pip install 'longverse[eval]'" in refused(*absent, "--tasks", "dureader,trec")
    assert "There is no model" in refused(*absent, "--tasks", "trec")


def test_lengths_are_written_short_only_where_they_are_round() -> None:
    assert [short_length(n) for n in (700, 1000, 1500, 4096, 8000, 262_000)] == [
        "700", "1K", "1.5K", "4,096", "8K", "262K",
    ]  # fmt: skip


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    for name, value in (
        ("needle.json", {"kind": "needle", "model": {"model": "m"}, "settings": {}}),
        (
            "ruler.json",
            {"kind": "ruler", "model": {"model": "m"}, "settings": {"lengths": [1]}, "rows": [{"task": "vt"}]},
        ),
        ("longbench.json", {"kind": "longbench", "model": {"model": "m"}, "scores": []}),
    ):
        (tmp_path / name).write_text(json.dumps(value))
        with pytest.raises(UserError, match=rf"{name} is a damaged result, or one of another version"):
            read_runs([tmp_path / name])
