"""Where in a document an answer comes from, by the attention of the answer's own tokens.

After an answer, its tokens are read once more as one chunk over the cache, and the wrapped `attend` notes how much of
each chosen head's softmax falls on each paragraph. One forward of some twenty tokens: a few per cent of the answer's own
cost. Heads that copy ("retrieval heads", Wu et al. 2024, arXiv 2404.15574) look at the very words that come next; which
they are in the embedded model was found on generated reports (benchmarks/citations.py --heads).

Shapes: T answer tokens, P paragraphs, N heads looked at, S tokens held.   mass [N, T, P]
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..inference.engine import Engine, Session

Head = tuple[int, int]  # layer, query head


@dataclass(frozen=True)
class Trace:
    """What a second reading of an answer tells."""

    mass: Tensor  # float32 [N, T, P]: share of head n's attention at answer token t that falls on paragraph p
    logprobs: Tensor  # float32 [T]: of the answer's tokens


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


def can_trace(session: Session) -> bool:
    """Whether the session's attention is exact over one cache, which a second reading needs."""
    return type(session) is Session


@torch.inference_mode()
def trace(
    session: Session, prompt: Sequence[int], answer: Sequence[int], spans: Sequence[tuple[int, int]],
    heads: Sequence[Head],
) -> Trace:  # fmt: skip
    """Read `answer` again after `prompt`, whose tokens the session holds. `spans` are the paragraphs' tokens, in order.

    The session ends up holding prompt and answer without its last token, as after the answer itself.
    """
    network, cache = session.engine.network, session.cache
    begin = len(prompt) - 1
    assert answer and session.tokens[:begin] == list(prompt[:begin])
    feed = [prompt[-1], *answer[:-1]]  # the token at t predicts answer[t]
    cache.truncate(begin)
    del session.tokens[begin:]
    wanted: dict[int, list[tuple[int, int]]] = {}  # layer -> [(row of mass, head)]
    for row, (layer, head) in enumerate(heads):
        wanted.setdefault(layer, []).append((row, head))
    mass = torch.zeros(len(heads), len(feed), len(spans))
    edges = torch.tensor([edge for span in spans for edge in span], device=network.device)  # [2 P]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = cache.attend(layer, q, k, v)
        if layer in wanted:
            chosen = [head for _, head in wanted[layer]]
            keys = cache.keys_of(layer, 0, begin + len(feed))[0]  # [G, S, D]
            shares = _paragraph_shares(q[0, chosen], keys, chosen, q.shape[1] // keys.shape[0], edges)
            for (row, _), share in zip(wanted[layer], shares, strict=True):
                mass[row] = share.cpu()
        return out

    positions = torch.arange(begin, begin + len(feed), device=network.device)[None]
    ids = torch.tensor([feed], device=network.device)
    hidden = network.model(ids, positions, cache.rope_length, attend)  # [1, T, C]
    cache.advance(len(feed))
    session.tokens.extend(feed)
    logits = network.lm_head(hidden[0]).float()  # [T, V]
    targets = torch.tensor(list(answer), device=network.device)
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return Trace(mass, logprobs.cpu())


def _paragraph_shares(q: Tensor, keys: Tensor, heads: list[int], group: int, edges: Tensor) -> list[Tensor]:
    """q [n, T, D] of the chosen heads, keys [G, S, D]: the shares [T, P] of each head."""
    new, total = q.shape[1], keys.shape[1]
    future = torch.ones(new, total, dtype=torch.bool, device=q.device).triu(total - new + 1)
    shares = []
    for place, head in enumerate(heads):
        scores = q[place].float() @ keys[head // group].float().T / q.shape[-1] ** 0.5  # [T, S]
        weights = scores.masked_fill_(future, float("-inf")).softmax(-1)
        summed = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))  # [T, S + 1]
        at = summed[:, edges]  # [T, 2 P]
        shares.append(at[:, 1::2] - at[:, 0::2])
    return shares
