"""The report of a build: items by family, language and length, depth of the evidence, and what each gate turned
down."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longverse.data.report import LENGTH_EDGES, length_label
from longverse.data.shards import replace_file
from longverse.data.sources import Skipped

if TYPE_CHECKING:
    from longverse.data.long_sft.plan import SftConfig


def sft_report(
    folder: Path,
    config: SftConfig,
    tokenizer: str,
    summaries: list[dict[str, Any]],
    rejected: Counter[str],
    given_up: list[int],
    skipped: dict[str, Skipped],
    seconds: float,
) -> dict[str, Any]:
    """Write report.json and report.md into `folder` (seconds: of this run); returns the JSON's content."""
    depths = np.histogram([d for s in summaries for d in s["depths"]], bins=10, range=(0, 1))[0]
    lengths = Counter(int(np.searchsorted(LENGTH_EDGES, s["tokens"], side="right")) - 1 for s in summaries)
    content: dict[str, Any] = {
        "tokenizer": tokenizer,
        "seed": config.seed,
        "teacher": config.teacher.model if config.teacher else "offline",
        "closed_book_check": "not made: no endpoint"
        if config.teacher is None
        else ("by the endpoint" if config.teacher.closed_book else "not made: closed_book is false"),
        "items": len(summaries),
        "wanted": config.items,
        "tokens": sum(s["tokens"] for s in summaries),
        "by_task": dict(sorted(Counter(s["task"] for s in summaries).items())),
        "by_kind": dict(sorted(Counter(f"{s['task']}: {s['kind']}" for s in summaries).items())),
        "by_language": dict(sorted(Counter(s["language"] for s in summaries).items())),
        "by_length": {length_label(i): n for i, n in sorted(lengths.items())},
        "recite_first": sum(s["recite"] for s in summaries),
        "evidence_by_depth": depths.tolist(),
        "rejected": dict(sorted(rejected.items())),
        "given_up": given_up,
        "seconds": round(seconds, 1),
        "skipped": {
            name: {"counts": dict(sorted(s.counts.items())), "examples": s.examples}
            for name, s in skipped.items()
            if s.counts
        },
    }
    replace_file(folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False).encode())
    replace_file(folder / "report.md", _markdown(content).encode())
    return content


def _markdown(content: dict[str, Any]) -> str:
    lines = [
        "# Instruction data report",
        "",
        f"{content['items']:,} of {content['wanted']:,} items, {content['tokens']:,} tokens under "
        f"`{content['tokenizer']}`; teacher: {content['teacher']}; closed-book check: {content['closed_book_check']}; "
        f"{content['recite_first']:,} recite first.",
    ]
    for title, key in (
        ("Family", "by_task"),
        ("Language", "by_language"),
        ("Length in tokens", "by_length"),
        ("Kind", "by_kind"),
    ):
        lines += ["", f"| {title} | items |", "|---|---|", *(f"| {k} | {v:,} |" for k, v in content[key].items())]
    lines += [
        "",
        "Evidence by depth (tenths of the document text): " + ", ".join(map(str, content["evidence_by_depth"])),
    ]
    lines += ["", "## Turned down by the gates", "", *(f"- {k}: {v:,}" for k, v in content["rejected"].items())]
    if content["given_up"]:
        lines.append(f"- {len(content['given_up'])} items given up after all attempts: {content['given_up'][:20]}")
    for name, skipped in content["skipped"].items():
        lines.append(f"- {name}, documents skipped: " + ", ".join(f"{v:,} {k}" for k, v in skipped["counts"].items()))
    return "\n".join([*lines, ""])
