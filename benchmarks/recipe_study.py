"""The model card's claims on a small model: what does each step of the recipe bring, at 1 to 128 times the base window?

    longverse extend build/tiny/base --recipe recipes/tiny_cpu.yaml --out runs/tiny     (first, about two hours)
    python benchmarks/recipe_study.py runs/tiny --factors 1 2 4 8

Variants, all from the stages that the run kept:

    base                 as pre-trained, window 2K, base 10,000
    abf, ntk, linear, yarn   the base with the RoPE plan alone changed, nothing trained
    abf+cpt              ABF and continued pre-training
    abf+cpt+ntk          that with dynamic NTK, nothing trained since
    abf+cpt+ntk+sft      the whole recipe
    stock                the whole recipe read in chunks with the base recomputed from what has been read so far, as
                         transformers' dynamic RoPE does it

For each: loss by length of the context on held-out text (the same 256 last tokens, so that lengths compare), the
share of invented facts found (four depths, two languages), and the loss on short texts. Writes
benchmarks/results/recipe_study.json and, with matplotlib, recipe_study.png. `--quick` takes few texts and facts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, table, write_results

from longverse.evaluation.backends import EngineBackend
from longverse.evaluation.needle import NeedleSettings, run_needle
from longverse.inference.engine import CHUNK, Engine
from longverse.train.new import read_texts

SCORED = 256  # tokens whose loss is compared at every length


def variants(run: Path, window: int, factor: int) -> Iterator[tuple[str, Engine, bool]]:
    """Name, engine, and whether the base is recomputed on the way."""
    stages = {path.name.split("-", 1)[1]: path / "model" for path in sorted((run / "stages").iterdir())}
    order = list(stages)
    base, cpt, sft = str(stages[order[-3]]), str(stages[order[-2]]), str(stages[order[-1]])
    far = 1 << 24  # the window is what is studied, so none is enforced

    def engine(model: str, rope: str | None = None) -> Engine:
        return Engine.load(model, dtype="float32", rope=rope, window=far)

    yield "base", engine(base), False
    yield "abf", engine(base, "abf:500000"), False
    if factor > 1:
        yield "ntk", engine(base, f"ntk:{factor}"), False
        yield "linear", engine(base, f"linear:{factor}"), False
        yield "yarn", engine(base, f"yarn:{factor}:{window}"), False
    yield "abf+cpt", engine(cpt), False
    yield "abf+cpt+ntk", engine(cpt, "dynamic:2:8192"), False
    yield "abf+cpt+ntk+sft", engine(sft), False
    yield "stock", engine(sft), True


@torch.inference_mode()
def last_loss(engine: Engine, ids: list[int], stock: bool) -> float:
    """Mean loss in nats of the last SCORED tokens of ids, given all before them."""
    network, session = engine.network, engine.session(len(ids))
    cache, losses = session.cache, []
    for begin in range(0, len(ids) - 1, CHUNK):
        part = torch.tensor([ids[begin : min(begin + CHUNK, len(ids) - 1)]])
        end = begin + part.shape[1]
        planned: Any = end if stock else cache.rope_length
        logits = network(part, torch.arange(begin, end)[None], planned, cache.attend)[0]
        cache.advance(end - begin)
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(ids[begin + 1 : end + 1]), reduction="none")
        )
    return float(torch.cat(losses)[-SCORED:].mean())


def held_out(path: Path, characters: int) -> str:
    """The end of a text file, which few training steps see."""
    return "\n".join(read_texts(path))[-characters:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--window", type=int, default=2048, help="the base window in tokens")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--texts", type=Path, default=Path("../shared/corpora/en_novels.jsonl.gz"))
    parser.add_argument("--repeats", type=int, default=4, help="texts, and facts at each depth")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    repeats = 1 if asked.quick else asked.repeats
    text = held_out(asked.texts, 8 * asked.window * max(asked.factors) + 400_000)
    rows: list[dict[str, Any]] = []
    for factor in sorted(asked.factors):
        length = factor * asked.window
        for name, engine, stock in variants(asked.run, asked.window, factor):
            ids = engine.tokenizer.encode(text)
            stretches = [ids[n * length // 2 :][:length] for n in range(repeats)]
            row: dict[str, Any] = {"variant": name, "factor": factor, "length": length}
            row["loss"] = sum(last_loss(engine, part, stock) for part in stretches) / repeats
            row["short_loss"] = sum(last_loss(engine, part[: SCORED * 2], stock) for part in stretches) / repeats
            if not stock:
                settings = NeedleSettings((length,), (0.1, 0.4, 0.6, 0.9), ("en", "zh"), repeats=repeats)
                found = run_needle(EngineBackend(engine), settings)
                row |= {"found_en": found.found("en"), "found_zh": found.found("zh"), "facts": len(found.trials)}
            rows.append(row)
            print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    print(
        write_results("recipe_study", {"run": asked.run.name, "window": asked.window, "repeats": repeats, "rows": rows})
    )
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for key in ("loss", "found_en", "found_zh", "short_loss"):
        cells = []
        for name in names:
            mine = {row["factor"]: row.get(key) for row in rows if row["variant"] == name}
            cells.append([name, *(f"{mine[f]:.3f}" if mine.get(f) is not None else "" for f in sorted(asked.factors))])
        print(f"\n{key}\n" + table(["variant", *(f"{f}x" for f in sorted(asked.factors))], cells))
    picture(rows, names)


def picture(rows: list[dict[str, Any]], names: list[str]) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        axes[0].plot([row["length"] for row in own], [row["loss"] for row in own], marker="o", label=name)
        own = [row for row in own if row.get("found_en") is not None]
        axes[1].plot([row["length"] for row in own], [row["found_en"] for row in own], marker="o", label=name)
    for panel, title in zip(axes, ("loss of the last tokens, nats", "facts found, English"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens read")
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / "recipe_study.png", dpi=110)


if __name__ == "__main__":
    main()
