"""What every benchmark shares: the machine in the results, results written whole, a plain table."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The facts a figure depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        extras = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
    except (OSError, StopIteration):
        model, extras = platform.processor(), []
    facts = {"cpu": model, "cores": os.cpu_count(), "instructions": extras, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return {**facts, "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json with the machine in it, aside and then renamed."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    aside = path.with_suffix(".json.tmp")
    aside.write_text(json.dumps({"machine": machine(), **results}, indent=2, ensure_ascii=False) + "\n")
    aside.replace(path)
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, which also reads well in a terminal."""
    cells = [header, *rows]
    widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
