"""First light: time to the first word over a document, and to the second question after it, beside transformers.

smol's own bf16 weights run in both, in one process, taking turns; each figure is the median of the turns. Documents are
generated. transformers reads the whole prompt for every question, as its `generate` does when a question is asked
anew; the engine keeps the document. Prints one table and writes results/first_light.json.

    python benchmarks/first_light.py [--turns 3]
"""

import argparse
import statistics
from typing import Any

import torch
from common import machine, seconds, table, write_results
from transformers import LlamaConfig, LlamaForCausalLM

from longverse.documents.report import generate_report
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling

QUESTIONS = ("Who wrote this report, and for which year?", "Which project cost the most, and where does it stand?")
NEW = 33  # tokens written when decoding is timed: the first comes from reading, 32 are timed


def transformers_twin(engine: Engine) -> LlamaForCausalLM:
    """transformers' Llama class on the very tensors of the engine."""
    config = LlamaConfig(**{k: v for k, v in engine.config.items() if k not in ("model_type", "architectures")})
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    twin.load_state_dict(engine.network.state_dict(), assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)  # its buffers were left on the meta device
    twin.generation_config.pad_token_id = 0
    twin.generation_config.eos_token_id = None  # both write exactly as many tokens as asked
    return twin.eval()


def prompts(engine: Engine, tokens: int) -> list[list[int]]:
    """Two prompts over one generated document of exactly `tokens` tokens."""
    text = generate_report(seed=1, target_words=tokens, questions=1).text
    document = engine.tokenizer.decode(engine.tokenizer.encode(text)[:tokens])
    return [engine.chat.encode([{"role": "user", "content": f"{document}\n\n{question}"}]) for question in QUESTIONS]


def measure(engine: Engine, twin: LlamaForCausalLM, tokens: int, turns: int) -> dict[str, Any]:
    first, second = prompts(engine, tokens)
    figures: dict[str, list[float]] = {}

    def theirs(ids: list[int], new: int) -> None:
        whole = torch.tensor([ids])
        twin.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=new, do_sample=False)

    def record(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for _ in range(turns):
        session = engine.session(len(first) + NEW + 64)
        record("ours first", seconds(lambda: session.complete(first, Sampling(max_new_tokens=1))))  # noqa: B023
        record("theirs first", seconds(lambda: theirs(first, 1)))
        record("ours second", seconds(lambda: session.complete(second, Sampling(max_new_tokens=1))))  # noqa: B023
        record("theirs second", seconds(lambda: theirs(second, 1)))
        written = session.complete(second, Sampling(max_new_tokens=NEW))
        record("ours decode", written.stats.decode_seconds / (NEW - 1))
        record("theirs decode", (seconds(lambda: theirs(second, NEW)) - figures["theirs second"][-1]) / (NEW - 1))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {"prompt_tokens": len(first), "seconds": medians, "all": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    engine = Engine.load("smol", dtype="bfloat16")
    engine.tokenizer.eos_ids = frozenset()
    twin = transformers_twin(engine)
    measure(engine, twin, 300, 1)  # warm up
    results, rows = {}, []
    for tokens in (2000, 6000):
        result = results[str(tokens)] = measure(engine, twin, tokens, arguments.turns)
        for label, key in (("first question", "first"), ("second question", "second"), ("a further token", "decode")):
            ours, theirs = result["seconds"][f"ours {key}"], result["seconds"][f"theirs {key}"]
            ratio = result[f"{key} ratio"] = theirs / ours
            rows.append([f"{tokens:,} tokens", label, f"{ours:.3f} s", f"{theirs:.3f} s", f"{ratio:.1f}x"])
    print(f"smol in bf16, {machine()['cpu']}, {torch.get_num_threads()} threads, medians of {arguments.turns} turns\n")
    print(table(["document", "time to", "longverse", "transformers", "ratio"], rows))
    print(f"\nwritten: {write_results('first_light', {'model': 'smol', 'documents': results})}")


if __name__ == "__main__":
    main()
