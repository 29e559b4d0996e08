"""How near the planner comes: predicted against measured memory and seconds, for one model at a few lengths.

    python benchmarks/plan_check.py --again                  smol at 2,048 and 8,000 tokens, full and int8 cache
    python benchmarks/plan_check.py --tokens 2048
    python benchmarks/plan_check.py --model PATH --rope abf:1000000,yarn:4 --tokens 32000

Each measurement is a process of its own that reads a prompt and writes an answer. One goes before it so that every
kernel is compiled, and a short prompt loads kernels and weights before the clock starts. Goals: memory within 10 %,
seconds within 30 %, on an idle machine. `--again` measures the machine's rates anew first; `--busy` believes them
though other programs run. Results: benchmarks/results/plan_check.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("LONGVERSE_COMMAND", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.common import table, write_results

NEW = 32  # tokens of the answer


def measure(model: str, rope: str | None, tokens: int, cache: str) -> dict[str, Any]:
    """One run in this process: what was planned for it, and what it took."""
    from longverse.commands_plan import predict
    from longverse.inference.engine import Engine, peak_memory
    from longverse.inference.memory import requirements
    from longverse.inference.sampling import Sampling
    from longverse.plan import PROCESS

    engine = Engine.load(model, rope=rope)
    words = "The mill by the river grinds the grain of nine farms, and the miller counts the sacks. "
    ids = engine.tokenizer.encode(words * (tokens // 12))[: tokens - NEW]
    engine.session(256, cache=cache).complete(ids[:64], Sampling(max_new_tokens=4))
    session = engine.session(tokens, cache=cache)
    predicted = predict(engine, session, tokens - NEW)
    bytes_planned = requirements(engine, tokens)[0][cache] + PROCESS
    stats = session.complete(ids, Sampling(max_new_tokens=NEW, repetition_penalty=1.2)).stats
    return {
        "tokens": tokens, "cache": cache, "weights": stats.weights, "kernels": stats.kernels,
        "planned_bytes": bytes_planned, "measured_bytes": peak_memory(engine.network.device),
        "planned_prefill": predicted[0] if predicted else None, "measured_prefill": stats.prefill_seconds,
        "planned_token": predicted[1] if predicted else None,
        "measured_token": stats.decode_seconds / max(1, stats.new_tokens - 1), "new_tokens": stats.new_tokens,
    }  # fmt: skip


def measure_rates(model: str, rope: str | None, busy: bool) -> dict[str, Any]:
    """Every figure of a plan, anew."""
    from longverse.inference import rates
    from longverse.inference.engine import Engine
    from longverse.inference.memory import shape_of_network, weights_form, written_with

    rates.LIMIT = 60.0
    if busy:
        rates.BUSY = 0.0
    engine = Engine.load(model, rope=rope)
    shape, dtype = shape_of_network(engine.name, engine.network.config), engine.network.dtype
    wanted = [("weights", written_with(engine, shape, weights_form(engine))), *rates.all_figures(dtype)]
    return rates.rates_for(shape, dtype, wanted, again=True).to_json()


def child(arguments: argparse.Namespace, kind: str, tokens: int = 512, cache: str = "full") -> dict[str, Any]:
    """`measure` or `measure_rates` in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, "--model", arguments.model, "--tokens", str(tokens)]
    command += ["--cache", cache] + (["--rope", arguments.rope] if arguments.rope else [])
    command += ["--busy"] if arguments.busy else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def error(planned: float | None, measured: float) -> str:
    return "-" if planned is None else f"{planned / measured - 1:+.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol")
    parser.add_argument("--rope", default=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8000])
    parser.add_argument("--cache", nargs="+", default=["full", "int8"])
    parser.add_argument("--again", action="store_true", help="measure the machine's rates anew first")
    parser.add_argument("--busy", action="store_true", help="believe the rates of a busy machine too")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "rates":
        print(json.dumps(measure_rates(arguments.model, arguments.rope, arguments.busy)))
        return
    if arguments.child:
        print(json.dumps(measure(arguments.model, arguments.rope, arguments.tokens[0], arguments.cache[0])))
        return
    for cache in arguments.cache:  # kernels are compiled
        child(arguments, "run", cache=cache)
    rates = child(arguments, "rates") if arguments.again else None
    rows = [child(arguments, "run", tokens, cache) for cache in arguments.cache for tokens in arguments.tokens]
    heads = ["tokens", "cache", "weights", "memory planned", "measured", "", "reading planned", "measured", "",
             "a token planned", "measured", ""]  # fmt: skip
    cells = [
        [f"{row['tokens']:,}", row["cache"], row["weights"],
         f"{row['planned_bytes'] / 1e6:,.0f} MB", f"{row['measured_bytes'] / 1e6:,.0f} MB",
         error(row["planned_bytes"], row["measured_bytes"]),
         "-" if row["planned_prefill"] is None else f"{row['planned_prefill']:.2f} s",
         f"{row['measured_prefill']:.2f} s", error(row["planned_prefill"], row["measured_prefill"]),
         "-" if row["planned_token"] is None else f"{row['planned_token'] * 1000:.1f} ms",
         f"{row['measured_token'] * 1000:.1f} ms", error(row["planned_token"], row["measured_token"])]
        for row in rows
    ]  # fmt: skip
    print(table(heads, cells))
    print(f"\nwritten to {write_results('plan_check', {'model': arguments.model, 'rows': rows, 'rates': rates})}")


if __name__ == "__main__":
    main()
