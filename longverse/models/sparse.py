"""Block-sparse attention while a prompt is read: most of a long past weighs next to nothing, and is not attended to.

Shapes: G key/value heads, h query heads of each, D head size, T new tokens after P past ones; a row is one query head
of one new token, rows of a key/value head in the order [T, h].

The rows of a chunk are cut into query blocks of about QUERY_TOKENS tokens, the past into blocks of BLOCK keys. A few
sampled tokens of each query block are scored against every key, which costs about a fiftieth of attending; from them
come each block's share of the attention, and the fewest blocks that hold the share asked for, averaged over the
samples, are attended to by the whole query block; but no more than a given part of the past, so that heads which look
everywhere do not take most of the time. The chunk itself, the past's last, broken block and its first block are always
kept. One further token of each query block has no say and measures: what its attention keeps is what the statistics
state.

In the line of MInference (Jiang et al. 2024, arXiv 2407.02490) and XAttention (Xu et al. 2025, arXiv 2503.16428), which
estimate from the last queries and from antidiagonals. Not done: patterns per head, fixed beforehand.

This file is the definition, in plain torch, for every device and type; CPUs go to `kernels/chunk.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .attention import folded_attention, merge

BLOCK = 64  # keys
FEW = 4  # of them may always be read, however small a part is allowed
ITEM_ROWS = 96  # query blocks are whole numbers of so many rows, which the kernels deal with together
QUERY_TOKENS = 128
SAMPLES = (0.1, 0.35, 0.65, 0.9)  # where in its query block a sampled token stands
MEASURE = 0.5  # and the one that measures
STRETCH = 4096  # tokens of the past in floating point at a time

# stretch(begin, end) -> keys, values [1, G, end - begin, D] of past tokens
Stretch = Callable[[int, int], tuple[Tensor, Tensor]]


@dataclass
class Sparse:
    """The dials, and what came of them.

    mass     share of the attention that the chosen blocks must hold, 0 .. 1, on average over the sampled queries
    most     part of the past, 0 .. 1, that a query block of a prompt attends to at most, beside what is always kept
             (never less than FEW blocks): where the share asked for is spread over more, the heaviest are taken and
             less is kept
    least    chunks of fewer tokens, such as questions, are attended to exactly
    writing  set while the tokens of an answer are read, one by one: then every key is scored, and pages of values that
             weigh next to nothing are left out (kernels/cpu_decode.py); what they weigh is known, so every head of
             every token keeps at least `mass`
    """

    mass: float = 0.95
    most: float = 1.0
    least: int = 256
    writing: bool = False
    share_sum: float = 0.0
    share_count: int = 0
    blocks_kept: int = 0
    blocks_all: int = 0
    written_lost: float = 0.0
    written_count: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise UserError(
                f"A share of {self.mass:g} of the attention cannot be kept: choose one above 0 and up to 1."
            )
        if not 0 < self.most <= 1:
            raise UserError(f"A part of {self.most:g} of the past cannot be read: choose one above 0 and up to 1.")

    @property
    def mass_kept(self) -> float:
        """The mean share of the attention that was kept, over the queries that measured; 1 before any did."""
        return self.share_sum / self.share_count if self.share_count else 1.0

    @property
    def mass_written(self) -> float:
        """The mean share of the attention that written tokens kept, over layers and heads; 1 before any was written."""
        return 1 - self.written_lost / self.written_count if self.written_count else 1.0

    @property
    def density(self) -> float:
        """The share of the past's blocks that was attended to; 1 before any was left out."""
        return self.blocks_kept / self.blocks_all if self.blocks_all else 1.0

    def serves(self, new: int, past: int) -> bool:
        """Whether a chunk of `new` tokens after `past` is attended to sparsely."""
        return new >= self.least and past >= 2 * BLOCK

    def limit(self, blocks: int) -> int:
        """Of so many blocks of the past, how many a query block attends to at most, the first one aside."""
        return max(FEW, round(self.most * blocks))

    def count(self, kept: Tensor, share: Tensor) -> None:
        """Take up what one layer chose: kept [G, query blocks, past blocks], measured share [G, query blocks]."""
        self.share_sum += float(share.sum())
        self.share_count += share.numel()
        self.blocks_kept += int(kept.sum())
        self.blocks_all += kept.numel()

    def count_written(self, lost: float, count: int) -> None:
        """Take up the shares left out of `count` heads' attention by a written token, added up."""
        self.written_lost += float(lost)
        self.written_count += count


