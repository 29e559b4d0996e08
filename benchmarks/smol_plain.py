"""What reading further cost smol: perplexity on plain English beside the model it was made from.

    python benchmarks/smol_plain.py [--models smol-8k smol] [--texts 12]

The middle 1,000 tokens of each of TEXTS English novels ($LONGVERSE_SHARED, or ../shared), each read by itself, without
a chat format. Writes benchmarks/results/smol_plain.json.
"""

import argparse
import gzip
import json
import math
import os
from itertools import islice
from pathlib import Path

import torch
from common import table, write_results

from longverse.inference.engine import Engine

SHARED = Path(os.environ.get("LONGVERSE_SHARED", Path(__file__).parent.parent / "../shared")) / "corpora"
TOKENS = 1000


def perplexity(model: str, texts: list[str]) -> float:
    engine = Engine.load(model)
    total, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = engine.tokenizer.encode(text[len(text) // 2 :][: 5 * TOKENS])[:TOKENS]
            logits = engine.network(torch.tensor([ids]))[0].float()
            total += float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
            count += len(ids) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smol-8k", "smol"], help="compared to the first")
    parser.add_argument("--texts", type=int, default=12)
    options = parser.parse_args()
    with gzip.open(SHARED / "en_novels.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, options.texts)]
    found = {model: perplexity(model, texts) for model in options.models}
    first = found[options.models[0]]
    print(table(["model", "perplexity", "ratio"], [[m, f"{p:.2f}", f"{p / first:.3f}"] for m, p in found.items()]))
    print(f"written: {write_results('smol_plain', {'perplexity': found})}")


if __name__ == "__main__":
    main()
