"""From predictions to scores: the benchmark's own arithmetic, its variants beside it.

A task's score is the mean over its rows of the best score over a row's answers, `round(100 * x, 2)`. Rows that
failed have no prediction; they are counted and named beside the score, and are in no mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation.files import read_rows
from longverse.evaluation.longbench.metrics import METRICS, cut_chinese
from longverse.evaluation.longbench.tasks import CATEGORIES, E_TASKS, FIRST_LINE, ROWS, TASKS, Row
from longverse.evaluation.longbench.tasks import METRICS as METRIC_OF

BUCKETS = ("0-4k", "4-8k", "8k+")


@dataclass(frozen=True)
class Prediction:
    """A row of a prediction file, in the benchmark's format."""

    pred: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None
    length: int | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "pred": self.pred,
            "answers": list(self.answers),
            "all_classes": None if self.all_classes is None else list(self.all_classes),
            "length": self.length,
        }


@dataclass
class TaskScore:
    """score: the official figure, 0..100; beside: variants' figures; buckets: LongBench-E's, None for an empty one."""

    task: str
    metric: str
    rows: int
    score: float
    beside: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, float | None] | None = None
    failed: int = 0
    missing: int = 0  # rows of the data without a prediction that did not fail either (a run not finished)
    cut: int | None = None  # rows whose prompt was cut to fit; None where the predictions do not say
    of: int | None = None  # rows the benchmark has

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_metrics(tasks: Sequence[str]) -> None:
    """UserError when a task's metric needs jieba and that is not installed: better now than after the last answer."""
    if any(METRIC_OF[task] in ("qa_f1_zh", "rouge_zh") for task in tasks):
        cut_chinese("")


