"""What reading further cost smol: perplexity on plain English beside the model it was made from.

    python benchmarks/smol_plain.py [--models smol-8k smol] [--texts 12]

1,000 tokens each of TEXTS texts, read by themselves and without a chat format: news articles (LongBench's multi_news;
the training had no news), and the middles of English novels that were not among the fifth trained on as text (some of
their sentences were answers in the instruction data, so news is the fairer measure). Both are of $LONGVERSE_SHARED, or
../shared. Writes benchmarks/results/smol_plain.json.
"""

import argparse
import gzip
import json
import math
import os
from pathlib import Path

import torch
from common import table, write_results

from longverse.data.corpus import chosen, load_corpus_config
from longverse.inference.engine import Engine

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("LONGVERSE_SHARED", ROOT / "../shared"))
TOKENS = 1000


def novels(count: int) -> list[str]:
    """From the middle of each novel that recipes/smol_corpus.yaml leaves out."""
    config = load_corpus_config(ROOT / "recipes" / "smol_corpus.yaml")
    texts = []
    with gzip.open(SHARED / "corpora" / "en_novels.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            novel = json.loads(line)
            if not chosen(config, config.sources[0], novel["id"]):
                texts.append(novel["text"][len(novel["text"]) // 2 :])
            if len(texts) == count:
                break
    assert len(texts) == count, f"{len(texts)} novels are left"
    return texts


def news(count: int) -> list[str]:
    """The first article of each of the benchmark's first clusters that are long enough."""
    texts = []
    with (SHARED / "longbench" / "data" / "multi_news.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["context"].replace(" NEWLINE_CHAR ", "\n")
            text = text.partition("Passage 2:")[0].removeprefix("Passage 1:").strip()
            if len(text) > 5 * TOKENS:
                texts.append(text)
    assert len(texts) >= count, f"{len(texts)} articles are long enough"
    return texts[:count]


def perplexity(engine: Engine, texts: list[str]) -> float:
    total, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = engine.tokenizer.encode(text[: 6 * TOKENS])[:TOKENS]
            logits = engine.network(torch.tensor([ids]))[0].float()
            total += float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
            count += len(ids) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smol-8k", "smol"], help="compared to the first")
    parser.add_argument("--texts", type=int, default=12)
    options = parser.parse_args()
    kinds = {"news": news(options.texts), "novels": novels(options.texts)}
    found: dict[str, dict[str, float]] = {}
    for model in options.models:
        engine = Engine.load(model)
        found[model] = {kind: perplexity(engine, texts) for kind, texts in kinds.items()}
    first = found[options.models[0]]
    rows = [[m, *(f"{p:.2f} ({p / first[kind]:.3f})" for kind, p in own.items())] for m, own in found.items()]
    print(table(["perplexity (ratio)", *kinds], rows))
    print(f"written: {write_results('smol_plain', {'perplexity': found})}")


if __name__ == "__main__":
    main()
