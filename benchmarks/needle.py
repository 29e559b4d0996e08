"""What smol finds in long texts as it comes, and what a change of RoPE alone does at twice its window.

    python benchmarks/needle.py [--repeats 2] [--keep FOLDER]

Facts of eight kinds in generated prose, 1,000 to 8,000 tokens at five depths; beside it 16,000 tokens with the
plain base, with ABF (base 100,000 to 500,000) and with dynamic NTK, each without any training: the picture that
the recipe is to change. Writes benchmarks/results/needle.json and docs/needle_smol.png. A stopped run goes on.
"""

import argparse
import tempfile
from pathlib import Path

from common import write_results

from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.needle import NeedleResult, NeedleSettings, run_needle
from longverse.evaluation.plots import heatmaps
from longverse.inference.engine import Engine

NEW_TOKENS = 24
LONG = 16_000
ROPES = {"plain base": None, "ABF x5": "abf:500000", "dynamic NTK": "dynamic:2"}


def run(rope: str | None, settings: NeedleSettings, journal: Path) -> NeedleResult:
    longest = max(settings.lengths) + NEW_TOKENS
    engine = Engine.load("smol", rope=rope, window=longest if longest > 8192 else None)
    result = run_needle(
        EngineBackend(engine),
        settings,
        journal=journal,
        on_progress=lambda done, total: print(f"\r{journal.stem}: {done} of {total}", end="", flush=True),
    )
    print()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="facts a cell")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "longverse-needle", help="journals")
    options = parser.parse_args()
    common = {"repeats": options.repeats, "max_new_tokens": NEW_TOKENS}
    lengths = tuple(range(1000, 8001, 1000))
    window = run(None, NeedleSettings(lengths=lengths, **common), options.keep / "window.jsonl")
    print(window.markdown())
    results = {"within the window": window.to_dict()}
    columns = []
    for name, rope in ROPES.items():
        journal = options.keep / f"{name.replace(' ', '_')}.jsonl"
        beyond = run(rope, NeedleSettings(lengths=(LONG,), **common), journal)
        print(name, beyond.markdown(), sep="\n")
        results[f"{LONG:,} tokens, {name}"] = beyond.to_dict()
        columns.append([row[0] for row in beyond.grid("en")])
    print(f"written: {write_results('needle', results)}")
    picture = Path(__file__).parent.parent / "docs" / "needle_smol.png"
    panels = [
        window.panels()[0] | {"title": "its window: 8,192 tokens"},
        {
            "title": f"{LONG:,} tokens, untrained",
            "columns": list(ROPES),
            "rows": window.panels()[0]["rows"],
            "cells": [list(row) for row in zip(*columns, strict=True)],
            "x": "RoPE",
        },
    ]
    heatmaps(
        panels,
        picture,
        title="smol as it comes: facts found, per cent",
        subtitle=f"{options.repeats} facts a cell, eight kinds · generated prose · greedy, exact prompt lengths",
    )
    print(f"written: {picture}")


if __name__ == "__main__":
    main()
