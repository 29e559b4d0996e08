"""Which pages of a long past a question looks at: scores, and the choice by them.

Shapes: H heads, T tokens of the question, G key/value heads, R = H / G * T queries that share one of those, D head
size, P pages. Keys are those of the cache, before RoPE; the queries are rotated as if every far key stood the same
distance before them, so one product scores a key wherever it stands.

Page summaries: the mean key of a block is the exact score's first-order estimate; the least and greatest coordinate
bound it from above (Tang et al. 2024, "Quest", arXiv 2406.10774). Everything else here is our own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..models.compiled import compiled_fits
from ..models.sparse import BLOCK

Score = Literal["mass", "mean", "bounds", "two-step"]
SCORES: tuple[Score, ...] = ("mass", "mean", "bounds", "two-step")
STEP = 8192  # keys scored at once: the [R, STEP] scores stay in the processor's cache


@dataclass(frozen=True)
class Far:
    """The far past of one layer, cut into P pages.

    kept    [layers, 1, G, tokens, D], the keys of all layers, before RoPE;  layer: which one is meant
    first   tokens before the first page;  pages: P
    blocks  summaries by name ("means", "lows", "highs"), each [G, P * page / block, D]
    """

    kept: Tensor
    layer: int
    first: int
    pages: int
    blocks: dict[str, Tensor]
    page: int
    block: int

    @property
    def keys(self) -> Tensor:
        """[G, P * page, D]."""
        return self.kept[self.layer, 0, :, self.first : self.first + self.pages * self.page]


def page_mass(q: Tensor, near: Tensor, far: Far, score: Score, shortlist: int) -> Tensor:
    """The attention mass that every page gets, summed over the queries: float32 [G, P].

    q          [H, T, D], rotated
    near       [G, R] log-sum-exps of the queries over all that they see anyway (first and newest tokens, the question
               itself): a head that is content with those has little say
    score      mass: every key, exactly. mean, bounds: from the summaries alone. two-step: the `shortlist` best pages
               by the means, then exactly; the other pages get 0
    """
    if score == "mass" or (score == "two-step" and shortlist >= far.pages):
        return _shares(_exact_lse(q, far), near)
    rows = scaled_rows(q, far.kept.shape[2])
    if score == "bounds":
        return _shares(_bounds_lse(rows, far), near)
    # A block's sum of exps is about its size times the exp of its mean score.
    size = torch.tensor(float(far.block)).log().item()
    page_lse = _page_lse(rows, far.blocks["means"], far.page // far.block) + size
    mass = _shares(page_lse, near)  # [G, P]
    if score == "mean":
        return mass
    best = mass.sum(0).topk(shortlist).indices.sort().values  # [shortlist]
    keys = far.keys.unflatten(1, (far.pages, far.page))[:, best].flatten(1, 2)  # [G, shortlist * page, D]
    exact = _page_lse(rows, keys, far.page)  # [G, R, shortlist]
    # The pages left out still count in the denominator, by their estimate.
    rest = page_lse.index_fill(2, best, float("-inf")).logsumexp(-1)  # [G, R]
    return torch.zeros_like(mass).index_copy(1, best, _shares(exact, torch.logaddexp(near, rest)))


def scaled_rows(q: Tensor, groups: int) -> Tensor:
    """[H, T, D] as rows that share a key/value head, times D ** -0.5: [G, R, D]."""
    return (q * q.shape[2] ** -0.5).reshape(groups, -1, q.shape[2])


def _exact_lse(q: Tensor, far: Far) -> Tensor:
    """Log-sum-exps of q [H, T, D] over every page: float32 [G, R, P]; by a kernel that keeps no scores, where it runs
    and pages are whole blocks of it."""
    whole = far.page % BLOCK == 0 and far.first % BLOCK == 0 and far.kept.is_contiguous()
    if whole and far.kept.dtype in (q.dtype, torch.bfloat16) and compiled_fits(q[None], None):
        from ..models.kernels import chunk

        sums = chunk.block_log_sums(q, far.kept, far.layer, far.first + far.pages * far.page)
        sums = sums[:, :, far.first // BLOCK :]
        return sums if far.page == BLOCK else sums.unflatten(2, (far.pages, -1)).logsumexp(-1)
    return _page_lse(scaled_rows(q, far.kept.shape[2]), far.keys, far.page)


def _page_lse(q: Tensor, keys: Tensor, page: int) -> Tensor:
    """Log-sum-exps of rows q [G, R, D] over every `page` keys [G, n, D]: float32 [G, R, n / page]."""
    groups, rows, _ = q.shape
    out = q.new_empty(groups, rows, keys.shape[1] // page, dtype=torch.float32)
    step = max(1, STEP // page)  # pages at once
    for group in range(groups):
        for begin in range(0, out.shape[2], step):
            some = keys[group, begin * page : (begin + step) * page].to(q.dtype)  # [s, D]
            scores = (q[group] @ some.T).unflatten(1, (-1, page))
            out[group, :, begin : begin + step] = scores.float().logsumexp(-1)
    return out


def _bounds_lse(q: Tensor, far: Far) -> Tensor:
    """The largest score that a key inside each block's bounds could have, of rows q [G, R, D]; of a page, its best
    block's: [G, R, P]."""
    highs, lows = (far.blocks[name].to(q.dtype).transpose(1, 2) for name in ("highs", "lows"))  # [G, D, blocks]
    high = q.clamp(min=0) @ highs  # [G, R, P * page / block]
    low = q.clamp(max=0) @ lows
    return (high + low).float().unflatten(2, (far.pages, -1)).amax(-1)


def _shares(page_lse: Tensor, near: Tensor) -> Tensor:
    total = torch.logaddexp(page_lse.logsumexp(-1), near)  # [G, R]
    return (page_lse - total[..., None]).exp().sum(1)  # [G, P]


def best_pages(mass: Tensor, count: int) -> Tensor:
    """The `count` pages of most mass in their order: [..., P] -> int64 [..., count]. Equal masses: the earlier page."""
    order = mass.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
