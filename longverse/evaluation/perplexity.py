"""Loss by position and by length: how much does a model still gain from text further back?

    curve = loss_by_position(backend, ids, length=8192, texts=4)    # stretches of a text, each read whole
    gain = loss_by_length(backend, ids, lengths=(1024, 2048, 4096))  # the same tokens with more and more before them
    result = sliding_loss(backend, ids, context=2048, stride=512)    # every token with context - stride or more before

Losses are natural-logarithm cross-entropies in nats a token, in float32, through the engine's own network, cache
and chunks. The effective window is the longest length up to which the loss does not rise by more than a tolerance above
its lowest value so far. By position that needs several stretches, since one text's passages differ more than a
model's positions do; by length the tokens scored are the same throughout, and only their context grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longverse.errors import UserError
from longverse.evaluation.files import write_json, write_text

if TYPE_CHECKING:
    from longverse.evaluation.engine_backend import EngineBackend

TEXTS = 4  # stretches that a window by position is averaged over at least
CHUNK = 512  # tokens a forward; logits of a chunk are [CHUNK, vocabulary] in float32


@dataclass
class LossResult:
    """Mean losses in blocks.

    blocks: (first position, last position + 1, mean loss, texts) in rising order; mean over all tokens scored.
    kind "whole": a block's positions are the tokens before a token plus one. kind "sliding": every token is read
    with at least context - stride tokens before it, and `blocks` follow the place in the text. kind "length": the same
    last tokens with contexts of several lengths; a block is (0, length, loss, texts).
    """

    kind: str
    model: dict[str, Any]
    settings: dict[str, Any]
    blocks: list[tuple[int, int, float, int]]
    mean: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    def effective_window(self, tolerance: float = 0.05) -> int | None:
        """Tokens up to the end of the last block before the loss rises by more than `tolerance` nats above the
        lowest earlier block and stays there; None for kind "sliding" and, by position, below TEXTS stretches."""
        if self.kind == "sliding" or (self.kind == "whole" and min(b[3] for b in self.blocks) < TEXTS):
            return None
        lowest = math.inf
        for index, (_, _, loss, _) in enumerate(self.blocks):
            # One hard passage is no end of the window: the next block, where there is one, must be above as well.
            later = self.blocks[index : index + 2]
            if all(block[2] > lowest + tolerance for block in later):
                return self.blocks[index - 1][1]
            lowest = min(lowest, loss)
        return self.blocks[-1][1] if self.blocks else None

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "kind": "loss",
            "way": self.kind,
            "perplexity": self.perplexity,
            "effective_window": self.effective_window(),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LossResult:
        blocks = [(b[0], b[1], b[2], b[3]) for b in value["blocks"]]
        return cls(value["way"], value["model"], value["settings"], blocks, value["mean"], value["tokens"])

    def markdown(self) -> str:
        title = {"whole": "by position", "length": "by length of the context", "sliding": "sliding"}[self.kind]
        lines = [f"## Loss {title}: {self.model['model']}", ""]
        lines.append(
            f"Mean {self.mean:.4f} nats a token (perplexity {self.perplexity:.2f}) over {self.tokens:,} tokens."
        )
        window = self.effective_window()
        if window is not None:
            reached = " (the end of what was read)" if self.blocks and window == self.blocks[-1][1] else ""
            lines.append(f"Effective window: {window:,} tokens{reached}.")
        elif self.kind == "whole":
            lines.append(f"No effective window: fewer than {TEXTS} stretches say more about the text than the model.")
        lines += ["", f"| {'length' if self.kind == 'length' else 'positions'} | nats a token | perplexity |"]
        lines += ["|---|---|---|"]
        for a, b, loss, _ in self.blocks:
            place = f"{b:,}" if self.kind == "length" else f"{a:,}–{b - 1:,}"
            lines.append(f"| {place} | {loss:.4f} | {math.exp(loss):.2f} |")
        return "\n".join(lines) + "\n"

    def points(self) -> list[tuple[float, float]]:
        return [(b if self.kind == "length" else (a + b) / 2, loss) for a, b, loss, _ in self.blocks]

    def save(self, folder: Path) -> list[Path]:
        """Writes loss.json, loss.md and, where matplotlib is there, loss.png."""
        write_json(folder / "loss.json", self.to_dict())
        write_text(folder / "loss.md", self.markdown())
        paths = [folder / "loss.json", folder / "loss.md"]
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return paths
        from longverse.evaluation.plots import curves

        window = self.effective_window()
        marks = {"trained window": float(self.model["window"])} if self.model.get("window") else {}
        if self.blocks and marks and marks["trained window"] > self.blocks[-1][1]:
            marks = {}
        if window is not None and self.blocks and window < self.blocks[-1][1]:
            marks["effective window"] = float(window)
        what = "length of the context" if self.kind == "length" else "position"
        curves({self.model["model"]: self.points()}, folder / "loss.png", x=f"{what} in tokens", y="nats a token",
               title=f"{self.model['model']}: loss by {what}", log_x=self.kind == "length",
               subtitle=f"{self.tokens:,} tokens, mean {self.mean:.3f}", marks=marks)  # fmt: skip
        return [*paths, folder / "loss.png"]


def token_losses(
    backend: EngineBackend,
    ids: Sequence[int],
    *,
    skip: int = 0,
    planned: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Loss of ids[skip + 1:], each given all tokens before it, in one reading in chunks of CHUNK.

    planned: tokens the dynamic RoPE base is chosen for; None takes len(ids). UserError past the window.
    """
    import torch
    import torch.nn.functional as F

    from longverse.inference.memory import check_fits

    if len(ids) < 2:
        raise UserError("A loss needs at least two tokens: give a longer text.")
    planned = planned or len(ids)
    check_fits(backend.engine, planned, backend.cache)
    session = backend.engine.session(planned, cache=backend.cache)
    network, cache = backend.engine.network, session.cache
    losses: list[float] = []
    with torch.inference_mode():
        tokens = torch.tensor(list(ids), device=network.device)  # [T]
        for begin in range(0, len(ids) - 1, CHUNK):
            end = min(begin + CHUNK, len(ids) - 1)
            positions = torch.arange(begin, end, device=network.device)[None]  # [1, chunk]
            logits = network(tokens[None, begin:end], positions, cache.rope_length, cache.attend)[0].float()
            cache.advance(end - begin)
            here = F.cross_entropy(logits, tokens[begin + 1 : end + 1], reduction="none")  # [chunk], nats
            losses += here[max(0, skip - begin) :].tolist()
            if on_progress is not None:
                on_progress(end, len(ids) - 1)
    return losses


