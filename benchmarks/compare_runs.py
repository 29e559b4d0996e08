"""What several runs of a recipe lost on the way: mean losses around the same steps of the same stages.

    longverse extend build/tiny/base --recipe recipes/tiny_cpu.yaml --out runs/tiny          and a copy of the recipe
    longverse extend build/tiny/base --recipe adamw.yaml --out runs/tiny-adamw               without `optimizer`
    python benchmarks/compare_runs.py muon=runs/tiny adamw=runs/tiny-adamw --stages look base

Reads each run's log.jsonl. Writes benchmarks/results/compare_runs.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import table, write_results

from longverse.train.trainer import read_log

AROUND = 20  # steps before and after one: of examples this different a step's own loss says little


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--stages", nargs="+", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 250, 500, 750, 900, 1000, 1100])
    asked = parser.parse_args()
    runs = dict(run.split("=", 1) for run in asked.runs)
    rows = []
    for stage in asked.stages:
        for step in asked.steps:
            losses = {}
            for name, folder in runs.items():
                lines = [line for line in read_log(Path(folder) / "log.jsonl") if line["stage"] == stage]
                near = [line["loss"] for line in lines if abs(line["step"] - step) <= AROUND]
                losses[name] = sum(near) / len(near) if len(near) > AROUND else None
            if all(loss is not None for loss in losses.values()):
                rows.append({"stage": stage, "step": step, "losses": losses})
    settings = {name: json.loads((Path(folder) / "run.json").read_text())["recipe"] for name, folder in runs.items()}
    told = {
        name: {
            "optimizer": recipe.get("optimizer", "adamw"),
            "steps": {stage["name"]: stage["steps"] for stage in recipe["stages"]},
            "shape": {key: value for key, value in (recipe["new"] or {}).items() if key != "texts"},
        }
        for name, recipe in settings.items()
    }
    print(write_results("compare_runs", {"runs": told, "around": AROUND, "rows": rows}))
    cells = [[row["stage"], f"{row['step']:,}", *(f"{row['losses'][name]:.2f}" for name in runs)] for row in rows]
    print(table(["stage", "step", *runs], cells))


if __name__ == "__main__":
    main()