def read_predictions(path: Path, task: str) -> list[Prediction]:
    """A prediction file of ours or of the benchmark's own script.

    UserError for a damaged row, a missing field (file and line) and an empty file.
    """
    rows: list[Prediction] = []
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        for name in ("pred", "answers", "all_classes"):
            if name not in row:
                raise UserError(
                    f"{where}: the field {name!r} is missing; predictions have pred, answers, all_classes, length."
                )
        if not isinstance(row["pred"], str):
            raise UserError(f"{where}: 'pred' is not a text; make that prediction again.")
        answers = row["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise UserError(f"{where}: 'answers' must be a list of one or more texts; make that prediction again.")
        classes = row["all_classes"]
        if METRIC_OF[task] == "classification" and not classes:
            raise UserError(f"{where}: {task} needs 'all_classes'; make that prediction again.")
        length = row.get("length")
        rows.append(
            Prediction(
                row["pred"],
                tuple(answers),
                tuple(classes) if classes else None,
                length if isinstance(length, int) else None,
            )
        )
    if not rows:
        raise UserError(f"{path} holds no predictions; run the task first.")
    return rows


def check_against(data: Sequence[Row], predictions: Sequence[Prediction], path: Path, *, partial: bool) -> None:
    """UserError when the predictions are not those of the data: other answers, or another number of rows.

    The order does not count (the benchmark's script appends from several GPUs at once). partial: fewer rows are
    allowed, as a run with a limit or with failed rows makes them.
    """
    if len(predictions) > len(data) or (not partial and len(predictions) != len(data)):
        raise UserError(
            f"{path} has {len(predictions)} predictions and the data {len(data)} rows: they do not belong together."
        )
    left = Counter(row.answers for row in data)
    for number, prediction in enumerate(predictions, 1):
        if not left[prediction.answers]:
            raise UserError(
                f"{path}, prediction {number}: no row of the data that is left has its answers, so the two do not "
                "belong together: score each with its own."
            )
        left[prediction.answers] -= 1


def score_rows(task: str, predictions: Sequence[Prediction], *, e: bool = False) -> TaskScore:
    """Scores a task; `predictions` in the order of the file, since the official script takes the last row's classes."""
    assert predictions
    metric = METRICS[METRIC_OF[task]]
    last = predictions[-1].all_classes
    names = ("", *metric.beside)
    scores: dict[str, list[float]] = {name: [] for name in names}
    for row in predictions:
        text = row.pred
        if task in FIRST_LINE:
            text = text.lstrip("\n").split("\n")[0]
        for name in names:
            function = metric.beside[name] if name else metric.official
            classes = row.all_classes if name in metric.own_classes else last
            scores[name].append(max(0.0, *(function(text, answer, classes) for answer in row.answers)))
    buckets = None
    if e:
        if any(row.length is None for row in predictions):
            raise UserError(f"{task}: LongBench-E needs the field 'length' in every prediction; make them again.")
        kept: dict[str, list[float]] = {name: [] for name in BUCKETS}
        for row, value in zip(predictions, scores[""], strict=True):
            assert row.length is not None
            kept[BUCKETS[0] if row.length < 4000 else BUCKETS[1] if row.length < 8000 else BUCKETS[2]].append(value)
        buckets = {name: _mean(values) if values else None for name, values in kept.items()}
    return TaskScore(
        task=task,
        metric=METRIC_OF[task],
        rows=len(predictions),
        score=_official(scores[""]),
        beside={name: _official(scores[name]) for name in metric.beside},
        buckets=buckets,
        of=None if e else ROWS[task],
    )


def _official(values: Sequence[float]) -> float:
    # The script adds up row by row and divides once: the order of the additions decides the last digit.
    total = 0.0
    for value in values:
        total += value
    return round(100 * total / len(values), 2)


def _mean(values: Sequence[float]) -> float:
    import numpy as np  # the official script takes numpy's mean here, which adds in pairs

    return float(round(100 * np.mean(values), 2))  # numpy's own rounding of its own number


@dataclass
class Averages:
    """Means of the categories (of the tasks at hand), of all tasks, and the leaderboard's mean of the six categories.

    complete: every task of the benchmark is there with all its rows; only then do the averages compare with others'.
    """

    categories: dict[str, float | None]
    tasks: float
    leaderboard: float | None
    complete: bool


def averages(scores: Sequence[TaskScore]) -> Averages:
    by_task = {s.task: s for s in scores}
    categories: dict[str, float | None] = {}
    for category, tasks in CATEGORIES.items():
        there = [by_task[t].score for t in tasks if t in by_task]
        categories[category] = round(sum(there) / len(there), 2) if there else None
    means = []
    for tasks in CATEGORIES.values():
        there = [by_task[t].score for t in tasks if t in by_task]
        if there:
            means.append(sum(there) / len(there))
    whole = len(by_task) == len(TASKS) and all(s.rows == s.of and not s.failed for s in scores)
    return Averages(
        categories=categories,
        tasks=round(sum(s.score for s in scores) / len(scores), 2),
        leaderboard=round(sum(means) / len(means), 2) if len(means) == len(CATEGORIES) else None,
        complete=whole,
    )


def prediction_file(folder: Path, task: str, *, e: bool = False) -> Path:
    """Where the predictions of a task are: in a run's `pred` (LongBench-E: `pred_e`), else in the folder itself."""
    inner = folder / ("pred_e" if e else "pred")
    return (inner if inner.is_dir() else folder) / f"{task}.jsonl"


def score_folder(folder: Path, *, e: bool = False, tasks: Sequence[str] | None = None) -> list[TaskScore]:
    """Scores every TASK.jsonl of a folder of predictions (or of its `pred`/`pred_e` subfolder), by any program.

    UserError when the folder holds no prediction of a known task, or a task asked for is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of predictions: give the folder with the TASK.jsonl files.")
    known = E_TASKS if e else TASKS
    there = [task for task in known if prediction_file(folder, task, e=e).is_file()]
    for task in tasks or ():
        if task not in there:
            raise UserError(
                f"{prediction_file(folder, task, e=e)} does not exist: run {task} first, or leave it out of --tasks."
            )
    chosen = [task for task in there if tasks is None or task in tasks]
    if not chosen:
        raise UserError(f"{folder} holds no predictions called like a task (such as hotpotqa.jsonl): check --score.")
    return [score_rows(t, read_predictions(prediction_file(folder, t, e=e), t), e=e) for t in chosen]
