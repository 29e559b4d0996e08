"""Pictures of results: heatmaps, curves and bars, drawn with matplotlib (an extra), without a display.

Every function takes plain numbers and a path; the suffix of the path chooses the format (.png, .svg, .pdf).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation.files import write_atomically

# From failing to finding: brick, sand, teal. Distinct for the colour-blind, and readable in grey.
_SCALE = ("#8c2d19", "#cf6a3f", "#edc58d", "#f4efd9", "#b5d6cd", "#5aa69b", "#1c6b66")
_INK, _FAINT = "#22282c", "#8a9298"
_LINES = ("#1c6b66", "#cf6a3f", "#4a5d9e", "#b08b2e", "#7d4a86", "#5b6b73", "#a3363b", "#3f8f4f")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Pictures need matplotlib; install it with: pip install 'longverse[plots]'") from None
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure


def _save(figure: Any, path: Path) -> None:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path.name} is no picture; name it .png, .svg or .pdf.")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160))


def short_length(tokens: int) -> str:
    """8000 to "8K", 1500 to "1.5K"; what is no round number in full: 4096 to "4,096"."""
    if tokens >= 1000 and tokens % 1000 == 0:
        return f"{tokens // 1000:,}K"
    return f"{tokens / 1000:.1f}K" if tokens >= 1000 and tokens % 100 == 0 else f"{tokens:,}"


def heatmaps(
    panels: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    colour_label: str = "facts found",
) -> None:
    """One heatmap a panel, side by side on one scale of 0 to 100 %.

    panels: each with `title`, `columns` (labels), `rows` (labels) and `cells` [rows][columns] of shares 0..1,
    None where nothing was measured; optional `x` and `y`, the axis labels, and `sum`, true where the last row sums up
    the others. Widths follow the numbers of columns.
    """
    from matplotlib.colors import LinearSegmentedColormap

    columns = [len(p["columns"]) for p in panels]
    rows = max(len(p["rows"]) for p in panels)
    width = 2.6 + sum(0.78 * c for c in columns) + 0.75 * len(panels)
    figure, _ = _figure(max(7.2, width), 2.5 + 0.56 * rows)
    scale = LinearSegmentedColormap.from_list("found", _SCALE).with_extremes(bad="#eceff0")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=columns)[0]
    image = None
    for axis, panel in zip(axes, panels, strict=True):
        cells = [[float("nan") if v is None else v for v in row] for row in panel["cells"]]
        image = axis.imshow(cells, cmap=scale, vmin=0, vmax=1, aspect="auto")
        for r, row in enumerate(panel["cells"]):
            for c, value in enumerate(row):
                if value is not None:
                    dark = value < 0.2 or value > 0.82
                    axis.text(c, r, f"{100 * value:.0f}", ha="center", va="center", fontsize=10.5,
                              color="white" if dark else _INK)  # fmt: skip
        axis.set_xticks(range(len(panel["columns"])), panel["columns"], color=_INK, fontsize=10)
        axis.set_yticks(range(len(panel["rows"])), panel["rows"], color=_INK, fontsize=10)
        axis.set_xticks([c - 0.5 for c in range(1, len(panel["columns"]))], minor=True)
        axis.set_yticks([r - 0.5 for r in range(1, len(panel["rows"]))], minor=True)
        axis.grid(which="minor", color="white", linewidth=2)
        if panel.get("sum"):
            axis.axhline(len(panel["rows"]) - 1.5, color="white", linewidth=7)
        axis.tick_params(which="both", length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel(panel.get("x", "length of the prompt in tokens"), color=_INK, fontsize=10.5, labelpad=7)
        if axis is axes[0] or panel.get("y"):
            axis.set_ylabel(panel.get("y", "depth of the fact"), color=_INK, fontsize=10.5, labelpad=7)
        if panel.get("title"):
            axis.set_title(panel["title"], color=_INK, fontsize=11, loc="left", pad=8)
    bar = figure.colorbar(image, ax=list(axes), ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.015, fraction=0.05,
                          aspect=max(22, 4 * rows))  # fmt: skip
    bar.ax.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"], color=_INK, fontsize=9.5)
    bar.set_label(colour_label, color=_INK, fontsize=10.5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    _head(figure, title, subtitle)
    _save(figure, path)


def _head(figure: Any, title: str, subtitle: str) -> None:
    text = figure.suptitle(title + (f"\n{subtitle}" if subtitle else ""), x=0.012, ha="left", fontsize=12.5, color=_INK)
    text.set_linespacing(1.45)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str, subtitle: str = "",
    x: str, y: str, log_x: bool = False, marks: Mapping[str, float] | None = None, percent: bool = False,
) -> None:  # fmt: skip
    """One line a name over (x, y) points; `marks`: labelled vertical lines; percent: the y axis is 0 to 100."""
    figure, _ = _figure(8.4, 4.6)
    axis = figure.subplots()
    few = all(len(points) <= 24 for points in lines.values())
    for colour, (name, points) in zip(_cycle(len(lines)), lines.items(), strict=True):
        axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, linewidth=1.9, label=name,
                  marker="o" if few else None, markersize=4.5)  # fmt: skip
    if log_x:
        axis.set_xscale("log", base=2)
        ticks = sorted({p[0] for points in lines.values() for p in points}) if few else None
        if ticks:
            axis.set_xticks(ticks, [f"{int(t):,}" for t in ticks])
            axis.minorticks_off()
    low, high = axis.get_xlim()
    for place, (at, name) in enumerate(sorted(_joined(marks or {}).items())):
        axis.axvline(at, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
        # Labels of marks that stand close together keep clear of each other and of the edge.
        share = (math.log(at / low) / math.log(high / low)) if log_x else (at - low) / (high - low)
        side, away = ("left", 4) if share < 0.75 else ("right", -4)
        axis.annotate(name, (at, 1), xycoords=("data", "axes fraction"), xytext=(away, -11 - 13 * place), ha=side,
                      fontsize=9, textcoords="offset points", color=_FAINT)  # fmt: skip
    if not log_x:
        axis.xaxis.set_major_formatter("{x:,.0f}")
    if percent:
        axis.set_ylim(-2, 102)
    axis.set_xlabel(x, color=_INK, fontsize=10.5)
    axis.set_ylabel(y, color=_INK, fontsize=10.5)
    axis.grid(axis="y", color="#e3e7e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.tick_params(colors=_INK, labelsize=9.5)
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=9.5, labelcolor=_INK)
    _head(figure, title, subtitle)
    _save(figure, path)


def bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float | None]], path: Path, *, title: str, subtitle: str = "",
    x: str,
) -> None:  # fmt: skip
    """Grouped horizontal bars from 0 to 100: one group a name, one colour a series; None leaves its place empty."""
    figure, _ = _figure(8.4, 1.9 + (0.26 if len(groups) < 8 else 0.17) * len(groups) * (len(series) + 0.6))
    axis = figure.subplots()
    width = 0.8 / len(series)
    for number, (colour, (name, values)) in enumerate(zip(_cycle(len(series)), series.items(), strict=True)):
        at = [g - 0.4 + width * (number + 0.5) for g in range(len(groups))]
        axis.barh(at, [v or 0 for v in values], width * 0.86, color=colour, label=name)
        for position, value in zip(at, values, strict=True):
            if value is not None:
                axis.text(value + 0.8, position, f"{value:.1f}", va="center", fontsize=8.5, color=_INK)
    axis.set_yticks(range(len(groups)), groups, color=_INK, fontsize=10)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xlabel(x, color=_INK, fontsize=10.5)
    axis.grid(axis="x", color="#e3e7e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.spines["left"].set_color(_FAINT)
    axis.tick_params(colors=_INK, length=0)
    if len(series) > 1:
        figure.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="outside lower center", ncols=3)
    _head(figure, title, subtitle)
    _save(figure, path)


def _joined(marks: Mapping[str, float]) -> dict[float, str]:
    """Places with their names; names that mark the same place become one."""
    places: dict[float, str] = {}
    for name, at in marks.items():
        places[at] = f"{places[at]}, {name}" if at in places else name
    return places


def _cycle(count: int) -> list[str]:
    return [_LINES[i % len(_LINES)] for i in range(count)]
