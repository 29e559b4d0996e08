"""What pages find, and what they cost: variants side by side over the same documents, then the chosen one by length.

    python benchmarks/pages.py variants [--length 32K] [--documents 3]      which way to choose pages
    python benchmarks/pages.py lengths [--lengths 32K,64K,128K,256K]            needles, several facts, two hops, speed
    python benchmarks/pages.py dense [--length 4K]                          the model's own score, exact attention
    python benchmarks/pages.py reports [--lengths 16000,32000] [--language zh]  citations.py's questions, both ways
    python benchmarks/pages.py all --quick                                  everything small, to see that it runs

Each document is read once and asked under every variant, so variants differ by the choice alone. Facts are those of
`longverse eval needle`; the haystack is English novels from $LONGVERSE_SHARED (default ../shared) where they are, else
generated prose. --model takes a name or a folder, --rope a change of plan, --adapter a LoRA folder to merge. Writes
benchmarks/results/pages_PART.json, which a later run with another --model does not touch when --name is given.
"""

import argparse
import gzip
import json
import os
import re
import resource
import time
from bisect import bisect_right
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command has it, before torch is imported

import torch
from common import table, write_results

from longverse.evaluation.backends import Reply, Request
from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.needle import NeedleSettings, run_needle
from longverse.inference.engine import Engine
from longverse.inference.pages import PagesSession, PagesSettings
from longverse.models.adapters import merge_adapter
from longverse.models.embedded import EMBEDDED

DEFAULT = PagesSettings()
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "every layer chooses": {"scope": "layer"},
    "every head chooses": {"scope": "head"},
    "pages of 32": {"page": 32},
    "pages of 128": {"page": 128},
    "pages of 256": {"page": 256},
    "a shortlist of 256 by the means": {"score": "two-step"},
    "a shortlist of 64 by the means": {"score": "two-step", "shortlist": 64},
    "means alone": {"score": "mean"},
    "bounds alone": {"score": "bounds"},
    "votes added": {"vote": "sum"},
    "nothing read anew": {"anew": 0},
    "votes added, nothing read anew": {"vote": "sum", "anew": 0},
    "all that have room read anew": {"least": 0.0},
    "read anew, 512 tokens": {"anew": 512},
    "read anew, 2,048 tokens": {"anew": 2048},
    "read anew, margins of 96": {"margin": 96},
    "positions clamped": {"positions": "clamped", "anew": 0},
    "budget 1,024": {"budget": 1024, "anew": 0},
    "budget 4,096": {"budget": 4096, "anew": 0},
    "newest 256": {"newest": 256},
    "distance 512": {"distance": 512},
    "distance 3,072": {"distance": 3072},
}
MODES = {"facts": 16, "several": 4, "hop": 9}  # mode and facts a document
REPORT_SHARES = {  # of citations.py's counts
    "right at first": ("answerable right at first", "answerable"),
    "after a second look": ("answerable right", "answerable"),
    "right paragraph cited": ("answerable cited", "answerable"),
    "no answer there: refused": ("unanswerable refused", "unanswerable"),
    "reworded: right at first": ("reworded right at first", "reworded"),
    "reworded: right in the end": ("reworded right", "reworded"),
}
# An answer may begin with the sentence before the fact.
NEW_TOKENS = {"facts": 48, "several": 64, "hop": 48}


@dataclass
class PagesBackend(EngineBackend):
    """An engine that answers with pages under `settings`, which may change between questions to one document."""

    attention: str = "pages"
    settings: PagesSettings = DEFAULT
    widest: PagesSettings = DEFAULT  # decides what is kept while reading and how many positions there are
    asked: list[dict[str, float]] = field(default_factory=list)
    chosen: list[torch.Tensor | None] = field(default_factory=list)  # of each question, [layers, G, count]

    def answer(self, request: Request) -> Reply:
        assert request.planned_tokens is not None
        session = self._session
        if not isinstance(session, PagesSession) or session.planned_tokens != request.planned_tokens:
            self._session = None
            self._session = session = PagesSession(self.engine, request.planned_tokens, settings=self.widest)
        session.pages = self.settings
        reply = super().answer(request)
        stats = session.stats
        self.asked.append({"read": stats.fresh_tokens, "first": stats.prefill_seconds, "rate": stats.decode_rate})
        self.chosen.append(session.chosen)
        return reply


def haystack(length: int) -> tuple[str | None, str]:
    """Novels enough for `length` tokens, and what to call them; None where the corpora are not."""
    path = Path(os.environ.get("LONGVERSE_SHARED", "../shared")) / "corpora" / "en_novels.jsonl.gz"
    if not path.exists():
        return None, "generated"
    texts: list[str] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            if sum(map(len, texts)) > 8 * length + 1_000_000:
                break
    return "\n\n".join(texts), "novels"


