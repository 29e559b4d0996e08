"""A run as a picture, where matplotlib is installed: its loss, and what was probed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longverse.train.probe import Figures
from longverse.train.trainer import read_log, read_probes


def plot_log(out: Path, after: dict[str, Figures]) -> Path | None:
    """Draw OUT/loss.png from OUT/log.jsonl: loss by tokens seen, a line for every stage; beside it the loss by position
    and the facts found, in rising order of time, where there were probes. after: figures after each stage. None without
    matplotlib or with fewer than two steps."""
    lines = read_log(out / "log.jsonl")
    if len(lines) < 2:
        return None
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    probes = _probes(out, after)
    panels = [_losses]
    if any(figures.loss for _, figures in probes):
        panels.append(_positions)
    if any(figures.found for _, figures in probes):
        panels.append(_found)
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4.5), constrained_layout=True, squeeze=False)
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis, lines, probes)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path = out / "loss.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _probes(out: Path, after: dict[str, Figures]) -> list[tuple[str, Figures]]:
    """What was measured, in the order of time, each with its name."""
    probes: list[tuple[str, Figures]] = []
    on_the_way = read_probes(out / "log.jsonl")
    for stage, figures in after.items():
        own = [line for line in on_the_way if line["stage"] == stage]
        probes += [(f"{stage}, step {line['step']}", Figures.from_dict(line["probe"])) for line in own]
        probes.append((f"after {stage}", figures))
    return probes


def _losses(axis: Any, lines: list[dict[str, Any]], probes: list[tuple[str, Figures]]) -> None:
    seen = 0
    for number in sorted({line["number"] for line in lines}):
        own = [line for line in lines if line["number"] == number]
        places, losses = [], []
        smooth = own[0]["loss"]
        for line in own:
            seen += line["tokens"]
            smooth = 0.9 * smooth + 0.1 * line["loss"]
            places.append(seen / 1e6)
            losses.append(smooth)
        (drawn,) = axis.plot(places, losses, label=own[0]["stage"])
        axis.scatter(places, [line["loss"] for line in own], s=4, alpha=0.3, color=drawn.get_color())
    axis.set_xlabel("million tokens read")
    axis.set_ylabel("loss (nats a label, running mean of ten steps)")
    axis.set_yscale("log")


def _positions(axis: Any, lines: list[dict[str, Any]], probes: list[tuple[str, Figures]]) -> None:
    known = [(name, figures.loss) for name, figures in probes if figures.loss]
    for n, (name, blocks) in enumerate(known):
        shade = 0.25 + 0.75 * (n + 1) / len(known)  # the later, the darker
        middle = [(begin + end) / 2 for begin, end, _ in blocks]
        axis.plot(middle, [nats for *_, nats in blocks], alpha=shade, color="tab:blue", label=name)
    axis.set_xlabel("position in the held-out text, tokens")
    axis.set_ylabel("loss, nats a token")


def _found(axis: Any, lines: list[dict[str, Any]], probes: list[tuple[str, Figures]]) -> None:
    known = [(name, figures.found) for name, figures in probes if figures.found]
    for language in dict.fromkeys(language for _, found in known for language in found):
        for length in dict.fromkeys(length for _, found in known for length in found.get(language, {})):
            shares = [found.get(language, {}).get(length) for _, found in known]
            heights = [float("nan") if share is None else 100 * share for share in shares]
            axis.plot(range(len(known)), heights, marker="o", label=f"{language}, {int(length):,} tokens")
    axis.set_xticks(range(len(known)), [name for name, _ in known], rotation=30, ha="right", fontsize=7)
    axis.set_ylabel("facts found, %")
    axis.set_ylim(-4, 104)