def query_items(heads: int) -> int:
    """Items of ITEM_ROWS rows in a query block, for h query heads of a key/value head."""
    return max(1, QUERY_TOKENS * heads // ITEM_ROWS)


def sampled_tokens(tokens: int, heads: int) -> Tensor:
    """int64 [query blocks, samples + 1]: the tokens of each query block that are scored; the last one measures."""
    rows = query_items(heads) * ITEM_ROWS
    begins = torch.arange(0, tokens * heads, rows) / heads
    spans = (torch.arange(0, tokens * heads, rows) + rows).clamp(max=tokens * heads) / heads - begins
    places = torch.tensor([*SAMPLES, MEASURE])
    return (begins[:, None] + spans[:, None] * places).long().clamp(max=tokens - 1)


def sparse_attention(sparse: Sparse, q: Tensor, k: Tensor, v: Tensor, past: int, stretch: Stretch) -> Tensor:
    """Causal attention of q [1, H, T, D] over `past` tokens given by `stretch` and its own k, v [1, G, T, D]."""
    _, heads, tokens, size = q.shape
    kv_heads, whole = k.shape[1], past // BLOCK
    group = heads // kv_heads
    by_token = q.view(kv_heads, group, tokens, size).transpose(1, 2)  # [G, T, h, D]
    sampled = sampled_tokens(tokens, group).to(q.device)  # [query blocks, samples + 1]
    kept, share = _choose(sparse, by_token, sampled, k, past, stretch)
    sparse.count(kept, share)

    # The chunk, and the keys before it that make no whole block: everything is kept.
    rest_k, rest_v = stretch(whole * BLOCK, past)
    mixed, weight = _causal(q, torch.cat((rest_k, k), 2), torch.cat((rest_v, v), 2))
    rows_each = query_items(group) * ITEM_ROWS
    step = STRETCH // BLOCK
    for first in range(0, whole, step):
        last = min(first + step, whole)
        keys, values = stretch(first * BLOCK, last * BLOCK)  # [1, G, n, D]
        for head in range(kv_heads):
            of_head = slice(head * group, (head + 1) * group)
            for query in range(kept.shape[1]):
                chosen = kept[head, query, first:last].repeat_interleave(BLOCK).nonzero()[:, 0]
                if not len(chosen):
                    continue
                # Rows of a query block need not be whole tokens: the tokens that hold any, masked to those rows.
                begin, end = query * rows_each, min((query + 1) * rows_each, tokens * group)
                place = slice(begin // group, -(-end // group))
                rows = torch.arange(place.start * group, place.stop * group, device=q.device)
                inside = ((rows >= begin) & (rows < end)).view(-1, group).t()  # [h, tokens]
                more, more_weight = folded_attention(
                    q[:, of_head, place], keys[:, head : head + 1, chosen], values[:, head : head + 1, chosen]
                )
                more_weight = more_weight.masked_fill(~inside, float("-inf"))
                before, before_weight = mixed[:, of_head, place], weight[:, of_head, place]
                mixed[:, of_head, place] = merge(more.float(), more_weight, before, before_weight)
                weight[:, of_head, place] = torch.logaddexp(more_weight, before_weight)
    return mixed.to(q.dtype)


def _choose(
    sparse: Sparse, by_token: Tensor, sampled: Tensor, k: Tensor, past: int, stretch: Stretch
) -> tuple[Tensor, Tensor]:
    """kept bool [G, query blocks, past blocks] and the measured share [G, query blocks]."""
    kv_heads, _, group, size = by_token.shape
    whole, scale = past // BLOCK, size**-0.5
    rows = by_token[:, sampled].float().flatten(1, 3)  # [G, query blocks * samples * h, D]
    seen = sampled[:, :, None].expand(-1, -1, group).flatten()  # [rows]: the new token each row is of
    weights = [torch.empty(kv_heads, rows.shape[1], 0, device=rows.device)]
    step = STRETCH // BLOCK
    for first in range(0, whole, step):
        keys = stretch(first * BLOCK, min(first + step, whole) * BLOCK)[0][0].float()
        scores = rows @ keys.transpose(1, 2) * scale  # [G, rows, n]
        weights.append(scores.unflatten(-1, (-1, BLOCK)).logsumexp(-1))
    rest = torch.cat((stretch(whole * BLOCK, past)[0], k), 2)[0].float()
    scores = rows @ rest.transpose(1, 2) * scale
    future = torch.arange(rest.shape[1], device=rows.device) > seen[:, None] + past - whole * BLOCK
    weights.append(scores.masked_fill(future, float("-inf")).logsumexp(-1, keepdim=True))
    shares = torch.cat(weights, -1).softmax(-1)  # [G, rows, past blocks + 1]
    shares = shares.view(kv_heads, *sampled.shape, group, -1)
    mean = shares[:, :, :-1].mean((2, 3))  # [G, query blocks, past blocks + 1], the measuring token left out
    need = sparse.mass - mean[..., -1:] - mean[..., :1]
    ordered, order = mean[..., 1:-1].sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # held by the blocks ahead of each
    kept = torch.ones(*mean.shape[:2], whole, dtype=torch.bool, device=rows.device)
    rank = torch.arange(ordered.shape[-1], device=rows.device)
    kept[..., 1:].scatter_(-1, order, (before < need) & (rank < sparse.limit(whole)))
    measured = shares[:, :, -1].mean(2)  # [G, query blocks, past blocks + 1]
    return kept, (measured[..., :-1] * kept).sum(-1) + measured[..., -1]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [1, H, T, D] over k, v [1, G, S, D], its own T last, in float32; with log-sum-exps [1, H, T]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.float() @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
