"""The commands that train: extend (a recipe, all its stages) and finetune (LoRA on one's own conversations).

Plain functions for the command line's app to mount. Everything heavy is imported inside them. Both can be stopped with
Ctrl-C or SIGTERM and go on when the same command is given again.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .errors import UserError, expand
from .plan import gigabytes

if TYPE_CHECKING:
    from .train.config import Recipe, Stage
    from .train.doctor import Finding
    from .train.forecast import Forecast
    from .train.probe import Figures
    from .train.run import Outcome, Watch
    from .train.trainer import StepReport

# Seconds between step lines: a fiftieth of the time gone by. The first and last of a stage are always shown.
LEAST, MOST = 5.0, 60.0
Model = Annotated[str, typer.Argument(help="A model name, a checkpoint folder, a .gguf file or a hub id (owner/name).")]
Out = Annotated[Path, typer.Option(help="Folder of the run: log, checkpoints, result. The same one goes on.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def extend(
    model: Model,
    recipe: Annotated[Path, typer.Option(help="The recipe, a YAML file.")],
    out: Out = Path("runs/extend"),
    device: Device = "auto",
    stages: Annotated[int | None, typer.Option(help="Stop after so many stages.", min=1)] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Only check and forecast the first stage.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Also write a whole checkpoint for a LoRA recipe.")] = False,
    stages_from: Annotated[
        Path | None, typer.Option(help="Another run's folder: first stages that are the same are taken over from it.")
    ] = None,
) -> None:
    """Extend a model's window by a recipe: RoPE change, continued pre-training, long instruction data.

    Each stage is checked and forecast before it begins and probed when it ends.
    For several processes: torchrun -m longverse_command.

    Example: longverse extend smol --recipe recipes/smol_cpu.yaml --out runs/smol
    """
    from .models.embedded import plain
    from .train.config import Recipe

    # An embedded model is extended as it comes, without the adapter that longverse has for it already.
    plan = Recipe.load(expand(recipe), model if expand(model).exists() else plain(model))
    _run(plan, out, device=device, stages=stages, dry=dry, write_merged=merge, stages_from=stages_from)


def finetune(
    model: Model,
    data: Annotated[Path, typer.Option(help='JSON lines, each {"messages": [{"role": ..., "content": ...}, ...]}.')],
    out: Out = Path("runs/finetune"),
    epochs: Annotated[float, typer.Option(help="How often each conversation is seen.", min=0.01)] = 2.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Conversations a step.", min=1)] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. [2e-4; with --full 2e-5]")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.", min=1)] = 16,
    max_tokens: Annotated[int | None, typer.Option(help="Leave longer ones out, else those past the window.")] = None,
    rope: Annotated[str | None, typer.Option(help="A RoPE change, such as abf:500000 or dynamic:2.")] = None,
    bits: Annotated[int | None, typer.Option(help="4: hold the frozen weights in 4 bits (QLoRA).")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of an adapter.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write a whole checkpoint, the adapter merged in.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Order of the data and first weights of the adapter.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a model on your own conversations. Only the answers are learned.

    Writes OUT/adapter, a model for every command's --model and for PEFT, or with --merge a whole checkpoint as well.

    Example: longverse finetune smol --data chats.jsonl --out runs/mine
    """
    from .data.config import build
    from .train.config import Recipe

    if full and bits:
        raise UserError("--bits holds frozen weights small and --full freezes none: leave one of them out.")
    lines = _count_lines(data)
    window = max_tokens or _window(model)
    total = steps or max(1, round(epochs * lines / batch))
    rate = learning_rate if learning_rate is not None else 2e-5 if full else 2e-4
    stage = {
        "name": "finetune", "data": [{"messages": str(expand(data).resolve())}], "steps": total, "batch": batch,
        "learning_rate": rate, "max_tokens": window, "rope": rope, "warmup": min(20, total // 10),
        "micro_tokens": min(4096, window),
    }  # fmt: skip
    values: dict[str, Any] = {
        "model": model, "name": out.name, "method": "full" if full else "lora",
        "lora": {"rank": rank, "bits": bits}, "seed": seed,
        "stages": [stage],
    }  # fmt: skip
    _run(build(Recipe, values, "the run"), out, device=device, write_merged=merge)


def _count_lines(path: Path) -> int:
    try:
        with expand(path).open("rb") as file:
            lines = sum(1 for line in file if line.strip())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a JSON-lines file with messages.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    if not lines:
        raise UserError(f"{path} is empty: it must hold one conversation a line.")
    return lines


def _window(model: str) -> int:
    from .models.checkpoint import open_model
    from .models.network import NetworkConfig

    return NetworkConfig.from_dict(open_model(model).config).window


# ---- what is shown ------------------------------------------------------------------------------------


def _run(recipe: Recipe, out: Path, **options: Any) -> None:
    from .train.run import Watch, run_recipe
    from .train.trainer import interruptible

    silent = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    with interruptible() as stop:
        screen = _Screen()
        try:
            outcome = run_recipe(recipe, out, watch=Watch(stop=stop) if silent else screen.watch(stop), **options)
        finally:
            screen.close()
    if not silent:
        _tell(outcome, out, options.get("dry", False))


def _tell(outcome: Outcome, out: Path, dry: bool) -> None:
    if dry:
        return
    if outcome.interrupted:
        console.note(f"Stopped after step {outcome.step} of stage {outcome.stage}; the same command goes on there.")
        raise SystemExit(130)
    from .train.plot import plot_log

    if (picture := plot_log(expand(out), outcome.probes)) is not None:
        console.line(f"Loss curve: {picture}")
    if not outcome.finished:
        console.note(f"Stage {outcome.stage} is done; the same command without --stages goes on with the next.")
    for what, place in (("Adapter", outcome.adapter), ("Checkpoint", outcome.model)):
        if place is not None:
            console.line(f"{what}: {place} (use it with --model {place})")


class _Screen:
    """Turns what a run tells into lines on standard error."""

    def __init__(self) -> None:
        self.task: console.Task | None = None
        self.begun = self.said = time.monotonic()
        self.title = ""

    def watch(self, stop: Any) -> Watch:
        from .train.run import Watch

        return Watch(
            note=console.note,
            progress=self.progress,
            findings=self.findings,
            planned=self.planned,
            step=self.step,
            probed=self.probed,
            stop=stop,
        )

    def progress(self, title: str, done: int, total: int, unit: str) -> None:
        if title != self.title:
            self.close()
            self.task, self.title = console.Task(title, unit=unit), title
        assert self.task is not None
        self.task(done, total)

    def close(self) -> None:
        if self.task is not None:
            self.task.close()
            self.task = None
        self.title = ""

    def findings(self, stage: Stage, findings: list[Finding]) -> None:
        self.close()
        for finding in findings:
            self.say(f"{'ok' if finding.passed else 'FAILED':6} {finding.name}: {finding.detail}")

    def planned(self, stage: Stage, forecast: Forecast) -> None:
        parts = [
            f"{forecast.steps:,} steps, {forecast.tokens:,} tokens, the longest example {forecast.longest:,}",
            f"about {console.duration(forecast.seconds)}",
            f"{gigabytes(forecast.total_bytes)} ({gigabytes(forecast.weight_bytes)} weights,"
            f" {gigabytes(forecast.optimizer_bytes)} optimizer, {gigabytes(forecast.activation_bytes)} activations)"
            f" of {gigabytes(forecast.available_bytes)} free",
        ]
        self.say(f"Stage {stage.name}: {'; '.join(parts)}.")

    def step(self, report: StepReport) -> None:
        now = time.monotonic()
        wait = min(MOST, max(LEAST, (now - self.begun) / 50))
        if report.step not in (1, report.steps) and now - self.said < wait:
            return
        self.said = now
        parts = (
            f"{report.stage} {report.step}/{report.steps}",
            f"loss {report.loss:.4f}",
            f"{report.tokens_per_second:,.0f} tok/s",
            f"{report.gflops:,.0f} GFLOP/s" + (f" ({100 * report.mfu:.0f} % MFU)" if report.mfu else ""),
            f"longest {report.longest:,}",
            f"lr {report.learning_rate:.1e}",
            f"norm {report.gradient_norm:.2f}",
            gigabytes(report.peak_memory_bytes),
            f"{console.duration(report.seconds_left)} left",
        )
        self.say("  ".join(parts))

    def probed(self, stage: Stage, steps: int, figures: Figures) -> None:
        self.close()
        when = f"after {stage.name}" if steps == stage.steps else f"after step {steps} of {stage.name}"
        for language, row in figures.found.items():
            cells = ", ".join(f"{int(n):,}: {_share(share)}" for n, share in row.items())
            self.say(f"Facts found {when} ({language}): {cells}")
        if figures.loss:
            (first, _, near), (_, last, far) = figures.loss[0], figures.loss[-1]
            self.say(
                f"Loss of held-out text {when}: {figures.mean_loss:.4f} nats a token; {near:.4f} from position"
                f" {first:,} on, {far:.4f} up to {last - 1:,}"
            )

    def say(self, text: str) -> None:
        console.err().print(text, markup=False, highlight=False, soft_wrap=True)


def _share(share: float | None) -> str:
    return "no answer" if share is None else f"{100 * share:.0f} %"
