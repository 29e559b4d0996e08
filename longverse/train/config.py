"""A recipe as a file: what is trained, on what, in which stages. Every field is checked when the recipe is built.

    model: smol
    method: lora
    stages:
      - name: sft
        rope: abf:1000000
        data: [{messages: train.jsonl}]
        max_tokens: 4K
        steps: 200

Relative paths start at the recipe's own folder. Token counts may be written as 32K (32,768) or 1M.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longverse.data.config import build, load_yaml, nearest, resolve
from longverse.errors import UserError
from longverse.train.new import NewModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = ("lora", "full")
PRECISIONS = ("auto", "bf16", "fp32")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant")
WEIGHTINGS = ("token", "sample", "answer")
ALSO = ("embeddings", "norms")


def _one_of(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise UserError(f"{what} {value!r} is not known{nearest(value, known)}")


def _at_least(value: float, least: float, what: str) -> None:
    if not value >= least:
        raise UserError(f"{what} is {value:g} and must be at least {least:g}.")


def _place(path: str, base: Path) -> str:
    return os.path.normpath(resolve(path, base))


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    rank     r; the adapter has r * (inputs + outputs) weights for each projection
    alpha    the update is scaled by alpha / rank; twice the rank when left out
    targets  projections that get an adapter
    also     trained in full beside it: embeddings (with the head), norms
    start    a folder with an adapter of this rank and these targets to begin with, instead of one that changes nothing;
             its RoPE plan is that of the first stage unless that one changes it
    bits     4 holds the frozen projections in int4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), a quarter of their
             memory, and makes each anew where it is used; when left out they stay as they are
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = PROJECTIONS
    also: tuple[str, ...] = ()
    start: str | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        _at_least(self.rank, 1, "The LoRA rank")
        if not self.targets:
            raise UserError(f"LoRA needs at least one target among {', '.join(PROJECTIONS)}.")
        for name in self.targets:
            _one_of(name, PROJECTIONS, "LoRA target")
        for name in self.also:
            _one_of(name, ALSO, "A part to train beside LoRA,")
        if self.bits not in (None, 4):
            raise UserError(f"LoRA's frozen weights can be held in 4 bits, not {self.bits}: write 4, or leave it out.")

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True)
class Source:
    """Where examples come from: exactly one of `messages`, `store` and `made`.

    messages  a JSON-lines file with a `messages` list a line: instruction data, trained on the answers
    store     a token store (`longverse data corpus`): text, trained on every token
    made      `copy` or `facts`: examples made on the way, new ones for ever (longverse.train.made): for small models
    texts     made facts only: the files that the facts are put into
    facts     made facts only: as many of them in a text at most; more of them teach more with the same tokens
    build     the configuration (`longverse data sft` or `corpus`) that makes `messages` or `store` when it is absent
    weight    its share of the examples, relative to the stage's other sources
    first     messages only: the weight of a conversation's first learned answer, beside 1 of every later one: it stands
              right below the document, as an answer to a single question does
    keep      text only: whether documents packed into a sequence stay invisible to each other
    """

    messages: str | None = None
    store: str | None = None
    made: str | None = None
    texts: tuple[str, ...] = ()
    facts: int = 6
    build: str | None = None
    weight: float = 1.0
    first: float = 1.0
    keep: bool = True

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.messages, self.store, self.made)) != 1:
            raise UserError("A data source needs exactly one of messages, store and made.")
        if self.build is not None and self.made is not None:
            raise UserError("A made source is not built: leave 'build' out.")
        if not self.weight > 0:
            raise UserError(f"The weight of a data source is {self.weight:g} and must be above 0.")
        if not self.first > 0:
            raise UserError(f"The weight of a data source's first answers is {self.first:g} and must be above 0.")
        if self.facts < 1:
            raise UserError(f"A data source has {self.facts} facts in a text and must have 1 or more.")
        if self.facts != 6 and self.made != "facts":
            raise UserError("Only made facts are counted: leave 'facts' out of another data source.")
        if self.first != 1 and self.messages is None:
            raise UserError("Only conversations have a first answer: leave 'first' out where the source is a text.")

    @property
    def label(self) -> str:
        """What a message calls it."""
        return str(self.messages or self.store or self.made)


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    rope             change of the RoPE plan before the stage begins (`abf:500000`, `dynamic:2`), see RopePlan.parse
    window           window in tokens that the checkpoint states afterwards; when left out, max_tokens, or the
                     model's own where that is longer
    min_tokens, max_tokens  examples outside are left out (and counted); text is cut into pieces of max_tokens
    steps, batch     optimizer steps, and examples (or text sequences) a step over all ranks
    micro_tokens     examples are packed into rows of at most so many tokens; a longer one has a row of its own
    learning_rate    peak; `warmup` steps rise to it, then `schedule` (cosine falls to `floor` of it, constant stays)
    weighting        every labelled token counts alike (token), every example (sample), or every answer (answer)
    recompute_above  rows longer than this keep no activations but each layer's input, and compute the rest anew
    offload          those inputs wait in main memory instead of the GPU's
    """

    name: str
    data: tuple[Source, ...]
    steps: int
    rope: str | None = None
    window: int | None = None
    min_tokens: int = 2
    max_tokens: int = 8192
    batch: int = 8
    micro_tokens: int = 4096
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: int = 10
    floor: float = 0.1
    weighting: str = "token"
    recompute_above: int = 2048
    offload: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise UserError(f"The stage name {self.name!r} must be letters, digits, dots, dashes and underscores.")
        where = f"Stage {self.name}:"
        if not self.data:
            raise UserError(f"{where} data must name at least one source.")
        for name, least in (("steps", 1), ("batch", 1), ("micro_tokens", 1), ("min_tokens", 2), ("warmup", 0)):
            _at_least(getattr(self, name), least, f"{where} {name}")
        _at_least(self.max_tokens, self.min_tokens, f"{where} max_tokens")
        if not self.learning_rate > 0:
            raise UserError(f"{where} learning_rate is {self.learning_rate:g} and must be above 0.")
        if not 0 <= self.floor <= 1:
            raise UserError(f"{where} floor is {self.floor:g} and must lie between 0 and 1.")
        if self.window is not None and self.window < self.max_tokens:
            raise UserError(
                f"{where} window is {self.window:,} tokens and smaller than its data, max_tokens {self.max_tokens:,}:"
                " raise the one or lower the other."
            )
        if self.warmup > self.steps:
            raise UserError(f"{where} {self.warmup} warm-up steps exceed its {self.steps} steps: lower warmup.")
        _one_of(self.schedule, SCHEDULES, f"{where} schedule")
        _one_of(self.weighting, WEIGHTINGS, f"{where} weighting")

    def rate(self, step: int) -> float:
        """Learning rate of a step (0 is the first)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Probe:
    """What is measured on the way: after every stage, and every `every` steps of it (0: only after).

    lengths, facts, chinese  needles: `facts` invented facts at each of `lengths` tokens, half of them Chinese if set
    text       a file whose end is held out: loss by position over `texts` stretches of `text_tokens` tokens of it
    patience   a stage ends early when its window has not grown for so many probes in a row (0: never). The window is
               the longest of `lengths` up to which, at it and at every shorter one, at least `enough` of the facts
               are found; while there is none yet, nothing is counted
    """

    lengths: tuple[int, ...] = ()
    facts: int = 8
    chinese: bool = False
    every: int = 0
    text: str | None = None
    text_tokens: int = 4096
    texts: int = 4
    patience: int = 0
    enough: float = 0.85

    def __post_init__(self) -> None:
        for name, least in (("facts", 1), ("every", 0), ("text_tokens", 16), ("texts", 1), ("patience", 0)):
            _at_least(getattr(self, name), least, f"The probe's {name}")
        for length in self.lengths:
            _at_least(length, 256, "A probe length")
        if not 0 < self.enough <= 1:
            raise UserError(f"The probe's enough is {self.enough:g} and must lie above 0 and up to 1.")
        if self.patience and not (self.every and self.lengths):
            raise UserError("The probe's patience needs 'lengths' and 'every': it counts the needle probes of a stage.")

    def __bool__(self) -> bool:
        """Whether anything is measured."""
        return bool(self.lengths or self.text)


def _starts_from_window(rope: str | None) -> bool:
    """Whether a RoPE change takes the window stated before it for its own: dynamic and yarn that name none do."""
    return any(
        part.strip().startswith(("dynamic:", "yarn:")) and part.count(":") == 1 for part in (rope or "").split(",")
    )


@dataclass(frozen=True)
class Recipe:
    """Everything `longverse extend` needs. Same recipe, same data, same seed: the same run.

    model      embedded name, folder, .gguf file or hub id
    method     lora (with `lora`) or full
    precision  auto (bf16 where the hardware multiplies it), bf16, fp32
    optimizer  adamw, or for method full muon: that for the matrices of the layers, AdamW for all else. beta1 and beta2
               are AdamW's; Muon's steps are of one size, whatever that of the gradient is
    probe      what is measured on the way, see Probe
    clip       norm to which gradients are clipped, 0 for never
    save_every steps between checkpoints; `keep` newest are kept
    keep_stages  also write what each stage ends with, to OUT/stages/NN-NAME: for comparing stages, and for runs that
                 take them over (--stages-from)
    new        makes the model from nothing when the folder `model` is not there
    sequence   Ulysses degree: ranks that share one sequence; divides the heads and the number of ranks
    """

    model: str
    stages: tuple[Stage, ...]
    method: str = "lora"
    lora: Lora = field(default_factory=Lora)
    precision: str = "auto"
    optimizer: str = "adamw"
    seed: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    save_every: int = 20
    keep: int = 2
    keep_stages: bool = False
    sequence: int = 1
    probe: Probe = field(default_factory=Probe)
    new: NewModel | None = None
    name: str = "extended"
    licence: str | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("A recipe needs at least one stage.")
        names = [stage.name for stage in self.stages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"Two stages are called {min(twice)!r}: give each its own name.")
        _one_of(self.method, METHODS, "Method")
        _one_of(self.precision, PRECISIONS, "Precision")
        _one_of(self.optimizer, OPTIMIZERS, "Optimizer")
        if self.optimizer == "muon" and self.method != "full":
            raise UserError("Muon turns whole matrices, which method lora does not train: write optimizer: adamw.")
        for key, least in (("weight_decay", 0), ("clip", 0), ("save_every", 1), ("keep", 1), ("sequence", 1)):
            _at_least(getattr(self, key), least, key)
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key} is {getattr(self, key):g} and must lie in [0, 1).")

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> Recipe:
        """Read a YAML file; `model` overrides its own. Raises UserError naming the file's line or key."""
        path = Path(path)
        values = load_yaml(path)
        if model is not None:
            values["model"] = model
        elif values.get("new") and isinstance(values.get("model"), str):
            values["model"] = _place(values["model"], path.resolve().parent)
        try:
            recipe = build(cls, values, "the recipe")
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return recipe.at(path.resolve().parent)

    def at(self, base: Path) -> Recipe:
        """The same recipe with its data paths absolute, relative ones starting at `base`."""

        def place(source: Source) -> Source:
            changes: dict[str, Any] = {
                key: _place(value, base) for key in ("messages", "store", "build") if (value := getattr(source, key))
            }
            if source.texts:
                changes["texts"] = tuple(_place(text, base) for text in source.texts)
            return dataclasses.replace(source, **changes)

        stages = tuple(
            dataclasses.replace(stage, data=tuple(place(source) for source in stage.data)) for stage in self.stages
        )
        new, probe, lora = self.new, self.probe, self.lora
        if lora.start is not None:
            lora = dataclasses.replace(lora, start=_place(lora.start, base))
        if new is not None:
            new = dataclasses.replace(new, texts=tuple(_place(text, base) for text in new.texts))
        if probe.text is not None:
            probe = dataclasses.replace(probe, text=_place(probe.text, base))
        return dataclasses.replace(self, stages=stages, new=new, probe=probe, lora=lora)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def first_stages(self, count: int) -> Recipe:
        """The same recipe, ending after so many stages."""
        return dataclasses.replace(self, stages=self.stages[:count])

    def what_counts(self) -> dict[str, Any]:
        """Plain values without what trains nothing else (how often to save or probe, unless probes may end a stage)."""
        values = self.to_dict()
        for key in ("save_every", "keep", "keep_stages", "name", "licence", "sequence"):
            values.pop(key)
        if not self.probe.patience:
            values.pop("probe")
        for number, stage in enumerate(values["stages"]):
            for key in ("micro_tokens", "recompute_above", "offload"):
                stage.pop(key)
            if not any(_starts_from_window(later["rope"]) for later in values["stages"][number + 1 :]):
                stage.pop("window")
        return values

    def has_conversations(self, stages: int) -> bool:
        """Whether the first `stages` stages teach to answer."""
        data = [source for stage in self.stages[:stages] for source in stage.data]
        return any(source.messages is not None or source.made == "facts" for source in data)

    def fingerprint(self) -> str:
        """16 hex digits; equal for recipes that train alike."""
        values = self.what_counts()
        if self.optimizer == "adamw":  # the only one when checkpoints of older runs were written
            values.pop("optimizer")
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
