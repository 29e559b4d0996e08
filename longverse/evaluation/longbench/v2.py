"""LongBench v2: 503 multiple-choice items over long texts, answered directly or after reasoning.

Source: Bai et al. 2024 (arXiv:2412.15204) and the benchmark's repository. Items and prompts are read from the
user's copy (data.json or .jsonl; prompts/0shot.txt, 0shot_cot.txt, 0shot_cot_ans.txt). Two differences of protocol: the
official script draws at temperature 0.1, here answers are greedy; and it drops an item whose answer is empty from file
and mean, here an empty answer names no letter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation.backends import Backend, Failure, Request, answer_all, template_tokens
from longverse.evaluation.files import Journal, read_json, read_rows, write_json, write_text

_FIELDS = (
    "_id",
    "difficulty",
    "length",
    "question",
    "choice_A",
    "choice_B",
    "choice_C",
    "choice_D",
    "answer",
    "context",
)
_PLACES = {
    "$DOC$": "context", "$Q$": "question", "$C_A$": "choice_A", "$C_B$": "choice_B", "$C_C$": "choice_C",
    "$C_D$": "choice_D",
}  # fmt: skip
DIRECT_TOKENS, REASONING_TOKENS = 128, 1024
GROUPS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}


def items_file(path: Path) -> Path:
    """The file of items in a folder, or the file itself."""
    if not path.is_dir():
        return path
    there = [p for p in (path / "data.json", path / "data.jsonl") if p.is_file()]
    if not there:
        raise UserError(f"{path} holds neither data.json nor data.jsonl: give LongBench v2's own file with --data.")
    return there[0]


def read_items(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Items of data.json (a list) or of a JSON-lines file, the first `limit`; UserError for what is missing, naming the
    item."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no item: give 1 or more.")
    path = items_file(path)
    items = [row for _, row in read_rows(path)] if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(items, list) or not items:
        raise UserError(f"{path} is not a list of items: give LongBench v2's own file.")
    seen: set[str] = set()
    for number, item in enumerate(items, 1):
        for name in _FIELDS:
            if not isinstance(item, dict) or not isinstance(item.get(name), str):
                raise UserError(f"{path}, item {number}: the field {name!r} is missing or no text; get the file anew.")
        if item["answer"] not in ("A", "B", "C", "D"):
            raise UserError(f"{path}, item {number}: the answer {item['answer']!r} is none of A, B, C, D.")
        if item["_id"] in seen:
            raise UserError(f"{path}, item {number}: the id {item['_id']!r} occurs twice; remove one of the two.")
        seen.add(item["_id"])
    return items if limit is None else items[:limit]


def read_prompts(folder: Path, *, reasoning: bool) -> dict[str, str]:
    """The benchmark's prompt files by name: 0shot, or 0shot_cot and 0shot_cot_ans."""
    prompts = {}
    for name in ("0shot_cot", "0shot_cot_ans") if reasoning else ("0shot",):
        path = folder / f"{name}.txt"
        try:
            prompts[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path} cannot be read: give the benchmark's prompts folder with --config.") from None
        # The second prompt of the reasoning variant leaves the text out: it shows the thoughts instead.
        for place in ("$Q$", "$COT$" if name == "0shot_cot_ans" else "$DOC$"):
            if place not in prompts[name]:
                raise UserError(f"{path} has no {place}: use the benchmark's own file.")
    return prompts


def extract_answer(response: str) -> str | None:
    """The letter after "The correct answer is", with or without parentheses, stars dropped; None if there is none."""
    response = response.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        found = re.search(pattern, response)
        if found:
            return found[1]
    return None


