"""RULER: thirteen kinds of task at rising lengths, and the length up to which a model really reads.

    result = run_ruler(backend, RulerSettings(lengths=(4096, 8192)), journal=Path("out/ruler.jsonl"))

Metric of the authors: the share of the references that occur in the answer, case folded (for the qa tasks: any
one of them). The effective length is the longest whose mean over the tasks is above 85.6, the mean of Llama-2-7B
(chat) at 4K in the paper, with every shorter length above it too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation.backends import Backend, Failure, Request, answer_all, check_count, check_window
from longverse.evaluation.files import Journal, write_json, write_text
from longverse.evaluation.fitting import ENGLISH_PAD, fit
from longverse.evaluation.ruler_tasks import TASKS, Draft, QuestionFile, make_draft

THRESHOLD = 85.6
TEXTS = 3  # counts up when the same seed gives other texts, so that no run goes on with rows of the old ones


@dataclass(frozen=True)
class RulerSettings:
    """lengths: tokens of prompt and answer together, as the authors count; samples: rows a task and length."""

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = TASKS
    samples: int = 10
    seed: int = 0
    qa_file: str | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError("The lengths must be different positive numbers of tokens in rising order, like 4096,8192.")
        for task in self.tasks:
            if task not in TASKS:
                raise UserError(f"RULER has no task called {task!r}: choose among {', '.join(TASKS)}.")
        if self.samples < 1:
            raise UserError("--samples must be at least 1.")

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class RulerRow:
    task: str
    length: int
    sample: int
    references: list[str]
    answer: str
    score: float | None  # 0..1; None when no answer came
    prompt_tokens: int
    failed: str | None = None


@dataclass
class RulerResult:
    settings: dict[str, Any]
    model: dict[str, Any]
    rows: list[RulerRow]

    def score(self, task: str, length: int) -> float | None:
        """Mean of a cell in per cent; None when nothing of it was answered."""
        scores = [r.score for r in self.rows if (r.task, r.length) == (task, length) and r.score is not None]
        return 100 * sum(scores) / len(scores) if scores else None

    def average(self, length: int) -> float | None:
        cells = [self.score(task, length) for task in self.settings["tasks"]]
        known = [c for c in cells if c is not None]
        return sum(known) / len(known) if len(known) == len(cells) else None

    def effective_length(self) -> int | None:
        """The longest length with every average up to it above THRESHOLD; None if not even the first is."""
        longest = None
        for length in self.settings["lengths"]:
            average = self.average(length)
            if average is None or average <= THRESHOLD:
                break
            longest = length
        return longest

    @property
    def rows_a_cell(self) -> str:
        samples = self.settings["samples"]
        return f"{samples} row{'s' if samples > 1 else ''} a cell"

    @property
    def failures(self) -> int:
        return sum(r.failed is not None for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        lengths = self.settings["lengths"]
        return {
            "kind": "ruler",
            "model": self.model,
            "settings": self.settings,
            "scores": {t: {str(n): self.score(t, n) for n in lengths} for t in self.settings["tasks"]},
            "averages": {str(n): self.average(n) for n in lengths},
            "effective_length": self.effective_length(),
            "failed": self.failures,
            "rows": [asdict(r) for r in self.rows],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RulerResult:
        return cls(value["settings"], value["model"], [RulerRow(**r) for r in value["rows"]])

    def markdown(self) -> str:
        lengths = self.settings["lengths"]

        def cell(value: float | None) -> str:
            return "–" if value is None else f"{value:.1f}"

        lines = [f"## RULER: {self.model['model']}", "", f"{self.rows_a_cell}, per cent.", ""]
        lines += ["| task | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---|" + "---|" * len(lengths)]
        for task in self.settings["tasks"]:
            lines.append(f"| {task} | " + " | ".join(cell(self.score(task, n)) for n in lengths) + " |")
        lines.append("| **average** | " + " | ".join(f"**{cell(self.average(n))}**" for n in lengths) + " |")
        effective = self.effective_length()
        what = "none of these lengths" if effective is None else f"{effective:,} tokens"
        lines += ["", f"Effective length (average above {THRESHOLD}): {what}."]
        if set(self.settings["tasks"]) != set(TASKS):
            lines[-1] += " Only some of the 13 tasks were run, so it does not compare with published ones."
        if self.model.get("backend") == "endpoint":
            lines += ["", "Behind an endpoint the answer's beginning stands at the end of the question."]
        if self.failures:
            lines += ["", f"{self.failures} of {len(self.rows)} rows got no answer and are not counted."]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> list[Path]:
        """Writes ruler.json, ruler.md and, where matplotlib is there, ruler.png (tasks down, lengths across)."""
        write_json(folder / "ruler.json", self.to_dict())
        write_text(folder / "ruler.md", self.markdown())
        paths = [folder / "ruler.json", folder / "ruler.md"]
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return paths
        from longverse.evaluation.plots import heatmaps

        tasks, lengths = self.settings["tasks"], self.settings["lengths"]
        cells = [[None if (s := self.score(t, n)) is None else s / 100 for n in lengths] for t in tasks]
        cells.append([None if (s := self.average(n)) is None else s / 100 for n in lengths])
        panel = {"columns": [f"{n:,}" for n in lengths], "rows": [*tasks, "average"], "cells": cells, "sum": True,
                 "x": "length of prompt and answer in tokens", "y": "task"}  # fmt: skip
        heatmaps([panel], folder / "ruler.png", title=f"RULER: {self.model['model']}",
                 subtitle=self.rows_a_cell, colour_label="score")  # fmt: skip
        return [*paths, folder / "ruler.png"]


def score_answer(answer: str, draft: Draft) -> float:
    """Share of the references that occur in the answer, case folded; for any_of 1 as soon as one does."""
    answer = answer.lower()
    found = [reference.lower() in answer for reference in draft.references]
    return float(any(found)) if draft.any_of else sum(found) / len(found)


def fit_draft(backend: Backend, draft: Draft, length: int) -> Request:
    """The request whose prompt, with the template, has exactly length - draft.new_tokens tokens."""
    target = length - draft.new_tokens
    if target < 1:
        raise UserError(f"A row of {length:,} tokens has no room for an answer of {draft.new_tokens}: use longer rows.")
    source = draft.parts()
    # A piece of the list tasks comes several times and numbered, so its own tokens say little: count it in place.
    empty = backend.count(_ask(draft, [], ""))
    pieces = list(islice(source, 8))
    price = max(1, (backend.count(_ask(draft, pieces, "")) - empty) // len(pieces))
    pieces += islice(source, max(32, 5 * target // (4 * price)))

    def count(number: int, padding: str) -> int:
        return backend.count(_ask(draft, pieces[:number], padding))

    while True:
        number, padding = fit(count, target, [price] * len(pieces), empty, ENGLISH_PAD)
        if number < len(pieces):
            return _ask(draft, pieces[:number], padding)
        pieces += islice(source, len(pieces))  # the first were longer than the rest: the text can hold more


def _ask(draft: Draft, pieces: list[str], padding: str) -> Request:
    # The pad stands before the task: inside it would be a word of the list or a sentence of the haystack.
    text = (padding + "\n" if padding else "") + draft.build(pieces)
    return Request.user(text, lead=draft.lead, max_new_tokens=draft.new_tokens)


def run_ruler(
    backend: Backend,
    settings: RulerSettings,
    *,
    qa: QuestionFile | None = None,
    journal: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> RulerResult:
    """Every task at every length; finished rows in `journal` are not done again. on_progress counts rows."""
    for length in settings.lengths:
        check_window(backend, length, 0)
    header = {**settings.to_dict(), "texts": TEXTS, "model": backend.describe()}
    kept = Journal(journal, header) if journal is not None else None
    plan = [(n, t, s) for n in settings.lengths for t in settings.tasks for s in range(settings.samples)]
    rows: dict[tuple[int, str, int], RulerRow] = {}
    for cell in plan:
        key = " ".join(map(str, cell))
        if kept is not None and kept.done(key):
            rows[cell] = RulerRow(**kept.rows[key]["row"])
    todo = [cell for cell in plan if cell not in rows]
    done = len(rows)
    drafts: list[Draft] = []

    def jobs() -> Iterator[tuple[Request]]:
        for length, task, sample in todo:
            rng = random.Random(f"ruler {settings.seed} {length} {task} {sample}")
            drafts.append(make_draft(task, rng, length, qa))
            yield (fit_draft(backend, drafts[-1], length),)

    for number, _, reply in answer_all(backend, jobs(), cancelled):
        length, task, sample = cell = todo[number]
        draft = drafts[number]
        failed, text = (str(reply), "") if isinstance(reply, Failure) else (None, reply.text)
        if not isinstance(reply, Failure):
            check_count(reply, length - draft.new_tokens)
        rows[cell] = RulerRow(
            task=task,
            length=length,
            sample=sample,
            references=list(draft.references),
            answer=text,
            score=None if failed else score_answer(text, draft),
            prompt_tokens=length - draft.new_tokens,
            failed=failed,
        )
        if kept is not None:
            kept.add(" ".join(map(str, cell)), {"row": asdict(rows[cell])} | ({"failed": failed} if failed else {}))
        done += 1
        if on_progress is not None:
            on_progress(done, len(plan))
    return RulerResult(settings.to_dict(), backend.describe(), [rows[cell] for cell in plan if cell in rows])
