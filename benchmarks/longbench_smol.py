"""Two whole tasks of LongBench with smol-8k, by the benchmark's own protocol: multi_news and passage_retrieval_zh.

    python benchmarks/longbench_smol.py [--limit N] [--processes 2] [--keep FOLDER]

Reads ../shared/longbench (or $LONGVERSE_SHARED/longbench): config and two data files of 200 rows. --max-length is
7,500, so that prompt, template and 512 new tokens fit its 8,192. Takes hours on two cores; a stopped run goes on.
Writes benchmarks/results/longbench_smol.json and, with all rows, docs/longbench_smol.md. It was never
trained on Chinese and is small: the figures are weak, and theirs is only to be right.
"""

import argparse
import os
import tempfile
from pathlib import Path

from common import write_results

from longverse.evaluation.engine_backend import EngineProcesses
from longverse.evaluation.files import write_text
from longverse.evaluation.longbench import tables
from longverse.evaluation.longbench.runner import LongBenchRun
from longverse.evaluation.longbench.score import score_folder
from longverse.evaluation.longbench.tasks import read_config

ROOT = Path(__file__).parent.parent
TASKS = ("multi_news", "passage_retrieval_zh")
MAX_LENGTH = 7500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="only the first rows of each task")
    parser.add_argument("--processes", type=int, default=2, help="engines side by side")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "longverse-longbench")
    options = parser.parse_args()
    data = Path(os.environ.get("LONGVERSE_SHARED", ROOT / "../shared")) / "longbench"
    with EngineProcesses("smol-8k", processes=options.processes) as backend:
        model = backend.describe()
        scores = LongBenchRun(
            backend=backend,
            data=data,
            config=read_config(data / "config", TASKS),
            out=options.keep,
            tasks=TASKS,
            max_length=MAX_LENGTH,
            limit=options.limit,
            on_progress=lambda done, total: print(f"\r{done} of {total} rows", end="", flush=True),
        ).run()
    print()
    again = {s.task: s.score for s in score_folder(options.keep, tasks=TASKS)}
    assert again == {s.task: s.score for s in scores}, "the prediction files do not give the run's own scores"
    settings = {
        "max_length": MAX_LENGTH,
        "truncation": "middle",
        "limit": options.limit,
        "tasks": list(TASKS),
        "cut_rows": sum(s.cut or 0 for s in scores),
    }
    text = tables.markdown(scores, model="smol-8k", settings=settings)
    print(text)
    path = write_results("longbench_smol", tables.to_dict(scores, model=model, settings=settings))
    print(f"written: {path}")
    if options.limit is None and not any(s.failed or s.missing for s in scores):
        write_text(ROOT / "docs" / "longbench_smol.md", text)


if __name__ == "__main__":
    main()
