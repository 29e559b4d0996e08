"""The 21 tasks of LongBench: categories, metrics, and the user's copy of prompts, lengths and rows.

Source: Bai et al. 2023, "LongBench" (arXiv:2308.14508) and the benchmark's repository (THUDM/LongBench). Its
prompts and rows are data of the benchmark: they are read from the user's copy and are not part of this project.
"""

from __future__ import annotations

import re
import string
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from longverse.errors import UserError, expand
from longverse.evaluation.files import read_json, read_rows

CATEGORIES: dict[str, tuple[str, ...]] = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarisation": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
METRICS: dict[str, str] = {
    "narrativeqa": "qa_f1", "qasper": "qa_f1", "multifieldqa_en": "qa_f1", "multifieldqa_zh": "qa_f1_zh",
    "hotpotqa": "qa_f1", "2wikimqa": "qa_f1", "musique": "qa_f1", "dureader": "rouge_zh",
    "gov_report": "rouge", "qmsum": "rouge", "multi_news": "rouge", "vcsum": "rouge_zh",
    "trec": "classification", "triviaqa": "qa_f1", "samsum": "rouge", "lsht": "classification",
    "passage_count": "count", "passage_retrieval_en": "retrieval", "passage_retrieval_zh": "retrieval_zh",
    "lcc": "code_sim", "repobench-p": "code_sim",
}  # fmt: skip
TASKS = tuple(task for tasks in CATEGORIES.values() for task in tasks)
CATEGORY = {task: category for category, tasks in CATEGORIES.items() for task in tasks}
# LongBench-E: the same tasks with rows spread evenly over lengths; its files are called TASK_e.jsonl.
E_TASKS = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
# Chat models do better without their template where the prompt is a list of examples or code to go on with.
NO_TEMPLATE = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
ROWS = {task: 500 if task in ("lcc", "repobench-p") else 150 if task == "multifieldqa_en" else 200 for task in TASKS}

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "input": str, "context": str, "answers": list, "length": int, "all_classes": (list, type(None)), "_id": str,
}  # fmt: skip
# JSON may spell half of a character outside the basic plane; no tokenizer takes it and no file of UTF-8 holds it.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row as the benchmark has it. length counts words (English, code) or characters (Chinese)."""

    id: str
    input: str
    context: str
    answers: tuple[str, ...]
    length: int
    all_classes: tuple[str, ...] | None
    fields: dict[str, Any]  # the row as read, for the template


@dataclass(frozen=True)
class Config:
    """prompts: template a task, with {context} and {input}; lengths: new tokens a task."""

    prompts: dict[str, str]
    lengths: dict[str, int]


def choose_tasks(names: list[str] | None, *, e: bool = False) -> tuple[str, ...]:
    """The tasks asked for, in the benchmark's order; None is all of them. UserError for an unknown name."""
    known = E_TASKS if e else TASKS
    if not names:
        return known
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}."
            raise UserError(f"{'LongBench-E' if e else 'LongBench'} has no task called {name!r}: {hint}")
    return tuple(task for task in known if task in names)


def read_config(folder: Path, tasks: tuple[str, ...]) -> Config:
    """Reads dataset2prompt.json and dataset2maxlen.json; UserError when one lacks a task or is malformed."""
    prompts, lengths = read_json(folder / "dataset2prompt.json"), read_json(folder / "dataset2maxlen.json")
    for name, value in (("dataset2prompt.json", prompts), ("dataset2maxlen.json", lengths)):
        if not isinstance(value, dict):
            raise UserError(f"{folder / name} is no table of tasks: use the benchmark's own file.")
    for task in tasks:
        template, length = prompts.get(task), lengths.get(task)
        if not isinstance(template, str):
            raise UserError(f"{folder / 'dataset2prompt.json'} has no prompt for {task}: use the benchmark's own file.")
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise UserError(f"{folder / 'dataset2maxlen.json'} has no length for {task}: use the benchmark's own file.")
        try:
            wanted = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise UserError(f"{folder / 'dataset2prompt.json'}: the prompt of {task} is malformed ({error}).") from None
        if not wanted <= set(_FIELDS) or "context" not in wanted:
            raise UserError(
                f"{folder / 'dataset2prompt.json'}: the prompt of {task} must fill {{context}} and at most "
                f"{', '.join(sorted(_FIELDS))}, not {', '.join(sorted(wanted)) or 'nothing'}."
            )
    return Config({t: prompts[t] for t in tasks}, {t: lengths[t] for t in tasks})


