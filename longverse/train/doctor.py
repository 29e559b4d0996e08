"""Before step 0, on the user's own model, data and ranks: does the training see what it should?

Each check takes a few short examples of the run itself. A failed one stops the run: it would train, and on something
else than was meant.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from longverse.models.rope import RopePlan
from longverse.train import parallel
from longverse.train.examples import Example
from longverse.train.forward import LossModel
from longverse.train.parallel import Ranks
from longverse.train.rows import make_row

SHORT = 384  # tokens of an example that a check looks at


@dataclass(frozen=True)
class Finding:
    """One check: what it looked at, whether all is well, and the figures in words."""

    name: str
    passed: bool
    detail: str


def examine(
    model: LossModel, examples: list[Example], before: RopePlan, eos_ids: frozenset[int], ranks: Ranks
) -> list[Finding]:
    """All checks. before: the RoPE plan of the model as it came. The model's mode is left as it was."""
    short = [shortened(example) for example in examples[:4]]
    if len(short) == 1:
        short *= 2
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            findings = [_isolation(model, short, ranks), _labels(examples, eos_ids)]
            findings.append(_start(model, short, before, ranks))
            if ranks.sequence > 1:
                findings.append(_one_against_many(model, short, ranks))
    finally:
        model.train(training)
    return findings


def shortened(example: Example, tokens: int = SHORT) -> Example:
    """The end of an example, as one document: there the answers are."""
    first = max(0, len(example) - tokens)
    spans = tuple((max(a - first, 1), b - first, w) for a, b, w in example.spans if b - first > 1)
    return Example(example.ids[first:], spans, example.name)


def _isolation(model: LossModel, examples: list[Example], ranks: Ranks) -> Finding:
    """Another token in the middle of the first document moves its own later labels, and nothing else in the row."""
    whole = [dataclasses.replace(example, spans=((1, len(example), 1.0),)) for example in examples]
    ids = whole[0].ids.copy()
    place = len(ids) // 2
    ids[place] = (ids[place] + 1) % model.network.config.vocab_size
    losses = [
        model(make_row([first, *whole[1:]], "token").to(ranks.device), per_token=True)
        for first in (whole[0], dataclasses.replace(whole[0], ids=ids))
    ]
    moved = (losses[0] != losses[1]).cpu().numpy()
    own = len(ids) - 1
    earlier, later, others = moved[: place - 1], moved[place - 1 : own], moved[own:]
    passed = bool(later.any() and not earlier.any() and not others.any())
    return Finding(
        "a changed token moves its own document only",
        passed,
        f"{int(later.sum())} of {len(later)} later labels moved, {int(earlier.sum())} earlier ones,"
        f" {int(others.sum())} of {len(others)} in other documents",
    )


def _labels(examples: list[Example], eos_ids: frozenset[int]) -> Finding:
    """Something is learned in every example, and a conversation's last answer ends with an end token (in plain text
    those before it do not: nothing stands there when the model is asked either)."""
    empty = [example.name for example in examples if not example.spans]
    conversations = [example for example in examples if " line " in example.name]
    open_ended = [
        example.name
        for example in conversations
        if eos_ids and example.spans and int(example.ids[example.spans[-1][1] - 1]) not in eos_ids
    ]
    learned = sum(end - first for example in examples for first, end, _ in example.spans)
    total = sum(map(len, examples))
    detail = f"{learned:,} of {total:,} tokens are learned"
    if odd := empty or open_ended:
        detail += f"; {odd[0]} has {'no label' if empty else 'an answer without an end token'}"
    return Finding("labels stand where the chat format puts answers", not odd, detail)


def _start(model: LossModel, examples: list[Example], before: RopePlan, ranks: Ranks) -> Finding:
    """The loss of the stage's first examples with its RoPE plan and with that of the model as it came: a jump of some
    nats on short texts would mean a broken change, not an extension."""
    rotary = model.network.model.rotary
    row = make_row(examples, "token").to(ranks.device)
    plan = rotary.plan
    now = float(model(row) / row.weights.sum())
    rotary.plan = before
    try:
        was = float(model(row) / row.weights.sum())
    finally:
        rotary.plan = plan
    passed = bool(np.isfinite(now) and now < was + 5.0)
    return Finding(
        "loss of the first examples", passed, f"{now:.3f} with {plan.describe()}, {was:.3f} as the model came"
    )


def _one_against_many(model: LossModel, examples: list[Example], ranks: Ranks) -> Finding:
    """The same row, whole on every rank and split over the ranks of a group."""
    row = make_row(examples, "token").to(ranks.device)
    alone = float(model(row))
    part = parallel.split(row, ranks)
    together = ranks.sum(float(model(part, parallel.attention(part, ranks))))[0] / ranks.data
    passed = bool(np.isclose(alone, together, rtol=2e-2 if model.network.dtype == torch.bfloat16 else 1e-3))
    return Finding(f"{ranks.sequence} ranks compute what one does", passed, f"{together:.4f} against {alone:.4f}")
