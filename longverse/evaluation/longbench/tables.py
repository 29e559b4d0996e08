"""LongBench results for people and programs: Markdown, JSON, a picture, and the published table beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longverse.evaluation.files import write_json, write_text
from longverse.evaluation.longbench.score import BUCKETS, TaskScore, averages
from longverse.evaluation.longbench.tasks import CATEGORIES, CATEGORY

# The table of XVERSE-13B-256K's model card, in its words and columns.
PUBLISHED_COLUMNS = ("XVERSE-13B-256K", "GPT-3.5-Turbo-16K", "Yi-6B-200K", "LongChat-7B-16K", "Llama2-7B-Chat-4K")
PUBLISHED: dict[str, tuple[float, ...]] = {
    "hotpotqa": (58.3, 51.6, 48.3, 22.4, 24.3),
    "dureader": (28.9, 28.7, 14.2, 19.1, 1.9),
    "narrativeqa": (24.1, 23.6, 14.5, 21.6, 19.1),
    "qasper": (30.2, 43.3, 21.6, 21.6, 19.6),
    "vcsum": (11.3, 16.0, 8.2, 14.0, 0.2),
    "trec": (72.0, 68.0, 71.0, 61.5, 60.5),
    "lsht": (35.0, 29.2, 38.0, 20.8, 19.8),
    "passage_retrieval_en": (63.0, 71.0, 6.0, 24.0, 9.2),
    "passage_retrieval_zh": (44.0, 77.5, 7.9, 4.8, 0.5),
    "repobench-p": (55.6, 53.6, 61.5, 54.7, 42.4),
}
FOOTNOTE = (
    "The five columns are the figures published on XVERSE-13B-256K's model card. They mix two revisions of LongBench, "
    "between which RepoBench-P was sampled anew, so that row does not compare across columns."
)
METRIC_NAMES = {
    "qa_f1": "F1", "qa_f1_zh": "F1 (jieba)", "rouge": "Rouge-L", "rouge_zh": "Rouge-L (jieba)",
    "classification": "accuracy", "retrieval": "accuracy", "retrieval_zh": "accuracy", "count": "accuracy",
    "code_sim": "edit similarity (difflib)",
}  # fmt: skip


def to_dict(scores: Sequence[TaskScore], *, model: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The result file: kind, model, settings, scores, averages."""
    return {
        "kind": "longbench-e" if settings.get("e") else "longbench",
        "model": dict(model),
        "settings": dict(settings),
        "scores": {s.task: s.to_dict() for s in scores},
        "averages": asdict(averages(scores)) if scores else None,
        "published": {"columns": PUBLISHED_COLUMNS, "rows": PUBLISHED, "note": FOOTNOTE},
    }


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def markdown(scores: Sequence[TaskScore], *, model: str, settings: Mapping[str, Any]) -> str:
    """Tables a task, a category and the averages; the variants beside; LongBench-E's buckets; what is missing."""
    if not scores:
        return f"No task of {model} has a prediction yet.\n"
    e = bool(settings.get("e"))
    lines = [f"## {'LongBench-E' if e else 'LongBench'}: {model}", "", _protocol(settings), ""]
    by_task = {s.task: s for s in scores}
    if e:
        lines += [_row(["task", "metric", "rows", "score", *BUCKETS]), _row(["---"] * (4 + len(BUCKETS)))]
        for s in scores:
            buckets = [_number((s.buckets or {}).get(b)) for b in BUCKETS]
            lines.append(_row([s.task, METRIC_NAMES[s.metric], str(s.rows), _number(s.score), *buckets]))
    else:
        lines += [_row(["category", "task", "metric", "rows", model, *PUBLISHED_COLUMNS])]
        lines += [_row(["---"] * (5 + len(PUBLISHED_COLUMNS)))]
        for task, category in CATEGORY.items():
            if task not in by_task:
                continue
            s = by_task[task]
            rows = f"{s.rows} of {s.of}" if s.of and s.rows != s.of else str(s.rows)
            published = [_number(v, 1) for v in PUBLISHED.get(task, (None,) * len(PUBLISHED_COLUMNS))]
            lines.append(_row([category, task, METRIC_NAMES[s.metric], rows, f"**{_number(s.score)}**", *published]))
        lines += ["", *_averages(scores)]
    beside = [(s.task, name, value) for s in scores for name, value in s.beside.items()]
    if beside:
        lines += ["", "Beside the official figures, the same predictions with a quirk of the benchmark corrected:", ""]
        lines += [_row(["task", "variant", "official", "variant's"]), _row(["---"] * 4)]
        lines += [_row([task, name, _number(by_task[task].score), _number(value)]) for task, name, value in beside]
    trouble = [s for s in scores if s.failed or s.missing]
    if trouble:
        lines += ["", "Not scored:"]
        lines += [f"- {s.task}: {s.failed} rows failed, {s.missing} not yet run" for s in trouble]
    if not e:
        lines += ["", FOOTNOTE]
    return "\n".join(lines) + "\n"


