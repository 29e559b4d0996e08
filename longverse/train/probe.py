"""What a model can do while it is being trained: facts found by length, loss by position; and when a stage is to end.

A probe reads the network as it stands and changes nothing of it, so a run with probes has the losses of one without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.models.checkpoint import Loaded
from longverse.models.shards import read_json, write_json
from longverse.train.config import Probe
from longverse.train.lora import merged

UNLIMITED = 1 << 24  # tokens: the stated window is not enforced while it is being moved
LETTERS = 8  # characters of a text held for each wanted token


@dataclass(frozen=True)
class Figures:
    """found: share of facts by language and length, None where no answer came. loss: (first position, last one + 1,
    nats a token) of the held-out text. window: see config.Probe."""

    found: dict[str, dict[str, float | None]] = field(default_factory=dict)
    loss: list[tuple[int, int, float]] = field(default_factory=list)
    window: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Figures:
        loss = [(int(a), int(b), float(nats)) for a, b, nats in values.get("loss", [])]
        return cls(values.get("found", {}), loss, int(values.get("window", 0)))

    @property
    def mean_loss(self) -> float | None:
        """Nats a token over all positions; None without a text."""
        tokens = sum(end - begin for begin, end, _ in self.loss)
        return sum((end - begin) * nats for begin, end, nats in self.loss) / tokens if tokens else None


class Prober:
    """Measures a run's network. cancelled: asked between questions and stretches; a probe cut off counts for none."""

    def __init__(self, plan: Probe, loaded: Loaded, cancelled: Callable[[], bool] = lambda: False) -> None:
        self.plan, self.loaded, self.cancelled = plan, loaded, cancelled
        self._ids = _held_out(plan, loaded) if plan.text is not None else []

    def after_stage(self, path: Path) -> Figures | None:
        """The figures of a finished stage, kept in a file with every single answer; None when cancelled."""
        if path.exists():
            return Figures.from_dict(read_json(path))
        if (measured := self.measure()) is None:
            return None
        figures, details = measured
        write_json(path, {"found": figures.found, "loss": figures.loss, "window": figures.window, **details})
        return figures

    def measure(self) -> tuple[Figures, dict[str, Any]] | None:
        """Figures and the answers behind them; None when cancelled."""
        from longverse.evaluation.engine_backend import EngineBackend
        from longverse.inference.engine import Engine

        network, loaded = self.loaded.network, self.loaded
        training = network.training
        network.eval()
        try:
            with merged(network):
                engine = Engine(network, loaded.tokenizer, loaded.chat, loaded.name, loaded.config, window=UNLIMITED)
                backend = EngineBackend(engine)
                found, details = self._needles(backend) if self.plan.lengths else ({}, {})
                loss = self._loss(backend) if self._ids else []
        finally:
            network.train(training)
        if found is None or loss is None or self.cancelled():
            return None
        return Figures(found, loss, window(self.plan, found)), details

    def _needles(self, backend: Any) -> tuple[dict[str, dict[str, float | None]] | None, dict[str, Any]]:
        from longverse.evaluation.needle import NeedleSettings, run_needle

        languages = ("en", "zh") if self.plan.chinese else ("en",)
        each = max(1, self.plan.facts // len(languages))
        depths = tuple((n + 0.5) / each for n in range(each))
        settings = NeedleSettings(tuple(sorted(self.plan.lengths)), depths, languages, repeats=1)
        result = run_needle(backend, settings, cancelled=self.cancelled)
        if self.cancelled():
            return None, {}
        found: dict[str, dict[str, float | None]] = {}
        for language in languages:
            grid = result.grid(language)
            columns = [[row[n] for row in grid if row[n] is not None] for n in range(len(settings.lengths))]
            found[language] = {
                str(length): sum(column) / len(column) if column else None  # type: ignore[arg-type]
                for length, column in zip(settings.lengths, columns, strict=True)
            }
        return found, {"result": result.to_dict()}

    def _loss(self, backend: Any) -> list[tuple[int, int, float]] | None:
        from longverse.evaluation.perplexity import loss_by_position

        def go_on(done: int, total: int) -> None:
            if self.cancelled():
                raise _Cancelled

        length = min(self.plan.text_tokens, len(self._ids))
        try:
            result = loss_by_position(
                backend, self._ids, length=length, texts=self.plan.texts, blocks=8, on_progress=go_on
            )
        except _Cancelled:
            return None
        return [(begin, end, round(nats, 5)) for begin, end, nats, _ in result.blocks]


class _Cancelled(Exception):
    """A signal came between two questions."""


def _held_out(plan: Probe, loaded: Loaded) -> list[int]:
    """Ids of the end of the probe's text."""
    from longverse.train.new import read_texts

    assert plan.text is not None
    wanted = plan.text_tokens * plan.texts
    text = ""
    for part in read_texts(Path(plan.text)):
        text = (text + "\n" + part)[-LETTERS * wanted :]
    ids = loaded.tokenizer.encode(text)[-wanted:]
    if len(ids) < 16:
        raise UserError(f"The probe's text {plan.text} has {len(ids)} tokens: give a longer one, or leave it out.")
    return ids


def window(plan: Probe, found: dict[str, dict[str, float | None]]) -> int:
    """The longest of the probed lengths up to which enough facts are found at it and every shorter one; 0 for none."""
    reached = 0
    for length in sorted(plan.lengths):
        shares = [share for row in found.values() if (share := row.get(str(length))) is not None]
        if not shares or sum(shares) / len(shares) < plan.enough:
            break
        reached = length
    return reached


def has_stopped_growing(windows: list[int], patience: int) -> bool:
    """Whether the last `patience` probes of a stage brought no longer window than the ones before them did."""
    if not patience or len(windows) <= patience:
        return False
    before = max(windows[:-patience])
    return before > 0 and max(windows[-patience:]) <= before
