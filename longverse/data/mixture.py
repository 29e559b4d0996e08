"""How often each document is shown in an epoch, so that sources, lengths and the total come out as asked.

Every document is tokenised and stored once; the mixture is a column of copies. A source's share of tokens is fixed
first; oversampling long documents then happens *within* it (short ones give way), so the mix of sources stays.
"""

from __future__ import annotations

import math

import numpy as np

from longverse.errors import UserError


def plan_copies(
    lengths: np.ndarray,
    sources: np.ndarray,
    names: list[str],
    weights: list[float | None],
    *,
    total_tokens: int | None = None,
    long_tokens: int | None = None,
    long_factor: float = 1.0,
    max_copies: float = 4.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(uint16[documents] whole copies of each document in an epoch, uint64[documents] tokens of its beginning shown
    once more; at most one document of a source has any).

    lengths: tokens of each document; sources: index of its source; weights: a source's share of the mixture's tokens,
    or None for all (then each source weighs its size). Without `total_tokens`, the mixture is as large as it can
    be without showing the average document of any source more than once. Documents of `long_tokens` or more are
    shown `long_factor` times as often as the others of their source. The tokens of a source come out
    within one token of the target. UserError when a source would be repeated more than `max_copies`
    times on average, or only some weights are given.
    """
    copies = np.zeros(lengths.size, dtype=np.uint16)
    extra = np.zeros(lengths.size, dtype=np.uint64)
    sizes = np.array([lengths[sources == s].sum(dtype=np.float64) for s in range(len(names))])
    given = [w for w in weights if w is not None]
    if given and len(given) != len(weights):
        missing = next(n for n, w in zip(names, weights, strict=True) if w is None)
        raise UserError(f"source {missing!r} has no weight while others do; give every source one, or none.")
    for name, size in zip(names, sizes, strict=True):
        if given and size == 0:
            raise UserError(f"source {name!r} has a weight but no document was left of it; drop it or mend it.")
    if not sizes.sum():
        return copies, extra
    share = np.array(given, dtype=np.float64) if given else sizes
    share = share / share.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.min(np.where(share > 0, sizes / share, np.inf))
    total = float(total_tokens) if total_tokens is not None else float(largest)
    for s, name in enumerate(names):
        mine = np.flatnonzero(sources == s)
        if mine.size == 0:
            continue
        target = total * share[s]
        if target > max_copies * sizes[s]:
            raise UserError(
                f"source {name!r} would be repeated {target / sizes[s]:.1f} times to give {int(target):,} tokens, the "
                f"limit is {max_copies:g}; lower its weight or total_tokens, or raise max_copies."
            )
        own = lengths[mine].astype(np.float64)
        ratio = np.where(own >= long_tokens, long_factor, 1.0) if long_tokens is not None else np.ones(own.size)
        rates = ratio * target / (ratio * own).sum()
        copies[mine], extra[mine] = _round(own, rates, np.random.default_rng([seed, s]))
    return copies, extra


def _round(lengths: np.ndarray, rates: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whole copies whose tokens add up to those of `rates`, and the rest as the beginning of one document: from the
    longest document down, each rounded so that the running sum stays nearest to its target. Falling order keeps the
    length distribution; neighbours in length are shuffled so that the seed decides who is chosen."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, order.size, 8):
        rng.shuffle(order[start : start + 8])
    copies = np.zeros(lengths.size, dtype=np.uint16)
    extra = np.zeros(lengths.size, dtype=np.uint64)
    owed = 0.0
    for index in order.tolist():
        length, rate = float(lengths[index]), float(rates[index])
        if length == 0:
            continue
        owed += length * rate
        low = math.floor(rate)
        count = min(max(math.floor(owed / length + 0.5), low), low + 1)
        copies[index] = count
        owed -= length * count
    rest = round(owed)
    if rest < 0:  # one document too many: the one shown above its rate that is long enough gives some of itself back
        index = max(np.flatnonzero((copies > 0) & (lengths >= -rest)), key=lambda i: copies[i] - rates[i])
        copies[index] -= 1
        rest += int(lengths[index])
        extra[index] = rest
    elif rest > 0:
        index = max(np.flatnonzero(lengths >= rest), key=lambda i: rates[i] - copies[i])
        extra[index] = rest
    return copies, extra
