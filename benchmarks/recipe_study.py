"""The model card's claims on a small model: what does each step of the recipe bring, at many times the base window?

    longverse extend build/tiny/base --recipe recipes/tiny_cpu.yaml --out runs/tiny          (first)
    python benchmarks/recipe_study.py runs/tiny --window 2048 --factors 1 2 4 8 16 64

Variants, all from the stages that the run kept (--base, --cpt, --sft name them; the last three when left out, and for
a run of adapters the model it began with, the first and the last stage):

    base                 as pre-trained
    abf, ntk, linear, yarn   the base with the RoPE plan alone changed, nothing trained
    abf+cpt              ABF and continued pre-training
    abf+cpt+ntk          that with dynamic NTK, nothing trained since
    abf+cpt+ntk+sft      the whole recipe
    stock                the whole recipe, the base recomputed at every forward from what has been read so far, as
                         transformers' dynamic RoPE does it

For each: the loss of the same last 256 tokens with more and more text before them; the loss by position in the longest
text of at most 8 times the window; the share of invented facts found (four depths, two languages; for a run that was
trained on facts made on the way, new ones of that kind, one a document); the loss of short texts. A variant and length
that is done is kept in RUN/study.jsonl, so a run that was stopped goes on.

From AT_ONCE times the window on, a run with facts of its own is asked in another way, which takes a sixth of the time:
every document goes through the training's attention in one piece, in bfloat16, and a fact is found when every token of
its answer is the likeliest; all facts of a document count. `stock`, which means something only token by token, is left
out there, and so are at more than FEW times the window all but FAR_VARIANTS.

Writes benchmarks/results/recipe_study.json (--name gives another name) with the claims judged, and with matplotlib the
pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, table, write_results

from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.needle import NeedleSettings, run_needle
from longverse.evaluation.perplexity import loss_by_length, loss_by_position
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from longverse.models.adapters import is_adapter, merge_adapter
from longverse.models.checkpoint import build, open_model
from longverse.models.network import NetworkConfig
from longverse.models.rope import RopePlan, Rotary
from longverse.train.examples import Example
from longverse.train.made import Made
from longverse.train.new import read_texts
from longverse.train.rows import Row, document_attention, make_row

FACTS_SEED = 7_000_003
SCORED = 256  # tokens whose loss is compared at every length
DEPTHS = (0.1, 0.4, 0.6, 0.9)
AT_ONCE = 16  # multiples of the base window from which documents are read in one piece
FACTS = 16  # of such a document at most
FEW = 16  # multiples past which only FAR_VARIANTS are measured
FAR_VARIANTS = ("base", "yarn", "abf+cpt+sft", "abf+cpt+ntk+sft")
CURVE = 8  # multiples of the base window: the longest text whose loss is shown by position
SPELT = 4  # more tokens than the answer's own, in which a model may spell the same words
FAR = 1 << 24  # the window is what is studied, so none is enforced


class StockRotary(Rotary):
    """The base from what the forward has reached, whatever was planned: what transformers does."""

    def forward(self, positions: torch.Tensor, rope_length: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(positions, int(positions.max()) + 1)


@dataclass(frozen=True)
class Places:
    """Where the three stages are: a checkpoint folder or a name, and for a run of adapters the one to merge."""

    base: tuple[str, Path | None]
    cpt: tuple[str, Path | None]
    sft: tuple[str, Path | None]

    @classmethod
    def find(cls, run: Path, names: tuple[str | None, str | None, str | None]) -> Places:
        stages = {path.name.split("-", 1)[1]: path for path in sorted((run / "stages").iterdir())}
        order = list(stages)
        model = json.loads((run / "run.json").read_text())["recipe"]["model"]
        adapters = is_adapter(stages[order[-1]] / "adapter")
        chosen = [order[0], order[-1]] if adapters else [order[-2], order[-1]]
        base, cpt, sft = names[0], names[1] or chosen[0], names[2] or chosen[1]
        if adapters:
            return cls((base or model, None), (model, stages[cpt] / "adapter"), (model, stages[sft] / "adapter"))
        base = str(stages[base or order[-3]] / "model")
        return cls((base, None), (str(stages[cpt] / "model"), None), (str(stages[sft] / "model"), None))


def engine(place: tuple[str, Path | None], rope: str | None = None, stock: bool = False) -> Engine:
    """The plain model, without what its name may bring along, in float32."""
    name, adapter = place
    opened = open_model(name)
    shape = NetworkConfig.from_dict(opened.config)
    network = build(shape, opened.tensors, torch.float32, torch.device("cpu"), opened.form)
    if adapter is not None:
        merge_adapter(network, adapter)
    if rope is not None:
        plan = RopePlan.parse(rope, network.config.rope, network.config.window)
        network.config = replace(network.config, rope=plan)
        network.model.rotary.plan = plan
    if stock:
        network.model.rotary = StockRotary(network.config.rope)
    return Engine(network, opened.tokenizer, opened.chat(), opened.name, opened.config, window=FAR)


def variants(places: Places, window: int, factor: int, asked: argparse.Namespace) -> Iterator[tuple[str, Engine]]:
    """What is studied at `factor` times the base window."""
    yield "base", engine(places.base)
    yield "abf", engine(places.base, f"abf:{asked.theta:g}")
    if factor > 1:
        yield "ntk", engine(places.base, f"ntk:{factor}")
        yield "linear", engine(places.base, f"linear:{factor}")
        yield "yarn", engine(places.base, f"yarn:{factor}:{window}")
    yield "abf+cpt", engine(places.cpt)
    final = engine(places.sft)
    dynamic = final.network.config.rope
    if dynamic.kind == "dynamic":
        yield "abf+cpt+ntk", engine(places.cpt, f"dynamic:{dynamic.factor:g}:{dynamic.original_window}")
    yield "abf+cpt+ntk+sft" if dynamic.kind == "dynamic" else "abf+cpt+sft", final
    if dynamic.kind == "dynamic":
        yield "stock", engine(places.sft, stock=True)


def measure(
    model: Engine, ids: list[int], factor: int, asked: argparse.Namespace, curve: bool, made: dict[str, Path]
) -> dict[str, Any]:
    """All figures of one variant at one length."""
    backend = EngineBackend(model)
    length, repeats = factor * asked.window, asked.repeats
    texts = max(1, asked.texts * 8 // max(8, factor))
    row: dict[str, Any] = {"length": length}
    # First, of the float32 weights: reading in one piece rounds them.
    row["short_loss"] = loss_by_position(backend, ids, length=2 * SCORED, texts=4 * asked.texts, blocks=1).mean
    if made and factor >= AT_ONCE:
        row["loss"] = loss_at_once(model, ids, length, texts)
    else:
        row["loss"] = loss_by_length(backend, ids, lengths=[length], scored=SCORED, texts=texts).mean
    if curve:
        found = loss_by_position(backend, ids, length=length, texts=texts, blocks=16)
        row["curve"] = [(begin, end, round(loss, 4)) for begin, end, loss, _ in found.blocks]
    if made:
        count = 8 * repeats if factor == 1 else max(2, 4 * repeats // max(1, factor // 4))
        find = facts_at_once if factor >= AT_ONCE else made_facts
        found_by = {language: find(model, path, length, count) for language, path in made.items()}
        shares = {f"found_{language}": right / of for language, (right, of) in found_by.items()}
        return row | shares | {"facts": sum(of for _, of in found_by.values()), "documents": 2 * count}
    result = run_needle(backend, NeedleSettings((length,), DEPTHS, ("en", "zh"), repeats=repeats))
    return row | {"found_en": result.found("en"), "found_zh": result.found("zh"), "facts": len(result.trials)}


def made_facts(model: Engine, text: Path, length: int, count: int) -> tuple[int, int]:
    """How many facts are found of how many, in `count` stretches of a text that they were put into: one of each is
    asked for, and the answer must be the same to the last letter."""
    source = Made("facts", model.tokenizer, model.chat, length * 31 // 32, length, FACTS_SEED, (str(text),))
    right = 0
    for number in range(count):
        story = source.story(number)
        question, answer = story.asked[0]
        prompt = model.chat.encode([{"role": "user", "content": story.prompt(question)}])
        written = len(model.tokenizer.encode(answer)) + SPELT
        said = model.session(len(prompt) + written).complete(prompt, Sampling(max_new_tokens=written)).text
        right += said.strip() == answer.strip()
    return right, count


def facts_at_once(model: Engine, text: Path, length: int, count: int) -> tuple[int, int]:
    """The same in one piece: all facts of a stretch, one after another, the true answers before each in between."""
    source = Made("facts", model.tokenizer, model.chat, length * 31 // 32, length, FACTS_SEED, (str(text),), FACTS)
    right = of = 0
    for number in range(count):
        example = source.get(number)
        row = make_row([example], "token")
        likeliest = (scores(model, row).argmax(-1) == row.targets).tolist()
        at = 0
        for begin, end, _ in example.spans:
            right += all(likeliest[at : at + end - begin])
            at += end - begin
            of += 1
    return right, of


def loss_at_once(model: Engine, ids: list[int], length: int, texts: int) -> float:
    """The loss of a text's last tokens in one piece, of stretches that end SCORED tokens apart."""
    losses = []
    for number in range(texts):
        end = len(ids) - number * SCORED
        part = np.array(ids[end - length : end], dtype=np.int64)
        row = make_row([Example(part, ((length - SCORED, length, 1.0),), "text")], "token")
        losses.append(float(F.cross_entropy(scores(model, row), row.targets)))
    return sum(losses) / len(losses)


