"""What smol finds in long texts, beside the model it was made from.

    python benchmarks/needle.py [--repeats 2] [--keep FOLDER] [--only smol]

Facts of eight kinds in generated texts at five depths: `smol` in English and Chinese, `smol-8k` (the same model before
it was read further) in English, and at twice its window with ABF (base 100,000 to 500,000) and with dynamic NTK alone:
what a change of RoPE does without training. None of the texts and sentences are of the training's data; some
kinds (birthplaces, colours, prices) are, with other sentences and values. Writes
benchmarks/results/needle.json and docs/needle_smol.png. A stopped run goes on; with --only the others keep what they
have.
"""

import argparse
import json
import tempfile
from pathlib import Path

from common import RESULTS, write_results

from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.needle import NeedleResult, NeedleSettings, run_needle
from longverse.evaluation.plots import heatmaps
from longverse.inference.engine import Engine

NEW_TOKENS = 64
SHORT, LONG = (1000, 2000, 4000, 8000), 16_000
# name: model, RoPE, lengths, languages
RUNS: dict[str, tuple[str, str | None, tuple[int, ...], tuple[str, ...]]] = {
    "smol": ("smol", None, (*SHORT, LONG), ("en", "zh")),
    "smol-8k": ("smol-8k", None, SHORT, ("en",)),
    "smol-8k, ABF x5": ("smol-8k", "abf:500000", (LONG,), ("en",)),
    "smol-8k, dynamic NTK": ("smol-8k", "dynamic:2", (LONG,), ("en",)),
}


def run(name: str, repeats: int, folder: Path) -> NeedleResult:
    model, rope, lengths, languages = RUNS[name]
    settings = NeedleSettings(lengths=lengths, languages=languages, repeats=repeats, max_new_tokens=NEW_TOKENS)
    longest = max(lengths) + NEW_TOKENS
    engine = Engine.load(model, rope=rope, window=longest)
    result = run_needle(
        EngineBackend(engine),
        settings,
        journal=folder / f"{name.replace(', ', '_').replace(' ', '_')}.jsonl",
        on_progress=lambda done, total: print(f"\r{name}: {done} of {total}", end="", flush=True),
    )
    print()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="facts a cell")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "longverse-needle", help="journals")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS), help="nothing: draw anew")
    options = parser.parse_args()
    before = json.loads((RESULTS / "needle.json").read_text())
    results = {name: NeedleResult.from_dict(before[name]) for name in RUNS if name not in options.only}
    for name in options.only:
        results[name] = run(name, options.repeats, options.keep)
        print(results[name].markdown())
    results = {name: results[name] for name in RUNS}
    print(f"written: {write_results('needle', {name: result.to_dict() for name, result in results.items()})}")
    picture = Path(__file__).parent.parent / "docs" / "needle_smol.png"
    titles = [
        ("smol", 0, "smol, English"),
        ("smol", 1, "smol, Chinese"),
        ("smol-8k", 0, "smol-8k: as it came, English"),
    ]
    heatmaps(
        [results[name].panels()[number] | {"title": title} for name, number, title in titles],
        picture,
        title="Facts found by depth and length, per cent",
        subtitle="eight kinds of fact · generated texts · greedy, exact prompt lengths",
    )
    print(f"written: {picture}")


if __name__ == "__main__":
    main()