def settings_for(mode: str, length: int, document: int) -> NeedleSettings:
    """One document. Each begins in another novel, and holds other facts."""
    text, name = haystack(length)
    if text is not None:
        begin = document * 300_000 % 1_000_000
        text = text[text.index("\n", begin) :]
    count = MODES[mode]
    depths = tuple((n + 0.5) / count * 0.9 for n in range(count))  # the newest tokens would be too easy
    return NeedleSettings(
        lengths=(length,), depths=depths, mode=mode, repeats=1, max_new_tokens=NEW_TOKENS[mode], seed=document,
        haystack=text, haystack_name=name,
    )  # fmt: skip


def load(options: argparse.Namespace) -> Engine:
    engine = Engine.load(options.model, rope=options.rope, window=options.window)
    if options.adapter:
        for note in merge_adapter(engine.network, options.adapter):
            print(note)
        engine.window = options.window or engine.network.config.window
        engine.name = f"{engine.name} + {Path(options.adapter).name}"
    return engine


def ask_all(backend: EngineBackend, settings: NeedleSettings) -> list[dict[str, Any]]:
    if isinstance(backend, PagesBackend):
        backend.asked.clear()
        backend.chosen.clear()
    trials = [asdict(t) for t in run_needle(backend, settings).trials]
    kept = [{key: t[key] for key in ("kind", "depth", "expected", "answer", "score", "seconds")} for t in trials]
    if isinstance(backend, PagesBackend) and len(backend.chosen) == len(trials):
        for one, trial, chosen in zip(kept, trials, backend.chosen, strict=True):
            one["seen"] = seen(backend, trial, chosen, settings.mode)
    return kept


def seen(backend: PagesBackend, trial: dict[str, Any], chosen: torch.Tensor | None, mode: str) -> float | None:
    """The share of layers that had the page with the fact's value before them (of two facts: the second's); None where
    it is no page (first or newest tokens)."""
    session = backend._session
    assert isinstance(session, PagesSession)
    ends: list[int] = []  # characters up to and with each token
    pieces: list[str] = []
    for token in session.tokens:
        pieces.append(session.engine.tokenizer.decode([token], skip_special=False))
        ends.append((ends[-1] if ends else 0) + len(pieces[-1]))
    text = "".join(pieces)
    depth = trial["measured_depth"]
    if mode == "hop":
        depth = depth + 0.5 if trial["depth"] <= 0.5 else depth - 0.5
    places = [match.start() for match in re.finditer(re.escape(trial["expected"]), text)]
    if not places or chosen is None:
        return None
    at = min(places, key=lambda place: abs(place - depth * len(text)))
    page = (bisect_right(ends, at) - backend.settings.first) // backend.settings.page
    far = (len(session.tokens) - backend.settings.newest - backend.settings.first) // backend.settings.page
    return (chosen == page).any(-1).float().mean().item() if 0 <= page < far else None


def right(trials: list[dict[str, Any]]) -> str:
    shares = [t["seen"] for t in trials if t.get("seen") is not None]
    share = f" (seen {100 * sum(shares) / len(shares):.0f} %)" if shares else ""
    return f"{sum(t['score'] or 0 for t in trials):.0f} of {len(trials)}{share}"


def variants(engine: Engine, length: int, documents: int, names: list[str], modes: list[str]) -> dict[str, Any]:
    chosen = {name: replace(DEFAULT, **VARIANTS[name]) for name in names}
    most = max(chosen.values(), key=lambda s: s.reach)
    score = "bounds" if any(s.score == "bounds" for s in chosen.values()) else DEFAULT.score
    backend = PagesBackend(engine, widest=replace(most, score=score))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {mode: [] for mode in modes} for name in names}
    first: dict[str, list[float]] = {name: [] for name in names}
    for document in range(documents):
        for mode in modes:
            for name, settings in chosen.items():
                backend.settings = settings
                found[name][mode] += ask_all(backend, settings_for(mode, length, document))
                first[name] += [a["first"] for a in backend.asked if a["read"] < 1000]
            print(
                f"document {document + 1}, {mode}: " + ", ".join(f"{n} {right(found[n][mode])}" for n in names),
                flush=True,
            )
    rows = [
        [name, *(right(found[name][mode]) for mode in modes), f"{sum(first[name]) / max(1, len(first[name])):.2f} s"]
        for name in names
    ]
    print(table([f"{engine.name}, {length:,} tokens", *modes, "to the first token"], rows))
    return {"length": length, "documents": documents, "settings": asdict(DEFAULT), "variants": found, "first": first}


