"""LongBench: reading the user's copy, the protocol, resuming, scoring, tables, v2."""

import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longverse.errors import UserError
from longverse.evaluation.backends import Request
from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.files import Journal
from longverse.evaluation.longbench import metrics, tables
from longverse.evaluation.longbench.metrics import OWN_CLASSES
from longverse.evaluation.longbench.runner import LongBenchRun, cut_context, cut_middle
from longverse.evaluation.longbench.score import (
    Prediction,
    averages,
    check_against,
    read_predictions,
    score_folder,
    score_rows,
)
from longverse.evaluation.longbench.tasks import (
    CATEGORIES,
    METRICS,
    ROWS,
    TASKS,
    Config,
    choose_tasks,
    locate,
    read_config,
    read_task,
)
from longverse.evaluation.longbench.v2 import cut, extract_answer, read_items, read_prompts, run_v2
from longverse.inference.engine import Engine

from .conftest import Echo, write_jsonl

pytest.importorskip("jieba", reason="the Chinese metrics need the extra `eval`")
SHARED = Path(os.environ.get("LONGVERSE_SHARED", Path(__file__).parents[2] / "../shared")) / "longbench"
OURS = ("hotpotqa", "trec", "samsum", "passage_retrieval_zh", "lcc")


def make_run(backend: Any, bench: Path, out: Path, **more: Any) -> LongBenchRun:
    tasks = more.pop("tasks", choose_tasks(list(OURS)))
    config = read_config(bench / "config", tasks)
    return LongBenchRun(backend, bench, config, out, tasks, **{"max_length": 300, **more})


def test_the_21_tasks() -> None:
    assert len(TASKS) == 21 == len(METRICS)
    assert sum(ROWS.values()) == 4750
    assert [len(tasks) for tasks in CATEGORIES.values()] == [4, 4, 4, 4, 3, 2]
    assert choose_tasks(["lcc", "trec"]) == ("trec", "lcc")
    with pytest.raises(UserError, match="did you mean hotpotqa"):
        choose_tasks(["hotpotq"])
    with pytest.raises(UserError, match="LongBench-E has no task called 'vcsum'"):
        choose_tasks(["vcsum"], e=True)


# ---- the user's copy ------------------------------------------------------------------------------------


def test_genuine_files_are_read() -> None:
    if not SHARED.is_dir():
        pytest.skip("the benchmark's files are not here: set LONGVERSE_SHARED")
    config = read_config(SHARED / "config", TASKS)
    assert config.lengths["multi_news"] == 512
    for task in ("multi_news", "passage_retrieval_zh"):
        assert len(read_task(SHARED, task)) == 200


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (3, {"context": None}, "line 3: the field 'context' is of the wrong type"),
        (2, {"answers": []}, "line 2: 'answers' must be a list"),
        (4, {"_id": "hotpotqa-0"}, "line 4: the id 'hotpotqa-0' stands in line 1 already"),
        (1, {"dataset": "musique"}, "line 1: the row belongs to 'musique'"),
        (6, "_id", "line 6: the field '_id' is missing"),
        (5, {"context": "half \ud83d"}, "line 5: the row holds half a character"),
    ],
)
def test_a_bad_row_is_named(bench: Path, line: int, change: dict[str, object] | str, message: str) -> None:
    path = bench / "data" / "hotpotqa.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    if isinstance(change, str):
        del rows[line - 1][change]
    else:
        rows[line - 1] |= change
    write_jsonl(path, rows)
    with pytest.raises(UserError, match=message):
        read_task(bench, "hotpotqa")


def test_damaged_and_missing_files_are_named(bench: Path) -> None:
    path = bench / "data" / "hotpotqa.jsonl"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"hotpotqa\.jsonl, line 6: not valid JSON"):
        read_task(bench, "hotpotqa")
    path.write_bytes(b'{"a": "\xff\xff"}\n')
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        read_task(bench, "hotpotqa")
    path.write_text("")
    with pytest.raises(UserError, match="has no rows"):
        read_task(bench, "hotpotqa")
    with pytest.raises(UserError, match=r"musique\.jsonl is neither in"):
        read_task(bench, "musique")
    with pytest.raises(UserError, match="no prompt for musique"):
        read_config(bench / "config", ("musique",))
    with pytest.raises(UserError, match=r"dataset2prompt\.json does not exist"):
        read_config(bench, ("trec",))
    (bench / "config" / "dataset2prompt.json").write_text(json.dumps({"trec": "{contxt} {input}"}))
    with pytest.raises(UserError, match=r"must fill .context."):
        read_config(bench / "config", ("trec",))
    (bench / "config" / "dataset2prompt.json").write_text("[]")
    with pytest.raises(UserError, match="is no table of tasks"):
        read_config(bench / "config", ("trec",))
    (bench / "config" / "dataset2prompt.json").write_text("{")
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        read_config(bench / "config", ("trec",))


