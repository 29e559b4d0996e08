"""Reading and writing on a CPU: ours, transformers' dense attention, llama.cpp on the very file of the wheel. On smol.

transformers runs in bfloat16 where the processor multiplies it, else in float32, which is far faster there.

Every measurement is a process of its own, and results/cpu_long.json is written after each (another kind of machine has
another --name); given again, the script goes on with what is missing. A process that reaches --limit seconds counts as
"not done". Texts are the same ids everywhere.

    python benchmarks/cpu_long.py [--lengths 2000 8000 32000 64000] [--ours 131072 262144] [--limit 900]
                                  [--llama /path/to/python] [--only NAME ...] [--again] [--name cpu_long_amx]
    python benchmarks/cpu_long.py --kernels      how near decode kernels come to the memory's speed: cpu_kernels.json,
                                                 with --name cpu_long_amx cpu_kernels_amx.json

llama.cpp needs an interpreter with llama-cpp-python 0.3.36 (see llama_cpp_check.py), named with --llama.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEW = 33  # tokens written after each text; the first comes from reading
OURS: dict[str, dict[str, str]] = {
    "ours exact": {"attention": "exact", "cache": "full"},
    "ours exact, int8 cache": {"attention": "exact", "cache": "int8"},
    "ours exact, int4 cache": {"attention": "exact", "cache": "int4"},
    "ours sparse": {"attention": "sparse", "cache": "full"},
    "ours sparse:0.8": {"attention": "sparse:0.8", "cache": "full"},
    "ours pages": {"attention": "pages", "cache": "full"},
}
PEERS = ("transformers bf16", "transformers float32", "llama.cpp Q4_1, f16 cache")


def ids_of(count: int) -> list[int]:
    """The same tokens for everybody, without sense. Only sparse reading's speed depends on which: sparse_quality.py
    measures it on prose."""
    return [(n * 7919) % 40_000 + 100 for n in range(count)]


# ---- workers: each prints one line of JSON ------------------------------------------------------------------


def ours(name: str, tokens: int) -> dict[str, Any]:
    from longverse.inference.engine import Engine
    from longverse.inference.sampling import Sampling

    way = OURS[name]
    # Past the trained window exact attention still runs; it is its speed that is measured here.
    window = None if way["attention"] == "pages" else tokens + 1024
    engine = Engine.load("smol", device="cpu", window=window)
    engine.tokenizer.eos_ids = frozenset()
    # Kernels are compiled once on a machine, and loaded once in a process: neither belongs to a text. Several chunks,
    # since sparse reading begins with the second and float32 has kernels for many keys alone.
    warm = min(tokens, 5200)
    engine.session(warm + 4, **way).complete(ids_of(warm), Sampling(max_new_tokens=4))
    session = engine.session(tokens + NEW + 64, **way)
    stats = session.complete(ids_of(tokens), Sampling(max_new_tokens=NEW)).stats
    held = sum(x.nbytes for x in session.cache.storage().values())
    weights = sum({t.data_ptr(): t.nbytes for t in engine.network.state_dict().values()}.values())
    return {
        "read_seconds": stats.prefill_seconds, "token_seconds": stats.decode_seconds / (stats.new_tokens - 1),
        "weights": stats.weights, "kernels": stats.kernels, "mass_kept": stats.mass_kept,
        "mass_written": stats.mass_written, "cache_bytes": held, "weights_bytes": weights,
    }  # fmt: skip


def transformers(name: str, tokens: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from longverse.models.export import export

    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    with tempfile.TemporaryDirectory() as home:
        export("smol", Path(home) / "smol")
        model = AutoModelForCausalLM.from_pretrained(Path(home) / "smol", dtype=dtype).eval()
        with torch.inference_mode():
            model(torch.tensor([ids_of(600)]), logits_to_keep=1)
            begun = time.perf_counter()
            out = model(torch.tensor([ids_of(tokens)]), logits_to_keep=1, use_cache=True)
            token = out.logits[0, -1].argmax()[None, None]
            read, begun = time.perf_counter() - begun, time.perf_counter()
            for _ in range(NEW - 1):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[0, -1].argmax()[None, None]
            return {"read_seconds": read, "token_seconds": (time.perf_counter() - begun) / (NEW - 1)}


def llama_cpp(name: str, tokens: int, file: str, threads: int) -> dict[str, Any]:
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        file, n_ctx=tokens + NEW + 8, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    begun = time.perf_counter()
    model.eval(ids_of(tokens))
    read = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(NEW - 1):
        model.eval([int(np.argmax(model._scores[-1]))] if len(model._scores) else [100])
    return {"read_seconds": read, "token_seconds": (time.perf_counter() - begun) / (NEW - 1)}


def work(name: str, tokens: int, file: str, threads: int) -> None:
    if name in OURS:
        found = ours(name, tokens)
    elif name.startswith("transformers"):
        found = transformers(name, tokens)
    else:
        found = llama_cpp(name, tokens, file, threads)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


# ---- kernels against the memory's speed ---------------------------------------------------------------------


def kernel_speeds(
    tokens: int, shapes: tuple[tuple[int, int, int], ...] = ((3, 3, 64), (40, 1, 128))
) -> list[dict[str, Any]]:
    """Bytes a second that decode attention reads, by format and shape (G, h, D), beside plain reading."""
    import numpy as np
    import torch
    from numba import njit

    from longverse.models.cache import FORMATS, KVCache
    from longverse.models.kernels.build import team
    from longverse.models.kernels.one_token import OneQuery

    @njit(nogil=True, fastmath=True)
    def read(rank: int, size: int, counter: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
        part = x[x.size * rank // size : x.size * (rank + 1) // size]  # a loop from 0 is made into vectors
        total = np.float32(0)
        for i in range(part.size):
            total += part[i]
        out[rank] = total

    threads = team(torch.get_num_threads())
    out = np.empty(threads.size, dtype=np.float32)

    def best(do: Any, times: int = 7) -> float:
        found = []
        for _ in range(times + 1):  # the first compiles
            begun = time.perf_counter()
            do()
            found.append(time.perf_counter() - begun)
        return min(found[1:])

    plain = 0.0
    for _ in range(3):  # how fast an array is read depends on the size of the pages that the system gave it
        x = np.ones(1 << 28, dtype=np.float32)
        plain = max(plain, x.nbytes / best(lambda x=x: threads.run(read, x, out)))
    rows = [{"what": "plain reading", "gb": plain / 1e9, "share": 1.0}]
    for heads, group, size in shapes:
        count = min(tokens, tokens * 3 * 64 * 4 // (heads * size))
        for format in FORMATS:
            cache = KVCache(2, heads, size, count + 1, torch.bfloat16, format=format)
            cache.expect(count)  # as a session does that will fill it
            for array in cache.storage().values():
                array.zero_()
            cache.restore(count)
            q, kernel = torch.randn(1, heads * group, 1, size), OneQuery.of(cache, heads * group)
            assert kernel is not None
            spans = cache.spans(count)
            took = best(lambda q=q, kernel=kernel, spans=spans: [kernel.attend(n, q, spans) for n in range(2)])
            speed = cache.bytes_per_token * count / took  # both layers
            rows.append(
                {"what": f"{format}, {heads} x {group} heads of {size}", "gb": speed / 1e9, "share": speed / plain}
            )
    return rows


# ---- the bench ----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 8000, 32_000, 64_000])
    parser.add_argument("--ours", type=int, nargs="*", default=[131_072, 262_144], help="lengths for pages alone")
    parser.add_argument("--limit", type=int, default=900, help="seconds a measurement may take")
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *PEERS), help="these alone")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--name", default="cpu_long", help="of the results: one for each kind of machine")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--tokens", type=int, default=400_000, help="of the caches of --kernels")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, tokens, file, threads = options.worker
        return work(name, int(tokens), file, int(threads))

    import torch
    from common import RESULTS, table, write_results

    from longverse.models import embedded
    from longverse.models.checkpoint import cpu_has_bfloat16

    if options.kernels:
        rows = kernel_speeds(options.tokens)
        print(
            table(["", "GB/s", "of plain reading"], [[r["what"], f"{r['gb']:.1f}", f"{r['share']:.0%}"] for r in rows])
        )
        print(write_results(options.name.replace("long", "kernels"), {"rows": rows}))
        return None
    path = RESULTS / f"{options.name}.json"
    known: dict[str, Any] = json.loads(path.read_text()).get("rows", {}) if path.exists() else {}
    unfit = "transformers float32" if cpu_has_bfloat16() else "transformers bf16"
    if options.only and unfit in options.only:
        raise SystemExit(f"{unfit} is not measured on this processor: leave it out.")
    plan = [(name, length) for length in options.lengths for name in (*OURS, *PEERS) if name != unfit]
    plan += [("ours pages", length) for length in options.ours]
    for name, length in plan:
        key = f"{name} @ {length}"
        if (options.only and name not in options.only) or (key in known and not options.again):
            continue
        python = options.llama if name.startswith("llama") else sys.executable
        if python is None:
            continue
        command = [
            python,
            __file__,
            "--worker",
            name,
            str(length),
            str(embedded.find("smol")),
            str(torch.get_num_threads()),
        ]
        # As the `longverse` command sets it; the peers run as they come.
        waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if name in OURS else {}
        peers = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=options.limit, cwd=ROOT, env=peers | waiting
            )
            if done.returncode:
                raise SystemExit(f"{key}: {done.stderr[-2000:]}")
            known[key] = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            known[key] = {"limit": options.limit}
        write_results(options.name, {"rows": known})
    header = ["", "tokens", "reading, s", "tokens/s", "a token, ms", "peak GB", "of goal", "weights", "attention kept"]
    lines = []
    for key, row in sorted(known.items(), key=lambda item: int(item[0].split(" @ ")[1])):
        name, length = key.split(" @ ")
        if "limit" in row:
            lines.append([name, f"{int(length):,}", f"not in {row['limit']}", *["–"] * 6])
            continue
        # The goal: 1.15 times weights and cache, and a gigabyte.
        goal = 1.15 * (row["weights_bytes"] + row["cache_bytes"]) + 1e9 if "cache_bytes" in row else 0
        lines.append(
            [
                name, f"{int(length):,}", f"{row['read_seconds']:.1f}", f"{int(length) / row['read_seconds']:,.0f}",
                f"{1e3 * row['token_seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['peak_bytes'] / goal:.0%}" if goal else "–", row.get("weights", "–"),
                f"{row['mass_kept']:.1%}" if "sparse" in name else "–",
            ]
        )  # fmt: skip
    print(table(header, lines))
    print(path)
    return None


if __name__ == "__main__":
    main()
