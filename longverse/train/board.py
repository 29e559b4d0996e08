"""A run's figures for TensorBoard, where it is installed: OUT/tensorboard beside log.jsonl.

    tensorboard --logdir runs

Steps are counted through all stages. What a run does again after a kill replaces what was written before.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from longverse.train.config import Recipe
from longverse.train.probe import Figures
from longverse.train.trainer import StepReport

SHOWN = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "gflops", "mfu", "longest", "peak_memory_bytes")


class Board:
    """Writes scalars; does nothing without TensorBoard. `done`: stage number and steps done when the run begins."""

    def __init__(self, folder: Path, recipe: Recipe, done: tuple[int, int]) -> None:
        self._before = [sum(stage.steps for stage in recipe.stages[:number]) for number in range(len(recipe.stages))]
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        first = self._before[done[0]] + done[1] if done[0] < len(self._before) else None
        self._writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def step(self, number: int, report: StepReport) -> None:
        """One training step of stage `number`."""
        if self._writer is not None:
            for name in SHOWN:
                self._writer.add_scalar(f"train/{name}", getattr(report, name), self._before[number] + report.step)

    def probe(self, number: int, step: int, figures: Figures) -> None:
        """Figures measured after `step` steps of stage `number`."""
        if self._writer is None:
            return
        at = self._before[number] + step
        for language, row in figures.found.items():
            for length, share in row.items():
                if share is not None:
                    self._writer.add_scalar(f"found {language}/{length}", share, at)
        for begin, end, nats in figures.loss:
            self._writer.add_scalar(f"loss by position/{begin}-{end - 1}", nats, at)
        if figures.found:
            self._writer.add_scalar("probe/window", figures.window, at)

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()
