"""What sparse reading and writing give and cost, on smol: seconds, the share of blocks read and of attention kept,
needles, KL.

Every length is read exactly and at each dial, which is what stands behind "sparse:". KL is of what follows each of the
last SCORED tokens of a text, against exact reading, mean over them and over the texts: of generated prose, whose few
templates return all the time, and of novels (--novels, which needs the corpora in $LONGVERSE_SHARED). Then WRITTEN
tokens are written, the same everywhere: milliseconds each, and the attention kept. Needles are asked in documents of
the same lengths over all depths, of the model as it is loaded (give --model the extended one, and --rope where it has
none of its own). With --texts 0 there are only those documents, and the seconds are theirs.

    python benchmarks/sparse_quality.py [--lengths 8000 16000 32000 64000] [--dials 0.95 0.8 0.9:0.1] [--needles]
                                        [--model smol] [--rope abf:1000000] [--repeats 1] [--facts 5] [--name long]
"""

import argparse
import gzip
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command has it, before torch is imported

import torch
from common import seconds, table, write_results
from quant_quality import kl

from longverse.evaluation.backends import Reply, Request
from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.haystack import generated_text
from longverse.evaluation.needle import NeedleSettings, run_needle
from longverse.inference.engine import Engine, Session

WRITTEN = 24
SCORED = 512  # enough to be read sparsely themselves


def documents(engine: Engine, tokens: int, count: int) -> list[list[int]]:
    """Texts of so many tokens, each of another seed."""
    found = []
    for seed in range(count):
        characters = 5 * tokens
        while len(ids := engine.tokenizer.encode(generated_text("en", seed, characters))) < tokens:
            characters *= 2
        found.append(ids[:tokens])
    return found