def find_file(folder: Path, task: str, *, e: bool = False) -> Path:
    """DATA/TASK.jsonl or DATA/data/TASK.jsonl (TASK_e for LongBench-E); UserError naming both when neither is there."""
    name = f"{task}_e.jsonl" if e else f"{task}.jsonl"
    for path in (folder / name, folder / "data" / name):
        if path.is_file():
            return path
    raise UserError(
        f"{name} is neither in {folder} nor in {folder / 'data'}: copy it there, or leave {task} out with --tasks."
    )


def read_task(folder: Path, task: str, *, e: bool = False, limit: int | None = None) -> list[Row]:
    """All rows of a task's file (the first `limit`), every one checked.

    UserError for a damaged row, a missing field or a field of the wrong type (file and line), for an id that
    occurs twice, for a row of another task and for an empty file.
    """
    path = find_file(folder, task, e=e)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, fields in read_rows(path):
        where = f"{path}, line {number}"
        for name, kind in _FIELDS.items():
            if name not in fields:
                raise UserError(f"{where}: the field {name!r} is missing; get the file anew from the benchmark.")
            if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
                raise UserError(
                    f"{where}: the field {name!r} is of the wrong type; get the file anew from the benchmark."
                )
        if not fields["answers"] or not all(isinstance(a, str) for a in fields["answers"]):
            raise UserError(
                f"{where}: 'answers' must be a list of one or more texts; get the file anew from the benchmark."
            )
        if _HALF_CHARACTER.search(f"{fields['input']}{fields['context']}{''.join(fields['answers'])}"):
            raise UserError(f"{where}: the row holds half a character (a lone surrogate); get the file anew.")
        if METRICS[task] == "classification" and not fields["all_classes"]:
            raise UserError(f"{where}: {task} needs 'all_classes'; get the file anew from the benchmark.")
        dataset = fields.get("dataset", task)
        if dataset not in (task, f"{task}_e"):
            raise UserError(f"{where}: the row belongs to {dataset!r}, not to {task}; mend the file's name or the row.")
        if fields["_id"] in seen:
            raise UserError(
                f"{where}: the id {fields['_id']!r} stands in line {seen[fields['_id']]} already: remove one."
            )
        seen[fields["_id"]] = number
        classes = fields["all_classes"]
        rows.append(
            Row(
                id=fields["_id"],
                input=fields["input"],
                context=fields["context"],
                answers=tuple(fields["answers"]),
                length=fields["length"],
                all_classes=None if classes is None else tuple(classes),
                fields=fields,
            )
        )
    if not rows:
        raise UserError(f"{path} has no rows; get the file anew from the benchmark.")
    return rows if limit is None else rows[:limit]


def locate(data: str, cache: Path) -> Path:
    """The folder of the benchmark: a folder, a data.zip, or a dataset of the hub like THUDM/LongBench.

    A zip is unpacked once under `cache`. UserError when nothing is found or the hub cannot be reached.
    """
    path = expand(data)
    if path.is_dir():
        if (path / "data.zip").is_file() and not (path / "data").is_dir() and not list(path.glob("*.jsonl")):
            return _unpack(path / "data.zip", cache)
        return path
    if path.is_file() and path.suffix == ".zip":
        return _unpack(path, cache)
    if data.count("/") == 1 and not data.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        try:
            return _unpack(Path(hf_hub_download(data, "data.zip", repo_type="dataset")), cache)
        except Exception as error:  # the hub's errors have many classes; whatever the reason, the remedy is one
            reason = str(error).strip().split("\n")[0][:160]
            raise UserError(
                f"{data} is no folder here and the hub did not give it ({reason}): download the benchmark and give its "
                "folder with --data."
            ) from error
    raise UserError(f"{data} does not exist: give the folder of the benchmark with --data.")


def config_folder(data: str, folder: Path) -> Path:
    """Where prompts and lengths are when nothing else is said: `config` in the folder `data` or beside the zip `data`;
    else in `folder`, where `locate` found the rows."""
    path = expand(data)
    beside = (path.parent if path.is_file() else path) / "config"
    return beside if beside.is_dir() else folder / "config"


def _unpack(archive: Path, cache: Path) -> Path:
    stat = archive.stat()
    target = cache / f"longbench-{stat.st_size}-{stat.st_mtime_ns}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive) as files, tempfile.TemporaryDirectory(dir=cache) as aside:
            folder = Path(aside) / "whole"
            (folder / "data").mkdir(parents=True)
            for entry in files.namelist():
                # Only the rows are taken, by their bare names: a path inside an archive is not to be trusted.
                if entry.endswith(".jsonl"):
                    (folder / "data" / Path(entry).name).write_bytes(files.read(entry))
            folder.replace(target)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise UserError(f"{archive} cannot be unpacked to {cache} ({error}): download it again.") from error
    return target
