"""Which pages of a long past a question looks at: scores, and the choice by them.

Shapes: G key/value heads, R queries that share one key/value head (H / G heads times the question's tokens), D head
size, N tokens of the far past, P = N / page pages. Keys are those of the cache, before RoPE; the queries are rotated
as if every far key stood the same distance before them, so one product scores a key wherever it stands.

Page summaries: the mean key of a block is the exact score's first-order estimate; the least and greatest coordinate
bound it from above (Tang et al. 2024, "Quest", arXiv 2406.10774). Everything else here is our own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..models import kernels

Score = Literal["mass", "mean", "bounds", "two-step"]
SCORES: tuple[Score, ...] = ("mass", "mean", "bounds", "two-step")
STEP = 8192  # keys scored at once: the [R, STEP] scores stay in the processor's cache


@dataclass(frozen=True)
class Far:
    """The far past of one layer, cut into P pages.

    keys    [G, P * page, D], before RoPE
    blocks  summaries by name ("means", "lows", "highs"), each [G, P * page / block, D]
    """

    keys: Tensor
    blocks: dict[str, Tensor]
    page: int
    block: int

    @property
    def pages(self) -> int:
        return self.keys.shape[1] // self.page


def page_mass(q: Tensor, near: Tensor, far: Far, score: Score, shortlist: int) -> Tensor:
    """The attention mass that every page gets, summed over the queries: float32 [G, P].

    q          [G, R, D], rotated and scaled by D ** -0.5
    near       [G, R] log-sum-exps of the queries over all that they see anyway (first and newest tokens, the question
               itself): a head that is content with those has little say
    score      mass: every key, exactly. mean, bounds: from the summaries alone. two-step: the `shortlist` best pages
               by the means, then exactly; the other pages get 0
    """
    if score == "mass":
        page_lse = _page_lse(q, far.keys, far.page, 0.0)
    elif score == "bounds":
        page_lse = _bounds_lse(q, far)
    else:
        # A block's sum of exps is about its size times the exp of its mean score.
        size = torch.tensor(float(far.block)).log().item()
        page_lse = _page_lse(q, far.blocks["means"], far.page // far.block, size)
    mass = _shares(page_lse, near)  # [G, P]
    if score != "two-step" or shortlist >= far.pages:
        return mass if score != "two-step" else _shares(_page_lse(q, far.keys, far.page, 0.0), near)
    best = mass.sum(0).topk(shortlist).indices.sort().values  # [shortlist]
    keys = far.keys.unflatten(1, (far.pages, far.page))[:, best].flatten(1, 2)  # [G, shortlist * page, D]
    exact = _page_lse(q, keys, far.page, 0.0)  # [G, R, shortlist]
    # The pages left out still count in the denominator, by their estimate.
    rest = page_lse.index_fill(2, best, float("-inf")).logsumexp(-1)  # [G, R]
    return torch.zeros_like(mass).index_copy(1, best, _shares(exact, torch.logaddexp(near, rest)))


def _page_lse(q: Tensor, keys: Tensor, page: int, offset: float) -> Tensor:
    """Log-sum-exps of q [G, R, D] over every `page` keys [G, n, D], plus offset: float32 [G, R, n / page]."""
    groups, rows, _ = q.shape
    out = q.new_empty(groups, rows, keys.shape[1] // page, dtype=torch.float32)
    step = max(1, STEP // page)  # pages at once
    for group in range(groups):
        for begin in range(0, out.shape[2], step):
            some = keys[group, begin * page : (begin + step) * page].to(q.dtype)  # [s, D]
            out[group, :, begin : begin + step] = _log_sums(q[group] @ some.T, page) + offset
    return out


def _log_sums(scores: Tensor, page: int) -> Tensor:
    """Log-sum-exps of scores [R, n] over every `page` of them: float32 [R, n / page]."""
    if scores.device.type == "cpu" and not kernels.unavailable():
        from ..models.kernels import page_sums

        if page_sums.fits(scores, page):
            return page_sums.page_log_sums(scores, page)
    return scores.unflatten(1, (-1, page)).float().logsumexp(-1)


def _bounds_lse(q: Tensor, far: Far) -> Tensor:
    """The largest score that a key inside each block's bounds could have; of a page, its best block's. [G, R, P]."""
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