def cut(backend: Backend, prompt: str, max_length: int) -> str:
    """The official cut: the first max_length // 2 ids and the last, decoded together."""
    ids = backend.encode(prompt)
    if len(ids) <= max_length:
        return prompt
    return backend.decode([*ids[: max_length // 2], *ids[-max_length // 2 :]])


def _fill(template: str, item: dict[str, Any], thoughts: str = "") -> str:
    for place, name in _PLACES.items():
        template = template.replace(place, item[name].strip())
    return template.replace("$COT$", thoughts)


@dataclass
class V2Result:
    """rows: item id, difficulty, length, answer, pred (None: no letter found), response; failed: id and reason."""

    model: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    failed: dict[str, str]

    def scores(self, unanswered: float = 0.0) -> dict[str, float | None]:
        """Accuracy in per cent, overall and a group; an item without a letter counts as `unanswered` (0.25: chance)."""

        def accuracy(rows: Sequence[dict[str, Any]]) -> float | None:
            if not rows:
                return None
            points = [unanswered if r["pred"] is None else float(r["pred"] == r["answer"]) for r in rows]
            return round(100 * sum(points) / len(points), 1)

        table = {"overall": accuracy(self.rows)}
        for field, values in GROUPS.items():
            for value in values:
                table[value] = accuracy([r for r in self.rows if r[field] == value])
        return table

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "longbench-v2",
            "model": self.model,
            "settings": self.settings,
            "scores": self.scores(),
            "scores with a quarter for no answer": self.scores(0.25),
            "items": len(self.rows),
            "unanswered": sum(r["pred"] is None for r in self.rows),
            "failed": self.failed,
        }

    def markdown(self) -> str:
        way = "with reasoning" if self.settings["reasoning"] else "direct"
        table, chance = self.scores(), self.scores(0.25)
        lines = [f"## LongBench v2, {way}: {self.model['model']}", ""]
        lines += ["| items | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
        for name, row in (("official", table), ("a quarter where no letter was given", chance)):
            cells = ["–" if v is None else f"{v:.1f}" for v in row.values()]
            lines.append(f"| {len(self.rows)}, {name} | " + " | ".join(cells) + " |")
        lines += [
            "",
            f"{sum(r['pred'] is None for r in self.rows)} answers named no letter; {len(self.failed)} items failed.",
        ]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> list[Path]:
        stem = "longbench-v2-cot" if self.settings["reasoning"] else "longbench-v2"
        write_json(folder / f"{stem}.json", self.to_dict())
        write_text(folder / f"{stem}.md", self.markdown())
        return [folder / f"{stem}.json", folder / f"{stem}.md"]


def run_v2(
    backend: Backend,
    items: Sequence[dict[str, Any]],
    prompts: dict[str, str],
    out: Path,
    *,
    max_length: int,
    reasoning: bool = False,
    data: str = "",
    on_progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> V2Result:
    """Answers every item once; `out/journal/longbench-v2*.jsonl` keeps finished ones for a later run over the same
    `data`, a digest of the items' file."""
    if max_length < 2:
        raise UserError(f"--max-length {max_length} leaves nothing of a prompt: give 2 or more.")
    first_tokens = REASONING_TOKENS if reasoning else DIRECT_TOKENS
    if backend.window is not None:
        most = backend.window - first_tokens - template_tokens(backend)
        if max_length > most:
            raise UserError(
                f"--max-length {max_length:,} with {first_tokens:,} new tokens exceeds the window of {backend.name}, "
                f"{backend.window:,} tokens: use --max-length {most:,} or less."
            )
    settings = {
        "reasoning": reasoning,
        "max_length": max_length,
        "prompts": hashlib.sha256(repr(sorted(prompts.items())).encode()).hexdigest()[:16],
        "data": data,
    }
    header = {**settings, "model": backend.describe()}
    answers = Journal(out / "journal" / ("longbench-v2-cot.jsonl" if reasoning else "longbench-v2.jsonl"), header)
    stages = [("0shot", DIRECT_TOKENS, answers)]
    thoughts = answers
    if reasoning:
        thoughts = Journal(out / "journal" / "longbench-v2-thoughts.jsonl", header)
        stages = [("0shot_cot", REASONING_TOKENS, thoughts), ("0shot_cot_ans", DIRECT_TOKENS, answers)]
    done = sum(kept.done(item["_id"]) for item in items for _, _, kept in stages)
    for name, tokens, kept in stages:
        todo = [item for item in items if not kept.done(item["_id"])]
        if name == "0shot_cot_ans":
            todo = [item for item in todo if thoughts.done(item["_id"])]
        jobs = _jobs(backend, prompts[name], todo, thoughts, max_length, tokens)
        for number, _, reply in answer_all(backend, jobs, cancelled):
            outcome = {"failed": str(reply)} if isinstance(reply, Failure) else {"text": reply.text.strip()}
            kept.add(todo[number]["_id"], outcome)
            done += 1
            if on_progress is not None:
                on_progress(done, len(items) * len(stages))
    rows, failed = [], {}
    for item in items:
        name = item["_id"]
        if answers.done(name):
            text = answers.rows[name]["text"]
            row: dict[str, Any] = {field: item[field] for field in ("_id", "difficulty", "length", "answer")}
            row |= {"pred": extract_answer(text), "response": text}
            rows.append(row | ({"response_cot": thoughts.rows[name]["text"]} if reasoning else {}))
        elif reason := (thoughts.rows.get(name, {}).get("failed") or answers.rows.get(name, {}).get("failed")):
            failed[name] = reason
    return V2Result(backend.describe(), settings, rows, failed)


def _jobs(
    backend: Backend, template: str, items: Sequence[dict[str, Any]], thoughts: Journal, max_length: int, tokens: int
) -> Iterator[tuple[Request]]:
    for item in items:
        prompt = _fill(template, item, thoughts.rows.get(item["_id"], {}).get("text", ""))
        yield (Request.user(cut(backend, prompt, max_length), max_new_tokens=tokens),)
