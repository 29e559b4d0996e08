"""The loop: a stage of a recipe, from its first step to its last, on one rank or many.

A step is: take its examples, lay them in rows, forward and backward each row, clip, update. The loss of a step is the
weighted mean over all labels of all its examples, whatever rows and ranks they were spread over.

Which examples a step takes is a function of (seed, step), and a checkpoint holds weights, moments and random state;
so a run killed anywhere goes on from its last checkpoint as if nothing had happened, on CPU (with as many threads) bit
for bit.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from longverse.errors import UserError
from longverse.models.shards import replacing
from longverse.train import parallel
from longverse.train.config import Recipe, Stage
from longverse.train.examples import Mixture
from longverse.train.forward import LossModel, training_flops
from longverse.train.muon import Muon, is_turned
from longverse.train.parallel import Ranks
from longverse.train.rows import make_rows
from longverse.train.state import save_state, trained


@dataclass(frozen=True)
class StepReport:
    """One line of log.jsonl. loss: weighted mean of the step; rates over the step's wall time, all ranks together."""

    stage: str
    step: int  # steps done, this one included
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    labels: int
    longest: int  # tokens of the longest example
    rows: int  # of one rank
    seconds: float
    tokens_per_second: float
    gflops: float  # achieved, 10^9 floating-point operations a second
    mfu: float  # their share of what the processors can do, 0 where that is not known
    peak_memory_bytes: int
    seconds_left: float  # of this stage, from the last steps' cost and the coming steps' lengths


@dataclass
class StageEnd:
    """How a stage ended: after how many steps, and whether a signal stopped it. early: its window grew no longer."""

    steps: int
    interrupted: bool
    checkpoint: Path | None
    early: bool = False


OnStep = Callable[[StepReport], None]


def make_optimizer(model: LossModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), or with it Muon for the matrices of the layers. Norms and
    biases, all that has one dimension, decay not."""
    parameters = trained(model.network)
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    matrices = [p for name, p in parameters.items() if is_turned(name, p)]
    tables = [p for name, p in parameters.items() if p.ndim > 1 and not is_turned(name, p)]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay, "muon": recipe.optimizer == "muon"},
        {"params": tables, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind = Muon if recipe.optimizer == "muon" else torch.optim.AdamW
    return kind([group for group in groups if group["params"]], lr=1.0, betas=(recipe.beta1, recipe.beta2), eps=1e-8)


def train_stage(
    model: LossModel,
    optimizer: torch.optim.Optimizer,
    mixture: Mixture,
    stage: Stage,
    recipe: Recipe,
    out: Path,
    *,
    number: int = 0,
    first_step: int = 0,
    ranks: Ranks | None = None,
    on_step: OnStep | None = None,
    follow: Callable[[int], bool] | None = None,
    stop: Callable[[], bool] = lambda: False,
    state: dict[str, Any] | None = None,
    peak_flops: float = 0.0,
) -> StageEnd:
    """Run a stage from `first_step` (steps already done) on. Writes OUT/log.jsonl and OUT/checkpoints.

    number      of the stage in its recipe
    follow      called with the steps done before each step; True ends the stage there
    stop        asked between rows; True ends the run after the last whole step, with a checkpoint
    state       what every checkpoint is to say beside the step
    peak_flops  operations a second that one rank's processor can do, 0 when not known
    Raises UserError when a loss is not finite: nothing was updated by then, and the last checkpoint stands.
    """
    ranks = ranks or Ranks()
    state = state or {}
    model.train()
    shape, full = model.network.config, recipe.method == "full"
    parameters = list(trained(model.network).values())
    costs = [_cost(lengths) for lengths in mixture.lengths()]
    clock = _Clock(costs[first_step:])
    log = Log(out / "log.jsonl") if ranks.rank == 0 else None
    checkpoint: Path | None = None

    def save(steps: int, early: bool = False) -> Path:
        here = {**state, "step": steps, "fingerprint": recipe.fingerprint(), "early": early}
        place = (number, stage.name)
        return save_state(out / "checkpoints", place, model.network, optimizer, here, rank=ranks.rank, keep=recipe.keep)

    for step in range(first_step, stage.steps):
        if follow is not None and follow(step):
            return StageEnd(step, False, save(step, early=True), early=True)
        started = time.perf_counter()
        rows, total = make_rows(mixture.step(step), stage.weighting, stage.micro_tokens, ranks.data_rank, ranks.data)
        losses: list[tuple[Tensor, tuple[str, ...]]] = []
        tokens = labels = squares = 0
        interrupted = False
        for n, row in enumerate(rows):
            if ranks.world == 1 and stop():
                interrupted = True
                break
            tokens += row.tokens
            labels += len(row.places)
            squares += row.squares
            part = parallel.split(row, ranks).to(ranks.device)
            parallel.synchronise(model, ranks, now=n == len(rows) - 1)
            nll = model(
                part,
                parallel.attention(part, ranks),
                recompute=row.tokens > stage.recompute_above,
                offload=stage.offload,
            )
            # Sharded ranks average their gradients, so each is scaled up by their number.
            (nll * (ranks.world / total)).backward()
            losses.append((nll.detach(), row.names))
        if interrupted:
            optimizer.zero_grad(set_to_none=True)
            return StageEnd(step, True, save(step))

        loss = ranks.sum(float(sum(nll for nll, _ in losses)))[0] / total
        limit = recipe.clip if recipe.clip > 0 else math.inf
        norm = float(parallel.whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = [name for nll, names in losses if not bool(torch.isfinite(nll)) for name in names]
            raise UserError(_not_finite(stage, step, loss, ranks.gather(bad)))
        rate = stage.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        seconds = time.perf_counter() - started
        tokens_all, labels_all, squares_all, ask = ranks.sum(tokens, labels, squares, float(stop()))
        share = ranks.sequence  # ranks of one group counted the same rows
        tokens_all, labels_all, squares_all = tokens_all / share, labels_all / share, squares_all / share
        work = training_flops(shape, int(tokens_all), int(squares_all), int(labels_all), full)
        report = StepReport(
            stage.name,
            done,
            stage.steps,
            loss,
            rate,
            norm,
            int(tokens_all),
            int(labels_all),
            max(int(row.rope_length.max()) for row in rows),
            len(rows),
            seconds,
            tokens_all / seconds,
            work / seconds / 1e9,
            work / seconds / (peak_flops * ranks.world) if peak_flops else 0.0,
            peak_memory(ranks.device),
            clock.left(seconds),
        )
        if log is not None:
            log.write({"number": number, **asdict(report)})
        if on_step is not None:
            on_step(report)
        if ask or done % recipe.save_every == 0 or done == stage.steps:
            checkpoint = save(done)
        if ask and done < stage.steps:
            return StageEnd(done, True, checkpoint)
    return StageEnd(stage.steps, False, checkpoint)


def _not_finite(stage: Stage, step: int, loss: float, bad: list[str]) -> str:
    where = "; ".join(bad) or "the gradient, of finite losses"
    return (
        f"Stage {stage.name}, step {step + 1}: the loss is {loss} ({where}): training stopped before the"
        " update and the last checkpoint stands; lower learning_rate, or look at that data."
    )


def _cost(lengths: Any) -> float:
    """Relative time of a step's examples: linear work and attention, for the forecast of the time left."""
    return float((lengths * (1 + lengths / 16384)).sum())