def _check(backend: EngineBackend, length: int, available: int) -> None:
    if length < 2:
        raise UserError("--length must be at least 2 tokens.")
    if length > backend.engine.window:
        raise UserError(
            f"A length of {length:,} tokens exceeds the window of {backend.name}, {backend.engine.window:,}: shorten "
            "it, or state a longer --window to see what happens past it."
        )
    if available < length:
        raise UserError(f"The text has {available:,} tokens and {length:,} are to be read: shorten --length.")


def loss_by_position(
    backend: EngineBackend,
    ids: Sequence[int],
    *,
    length: int,
    texts: int = 1,
    blocks: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """Reads `texts` stretches of `length` tokens of ids, spread evenly, each whole; mean losses in `blocks` blocks of
    positions. Every stretch begins anew, so position and length of the context are the same thing."""
    _check(backend, length, len(ids))
    if texts < 1 or blocks < 1:
        raise UserError("--texts and --blocks must be at least 1.")
    room = len(ids) - length
    starts = [round(room * i / max(1, texts - 1)) for i in range(texts)] if room else [0]
    starts = sorted(set(starts))
    sums = [0.0] * (length - 1)
    for number, start in enumerate(starts):

        def tell(done: int, total: int, number: int = number) -> None:
            if on_progress is not None:
                on_progress(number * total + done, len(starts) * total)

        for position, loss in enumerate(token_losses(backend, ids[start : start + length], on_progress=tell)):
            sums[position] += loss
    edges = [round((length - 1) * i / blocks) for i in range(blocks + 1)]
    table = [(a + 1, b + 1, sum(sums[a:b]) / (b - a) / len(starts), len(starts)) for a, b in pairwise(edges) if b > a]
    count = (length - 1) * len(starts)
    settings = {"length": length, "texts": len(starts), "text_tokens": len(ids)}
    return LossResult("whole", _describe(backend), settings, table, sum(sums) / count, count)


def loss_by_length(
    backend: EngineBackend,
    ids: Sequence[int],
    *,
    lengths: Sequence[int],
    scored: int = 256,
    texts: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """The same `scored` tokens, the last of each of `texts` stretches, with contexts of rising length: length L means
    that L tokens are read, the scored ones included. `mean` is that of the longest."""
    lengths = sorted(set(lengths))
    if scored < 1 or texts < 1 or not lengths or lengths[0] <= scored:
        raise UserError(f"--texts must be at least 1, and every length more than the {scored} tokens that are scored.")
    _check(backend, lengths[-1], len(ids))
    room = len(ids) - lengths[-1]
    ends = sorted({lengths[-1] + round(room * i / max(1, texts - 1)) for i in range(texts)})
    whole, done = sum(lengths) * len(ends), 0
    table = []
    for length in lengths:
        total = 0.0
        for end in ends:
            total += sum(token_losses(backend, ids[end - length : end], skip=length - scored - 1))
            done += length
            if on_progress is not None:
                on_progress(done, whole)
        table.append((0, length, total / scored / len(ends), len(ends)))
    settings = {"length": lengths[-1], "scored": scored, "texts": len(ends), "text_tokens": len(ids)}
    return LossResult("length", _describe(backend), settings, table, table[-1][2], scored * len(ends))


def sliding_loss(
    backend: EngineBackend,
    ids: Sequence[int],
    *,
    context: int,
    stride: int,
    blocks: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """Every token of ids but the first once, read in windows of `context` tokens that move by `stride`: each token has
    at least context - stride tokens before it (fewer only at the text's beginning)."""
    if not 0 < stride < context or blocks < 1:
        raise UserError("--stride must be at least 1 and less than --length, and --blocks at least 1.")
    _check(backend, context, max(2, len(ids)) if len(ids) < context else len(ids))
    losses: list[float] = []  # losses[i] is of ids[i + 1]
    total = len(ids) - 1
    begin = 0
    while len(losses) < total:
        window = ids[begin : begin + context]
        losses += token_losses(backend, window, skip=len(losses) - begin, planned=context)
        begin += stride
        if on_progress is not None:
            on_progress(len(losses), total)
    edges = [round(total * i / blocks) for i in range(blocks + 1)]
    table = [(a + 1, b + 1, sum(losses[a:b]) / (b - a), 1) for a, b in pairwise(edges) if b > a]
    settings = {"length": context, "stride": stride, "text_tokens": len(ids)}
    return LossResult("sliding", _describe(backend), settings, table, sum(losses) / len(losses), len(losses))


def _describe(backend: EngineBackend) -> dict[str, Any]:
    # The window the model was trained for, and not one stated by hand to look past it.
    return {**backend.describe(), "window": backend.engine.network.config.window}
