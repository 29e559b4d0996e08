"""The configuration of a build, and the plan of its items: who is to be what, fixed before the first is built."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from longverse.data.config import build, load_yaml, nearest
from longverse.data.long_sft.context import Spec
from longverse.data.long_sft.item import SPLITS, TASKS
from longverse.data.long_sft.stated import SETS as FACT_SETS
from longverse.data.long_sft.stated import SORTS, check_held_out
from longverse.data.sources import SourceConfig
from longverse.data.teacher import TeacherConfig
from longverse.errors import UserError


@dataclass(frozen=True)
class LengthBucket:
    """Lengths in tokens from `low` to `high`, drawn evenly on a logarithmic scale; exact when both are equal."""

    low: int
    high: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 256 <= self.low <= self.high:
            raise UserError(f"a length bucket needs 256 <= low <= high, not {self.low} and {self.high}.")
        if not self.weight > 0:
            raise UserError(f"a length bucket's weight must be above 0, not {self.weight}.")


_TASKS = {
    "single_doc_qa": 0.2, "multi_doc_qa": 0.2, "summary": 0.15, "code_completion": 0.1, "few_shot": 0.1,
    "multi_turn": 0.1, "stated_facts": 0.15,
}  # fmt: skip


@dataclass(frozen=True)
class SftConfig:
    """The whole of a builder's recipe; see docs/data.md."""

    out: str  # folder; the items come out as items.jsonl in it
    sources: tuple[SourceConfig, ...]
    items: int = 100
    tokenizer: str = "smol"  # lengths are exact under this model's tokenizer and chat format
    seed: int = 0
    tasks: dict[str, float] = field(default_factory=lambda: dict(_TASKS))  # shares of the task families
    languages: dict[str, float] = field(default_factory=lambda: {"en": 0.5, "zh": 0.5})
    lengths: tuple[LengthBucket, ...] = (
        LengthBucket(32 * 1024, 64 * 1024, 0.5),
        LengthBucket(64 * 1024, 128 * 1024, 0.3),
        LengthBucket(128 * 1024, 256 * 1024, 0.2),
    )
    recite: float = 0.5  # share of the items whose answers first recite the evidence
    quote: bool = False  # stated facts are answered by the very sentences that state them, and by nothing else
    facts: tuple[str, ...] = ("life",)  # sets of invented facts: life, work, world (see `stated`)
    sorts: dict[str, float] = field(default_factory=lambda: dict(SORTS))  # of stated-facts questions, see `stated`
    rivals: float = 0.0  # share of stated-facts questions beside whose fact one of the same kind stands about another
    real: float = 0.0  # share of stated-facts questions that ask for sentences the text has of its own; needs quote
    ask: float = 0.0  # share of stated-facts items put in the words of `longverse ask`; needs quote
    questions_low: int = 3  # questions in items of several turns, and on stated facts
    questions_high: int = 8
    split: str = "train"  # of stated facts: which kinds, names and values may appear
    decontaminate: tuple[str, ...] = ()  # files (text or JSONL) whose n-grams must not occur
    decontaminate_hits: int = 64  # documents with at least so many of their n-grams are dropped (about two sentences)
    teacher: TeacherConfig | None = None  # an OpenAI-compatible endpoint; without one the rules alone ask
    attempts: int = 40  # an item that fails a gate is drawn anew at most so often
    processes: int = 2

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("a build needs at least one source; add one under 'sources'.")
        names = [source.name for source in self.sources]
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise UserError(f"two sources are called {twice[0]!r}; give each its own name.")
        for task in self.tasks:
            if task not in TASKS:
                raise UserError(f"there is no task family {task!r}{nearest(task, TASKS)}")
        for language in self.languages:
            if language not in ("en", "zh"):
                raise UserError(f"languages can be en and zh, not {language!r}.")
        for sort in self.sorts:
            if sort not in SORTS:
                raise UserError(f"there is no sort of question {sort!r}{nearest(sort, SORTS)}")
        for name, shares in (("tasks", self.tasks), ("languages", self.languages), ("sorts", self.sorts)):
            if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
                raise UserError(f"{name} needs shares that are not negative and add up to more than 0.")
        if not self.out.strip():
            raise UserError("out is empty; give the folder that the items are to be written to.")
        if not self.lengths:
            raise UserError("lengths needs at least one bucket of low, high and weight.")
        for name, share in (("recite", self.recite), ("rivals", self.rivals), ("real", self.real), ("ask", self.ask)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} must be in 0 to 1, not {share}.")
        if (self.real or self.ask) and not self.quote:
            raise UserError("real and ask need quote: true, because their answers are sentences of the text.")
        for name in self.facts or ("",):
            if name not in FACT_SETS:
                raise UserError(f"there is no set of facts {name!r}{nearest(name, FACT_SETS)}")
        if not 1 <= self.questions_low <= self.questions_high <= 48:
            raise UserError("questions_low and questions_high must be 1 to 48, the low one not above the high one.")
        if self.split not in SPLITS:
            raise UserError(f"split must be train or heldout, not {self.split!r}.")
        check_held_out(self.split, self.facts)
        for name in ("items", "attempts", "processes", "decontaminate_hits"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")


def load_sft_config(path: str | Path) -> SftConfig:
    """An SftConfig from YAML; UserError names the file and the key."""
    return build(SftConfig, load_yaml(path), str(path))


def quotas(shares: dict[str, float], count: int) -> list[str]:
    """`count` names in proportion to their shares, by largest remainder, in the order of the shares."""
    total = sum(shares.values())
    exact = {name: count * share / total for name, share in shares.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    rest = sorted(shares, key=lambda name: (-(exact[name] - whole[name]), name))
    for name in rest[: count - sum(whole.values())]:
        whole[name] += 1
    return [name for name in shares for _ in range(whole[name])]


def plan_items(config: SftConfig) -> list[Spec]:
    """The specs of all items. Tasks, languages and lengths meet their shares exactly; which goes with which is
    chance."""
    rng = random.Random(f"plan {config.seed}")
    tasks = quotas(config.tasks, config.items)
    # Languages within each task, so that no family is of one language by chance.
    pairs = []
    for task in sorted(set(tasks)):
        pairs += [(task, language) for language in quotas(config.languages, tasks.count(task))]
    buckets = quotas({str(i): bucket.weight for i, bucket in enumerate(config.lengths)}, config.items)
    recites = quotas({"yes": config.recite, "no": 1 - config.recite}, config.items)
    for row in (pairs, buckets, recites):
        rng.shuffle(row)  # type: ignore[arg-type]
    offset = rng.random()
    specs = []
    for index, ((task, language), bucket, recite) in enumerate(zip(pairs, buckets, recites, strict=True)):
        length = config.lengths[int(bucket)]
        target = round(math.exp(rng.uniform(math.log(length.low), math.log(length.high))))
        depth = (offset + index * 0.6180339887498949) % 1  # evener than chance over any run of items
        questions = rng.randint(config.questions_low, config.questions_high)
        specs.append(
            Spec(
                index,
                0,
                config.seed,
                task,
                language,
                target,
                depth,
                recite == "yes",
                config.split,
                questions,
                config.quote,
                config.facts,
                config.rivals,
                config.real,
                config.ask,
                config.sorts,
            )
        )
    return specs