def test_a_zip_is_unpacked_once(bench: Path, tmp_path: Path) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.write(bench / "data" / "trec.jsonl", "data/trec.jsonl")
        files.writestr("../../outside.jsonl", "{}\n")
    folder = locate(str(archive), tmp_path / "cache")
    assert len(read_task(folder, "trec")) == 6
    assert (folder / "data" / "outside.jsonl").is_file()  # by its bare name, inside
    (folder / "data" / "trec.jsonl").write_text("kept")
    assert locate(str(archive), tmp_path / "cache") == folder
    assert (folder / "data" / "trec.jsonl").read_text() == "kept"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]
    archive.write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be unpacked"):
        locate(str(archive), tmp_path / "cache")
    with pytest.raises(UserError, match="does not exist"):
        locate("./nowhere", tmp_path)


# ---- the protocol ---------------------------------------------------------------------------------------


def test_the_middle_is_cut_as_the_benchmark_does(echo: Echo) -> None:
    text = "The river made people thoughtful. " * 30 + "清晨，花匠慢慢走过。" * 10
    ids = echo.encode(text)
    assert cut_middle(echo, text, len(ids)) == text
    for length in (40, 41, 333):
        half = length // 2
        assert cut_middle(echo, text, length) == echo.decode(ids[:half]) + echo.decode(ids[-half:])


