"""Fixed-length training sequences out of documents, every token once an epoch, in an order that is a function of
(seed, step).

1. `pieces`: documents (with the mixture's copies) are cut into pieces of at most one sequence.
2. `pack`: best-fit decreasing puts pieces into sequences; the rest of a sequence is padding, which is reported.
3. `Packing.step`: an epoch's order is a permutation of the sequences, grouped so that the batches of a step, and the
   ranks within one, cost about the same. Attention costs the *square* of a document's length, so the sum of squares
   is what is balanced. A step at the end of an epoch continues into the next, so every step is full.
4. `assemble`: ids, positions and document numbers of a sequence, for any source of tokens.

Nothing here keeps state: a run killed at step n resumes by asking for step n.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from longverse.errors import UserError

PIECE = np.dtype([("document", "<i8"), ("start", "<i8"), ("length", "<i8")])
PADDING = -1  # document number of padding; also the label that loss functions ignore is up to the trainer


def pieces(
    lengths: np.ndarray,
    sequence: int,
    *,
    copies: np.ndarray | None = None,
    extra: np.ndarray | None = None,
    split: bool = True,
) -> np.ndarray:
    """PIECE[n]: every document `copies` times (default once) plus the first `extra` tokens of it, cut into pieces of
    `sequence` tokens and a remainder. With split=False a longer document is a UserError (instruction items must not be
    cut)."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if sequence < 1:
        raise UserError(f"the sequence length must be at least 1 token, not {sequence}.")
    if not split and lengths.size and lengths.max() > sequence:
        raise UserError(
            f"an item has {lengths.max():,} tokens, the sequence length is {sequence:,}; raise it or drop longer items."
        )
    times = np.ones(lengths.size, np.int64) if copies is None else np.asarray(copies, dtype=np.int64)
    document = np.repeat(np.arange(lengths.size), times)
    shown = lengths[document]
    if extra is not None:
        more = np.flatnonzero(np.asarray(extra) > 0)
        document = np.concatenate([document, more])
        shown = np.concatenate([shown, np.asarray(extra, dtype=np.int64)[more]])
    parts = -(-shown // sequence)
    out = np.zeros(int(parts.sum()), dtype=PIECE)
    which = np.repeat(np.arange(shown.size), parts)
    ordinal = np.arange(out.size) - np.repeat(np.cumsum(parts) - parts, parts)
    out["document"] = document[which]
    out["start"] = ordinal * sequence
    out["length"] = np.minimum(sequence, shown[which] - out["start"])
    return out


def pack(lengths: np.ndarray, sequence: int) -> np.ndarray:
    """int64[n]: the sequence each piece goes into, by best-fit decreasing: the longest piece first, each into the
    fullest sequence that still has room. O(n log sequence) by a tree over the room left. Raises UserError when a piece
    is longer than a sequence."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and lengths.max() > sequence:
        raise UserError(f"a piece of {lengths.max():,} tokens does not fit a sequence of {sequence:,}.")
    where = np.zeros(lengths.size, dtype=np.int64)
    width = 1 << sequence.bit_length()  # leaves: rooms 0 .. sequence
    open_with: list[list[int]] = [[] for _ in range(sequence + 1)]  # sequences by the room left in them
    tree = np.zeros(2 * width, dtype=np.int64)  # number of open sequences below each node
    count = 0

    def change(room: int, by: int) -> None:
        node = room + width
        while node:
            tree[node] += by
            node >>= 1

    def least_room(at_least: int) -> int:
        """The smallest room >= at_least of an open sequence, or -1."""
        node = at_least + width
        if tree[node]:
            return at_least
        while node > 1:  # climb until a right sibling holds something, then go down to its leftmost
            if not node & 1 and tree[node + 1]:
                node += 1
                while node < width:
                    node = 2 * node if tree[2 * node] else 2 * node + 1
                return node - width
            node >>= 1
        return -1

    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        room = least_room(length) if length else 0
        if length and room < 0:
            target, room = count, sequence
            count += 1
        elif length:
            target = open_with[room].pop()
            change(room, -1)
        else:
            continue  # an empty document takes no place
        where[index] = target
        if room > length:
            open_with[room - length].append(target)
            change(room - length, 1)
    return where


@dataclass(frozen=True)
class Packing:
    """All sequences of an epoch and their order.

    pieces: PIECE[n] sorted by sequence; first: int64[sequences + 1] where each sequence's pieces begin.
    batch: sequences a step, over all ranks; ranks: each gets batch / ranks consecutive ones of a step.
    """

    pieces: np.ndarray
    first: np.ndarray
    sequence: int  # tokens
    batch: int
    ranks: int
    seed: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def plan(cls, parts: np.ndarray, sequence: int, *, batch: int = 1, ranks: int = 1, seed: int = 0) -> Packing:
        """Pack pieces (from `pieces`). UserError when nothing is to be packed or the batch does not divide."""
        parts = parts[parts["length"] > 0]
        if parts.size == 0:
            raise UserError("there is no token to pack; the store or the item file is empty.")
        if batch < 1 or ranks < 1 or batch % ranks:
            raise UserError(f"a batch of {batch} sequences does not divide over {ranks} ranks; make it a multiple.")
        shuffled = parts[np.random.default_rng([seed, 0]).permutation(parts.size)]
        where = pack(shuffled["length"], sequence)
        order = np.argsort(where, kind="stable")
        first = np.concatenate([[0], np.cumsum(np.bincount(where))])
        # Best-fit leaves the longest piece first in every sequence; shuffle within, so that position says nothing.
        rng = np.random.default_rng([seed, 1])
        for start, end in itertools.pairwise(first.tolist()):
            rng.shuffle(order[start:end])
        return cls(shuffled[order], first, sequence, batch, ranks, seed)

    def __len__(self) -> int:
        """Sequences in an epoch."""
        return len(self.first) - 1

    @property
    def tokens(self) -> int:
        """Tokens in an epoch, padding not counted."""
        return int(self.pieces["length"].sum())

    @property
    def padding(self) -> float:
        """Share of an epoch's places that hold padding."""
        return 1 - self.tokens / (len(self) * self.sequence)

    @cached_property
    def costs(self) -> np.ndarray:
        """float64[sequences]: the sum of squared document lengths of each, in tokens squared."""
        return np.add.reduceat(self.pieces["length"].astype(np.float64) ** 2, self.first[:-1])

    def step(self, step: int) -> list[int]:
        """The `batch` sequences of a step, rank 0's first. Equal for equal (seed, step), whatever ran before."""
        place = step * self.batch
        chosen: list[int] = []
        while len(chosen) < self.batch:
            epoch, start = divmod(place, len(self))
            part = self._epoch(epoch)[start : start + self.batch - len(chosen)]
            chosen.extend(part.tolist())
            place += len(part)
        return self._over_ranks(chosen)

    def sequence_pieces(self, index: int) -> np.ndarray:
        """PIECE[k] of one sequence, in order."""
        return self.pieces[self.first[index] : self.first[index + 1]]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 2:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = self._order(epoch)
        return self._orders[epoch]

    def _order(self, epoch: int) -> np.ndarray:
        """A permutation of the sequences. Those that fill whole steps of this epoch are dealt to the steps in rounds:
        sorted by cost, each round gives every step one sequence of about the same cost, in alternating direction."""
        n, batch = len(self), self.batch
        rng = np.random.default_rng([self.seed, 2, epoch])
        order = rng.permutation(n)
        head = -(epoch * n) % batch  # the first ones complete the step that began in the previous epoch
        steps = (n - head) // batch if n > head else 0
        if batch == 1 or steps < 2:
            return order
        whole = order[head : head + steps * batch]
        whole = whole[np.argsort(-self.costs[whole], kind="stable")].reshape(batch, steps)
        dealt = np.empty_like(whole)
        load = np.zeros(steps)
        costs = self.costs
        for turn in range(batch):  # the dearest of this round goes to the step that has least so far
            to = np.argsort(load, kind="stable")
            dealt[turn, to] = whole[turn]
            load[to] += costs[whole[turn]]
        dealt = dealt.T[rng.permutation(steps)]
        order[head : head + steps * batch] = dealt.reshape(-1)
        return order

    def _over_ranks(self, chosen: list[int]) -> list[int]:
        """The same sequences, arranged so that the ranks' shares cost about the same."""
        if self.ranks == 1:
            return chosen
        costs, each = self.costs, self.batch // self.ranks
        shares: list[list[int]] = [[] for _ in range(self.ranks)]
        loads = [0.0] * self.ranks
        for index in sorted(chosen, key=lambda i: (-costs[i], i)):
            rank = min((r for r in range(self.ranks) if len(shares[r]) < each), key=lambda r: (loads[r], r))
            shares[rank].append(index)
            loads[rank] += costs[index]
        return [index for share in shares for index in share]


class Tokens(Protocol):
    """Where the ids of a document come from: a TokenStore, or a list of items."""

    def ids(self, document: int, start: int, end: int | None) -> np.ndarray: ...


@dataclass(frozen=True)
class Sequence:
    """One packed sequence; every array has `sequence` places.

    ids: int64; padding holds `pad_id`.
    positions: int64; from 0 in each document when boundaries are kept, else 0, 1, 2 ... through.
    documents: int64; 0, 1, 2 ... by document within the sequence (all 0 when boundaries are not kept), PADDING for
    padding. Attention is allowed between equal numbers only: that is the block-diagonal mask.
    """

    ids: np.ndarray
    positions: np.ndarray
    documents: np.ndarray

    @property
    def boundaries(self) -> np.ndarray:
        """int64[k + 1]: where documents begin, and where the last one ends (cumulative lengths, padding left out)."""
        used = int((self.documents != PADDING).sum())
        starts = np.flatnonzero(np.diff(self.documents[:used], prepend=-2))
        return np.append(starts, used)


def assemble(
    packing: Packing, index: int, tokens: Tokens, *, pad_id: int = 0, keep_boundaries: bool = True
) -> Sequence:
    """Sequence `index` of a packing. keep_boundaries=False lets documents see each other, as plain concatenation
    does."""
    size = packing.sequence
    ids = np.full(size, pad_id, dtype=np.int64)
    positions = np.zeros(size, dtype=np.int64)
    documents = np.full(size, PADDING, dtype=np.int64)
    place = 0
    for number, piece in enumerate(packing.sequence_pieces(index)):
        start, length = int(piece["start"]), int(piece["length"])
        span = slice(place, place + length)
        ids[span] = tokens.ids(int(piece["document"]), start, start + length)
        positions[span] = np.arange(length) if keep_boundaries else np.arange(place, place + length)
        documents[span] = number if keep_boundaries else 0
        place += length
    return Sequence(ids, positions, documents)
