"""Tokenising the shared corpora into a store, beside `datasets.map`; building 200 instruction items offline.

    python benchmarks/data_speed.py                 # all corpora, 200 items of 32K-256K tokens
    python benchmarks/data_speed.py --share 0.05 --items 10

Both sides get the same documents, the same tokenizer (smol's) and the same number of processes, and leave ids on the
disk; ours also removes duplicates and writes the index, the mixture and the report. A side's time runs from the start
of its process until its last id is on the disk; nothing is read back within it. Each side runs in its own process,
and memory is the sum over its process tree of proportional set sizes, sampled every tenth of a second. `datasets` is
needed for the comparison (pip install datasets); without it the comparison is left out and said to be.
"""

import argparse
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORPORA = Path(os.environ.get("LONGVERSE_SHARED", ROOT / ".." / "shared")).resolve() / "corpora"
NAMES = ("en_novels", "zh_classics", "zh_laws")


def peak_memory(process: subprocess.Popen) -> list[float]:
    """Follow a process tree until it ends; the list's last entry is the highest sum in MB."""
    import psutil

    peak = [0.0]

    def follow() -> None:
        while process.poll() is None:
            total = 0
            try:
                root = psutil.Process(process.pid)
                for one in [root, *root.children(recursive=True)]:
                    try:
                        total += one.memory_full_info().pss
                    except psutil.Error:
                        continue
            except psutil.Error:
                break
            peak[0] = max(peak[0], total / 1e6)
            time.sleep(0.1)

    threading.Thread(target=follow, daemon=True).start()
    return peak


def timed(side: str, *arguments: str) -> dict:
    """Run one side of this file in a process of its own."""
    environment = os.environ | {"LONGVERSE_COMMAND": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    begin = time.time()
    process = subprocess.Popen(
        [sys.executable, __file__, "--side", side, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    peak = peak_memory(process)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{side} failed")
    made = json.loads(output.splitlines()[-1])
    return {"seconds": round(made.pop("ended") - begin, 1), "peak_memory_mb": round(peak[0]), **made}


def ours(folder: Path, processes: int) -> dict:
    from longverse.data.config import build
    from longverse.data.corpus import CorpusConfig, build_corpus

    sources = [{"name": name, "path": str(folder / f"{name}.jsonl.gz")} for name in NAMES]
    out = folder / "store"
    store = build_corpus(build(CorpusConfig, {"out": str(out), "sources": sources, "processes": processes}), folder)
    return {"ended": time.time(), "tokens": store.tokens, "documents": len(store)}


def theirs(folder: Path, processes: int) -> dict:
    import datasets
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    end = json.loads((folder / "end.json").read_text())
    datasets.disable_progress_bars()

    def tokenise(batch: dict) -> dict:
        return {"ids": [[*e.ids, end] for e in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}

    files = [str(folder / f"{name}.jsonl.gz") for name in NAMES]
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(folder / "cache"))
    made = rows.map(
        tokenise, batched=True, batch_size=16, num_proc=processes, remove_columns=rows.column_names,
        features=datasets.Features({"ids": datasets.Sequence(datasets.Value("int32"))}), writer_batch_size=16,
    )  # fmt: skip
    ended = time.time()  # what follows only checks that both sides made the same tokens
    tokens = sum(len(ids) for batch in made.with_format("numpy").iter(64) for ids in batch["ids"])
    return {"ended": ended, "tokens": tokens, "documents": len(made)}


def items(folder: Path, processes: int, count: int) -> dict:
    from longverse.data.config import build
    from longverse.data.long_sft.builder import build_sft
    from longverse.data.long_sft.plan import SftConfig

    library = str(Path(json.__file__).parent.parent)
    code = {
        "name": "code", "path": library, "suffixes": [".py"], "language": "code",
        "exclude": ["site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib"],
    }  # fmt: skip
    sources = [{"name": name, "path": str(folder / f"{name}.jsonl.gz")} for name in NAMES]
    settings = {"out": str(folder / "items"), "items": count, "sources": [*sources, code], "processes": processes}
    report = build_sft(build(SftConfig, settings), folder).report
    return {"ended": time.time(), "items": report["items"], "tokens": report["tokens"], "by_task": report["by_task"]}


def prepare(folder: Path, share: float) -> float:
    """The chosen share of each corpus and the tokenizer, in `folder`; returns megabytes of text."""
    from longverse.data.vocabulary import load_vocabulary

    size = 0
    for name in NAMES:
        with gzip.open(CORPORA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = lines.readlines()
        rows = rows[: max(1, round(len(rows) * share))]
        # Documents with the fields both sides read; the same files for both.
        rows = [json.dumps({k: json.loads(row)[k] for k in ("id", "text")}, ensure_ascii=False) + "\n" for row in rows]
        size += sum(len(json.loads(row)["text"].encode()) for row in rows)
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as file:
            file.writelines(rows)
    vocabulary = load_vocabulary("smol")
    vocabulary.tokenizer.save(folder / "tokenizer")
    (folder / "end.json").write_text(str(min(vocabulary.tokenizer.eos_ids)))
    return size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="share of each corpus")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/data_speed.json")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.side:
        work = {"ours": ours, "theirs": theirs}.get(options.side)
        arguments = (options.folder, options.processes)
        print(json.dumps(work(*arguments) if work else items(*arguments, options.items)))
        return
    if not CORPORA.exists():
        raise SystemExit(f"{CORPORA} is missing; set LONGVERSE_SHARED to the folder that holds corpora/.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        megabytes = prepare(folder, options.share)
        common = ("--folder", name, "--processes", str(options.processes))
        results: dict = {"megabytes": round(megabytes, 1), "processes": options.processes, "tokenizer": "smol"}
        results["longverse"] = timed("ours", *common)
        if importlib.util.find_spec("datasets"):
            results["datasets"] = timed("theirs", *common)
            results["times_faster"] = round(results["datasets"]["seconds"] / results["longverse"]["seconds"], 2)
        else:
            results["datasets"] = "not installed: pip install datasets"
        if options.items:
            results["items"] = timed("items", *common, "--items", str(options.items))
    print(json.dumps(results, indent=2))
    if options.write:
        from benchmarks.common import write_results

        print(f"written to {write_results('data_speed', results)}")


if __name__ == "__main__":
    main()