def test_the_corrected_cut_keeps_instructions_and_characters(echo: Echo) -> None:
    context = "清晨，花匠慢慢走过小小的码头。" * 40

    def fill(text: str) -> Request:
        return Request.user(f"请读。\n{text}\n问题：谁？")

    for length in (80, 121, 200):
        kept = cut_context(echo, fill, context, length)
        assert "\ufffd" not in kept
        assert length - 12 <= echo.count(fill(kept)) <= length
        assert context.startswith(kept[: len(kept) // 3])
    assert cut_context(echo, fill, "短", 200) == "短"
    with pytest.raises(UserError, match="instructions of a row alone take"):
        cut_context(echo, fill, context, 10)


def test_templates_only_where_the_protocol_says(echo: Echo, bench: Path, tmp_path: Path) -> None:
    run = make_run(echo, bench, tmp_path)
    rows = {task: read_task(bench, task)[0] for task in OURS}
    requests = {task: run.request(task, rows[task])[0] for task in OURS}
    assert {task for task, r in requests.items() if r.messages is not None} == {"hotpotqa", "passage_retrieval_zh"}
    assert {task for task, r in requests.items() if r.end_line} == {"samsum"}
    assert requests["trec"].max_new_tokens == 6
    assert "What is {0}?" in str(requests["trec"].prompt)  # braces inside a row are text


def test_a_run_writes_the_benchmarks_own_format(echo: Echo, bench: Path, tmp_path: Path) -> None:
    run = make_run(echo, bench, tmp_path)
    scores = {s.task: s for s in run.run()}
    assert list(scores) == [t for t in TASKS if t in OURS]
    lines = (tmp_path / "pred" / "trec.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert list(json.loads(lines[0])) == ["pred", "answers", "all_classes", "length"]
    assert scores["hotpotqa"].cut == 3  # the three long rows
    for task in OURS:
        path = tmp_path / "pred" / f"{task}.jsonl"
        check_against(read_task(bench, task), read_predictions(path, task), path, partial=False)
        check_against(read_task(bench, task), read_predictions(path, task)[::-1], path, partial=False)
    again = {s.task: s for s in score_folder(tmp_path)}
    assert {t: (s.score, s.beside) for t, s in again.items()} == {t: (s.score, s.beside) for t, s in scores.items()}


def test_a_killed_run_goes_on_to_an_identical_result(engine: Engine, bench: Path, tmp_path: Path) -> None:
    whole = make_run(EngineBackend(engine), bench, tmp_path / "whole")
    expected = whole.run()
    done = 0

    def count(at: int, total: int) -> None:
        nonlocal done
        done = at

    broken = make_run(EngineBackend(engine), bench, tmp_path / "broken", on_progress=count)
    broken.cancelled = lambda: done >= 9
    broken.run()
    assert done == 9
    journals = sorted((tmp_path / "broken" / "journal").iterdir())
    with journals[-1].open("a") as handle:
        handle.write('{"key": "trec-3", "pred": "half a ro')  # what a kill leaves
    resumed = make_run(EngineBackend(engine), bench, tmp_path / "broken")
    assert resumed.run() == expected
    for task in OURS:
        name = f"pred/{task}.jsonl"
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_missing_jieba_is_said_before_the_first_row(
    echo: Echo, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    metrics._jieba.cache_clear()
    config = Config({"multifieldqa_zh": "{context}"}, {"multifieldqa_zh": 4})
    (bench / "data" / "multifieldqa_zh.jsonl").write_text(
        (bench / "data" / "hotpotqa.jsonl").read_text().replace("hotpotqa", "multifieldqa_zh")
    )
    with pytest.raises(UserError, match="install it with: pip install"):
        LongBenchRun(echo, bench, config, tmp_path / "out", ("multifieldqa_zh",), max_length=300).run()
    assert echo.calls == 0
    assert not (tmp_path / "out").exists()


def test_rows_done_are_never_done_again(echo: Echo, bench: Path, tmp_path: Path) -> None:
    make_run(echo, bench, tmp_path, limit=2).run()
    assert echo.calls == 10
    make_run(echo, bench, tmp_path, limit=4).run()
    assert echo.calls == 20
    with pytest.raises(UserError, match=r"other settings \(max_length\)"):
        make_run(echo, bench, tmp_path, max_length=200).run()


def test_failed_rows_are_counted_and_tried_again(echo: Echo, bench: Path, tmp_path: Path) -> None:
    echo.fail = (1, 3)
    tasks = ("trec",)
    (score,) = make_run(echo, bench, tmp_path, tasks=tasks).run()
    assert (score.rows, score.failed) == (4, 2)
    text = tables.markdown([score], model="echo", settings={"truncation": "middle", "max_length": 300})
    assert "trec: 2 rows failed" in text
    assert len((tmp_path / "pred" / "trec.jsonl").read_text().splitlines()) == 4
    (score,) = make_run(echo, bench, tmp_path, tasks=tasks).run()
    assert (score.rows, score.failed) == (6, 0)


def test_a_task_that_failed_altogether_has_no_score(echo: Echo, bench: Path, tmp_path: Path) -> None:
    echo.fail = range(100)
    assert make_run(echo, bench, tmp_path, tasks=("trec",)).run() == []


def test_what_exceeds_the_window_is_refused_before_any_work(echo: Echo, bench: Path, tmp_path: Path) -> None:
    echo.window = 400
    with pytest.raises(UserError, match=r"use --max-length 3\d\d or less"):
        make_run(echo, bench, tmp_path, max_length=500).run()
    with pytest.raises(UserError, match=r"Row \d of hotpotqa needs .* cut long rows with --truncation middle"):
        make_run(echo, bench, tmp_path, truncation="off").run()
    assert echo.calls == 0
    make_run(echo, bench, tmp_path, truncation="context").run()
    for change in ({"truncation": "left"}, {"max_length": 1}, {"limit": 0}):
        with pytest.raises(UserError):
            make_run(echo, bench, tmp_path, **change)


def test_longbench_e_has_three_buckets(echo: Echo, bench: Path, tmp_path: Path) -> None:
    (bench / "data" / "trec.jsonl").rename(bench / "data" / "trec_e.jsonl")
    (score,) = make_run(echo, bench, tmp_path, tasks=("trec",), e=True).run()
    assert score.buckets is not None
    assert list(score.buckets) == ["0-4k", "4-8k", "8k+"]
    assert (tmp_path / "pred_e" / "trec.jsonl").is_file()
    assert "0-4k" in tables.markdown([score], model="echo", settings={"e": True})


# ---- scoring --------------------------------------------------------------------------------------------


def rows(
    *preds: str, answers: tuple[str, ...] = ("Food",), classes: tuple[str, ...] = ("Food", "Sport")
) -> list[Prediction]:
    return [Prediction(p, answers, classes, 100 * n) for n, p in enumerate(preds)]


def test_first_line_best_answer_and_rounding() -> None:
    score = score_rows("trec", rows("\n\nFood\nSport", "Sport", "Food"))
    assert score.score == 66.67
    assert score_rows("hotpotqa", rows("the mill", answers=("a pond", "Mill"))).score == 100.0


def test_the_last_rows_classes_and_the_rows_own() -> None:
    mixed = [*rows("Food or Drink", classes=("Food", "Drink")), *rows("Food")]
    score = score_rows("trec", mixed)
    assert score.score == 100.0  # officially only Food and Sport count, in every row
    assert score.beside[OWN_CLASSES] == 75.0


def test_averages_know_what_is_missing() -> None:
    scores = [score_rows("trec", rows("Food")), score_rows("lcc", rows("x"))]
    means = averages(scores)
    assert means.tasks == 50.0
    assert means.leaderboard is None
    assert not means.complete
    everything = [replace(scores[0], task=t, rows=ROWS[t], of=ROWS[t], score=float(n)) for n, t in enumerate(TASKS)]
    means = averages(everything)
    assert means.complete
    assert means.categories["code"] == 19.5
    assert means.leaderboard == round((1.5 + 5.5 + 9.5 + 13.5 + 17 + 19.5) / 6, 2)


def test_bad_predictions_are_named(bench: Path, tmp_path: Path) -> None:
    path = tmp_path / "trec.jsonl"
    good = {"pred": "Food", "answers": ["Food"], "all_classes": ["Food"], "length": 3}
    for change, message in (
        ({"pred": None}, "line 2: 'pred' is not a text"),
        ({"answers": "Food"}, "line 2: 'answers' must be"),
        ({"all_classes": None}, "line 2: trec needs 'all_classes'"),
    ):
        write_jsonl(path, [good, good | change])
        with pytest.raises(UserError, match=message):
            score_folder(tmp_path)
    write_jsonl(path, [{"pred": "x"}])
    with pytest.raises(UserError, match="line 1: the field 'answers' is missing"):
        score_folder(tmp_path)
    path.write_text("")
    with pytest.raises(UserError, match="holds no predictions"):
        score_folder(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="called like a task"):
        score_folder(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        score_folder(tmp_path / "absent")
    write_jsonl(path, [good])
    with pytest.raises(UserError, match=r"lcc\.jsonl does not exist"):
        score_folder(tmp_path, tasks=["lcc"])
    data = read_task(bench, "trec")
    alien = [Prediction("x", ("Sport",), None, 1)]
    with pytest.raises(UserError, match="prediction 1: no row of the data that is left"):
        check_against(data, alien, path, partial=True)
    with pytest.raises(UserError, match="1 predictions and the data 6 rows"):
        check_against(data, alien, path, partial=False)


def test_tables_stand_beside_the_published_figures(tmp_path: Path) -> None:
    scores = [score_rows("hotpotqa", rows("the mill", answers=("Mill",))), score_rows("lcc", rows("return y"))]
    settings = {"truncation": "middle", "max_length": 7500, "limit": None}
    text = tables.markdown(scores, model="smol", settings=settings)
    assert "| multi-document QA | hotpotqa | F1 | 1 of 200 | **100.00** | 58.3 | 51.6 | 48.3 | 22.4 | 24.3 |" in text
    assert "edit distance by Levenshtein" in text
    assert "two revisions of LongBench" in text
    assert "do not compare with published ones" in text
    paths = tables.save(tmp_path, scores, model={"model": "smol"}, settings=settings)
    assert json.loads(paths[0].read_text())["scores"]["hotpotqa"]["score"] == 100.0
    pytest.importorskip("matplotlib")
    assert paths[-1].read_bytes().startswith(b"\x89PNG")


# ---- v2 -------------------------------------------------------------------------------------------------


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    items = [
        {"_id": str(n), "domain": "x", "sub_domain": "y", "difficulty": ["easy", "hard"][n % 2], "answer": "B",
         "length": ["short", "medium", "long"][n % 3], "question": f"Question {n}?", "choice_A": "a", "choice_B": "b",
         "choice_C": "c", "choice_D": "d", "context": "The fog over the valley changed. " * 20}
        for n in range(6)
    ]  # fmt: skip
    folder = tmp_path / "v2"
    (folder / "prompts").mkdir(parents=True)
    (folder / "data.json").write_text(json.dumps(items))
    # As in the benchmark: the second prompt of the reasoning variant shows the thoughts and leaves the text out.
    question = "$Q$ (A) $C_A$ (B) $C_B$ (C) $C_C$ (D) $C_D$"
    for name, text in (
        ("0shot", f"<text>$DOC$</text> {question} Answer:"),
        ("0shot_cot", f"<text>$DOC$</text> {question} Think:"),
        ("0shot_cot_ans", f"The text is omitted. {question} Thoughts: $COT$ Answer:"),
    ):
        (folder / "prompts" / f"{name}.txt").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The correct answer is (C)", "C"),
        ("**The correct answer is B**.", "B"),
        ("The correct answer is (E)", None),
        ("the correct answer is (A)", None),
        ("I say D; The correct answer is A. The correct answer is (B)", "B"),
        ("", None),
    ],
)
def test_the_letter_is_extracted_as_the_benchmark_does(response: str, letter: str | None) -> None:
    assert extract_answer(response) == letter


def test_v2_direct_and_with_reasoning(echo: Echo, v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = read_items(v2)
    asked: list[str] = []
    real = Echo.answer

    def answer(self: Echo, request: Request) -> Any:
        asked.append(str(request.messages))
        reply = real(self, request)
        return replace(reply, text="The correct answer is (B)" if "Question 1" not in asked[-1] else "no idea")

    monkeypatch.setattr(Echo, "answer", answer)
    result = run_v2(echo, items, read_prompts(v2 / "prompts", reasoning=False), tmp_path, max_length=200)
    assert result.scores()["overall"] == 83.3
    assert result.scores(0.25)["overall"] == 87.5
    assert result.scores()["easy"] == 100.0
    before = len(asked)
    run_v2(echo, items, read_prompts(v2 / "prompts", reasoning=False), tmp_path, max_length=200)
    assert len(asked) == before
    thought = run_v2(
        echo, items, read_prompts(v2 / "prompts", reasoning=True), tmp_path, max_length=200, reasoning=True
    )
    assert len(asked) == before + 12
    assert "Thoughts: The correct answer is (B) Answer:" in asked[-1]
    assert thought.to_dict()["unanswered"] == 1
    assert "easy" in thought.markdown()
    assert len(thought.save(tmp_path)) == 2


def test_v2_keeps_every_answer_as_it_comes(echo: Echo, v2: Path, tmp_path: Path) -> None:
    items, prompts = read_items(v2), read_prompts(v2 / "prompts", reasoning=True)
    for stop in (3, 8):  # among the thoughts, then among the answers
        until: Any = lambda stop=stop: echo.calls >= stop  # noqa: E731
        run_v2(echo, items, prompts, tmp_path, max_length=200, reasoning=True, cancelled=until)
        kept = [path.read_text().count("\n") - 1 for path in sorted((tmp_path / "journal").iterdir())]
        assert kept == {3: [0, 3], 8: [2, 6]}[stop]
    result = run_v2(echo, items, prompts, tmp_path, max_length=200, reasoning=True)
    assert echo.calls == 12
    assert [row["response_cot"] != "" for row in result.rows] == [True] * 6


def test_v2_failures_and_bad_input(echo: Echo, v2: Path, tmp_path: Path) -> None:
    echo.fail = (0,)
    items = read_items(v2, limit=2)
    prompts = read_prompts(v2 / "prompts", reasoning=True)
    result = run_v2(echo, items, prompts, tmp_path, max_length=200, reasoning=True)
    assert list(result.failed) == ["0"]
    assert len(result.rows) == 1
    echo.window = 1100
    with pytest.raises(UserError, match="use --max-length"):
        run_v2(echo, items, prompts, tmp_path / "b", max_length=200, reasoning=True)
    with pytest.raises(UserError, match=r"0shot\.txt cannot be read"):
        read_prompts(v2, reasoning=False)
    (v2 / "prompts" / "0shot_cot_ans.txt").write_text("$DOC$ $Q$")
    with pytest.raises(UserError, match=r"0shot_cot_ans\.txt has no \$COT\$"):
        read_prompts(v2 / "prompts", reasoning=True)
    with pytest.raises(UserError, match=r"neither data\.json"):
        read_items(v2 / "prompts")
    for change, message in (
        ({"answer": "E"}, "'E' is none of"),
        ({"_id": "0"}, "occurs twice"),
        ({"context": 1}, "'context'"),
    ):
        broken = [dict(item) for item in read_items(v2)]
        broken[3] |= change
        (v2 / "data.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(UserError, match=f"item 4: .*{message}"):
            read_items(v2)
        broken[3] |= {"answer": "B", "_id": "3", "context": "x"}
        (v2 / "data.json").write_text(json.dumps(broken))


def test_v2_cuts_ids_and_decodes_them_together(echo: Echo) -> None:
    text = "The long winter belonged to the season. " * 20
    ids = echo.encode(text)
    assert cut(echo, text, 31) == echo.decode([*ids[:15], *ids[-16:]])
    assert cut(echo, text, 10_000) == text


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j.jsonl", {"a": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; make room"):
        journal.add("x", {"pred": "y"})
    assert not journal.done("x")


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {"a": 1})
    journal.add("x", {"pred": "y"})
    assert Journal(path, {"a": 1}).done("x")
    path.write_text(path.read_text() + "garbage\n")
    with pytest.raises(UserError, match="line 3: not valid JSON"):
        Journal(path, {"a": 1})
