"""Runs LongBench as its authors do: prompts, middle truncation, templates, greedy answers, prediction files.

    run = LongBenchRun(backend, data, config, Path("out"), max_length=31500)
    scores = run.run()

A run's folder holds `journal/TASK.jsonl` (every finished row, written as it comes, so a kill loses nothing),
`pred/TASK.jsonl` (the benchmark's own format, in the order of the data) and the tables. Rows that failed stay in
the journal with their reason, are tried again by the next run, and are left out of `pred`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation.backends import Backend, Failure, Reply, Request, answer_all, check_window, template_tokens
from longverse.evaluation.files import Journal, write_text
from longverse.evaluation.longbench.score import Prediction, TaskScore, check_metrics, score_rows
from longverse.evaluation.longbench.tasks import NO_TEMPLATE, Config, Row, find_file, read_task

TRUNCATIONS = ("middle", "context", "off")
SEAM = 16  # tokens that a cut prompt may grow by when it is tokenized again: the two halves meet in new words
CONTEXT_CUT = "only the context cut, on whole characters"


def cut_middle(backend: Backend, prompt: str, max_length: int) -> str:
    """The benchmark's cut: the first and the last max_length // 2 ids of the filled prompt, each decoded, joined.

    A prompt of at most max_length ids is returned as it is. Quirks kept: special tokens count, a character may be
    cut into halves (U+FFFD), the template comes on top, and the middle may be part of the instructions.
    """
    ids = backend.encode(prompt)
    if len(ids) <= max_length:
        return prompt
    half = max_length // 2
    return backend.decode(ids[:half]) + backend.decode(ids[-half:])


def cut_context(backend: Backend, fill: Callable[[str], Request], context: str, max_length: int) -> str:
    """The corrected cut: only the context loses its middle, on whole characters, until the request (template
    included) has at most max_length tokens. UserError when the rest alone is longer."""
    if backend.count(fill(context)) <= max_length:
        return context
    rest = backend.count(fill(""))
    if rest > max_length:
        raise UserError(
            f"The instructions of a row alone take {rest:,} tokens, more than --max-length {max_length:,}: raise it."
        )
    ids = backend.encode(context)
    keep = max_length - rest
    while keep > 0:
        half = keep // 2
        head = backend.decode(ids[: keep - half]).rstrip("\ufffd")
        tail = backend.decode(ids[len(ids) - half :]).lstrip("\ufffd") if half else ""
        over = backend.count(fill(head + tail)) - max_length
        if over <= 0:
            return head + tail
        keep -= over
    return ""


@dataclass
class LongBenchRun:
    """One model over the chosen tasks.

    data: the benchmark's folder; out: where this run keeps its files; max_length: tokens of the filled prompt,
    before the template; truncation: "middle" (the protocol), "context" (the corrected cut) or "off" (a row over
    the window is refused before any work); limit: only the first rows of each task.
    """

    backend: Backend
    data: Path
    config: Config
    out: Path
    tasks: tuple[str, ...]
    max_length: int = 31500
    truncation: str = "middle"
    limit: int | None = None
    e: bool = False
    on_progress: Callable[[int, int], None] | None = None
    cancelled: Callable[[], bool] | None = None
    scores: list[TaskScore] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise UserError(f"No truncation is called {self.truncation!r}: choose {', '.join(TRUNCATIONS)}.")
        if self.max_length < 2:
            raise UserError("--max-length must be at least 2 tokens.")
        if self.limit is not None and self.limit < 1:
            raise UserError("--limit must be at least 1 row.")

    @property
    def predictions(self) -> Path:
        return self.out / ("pred_e" if self.e else "pred")

    def request(self, task: str, row: Row) -> tuple[Request, bool]:
        """The request of a row, and whether its text was cut."""
        template, new_tokens = self.config.prompts[task], self.config.lengths[task]

        def ask(prompt: str) -> Request:
            if task in NO_TEMPLATE:
                return Request(prompt=prompt, max_new_tokens=new_tokens, end_line=task == "samsum")
            return Request.user(prompt, max_new_tokens=new_tokens)

        def fill(context: str) -> str:
            return template.format(**{**row.fields, "context": context})

        if self.truncation == "context":
            context = cut_context(self.backend, lambda text: ask(fill(text)), row.context, self.max_length)
            return ask(fill(context)), context != row.context
        whole = fill(row.context)
        if self.truncation == "off":
            return ask(whole), False
        cut = cut_middle(self.backend, whole, self.max_length)
        return ask(cut), cut != whole

    def run(self) -> list[TaskScore]:
        """Answers what is not yet answered and scores every task; the scores are kept in `scores` too.

        Raises UserError before any answer when rows cannot fit the window, files do not belong together or what a
        metric needs is not installed.
        """
        check_metrics(self.tasks)
        self._check_window()
        rows = {task: read_task(self.data, task, e=self.e, limit=self.limit) for task in self.tasks}
        if self.truncation == "off" and self.backend.window is not None:
            for task in self.tasks:
                self._check_rows(task, rows[task])
        journals = {task: self._journal(task) for task in self.tasks}
        total = sum(len(r) for r in rows.values())
        done = sum(journals[task].done(row.id) for task in self.tasks for row in rows[task])
        self.scores = []
        for task in self.tasks:
            journal = journals[task]
            todo = [row for row in rows[task] if not journal.done(row.id)]
            cut: dict[str, bool] = {}  # row id: whether its text was cut
            if self.on_progress is not None:
                self.on_progress(done, total)
            try:
                for number, _, reply in answer_all(self.backend, self._jobs(task, todo, cut), self.cancelled):
                    journal.add(todo[number].id, _journal_row(reply, cut[todo[number].id]))
                    done += 1
                    if self.on_progress is not None:
                        self.on_progress(done, total)
            finally:
                score = self._finish(task, rows[task], journal)
            if score is not None:
                self.scores.append(score)
            if self.cancelled is not None and self.cancelled():
                break
        return self.scores

    def _jobs(self, task: str, rows: Sequence[Row], cut: dict[str, bool]) -> Iterator[tuple[Request]]:
        # One at a time: cutting a long text takes a moment, and nothing should have to wait for all of them.
        for row in rows:
            request, cut[row.id] = self.request(task, row)
            yield (request,)

    def _check_window(self) -> None:
        if self.truncation == "off" or self.backend.window is None:
            return
        for task in self.tasks:
            template = 0
            if task not in NO_TEMPLATE and self.truncation == "middle":
                template = template_tokens(self.backend)
            new_tokens = self.config.lengths[task]
            most = self.backend.window - new_tokens - template - SEAM
            if self.max_length > most:
                raise UserError(
                    f"--max-length {self.max_length:,} with {new_tokens:,} new tokens for {task} exceeds the window of "
                    f"{self.backend.name}, {self.backend.window:,} tokens: use --max-length {most:,} or less."
                )

    def _check_rows(self, task: str, rows: Sequence[Row]) -> None:
        for number, row in enumerate(rows, 1):
            request, _ = self.request(task, row)
            tokens = self.backend.count(request)
            try:
                check_window(self.backend, tokens, request.max_new_tokens)
            except UserError:
                raise UserError(
                    f"Row {number} of {task} needs {tokens + request.max_new_tokens:,} tokens and the window of "
                    f"{self.backend.name} is {self.backend.window:,}: cut long rows with --truncation middle."
                ) from None

    def _journal(self, task: str) -> Journal:
        source = find_file(self.data, task, e=self.e)
        settings = {
            "task": task + ("_e" if self.e else ""),
            "model": self.backend.describe(),
            "max_length": None if self.truncation == "off" else self.max_length,
            "truncation": self.truncation,
            "prompt": hashlib.sha256(self.config.prompts[task].encode()).hexdigest()[:16],
            "new_tokens": self.config.lengths[task],
            "data": hashlib.sha256(source.read_bytes()).hexdigest()[:16],
        }
        folder = self.out / ("journal_e" if self.e else "journal")
        return Journal(folder / f"{task}.jsonl", settings)

    def _finish(self, task: str, rows: Sequence[Row], journal: Journal) -> TaskScore | None:
        finished = [row for row in rows if journal.done(row.id)]
        predictions = [
            Prediction(journal.rows[row.id]["pred"], row.answers, row.all_classes, row.length) for row in finished
        ]
        write_predictions(self.predictions / f"{task}.jsonl", predictions)
        if not predictions:
            return None
        score = score_rows(task, predictions, e=self.e)
        score.failed = sum(row.id in journal.rows and not journal.done(row.id) for row in rows)
        score.missing = len(rows) - len(finished) - score.failed
        score.cut = sum(journal.rows[row.id]["cut"] for row in finished)
        return score


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """The benchmark's format: a JSON object a line with pred, answers, all_classes, length."""
    write_text(path, "".join(json.dumps(p.to_dict(), ensure_ascii=False) + "\n" for p in predictions))


def _journal_row(reply: Reply | Failure, cut: bool) -> dict[str, Any]:
    if isinstance(reply, Failure):
        return {"failed": str(reply)}
    return {
        "pred": reply.text,
        "cut": cut,
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "finish": reply.finish_reason,
        "seconds": round(reply.seconds, 3),
    }
