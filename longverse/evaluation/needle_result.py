"""What a needle test found: trials, grids, tables and the heatmap."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longverse.evaluation.files import write_json, write_text


@dataclass(frozen=True)
class Trial:
    """One fact asked about. score: 1 found, 0 not, None when no answer came (then `failed` says why)."""

    language: str
    length: int
    depth: float  # asked for
    repeat: int
    kind: str
    measured_depth: float  # share of the document's tokens before the fact (the first of two)
    question: str
    expected: str
    answer: str
    score: float | None
    prompt_tokens: int
    reused_tokens: int = 0
    seconds: float = 0.0
    failed: str | None = None


@dataclass
class NeedleResult:
    settings: dict[str, Any]
    model: dict[str, Any]
    trials: list[Trial]

    kind = "needle"

    def grid(self, language: str) -> list[list[float | None]]:
        """[depths][lengths] mean scores of a language; None where every trial failed or none was made."""
        rows = []
        for depth in self.settings["depths"]:
            row: list[float | None] = []
            for length in self.settings["lengths"]:
                scores = [
                    t.score
                    for t in self.trials
                    if (t.language, t.length, t.depth) == (language, length, depth) and t.score is not None
                ]
                row.append(sum(scores) / len(scores) if scores else None)
            rows.append(row)
        return rows

    @property
    def failures(self) -> int:
        return sum(t.failed is not None for t in self.trials)

    def found(self, language: str | None = None) -> float | None:
        """Share of the facts found, of those that were answered."""
        scores = [t.score for t in self.trials if t.score is not None and language in (None, t.language)]
        return sum(scores) / len(scores) if scores else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "needle",
            "model": self.model,
            "settings": self.settings,
            "found": self.found(),
            "failed": self.failures,
            "grids": {language: self.grid(language) for language in self.settings["languages"]},
            "trials": [asdict(t) for t in self.trials],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> NeedleResult:
        return cls(value["settings"], value["model"], [Trial(**t) for t in value["trials"]])

    def markdown(self) -> str:
        """One table a language: depths down, lengths across, per cent found."""
        from longverse.evaluation.plots import short_length

        lines = []
        for language in self.settings["languages"]:
            share = self.found(language)
            total = "nothing answered" if share is None else f"{100 * share:.0f} % found"
            lines += [f"**{self.model['model']}**, {_LANGUAGE[language]}, {_MODE[self.settings['mode']]}: {total}", ""]
            lines.append("| depth | " + " | ".join(short_length(n) for n in self.settings["lengths"]) + " |")
            lines.append("|---|" + "---|" * len(self.settings["lengths"]))
            for depth, row in zip(self.settings["depths"], self.grid(language), strict=True):
                cells = ["–" if v is None else f"{100 * v:.0f}" for v in row]
                lines.append(f"| {100 * depth:.0f} % | " + " | ".join(cells) + " |")
            lines.append("")
        if self.failures:
            lines += [f"{self.failures} of {len(self.trials)} trials got no answer and are not counted.", ""]
        return "\n".join(lines)

    def _heading(self, language: str) -> str:
        share = self.found(language)
        return _LANGUAGE[language] + ("" if share is None else f": {100 * share:.0f} % found")

    def panels(self) -> list[dict[str, Any]]:
        from longverse.evaluation.plots import short_length

        columns = [short_length(n) for n in self.settings["lengths"]]
        rows = [f"{100 * d:.0f} %" for d in self.settings["depths"]]
        languages = self.settings["languages"]
        return [
            {
                "title": self._heading(language) if len(languages) > 1 else "",
                "columns": columns,
                "rows": rows,
                "cells": self.grid(language),
            }
            for language in languages
        ]

    def picture(self, path: Path) -> None:
        """The heatmap: depth down, length across, one panel a language."""
        from longverse.evaluation.plots import heatmaps

        s = self.settings
        share = self.found()
        each = len({t.repeat for t in self.trials})
        heatmaps(
            self.panels(),
            path,
            title=f"{self.model['model']}: {_MODE[s['mode']]}"
            + ("" if share is None else f" · {100 * share:.0f} % found"),
            subtitle=f"{each} fact{'s' if each > 1 else ''} a cell · haystack: {s['haystack_name']} · "
            "greedy, exact prompt lengths",
        )

    def save(self, folder: Path) -> list[Path]:
        """Writes needle.json, needle.md and needle.png (where matplotlib is there); returns their paths."""
        write_json(folder / "needle.json", self.to_dict())
        write_text(folder / "needle.md", self.markdown())
        paths = [folder / "needle.json", folder / "needle.md"]
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return paths
        self.picture(folder / "needle.png")
        return [*paths, folder / "needle.png"]


_LANGUAGE = {"en": "English", "zh": "Chinese"}
_MODE = {
    "facts": "stated facts, asked one by one",
    "several": "several facts, one question",
    "hop": "facts of two steps",
    "paraphrase": "facts asked in other words",
}