def lengths(engine: Engine, sizes: list[int], documents: int, modes: list[str]) -> dict[str, Any]:
    rows, results = [], []
    for length in sizes:
        backend = PagesBackend(engine)
        row = [f"{length:,}"]
        asked: list[dict[str, float]] = []
        record: dict[str, Any] = {"length": length}
        for mode in modes:
            trials = []
            for document in range(documents):
                trials += ask_all(backend, settings_for(mode, length, document))
                asked += [dict(a) for a in backend.asked]
            record[mode] = trials
            row.append(right(trials))
        reading = [a for a in asked if a["read"] >= 1000]
        record["microseconds a token"] = 1e6 * sum(a["first"] for a in reading) / sum(a["read"] for a in reading)
        record["first token"] = max((a["first"] for a in asked if a["read"] < 1000), default=float("nan"))
        record["asked"] = asked
        record["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far
        results.append(record)
        rows.append([*row, f"{record['microseconds a token']:.0f} µs", f"{record['first token']:.2f} s"])
        print(f"{length:,}: {rows[-1][1:]}", flush=True)
    print(table([engine.name, *modes, "reading a token", "slowest first token"], rows))
    return {"settings": asdict(DEFAULT), "lengths": results}


def dense(engine: Engine, length: int, documents: int, modes: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"length": length}
    for mode in modes:
        backend = EngineBackend(engine)
        record[mode] = [t for d in range(documents) for t in ask_all(backend, settings_for(mode, length, d))]
        print(f"{engine.name}, exact attention, {length:,} tokens, {mode}: {right(record[mode])}", flush=True)
    return record


def reports(engine: Engine, sizes: list[int], count: int, language: str, again: bool) -> dict[str, Any]:
    """The questions of benchmarks/citations.py over the same generated reports, read by pages and read exactly."""
    import citations

    rows: list[dict[str, Any]] = []
    for length in sizes:
        for way in ("pages", "exact"):
            asker = copy(engine)
            asker.session = partial(engine.session, attention=way)  # type: ignore[method-assign]
            kept = f"{engine.name} None {citations.digest(judges=False)}"  # as in citations.py, which shares them
            kept += f" {DEFAULT}" if way == "pages" else ""
            tally = citations.Tally()
            for report in range(count):
                seed = citations.SEED + report
                made = citations.answered(asker, length, seed, citations.QUESTIONS, language, kept, again)
                citations.measure(engine, made, tally)
            row: dict[str, Any] = {"tokens": length, "language": language, "read": way}
            row |= {name: tally.share(*parts) for name, parts in REPORT_SHARES.items()}
            rows.append(row | {"counts": dict(tally.counts), "misses": tally.misses})
            print({key: value for key, value in row.items() if key != "misses"}, flush=True)
    shown = [
        [f"{row['tokens']:,}", row["read"], *("–" if row[n] is None else f"{row[n]:.0%}" for n in REPORT_SHARES)]
        for row in rows
    ]
    print(table([f"{engine.name}, {language}", "read", *REPORT_SHARES], shown))
    return {"settings": asdict(DEFAULT), "rows": rows}


def number(text: str) -> int:
    text = text.strip().lower()
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("variants", "lengths", "dense", "reports", "all"))
    parser.add_argument("--model", default="smol")
    parser.add_argument("--rope", help="such as abf:1000000")
    parser.add_argument("--adapter", help="a LoRA folder to merge")
    parser.add_argument("--window", type=number, help="trained window, where the model states another")
    parser.add_argument("--length", type=number, help="of variants (32K) and dense (4K)")
    parser.add_argument("--lengths", default="32K,64K,128K,256K")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--language", default="en", help="of reports")
    parser.add_argument(
        "--again", action="store_true", help="ask reports anew: after a change of the engine or of pages"
    )
    parser.add_argument("--only", help="variants by name, separated by semicolons")
    parser.add_argument("--quick", action="store_true", help="one short document each")
    parser.add_argument("--name", default="", help="an ending for the result files")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    modes = options.modes.split(",")
    sizes = [number(text) for text in options.lengths.split(",")]
    documents = options.documents
    if options.quick:
        documents, sizes, options.length, modes = 1, [6000, 8000], options.length or 8000, ["facts"]
        VARIANTS["budget 4,096"] = {"budget": 3072}  # leaves something to choose
    names = [name.strip() for name in options.only.split(";")] if options.only else list(VARIANTS)
    engine = load(options)
    parts = ("dense", "variants", "lengths") if options.part == "all" else (options.part,)
    for part in parts:
        begin = time.perf_counter()
        if part == "dense":
            result = dense(engine, options.length or 4096, documents, modes)
        elif part == "reports":
            if options.model not in EMBEDDED or options.rope or options.adapter:
                parser.error("reports asks an embedded model as it comes: what it answered is kept by its name")
            result = reports(engine, sizes, documents, options.language, options.again)
        elif part == "variants":
            result = variants(engine, options.length or 32768, documents, names, modes)
        else:
            result = lengths(engine, sizes, documents, modes)
        about = {"model": engine.name, "rope": engine.network.config.rope.describe(), "window": engine.window}
        ending = f"_{options.name}" if options.name else ""
        if not options.quick:
            path = write_results(f"pages_{part}{ending}", about | result)
            print(f"written: {path}")
        print(f"{part}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
