"""From the examples of a step to rows: what one forward and backward pass takes.

A row is one sequence [1, T] of documents laid end to end. Attention stays within each, positions begin anew in each,
and each carries its own length for the dynamic RoPE base, so a document's loss does not depend on what shares its row,
its rank or its step. Nothing is padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longverse.data.packing import pack
from longverse.models.network import Attend
from longverse.train.cpu_attention import fast_here, fastest_attention
from longverse.train.examples import Example


@dataclass(frozen=True)
class Row:
    """T tokens, N of whose places predict a labelled next token.

    ids, positions, rope_length  int64 [1, T]; rope_length is the length of the token's own document
    bounds   where documents begin, and T
    places   int64 [N]: index of the token that predicts; targets int64 [N]; weights float32 [N]
    names    what the examples are called, for a message
    """

    ids: Tensor
    positions: Tensor
    rope_length: Tensor
    bounds: tuple[int, ...]
    places: Tensor
    targets: Tensor
    weights: Tensor
    names: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.shape[1]

    @property
    def squares(self) -> int:
        """Sum of squared document lengths, which attention costs."""
        return sum((end - begin) ** 2 for begin, end in zip(self.bounds, self.bounds[1:], strict=False))

    def to(self, device: torch.device) -> Row:
        """The same row on a device."""
        if self.ids.device == device:
            return self
        fields = (self.ids, self.positions, self.rope_length)
        labels = (self.places, self.targets, self.weights)
        ids, positions, rope_length = (tensor.to(device, non_blocking=True) for tensor in fields)
        places, targets, weights = (tensor.to(device, non_blocking=True) for tensor in labels)
        return Row(ids, positions, rope_length, self.bounds, places, targets, weights, self.names)


def make_row(examples: Sequence[Example], weighting: str, silent: bool = False) -> Row:
    """Lay examples end to end. silent: give every label weight 0 (a row that only keeps ranks in step)."""
    starts = np.cumsum([0, *map(len, examples)])
    bounds = [int(start) + part for start, example in zip(starts, examples, strict=False) for part in example.parts]
    bounds.append(int(starts[-1]))
    lengths = np.diff(bounds)
    ids = np.concatenate([example.ids for example in examples])
    weights = np.concatenate([example.weights(weighting) for example in examples])
    targets = np.flatnonzero(weights)
    positions = np.concatenate([np.arange(length) for length in lengths])
    assert (positions[targets] > 0).all(), "a document's first token has nothing before it"
    return Row(
        torch.from_numpy(ids)[None],
        torch.from_numpy(positions)[None],
        torch.from_numpy(np.repeat(lengths, lengths))[None],
        tuple(bounds),
        torch.from_numpy(targets - 1),
        torch.from_numpy(ids[targets]),
        torch.from_numpy(weights[targets] * (0.0 if silent else 1.0)).float(),
        tuple(example.name for example in examples),
    )


def make_rows(
    examples: Sequence[Example], weighting: str, micro_tokens: int, rank: int = 0, ranks: int = 1
) -> tuple[list[Row], float]:
    """The rows of one rank, and the sum of all weights of the step over all ranks: the loss is the weighted sum of
    negative log likelihoods divided by it, however the examples are spread.

    Every rank gets the same number of rows (collectives need that); where the examples do not suffice, a short row
    without weight is repeated. The dearest rows are dealt first, each to the rank that has least to do.
    """
    lengths = np.array([len(example) for example in examples])
    where = pack(lengths, max(micro_tokens, int(lengths.max())))
    groups = [[examples[int(n)] for n in np.flatnonzero(where == row)] for row in range(int(where.max()) + 1)]
    cost = [sum(len(example) ** 2 + 4096 * len(example) for example in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda n: (-cost[n], n))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    each = -(-len(groups) // ranks)
    for n in order:
        to = min((r for r in range(ranks) if len(shares[r]) < each), key=lambda r: (loads[r], r))
        shares[to].append(n)
        loads[to] += cost[n]
    rows = [make_row(groups[n], weighting) for n in shares[rank]]
    shortest = min(examples, key=len)
    while len(rows) < each:
        rows.append(make_row([shortest], weighting, silent=True))
    total = float(sum(example.weights(weighting).sum() for example in examples))
    return rows, total


def document_attention(bounds: tuple[int, ...]) -> Attend:
    """Causal attention within each document of a row, block by block: exact, without a mask, and without touching what
    a mask would only throw away."""
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    starts: list[Tensor] = []  # int32 [documents + 1] on the card, made when the first layer asks
    plain = plain_attention(lengths)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # q [1, H, T, D]; k, v [1, G, T, D]
        if fast_here(q):
            return fastest_attention(q, k, v, bounds)
        if len(lengths) > 1 and flash_fits(q):
            if not starts:
                starts.append(torch.tensor(bounds, dtype=torch.int32, device=q.device))
            return flash_documents(q, k, v, starts[0], max(lengths))
        return plain(layer, q, k, v)

    return attend


def plain_attention(lengths: list[int]) -> Attend:
    """The same by torch's own calls, of documents of these lengths."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if len(lengths) == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if len(set(lengths)) == 1:  # documents of one length are a batch
            q, k, v = (x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (q, k, v))  # [n, H, T/n, D]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return out.transpose(0, 1).flatten(1, 2)[None]
        parts = [
            F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=grouped)
            for a, b, c in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
        ]
        return torch.cat(parts, dim=2)

    return attend


def flash_fits(q: Tensor) -> bool:
    """Whether a card's flash attention takes such queries: bfloat16, heads of up to 256 in eights, Ampere or newer."""
    if not q.is_cuda or q.dtype != torch.bfloat16:
        return False
    return q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def flash_documents(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """All documents of a row in one call of the card's flash attention (Dao 2023, arXiv 2307.08691, with sequences of
    different lengths): q [1, H, T, D], k and v [1, G, T, D] in bfloat16, starts int32 [documents + 1] on the card."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H or G, D]
    out = torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, longest, longest, 0.0, True, False)[0]
    return out.transpose(0, 1)[None]  # type: ignore[no-any-return]
