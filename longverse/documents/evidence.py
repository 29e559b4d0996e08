"""Where in a document an answer comes from, by the attention of the answer's own tokens.

After an answer, its tokens are read once more as one chunk over the cache, and the wrapped `attend` notes how much of
each chosen head's softmax falls on each paragraph: one forward, where writing the answer took one for each token. Heads
that copy ("retrieval heads", Wu et al. 2024, arXiv 2404.15574) look at the very words that come next. Which they are in
the embedded model was found on generated reports (benchmarks/citations.py --heads); in any other model the heads of the
upper two thirds of the layers count by how much of their attention falls on the token that the answer takes next, which
is what copying is.

Shapes: T answer tokens, P paragraphs, N heads looked at, S tokens held.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import UserError
from ..inference.engine import Engine, Session
from ..models.tokenizer import token_offsets
from .citations import Attended
from .words import Index

Head = tuple[int, int]  # layer, query head

# By the model's name: the eight with most attention on the right paragraph over 46 right answers about eight reports of
# 3,400 and 7,000 tokens (the first alone: right in 46, with 0.42 of its attention there).
RETRIEVAL_HEADS: dict[str, tuple[Head, ...]] = {
    "smol": ((18, 7), (7, 7), (21, 8), (17, 3), (23, 2), (14, 3), (20, 6), (18, 6)),
}
KEPT = 8  # paragraphs remembered for each token of an answer
ROWS = 32  # answer tokens whose attention over everything is held at once

# Told of each head looked at: its number, the share of its attention at each answer token that falls on each paragraph
# (float32 [T, P]), and the mean share of it on earlier copies of the token that comes next.
Note = Callable[[int, Tensor, float], None]


def token_spans(engine: Engine, prompt: Sequence[int], texts: Sequence[str]) -> list[tuple[int, int]]:
    """The tokens [begin, end) of a prompt that spell each of `texts`, which stand in it in this order. A text that is
    not found as it stands (a tokenizer that rewrites characters) has an empty span at the place reached so far."""
    pieces = [engine.tokenizer.token_bytes(token) or b"" for token in prompt]
    ends = list(accumulate(map(len, pieces)))  # byte offset after each token
    spelled = b"".join(pieces)
    spans = []
    at = 0
    for text in texts:
        data = text.encode()
        found = spelled.find(data, at)
        if found < 0:
            token = bisect_right(ends, at)
            spans.append((token, token))
            continue
        at = found + len(data)
        spans.append((bisect_right(ends, found), bisect_left(ends, at) + 1))
    return spans


def attend_to(
    session: Session, prompt: Sequence[int], answer: Sequence[int], index: Index, places: Sequence[int] | None = None,
    parts: Sequence[str] | None = None,
) -> Attended | None:  # fmt: skip
    """What an answer's tokens attended to, over the paragraphs of an index whose documents stand in the prompt, in its
    order. None where there is nothing to look at: an empty answer, attention that is not exact over one cache, or a
    tokenizer whose tokens cannot be spelled. `answer` are the ids that the session just gave for `prompt`, `places` the
    index's paragraphs in it where it does not hold all of them, `parts` what it holds of each of these where that is
    not all of it (one may then stand among them several times)."""
    if not answer or type(session) is not Session or session.tokens[: len(prompt) - 1] != list(prompt[:-1]):
        return None
    engine = session.engine
    try:
        shown = range(len(index.places)) if places is None else places
        texts = parts if parts is not None else [index.places[place][1].text for place in shown]
        spans = token_spans(engine, prompt, texts)
    except UserError:
        return None
    heads = RETRIEVAL_HEADS.get(engine.name)
    known = heads is not None
    if heads is None:
        shape = engine.network.config
        layers = range(shape.num_layers // 3, shape.num_layers)
        heads = tuple((layer, head) for layer in layers for head in range(shape.num_heads))
    shares, total = torch.zeros(len(answer), len(spans)), 0.0  # [T, P]; a large model's heads are never held together

    def note(head: int, mass: Tensor, copying: float) -> None:
        nonlocal total
        weight = 1.0 if known else copying**2 + 1e-12
        shares.add_(mass, alpha=weight)
        total += weight

    logprobs = trace(session, prompt, answer, spans, heads, note)
    shares /= total
    values, columns = shares.topk(min(KEPT, shares.shape[1]))
    rows: list[dict[int, float]] = []
    for c, v in zip(columns.tolist(), values.tolist(), strict=True):
        rows.append({})
        for column, value in zip(c, v, strict=True):
            rows[-1][shown[column]] = rows[-1].get(shown[column], 0.0) + value
    offsets, _ = token_offsets(engine.tokenizer.token_bytes(token) or b"" for token in answer)
    return Attended(rows, offsets, float(logprobs.mean()))


@torch.inference_mode()
def trace(
    session: Session, prompt: Sequence[int], answer: Sequence[int], spans: Sequence[tuple[int, int]],
    heads: Sequence[Head], note: Note,
) -> Tensor:  # fmt: skip
    """Read `answer` again after `prompt`, whose tokens the session holds; float32 [T], the log-probabilities of its
    tokens. `spans` are the paragraphs' tokens, in order; `note` hears of every head.

    The session ends up holding prompt and answer without its last token, as after the answer itself.
    """
    network, cache = session.engine.network, session.cache
    begin = len(prompt) - 1
    assert answer
    assert session.tokens[:begin] == list(prompt[:begin])
    held = torch.tensor([*prompt, *answer[:-1]], device=network.device)  # [S]
    targets = torch.tensor(list(answer), device=network.device)  # [T]
    feed = [prompt[-1], *answer[:-1]]  # the token at t predicts answer[t]
    cache.truncate(begin)
    del session.tokens[begin:]
    wanted: dict[int, list[tuple[int, int]]] = {}  # layer -> [(number, head)]
    for row, (layer, head) in enumerate(heads):
        wanted.setdefault(layer, []).append((row, head))
    edges = torch.tensor([edge for span in spans for edge in span], device=network.device)  # [2 P]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = cache.attend(layer, q, k, v)
        by_group: dict[int, list[tuple[int, int]]] = {}  # key/value head -> [(number, head)]
        for row, head in wanted.get(layer, ()):
            by_group.setdefault(head * k.shape[1] // q.shape[1], []).append((row, head))
        for group, pairs in by_group.items():  # one after another: restored, all of a long past would be gigabytes
            keys = cache.keys_of(layer, 0, begin + len(feed), slice(group, group + 1))[0, 0].float()  # [S, D]
            for row, head in pairs:
                parts, copied = [], 0.0
                for first in range(0, len(feed), ROWS):
                    some = slice(first, first + ROWS)
                    weights = _weights(q[0, head, some], keys, begin + first)  # [ROWS, S]
                    copied += float(weights[held == targets[some, None]].sum())
                    summed = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))[:, edges]  # [ROWS, 2 P]
                    parts.append((summed[:, 1::2] - summed[:, 0::2]).cpu())
                note(row, torch.cat(parts), copied / len(feed))
        return out

    positions = torch.arange(begin, begin + len(feed), device=network.device)[None]
    ids = torch.tensor([feed], device=network.device)
    hidden = network.model(ids, positions, cache.rope_length, attend)  # [1, T, C]
    cache.advance(len(feed))
    session.tokens.extend(feed)
    logits = network.lm_head(hidden[0]).float()  # [T, V]
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logprobs.cpu()


def _weights(q: Tensor, keys: Tensor, first: int) -> Tensor:
    """The attention of q [T, D], one head's rows from position `first` on, over keys [S, D]: float32 [T, S]."""
    future = torch.ones(q.shape[0], keys.shape[0], dtype=torch.bool, device=q.device).triu(first + 1)
    scores = q.float() @ keys.T / q.shape[-1] ** 0.5
    return scores.masked_fill_(future, float("-inf")).softmax(-1)
