"""The loss curve of a run as a picture, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from longverse.train.trainer import read_log


def plot_log(out: Path) -> Path | None:
    """Draw OUT/loss.png from OUT/log.jsonl: loss by tokens seen, a line for every stage. None without matplotlib or
    with fewer than two steps."""
    lines = read_log(out / "log.jsonl") if (out / "log.jsonl").exists() else []
    if len(lines) < 2:
        return None
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
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
        (drawn,) = axes.plot(places, losses, label=own[0]["stage"])
        axes.scatter(places, [line["loss"] for line in own], s=4, alpha=0.3, color=drawn.get_color())
    axes.set_xlabel("million tokens read")
    axes.set_ylabel("loss (nats a label, running mean of ten steps)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    path = out / "loss.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
