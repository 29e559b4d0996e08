"""A document read once and opened again: seconds to the first new token, and whether the answer is the fresh reader's.

    python benchmarks/reopen.py [--tokens 262144] [--attention pages] [--cache full] [--model smol] [--folder DIR]
                                [--once] [--name slow]

Four processes: one reads the document fresh and answers; one reads it into a store, which must be new; two open the
store and answer, with the store's files in the machine's memory, as they are after reading, and with them dropped from
there (no difference where the folder itself lies in memory: then name another with --folder). Their clocks start when
the model is loaded and its kernels are compiled, and stop at the first new token; checksums are compared in between.
--once leaves the first out, for machines that take long: then the reading that is kept is the fresh one. Writes
benchmarks/results/reopen.json, with --name slow reopen_slow.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command has it, before torch is imported

from common import table, write_results

from longverse.inference.store import Store

QUESTION = " Question: who presides over the society? Answer:"
NEW = 32


def worker(what: str, options: argparse.Namespace) -> dict[str, Any]:
    """fresh, keep or open: seconds and the answer's tokens."""
    from longverse.evaluation.haystack import generated_text
    from longverse.inference.engine import Engine
    from longverse.inference.sampling import Sampling

    engine = Engine.load(options.model, device="cpu")
    engine.tokenizer.eos_ids = frozenset()  # all write NEW tokens
    ids = engine.tokenizer.encode(generated_text("en", 7, 6 * options.tokens))[: options.tokens]
    assert len(ids) == options.tokens
    prompt = ids + engine.tokenizer.encode(QUESTION)
    planned = len(prompt) + NEW
    ways = {"cache": options.cache, "attention": options.attention}
    engine.session(700, **ways).complete(ids[:600], Sampling(max_new_tokens=4))  # kernels and weights for writing
    store = Store(Path(options.folder))
    begun = time.perf_counter()
    if what == "fresh":
        session = engine.session(planned, **ways)
    elif what == "keep":
        session = store.read(engine, ids, planned, name="long", **ways)
    else:
        found = store.find(engine, prompt, planned, **ways)
        assert found is not None, store.notes
        session = found
    session.boundary = len(ids)
    opened = time.perf_counter() - begun
    done = session.complete(prompt, Sampling(max_new_tokens=NEW))
    assert not store.notes, store.notes
    return {
        "seconds": opened + done.stats.prefill_seconds,
        "opening": opened,
        "reused": done.stats.reused_tokens if what == "open" else 0,
        "tokens": list(done.tokens),
        "kept_bytes": sum(kept.bytes for kept in store.entries()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--attention", default="pages")
    parser.add_argument("--cache", default="full")
    parser.add_argument("--folder", help="of the store; a temporary one when left out")
    parser.add_argument("--once", action="store_true", help="compare with the reading that is kept")
    parser.add_argument("--name", help="an ending for the result file")
    parser.add_argument("--worker", choices=("fresh", "keep", "open"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker, options)))
        return
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(options.folder or aside)
        if Store(folder).entries():
            raise SystemExit(f"{folder} holds documents: give an empty folder.")
        found: dict[str, Any] = {}
        first = "keep" if options.once else "fresh"
        ways = [("keep", "keep"), ("open", "open"), ("open, files dropped", "open")]
        for name, what in ways if options.once else [("fresh", "fresh"), *ways]:
            if name.endswith("dropped"):
                drop(folder)
            found[name] = run(what, folder)
            same = found[name]["tokens"] == found[first]["tokens"]
            print(f"{name}: {found[name]['seconds']:.1f} s to the first token; {'same' if same else 'OTHER'} answer",
                  flush=True)  # fmt: skip
    rows = [
        [name, f"{one['reused']:,}", f"{one['opening']:.2f}", f"{one['seconds']:.2f}",
         "yes" if one["tokens"] == found[first]["tokens"] else "NO"]
        for name, one in found.items()
    ]  # fmt: skip
    print(table(["", "tokens reused", "opening, s", "to the first token, s", "answer as fresh"], rows))
    settings = {name: getattr(options, name) for name in ("model", "tokens", "attention", "cache", "once")}
    print(write_results("reopen" + (f"_{options.name}" if options.name else ""), settings | {"runs": found}))


def run(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--worker", what, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def drop(folder: Path) -> None:
    """Drop a folder's files from the machine's memory."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