def _protocol(settings: Mapping[str, Any]) -> str:
    parts = []
    truncation = settings.get("truncation")
    if truncation in ("middle", "context"):
        what = "from the middle of the prompt" if truncation == "middle" else "from the context only (corrected)"
        parts.append(f"cut {what} to {settings['max_length']:,} tokens")
    elif truncation == "off":
        parts.append("nothing cut")
    else:
        parts.append("predictions scored as they are")
    if settings.get("limit"):
        parts.append(f"the first {settings['limit']} rows of each task")
    if settings.get("cut_rows") is not None:
        parts.append(f"{settings['cut_rows']} rows were cut")
    text = "; ".join(parts)
    return f"Greedy answers; {text}." if truncation else f"{text[0].upper()}{text[1:]}."


def _averages(scores: Sequence[TaskScore]) -> list[str]:
    means = averages(scores)
    there = {s.task for s in scores}
    lines = [_row(["category", "tasks", "mean"]), _row(["---"] * 3)]
    for category, tasks in CATEGORIES.items():
        run = sum(t in there for t in tasks)
        if run:
            lines.append(_row([category, f"{run} of {len(tasks)}", _number(means.categories[category])]))
    lines.append(_row(["mean of the tasks", f"{len(scores)} of {len(CATEGORY)}", _number(means.tasks)]))
    if means.leaderboard is not None:
        name = "mean of the six categories (leaderboard)"
        lines.append(_row([name, f"{len(scores)} of {len(CATEGORY)}", _number(means.leaderboard)]))
    if not means.complete:
        lines += ["", "Not every task with all its rows is there, so these means do not compare with published ones."]
    return lines


def picture(scores: Sequence[TaskScore], path: Path, *, model: str) -> None:
    """Bars a task, with the published XVERSE-13B-256K and GPT-3.5-Turbo-16K where there is a figure."""
    from longverse.evaluation.plots import bars

    series: dict[str, list[float | None]] = {model: [s.score for s in scores]}
    for column in (0, 1):
        values = [PUBLISHED[s.task][column] if s.task in PUBLISHED else None for s in scores]
        if any(v is not None for v in values):
            series[f"{PUBLISHED_COLUMNS[column]} (published)"] = values
    rows, tasks = sum(s.rows for s in scores), len(scores)
    subtitle = f"{tasks} {'task' if tasks == 1 else 'tasks'}, {rows:,} rows, official metrics"
    bars([s.task for s in scores], series, path, title=f"LongBench: {model}", subtitle=subtitle, x="score")


def save(
    folder: Path, scores: Sequence[TaskScore], *, model: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[Path]:
    """Writes longbench.json, longbench.md and, where matplotlib is there, longbench.png; returns the paths."""
    name = str(model["model"])
    stem = "longbench-e" if settings.get("e") else "longbench"
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    write_json(paths[0], to_dict(scores, model=model, settings=settings))
    write_text(paths[1], markdown(scores, model=name, settings=settings))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return paths
    if scores:
        paths.append(folder / f"{stem}.png")
        picture(scores, paths[-1], model=name)
    return paths