class _Clock:
    """Forecasts the rest of a stage from the speed of its last steps, weighted by how long the examples to come are."""

    def __init__(self, costs: list[float]) -> None:
        self.costs, self.done = costs, 0
        self.recent: list[tuple[float, float]] = []

    def left(self, seconds: float) -> float:
        self.recent = [*self.recent, (self.costs[self.done], seconds)][-20:]
        self.done += 1
        cost = sum(c for c, _ in self.recent)
        return sum(self.costs[self.done :]) * sum(s for _, s in self.recent) / cost if cost else 0.0


class Log:
    """log.jsonl: a line for every step (a StepReport and the stage's number), and one for every probe on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def forget(self, after: tuple[int, int]) -> None:
        """Drop the lines past a checkpoint (stage number, steps done): those steps are done again. A line that a kill
        cut off goes too."""
        if self.path.exists():
            kept = [line for line in _lines(self.path) if (line["number"], line["step"]) <= after]
            with replacing(self.path) as aside:
                aside.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a log.jsonl, empty where there is none."""
    return [line for line in _lines(path) if "probe" not in line]


def read_probes(path: Path) -> list[dict[str, Any]]:
    """The probes of a log.jsonl: number, stage, step, and the figures as `probe`."""
    return [line for line in _lines(path) if "probe" in line]


def lines_before(path: Path, stage: int) -> list[dict[str, Any]]:
    """All lines of a log.jsonl that belong to the stages before the one of this number."""
    return [line for line in _lines(path) if line["number"] < stage]


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut off by a kill
            continue
    return lines


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """`with interruptible() as stop:` SIGTERM and Ctrl-C make stop() true; a second one ends the process as usual."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
        asked.append(number)

    try:
        for caught in (signal.SIGTERM, signal.SIGINT):
            before[int(caught)] = signal.signal(caught, ask)
    except ValueError:  # not the main thread: signals are someone else's
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, in bytes: of the process on CPU, of torch's allocations on a GPU."""
    from longverse.inference.engine import peak_memory as measured

    return measured(device)