def novels(engine: Engine, tokens: int, count: int) -> list[list[int]]:
    """So many tokens of each of the first `count` novels of the corpora that are long enough, from their middle on."""
    if not count:
        return []
    found: list[list[int]] = []
    shared = Path(os.environ.get("LONGVERSE_SHARED", Path(__file__).parents[2] / "shared"))
    with gzip.open(shared / "corpora" / "en_novels.jsonl.gz", "rt") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if len(text) > 14 * tokens:
                found.append(engine.tokenizer.encode(text[len(text) // 2 :][: 7 * tokens])[:tokens])
            if len(found) == count:
                return found
    raise SystemExit(
        f"The corpora hold {len(found)} novels of {tokens:,} tokens and more, and --novels asks for {count}."
    )


def read(engine: Engine, ids: list[int], attention: str) -> tuple[float, torch.Tensor, Session]:
    """Seconds of reading, log probabilities [SCORED, V] of what follows each of the last tokens, the session."""
    network = engine.network
    session = engine.session(len(ids) + 1 + WRITTEN, attention=attention)

    def run() -> None:
        nonlocal hidden
        session.read(ids[:-SCORED])
        place = torch.arange(session.cache.length, len(ids))[None]
        hidden = network.model(torch.tensor([ids[-SCORED:]]), place, session.cache.rope_length, session.cache.attend)
        session.cache.advance(SCORED)
        session.tokens.extend(ids[-SCORED:])

    hidden = torch.empty(0)
    with torch.inference_mode():
        took = seconds(run)
        return took, network.lm_head(hidden[0]).float().log_softmax(-1), session


def write(session: Session, ids: list[int]) -> float:
    """Seconds for each of WRITTEN tokens."""
    return seconds(lambda: [session._next(token) for token in ids[:WRITTEN]]) / WRITTEN


@dataclass
class Reader(EngineBackend):
    """An engine that notes how it read the documents it is asked about: seconds, and what sparse reading counted."""

    readings: list[tuple[float, Any]] = field(default_factory=list)

    def answer(self, request: Request) -> Reply:
        reply = super().answer(request)
        assert self._session is not None
        if 2 * (reply.reused_tokens or 0) < len(self._session.tokens):
            self.readings.append((self._session.stats.prefill_seconds, self._session.cache.sparse))
        return reply


def needles(engine: Engine, length: int, attention: str, options: argparse.Namespace) -> tuple[float | None, Reader]:
    """Share found of `options.facts` facts a document, at even depths, in `options.repeats` documents; its reader."""
    depths = tuple(n / (options.facts - 1) for n in range(options.facts))
    settings = NeedleSettings(lengths=(length,), depths=depths, repeats=options.repeats)
    reader = Reader(engine, attention)
    found = run_needle(reader, settings).found() if options.needles else None
    reader._session = None  # frees its cache
    return found, reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8000, 16000, 32000, 64000])
    parser.add_argument("--dials", nargs="+", default=["0.95", "0.8", "0.9:0.1"])
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--novels", type=int, default=0)
    parser.add_argument("--needles", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="documents of the needle test")
    parser.add_argument("--facts", type=int, default=5, help="in each of them, 2 or more")
    parser.add_argument("--model", default="smol")
    parser.add_argument("--rope")
    parser.add_argument("--name", help="an ending for the result file")
    options = parser.parse_args()
    if options.facts < 2:
        parser.error("--facts must be 2 or more")
    if not (options.texts or options.novels or options.needles):
        parser.error("--texts 0 reads nothing without --needles")
    engine = Engine.load(options.model, device="cpu", rope=options.rope, window=max(options.lengths) + 1000)
    for attention in ("exact", "sparse:0.9"):  # kernels are compiled, loaded and weights rounded before anything counts
        ids = documents(engine, 1500, 1)[0]
        write(read(engine, ids, attention)[2], ids)
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        made = documents(engine, length, options.texts)
        texts = made + novels(engine, length, options.novels)
        exact, written = [], []
        for ids in texts:
            took, following, session = read(engine, ids, "exact")
            exact.append((took, following))
            written.append(write(session, ids))
        found, reader = needles(engine, length, "exact", options)
        base = mean([took for took, _ in exact or reader.readings])
        row: dict[str, Any] = {"tokens": length, "dial": "exact", "seconds": base, "times faster": 1.0}
        rows.append(row | {"ms a token": 1000 * mean(written) if written else None, "facts found": found})
        print(rows[-1], flush=True)
        for dial in options.dials:
            sparse = [read(engine, ids, f"sparse:{dial}") for ids in texts]
            found, reader = needles(engine, length, f"sparse:{dial}", options)
            took = mean([x[0] for x in sparse or reader.readings])
            stats: list[Any] = [x[2].cache.sparse for x in sparse] or [counted for _, counted in reader.readings]
            row = {"tokens": length, "dial": dial, "seconds": took, "times faster": base / took, "facts found": found}
            row["blocks read"] = mean([x.density for x in stats])
            row["mass kept"] = mean([x.mass_kept for x in stats])
            if sparse:
                lost = [kl(e[1], s[1]) for e, s in zip(exact, sparse, strict=True)]
                for key, some in (("KL, made text", lost[: len(made)]), ("KL, novel", lost[len(made) :])):
                    row[key] = mean(some) if some else None
                row["ms a token"] = 1000 * mean([write(x[2], ids) for x, ids in zip(sparse, texts, strict=True)])
                row["mass written"] = mean([x.mass_written for x in stats])
            rows.append(row)
            print(row, flush=True)
    header = [
        "tokens", "dial", "seconds", "times faster", "blocks read", "mass kept", "KL, made text", "KL, novel",
        "ms a token", "mass written", "facts found",
    ]  # fmt: skip
    form = {
        "tokens": "{:,}",
        "seconds": "{:.1f}",
        "times faster": "{:.2f}",
        "blocks read": "{:.1%}",
        "mass kept": "{:.2%}",
        "mass written": "{:.2%}",
        "ms a token": "{:.1f}",
    }
    form |= {"KL, made text": "{:.3f}", "KL, novel": "{:.3f}", "facts found": "{:.0%}", "dial": "{}"}
    print(
        table(
            header,
            [[form[key].format(row[key]) if row.get(key) is not None else "–" for key in header] for row in rows],
        )
    )
    about = {"model": options.model, "rope": options.rope, "facts": options.facts, "repeats": options.repeats}
    name = f"sparse_quality_{options.name}" if options.name else "sparse_quality"
    print(write_results(name, about | {"rows": rows}))


if __name__ == "__main__":
    main()