@torch.inference_mode()
def scores(model: Engine, row: Row) -> torch.Tensor:
    """Logits float32 [N, V] of the labelled places of a row, computed in bfloat16."""
    network = model.network.to(torch.bfloat16)
    hidden = network.model(row.ids, row.positions, row.rope_length, document_attention(row.bounds))
    return network.lm_head(hidden[0, row.places]).float()


def made_texts(run: Path) -> dict[str, Path]:
    """Texts by language, where the run was trained on facts made on the way: then its own kind of facts is asked for,
    new ones. A model of a few million weights knows no other questions."""
    stages = json.loads((run / "run.json").read_text())["recipe"]["stages"]
    if not any(source.get("made") == "facts" for stage in stages for source in stage["data"]):
        return {}
    return {"en": shared() / "corpora" / "en_novels.jsonl.gz", "zh": shared() / "corpora" / "zh_classics.jsonl.gz"}


# ---- the card's claims ----------------------------------------------------------------------------------

# A claim, the variant it speaks for, the one it is held against, the figure, and the least multiple of the base window
# that it speaks of. Each is judged at the length where the two differ most, whichever way.
CLAIMS = (
    ("ABF alone lets far tokens be used: nothing trained", "abf", "base", "loss", 2),
    ("ABF alone finds facts past the base window: nothing trained", "abf", "base", "found", 2),
    ("A little continued pre-training after ABF lowers the loss of long texts", "abf+cpt", "abf", "loss", 2),
    ("A little continued pre-training after ABF finds more facts", "abf+cpt", "abf", "found", 1),
    ("Dynamic NTK lowers the loss past the trained length, nothing trained", "abf+cpt+ntk", "abf+cpt", "loss", 2),
    ("Dynamic NTK finds more facts, nothing trained", "abf+cpt+ntk", "abf+cpt", "found", 2),
    ("Fine-tuning on long instructions finds more facts", "abf+cpt+ntk+sft", "abf+cpt+ntk", "found", 1),
    ("The whole recipe finds facts past the base window", "abf+cpt+ntk+sft", "base", "found", 2),
    ("Short texts lose nothing by the whole recipe", "abf+cpt+ntk+sft", "base", "short_loss", 1),
    (
        "The base chosen once finds more than the base recomputed at every forward",
        "abf+cpt+ntk+sft",
        "stock",
        "found",
        2,
    ),
)
NATS = 0.02  # a smaller difference of mean losses decides nothing


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its two figures at the length where they differ most, and a verdict."""
    by = {(row["variant"], row["factor"]): row for row in rows}
    judged = []
    for claim, one, other, figure, least in CLAIMS:
        best: dict[str, Any] | None = None
        for factor in sorted({factor for _, factor in by if factor >= least}):
            a, b = by.get((one, factor)), by.get((other, factor))
            if a is None or b is None:
                continue
            if figure == "found":
                x, y = _share(a), _share(b)
                doubt = 2 * math.sqrt(max(x * (1 - x) / a["facts"] + y * (1 - y) / b["facts"], 0.25 / a["facts"] / 4))
                gain = x - y
            else:
                x, y, doubt = a[figure], b[figure], NATS
                gain = y - x
            if figure == "short_loss":  # claimed is that nothing is lost
                verdict = "refuted" if gain < -doubt else "confirmed"
            else:
                verdict = "confirmed" if gain > doubt else "refuted" if gain < -doubt else "undecided"
            found = {"claim": claim, "of": one, "against": other, "figure": figure, "factor": factor}
            found |= {"value": x, "other": y, "gain": gain, "verdict": verdict}
            if best is None or (abs(gain), factor) > (abs(best["gain"]), best["factor"]):
                best = found
        judged.append(best or {"claim": claim, "verdict": "not measured"})
    return judged


def _share(row: dict[str, Any]) -> float:
    return float(row["found_en"] + row["found_zh"]) / 2


# ---- from the command line ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--window", type=int, default=2048, help="the base window in tokens")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--theta", type=float, default=500_000, help="the base of the variant abf")
    parser.add_argument("--base")
    parser.add_argument("--cpt")
    parser.add_argument("--sft")
    parser.add_argument("--text", type=Path, help="held-out text, its end is read [novels of $LONGVERSE_SHARED]")
    parser.add_argument("--texts", type=int, default=4, help="stretches of text a loss is the mean of")
    parser.add_argument("--repeats", type=int, default=4, help="facts at each depth and language")
    parser.add_argument("--name", default="recipe_study")
    asked = parser.parse_args()
    places = Places.find(asked.run, (asked.base, asked.cpt, asked.sft))
    factors = sorted(asked.factors)
    longest = max([factor for factor in factors if factor <= CURVE], default=0)
    ids = held_out(asked.text or shared() / "corpora" / "en_novels.jsonl.gz", engine(places.base), asked, factors[-1])
    settings = {"window": asked.window, "texts": asked.texts, "repeats": asked.repeats, "theta": asked.theta}
    settings |= {"stages": [str(place) for place in (places.base, places.cpt, places.sft)]}
    made = made_texts(asked.run)
    settings["facts"] = "as in training" if made else "needle"
    journal = asked.run / "study.jsonl"
    rows: list[dict[str, Any]] = []
    done = {(row["variant"], row["factor"]): row for row in read_rows(journal) if row.pop("settings") == settings}
    for factor in factors:
        for name, model in variants(places, asked.window, factor, asked):
            if (made and factor >= AT_ONCE and name == "stock") or (factor > FEW and name not in FAR_VARIANTS):
                continue
            row = done.get((name, factor))
            if row is None:
                figures = measure(model, ids, factor, asked, factor == longest, made)
                row = {"variant": name, "factor": factor, **figures}
                with journal.open("a") as file:
                    file.write(json.dumps({**row, "settings": settings}) + "\n")
            rows.append(row)
            shown = {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items() if key != "curve"}
            print(shown, flush=True)
    claims = judge(rows)
    print(write_results(asked.name, {"run": asked.run.name, **settings, "rows": rows, "claims": claims}))
    print("\n".join(tables(rows, claims, factors)))
    pictures(rows, RESULTS / asked.name)


def shared() -> Path:
    return Path(os.environ.get("LONGVERSE_SHARED", Path(__file__).resolve().parents[1] / "../shared"))


def held_out(path: Path, model: Engine, asked: argparse.Namespace, factor: int) -> list[int]:
    """Ids of the end of a text, which few training steps see: enough for stretches that do not all overlap."""
    wanted = 2 * asked.window * factor
    text = "\n".join(read_texts(path))[-8 * wanted :]
    ids = model.tokenizer.encode(text)[-wanted:]
    if len(ids) < asked.window * factor:
        raise SystemExit(f"{path} has {len(ids):,} tokens and {asked.window * factor:,} are to be read.")
    return ids


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off by a kill
            continue
    return rows


def tables(rows: list[dict[str, Any]], claims: list[dict[str, Any]], factors: list[int]) -> Iterator[str]:
    names = list(dict.fromkeys(row["variant"] for row in rows))
    titles = {
        "loss": "Loss of the same last tokens, nats", "found_en": "Facts found, English",
        "found_zh": "Facts found, Chinese", "short_loss": "Loss of short texts, nats",
    }  # fmt: skip
    for key, title in titles.items():
        cells = []
        for name in names:
            mine = {row["factor"]: row.get(key) for row in rows if row["variant"] == name}
            cells.append([name, *(f"{mine[f]:.3f}" if mine.get(f) is not None else "" for f in factors)])
        yield f"\n{title}\n\n" + table(["variant", *(f"{f}x" for f in factors)], cells)
    cells = []
    for claim in claims:
        figures = f"{claim['value']:.3f} against {claim['other']:.3f} at {claim['factor']}x" if "value" in claim else ""
        cells.append([claim["claim"], figures, claim["verdict"]])
    yield "\nThe card's claims\n\n" + table(["claim", "figures", "verdict"], cells)


def pictures(rows: list[dict[str, Any]], path: Path) -> None:
    """PATH.png: loss and facts by length, and loss by position in the longest text that has it."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), constrained_layout=True)
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        lengths = [row["length"] for row in own]
        axes[0].plot(lengths, [row["loss"] for row in own], marker="o", label=name)
        axes[1].plot(lengths, [_share(row) for row in own], marker="o", label=name)
        for curve in [row["curve"] for row in own if "curve" in row]:
            axes[2].plot([(begin + end) / 2 for begin, end, _ in curve], [loss for *_, loss in curve], label=name)
    titles = ("loss of the same last tokens, nats", "facts found, both languages", "loss by position, nats")
    for panel, title, x in zip(axes, titles, ("tokens read", "tokens read", "position"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlabel(x)
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
