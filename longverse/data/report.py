"""The corpus report: tokens by source, language and length, what was dropped and why. JSON, Markdown and a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longverse.data.shards import replace_file
from longverse.data.sources import Skipped
from longverse.data.text import LANGUAGES

if TYPE_CHECKING:
    from longverse.data.corpus import CorpusConfig

LENGTH_EDGES = (0, 1 << 10, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 63)


def length_label(index: int) -> str:
    """`4K-8K` for the length class between two edges."""
    low, high = LENGTH_EDGES[index], LENGTH_EDGES[index + 1]
    if high == 1 << 63:
        return f"{low >> 10}K and more"
    return f"{low >> 10}K-{high >> 10}K"


def corpus_report(
    folder: Path,
    config: CorpusConfig,
    tokenizer: str,
    documents: np.ndarray,
    counts: dict[str, int],
    skipped: dict[str, Skipped],
) -> dict[str, Any]:
    """Write report.json, report.md and (with matplotlib) report.png into `folder`; returns the JSON's content."""
    lengths = documents["length"].astype(np.int64)
    mixed = lengths * documents["copies"] + documents["extra"].astype(np.int64)
    classes = np.searchsorted(LENGTH_EDGES, lengths, side="right") - 1
    names = [source.name for source in config.sources]

    def table(labels: Sequence[str], keys: np.ndarray) -> dict[str, dict[str, int]]:
        return {
            label: {
                "documents": int((keys == i).sum()),
                "tokens": int(lengths[keys == i].sum()),
                "mixture_tokens": int(mixed[keys == i].sum()),
            }
            for i, label in enumerate(labels)
            if (keys == i).any()
        }

    per_source: dict[str, dict[str, int]] = {name: {} for name in names}
    for key, value in counts.items():
        name, _, reason = key.partition("\t")
        if reason:
            per_source[name][reason] = value
    content: dict[str, Any] = {
        "tokenizer": tokenizer,
        "seed": config.seed,
        "fraction": config.fraction,
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "mixture_tokens": int(mixed.sum()),
        "by_source": table(names, documents["source"]),
        "by_language": table(LANGUAGES, documents["language"]),
        "by_length": table([length_label(i) for i in range(len(LENGTH_EDGES) - 1)], classes),
        "by_source_and_length": {
            name: table(
                [length_label(i) for i in range(len(LENGTH_EDGES) - 1)],
                np.where(documents["source"] == s, classes, -1),
            )
            for s, name in enumerate(names)
        },
        "documents_read": per_source,
        "skipped": {
            name: {"counts": dict(sorted(s.counts.items())), "examples": s.examples}
            for name, s in skipped.items()
            if s.counts
        },
        "near_duplicate_index_forgot": counts.get("forgotten", 0),
    }
    drawn = importlib.util.find_spec("matplotlib") is not None
    content["plot"] = "report.png" if drawn else "not drawn: matplotlib is not installed (pip install longverse[plots])"
    replace_file(folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False).encode())
    replace_file(folder / "report.md", _markdown(content).encode())
    if drawn:
        _plot(content, folder / "report.png")
    return content


def _markdown(content: dict[str, Any]) -> str:
    lines = [
        "# Corpus report",
        "",
        f"{content['documents']:,} documents, {content['tokens']:,} tokens under `{content['tokenizer']}`; "
        f"the mixture shows {content['mixture_tokens']:,} tokens an epoch "
        f"(fraction {content['fraction']:g}, seed {content['seed']}).",
    ]
    total, mixed = max(content["tokens"], 1), max(content["mixture_tokens"], 1)
    for title, key in (("Source", "by_source"), ("Language", "by_language"), ("Length in tokens", "by_length")):
        lines += ["", f"| {title} | documents | tokens | share | mixture tokens | share |", "|---|---|---|---|---|---|"]
        for label, row in content[key].items():
            lines.append(
                f"| {label} | {row['documents']:,} | {row['tokens']:,} | {row['tokens'] / total:.1%} | "
                f"{row['mixture_tokens']:,} | {row['mixture_tokens'] / mixed:.1%} |"
            )
    lines += ["", "## What happened to the documents", ""]
    for name, reasons in content["documents_read"].items():
        lines.append(f"- {name}: " + ", ".join(f"{value:,} {reason}" for reason, value in sorted(reasons.items())))
    for name, skipped in content["skipped"].items():
        reasons = ", ".join(f"{value:,} {reason}" for reason, value in skipped["counts"].items())
        lines += [f"- {name}, skipped: {reasons}", *(f"  - {example}" for example in skipped["examples"])]
    if content["near_duplicate_index_forgot"]:
        lines.append(
            f"- {content['near_duplicate_index_forgot']:,} documents left the near-duplicate index (dedup_memory_mb); "
            f"near-duplicates that far apart were not found."
        )
    lines += ["", f"Plot: {content['plot']}", ""]
    return "\n".join(lines)


def _plot(content: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    sources = list(content["by_source"])
    places = np.arange(len(sources))
    for offset, key, label in ((-0.2, "tokens", "stored"), (0.2, "mixture_tokens", "in the mixture")):
        left.bar(places + offset, [content["by_source"][s][key] / 1e6 for s in sources], 0.38, label=label)
    left.set_xticks(places, sources, rotation=20 if len(sources) > 3 else 0)
    left.set_ylabel("million tokens")
    left.set_title("By source")
    left.legend()
    labels = list(content["by_length"])
    bottom = np.zeros(len(labels))
    for source in sources:
        rows = content["by_source_and_length"][source]
        height = np.array([rows.get(label, {}).get("mixture_tokens", 0) / 1e6 for label in labels])
        right.bar(labels, height, bottom=bottom, label=source)
        bottom += height
    right.tick_params(axis="x", rotation=40)
    right.set_title("Mixture by document length (tokens)")
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
