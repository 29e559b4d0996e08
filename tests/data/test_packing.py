"""Properties of packing: no token lost or doubled, boundaries true, work balanced, order a function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.data.packing import PADDING, Packing, assemble, pack, pieces
from longverse.errors import UserError


class Numbered:
    """Token k of document d is d * 1,000,000 + k, so every place of a sequence can be checked."""

    def ids(self, document, start, end):
        return document * 1_000_000 + np.arange(start, end)


lengths_of = st.lists(st.integers(0, 90), min_size=1, max_size=60).filter(lambda x: sum(x) > 0)


@given(lengths_of, st.integers(1, 64), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_token_once_per_epoch_and_boundaries_true(lengths, sequence, batch, seed):
    plan = Packing.plan(pieces(np.array(lengths), sequence), sequence, batch=batch, seed=seed)
    seen = []
    steps = -(-2 * len(plan) // batch)  # two epochs, and the rest of a step
    order = [index for step in range(steps) for index in plan.step(step)]
    for epoch in range(2):
        assert sorted(order[epoch * len(plan) : (epoch + 1) * len(plan)]) == list(range(len(plan)))
    for index in range(len(plan)):
        packed = assemble(plan, index, Numbered(), pad_id=-7)
        used = packed.documents != PADDING
        assert (packed.ids[~used] == -7).all()
        assert not used[used.sum() :].any()  # padding only at the end
        for start, end in zip(packed.boundaries[:-1], packed.boundaries[1:], strict=True):
            run = packed.ids[start:end]
            assert len(set((run // 1_000_000).tolist())) == 1
            assert (np.diff(run) == 1).all()
            assert (packed.positions[start:end] == np.arange(end - start)).all()
            assert len(set(packed.documents[start:end].tolist())) == 1
        seen.extend(packed.ids[used].tolist())
    assert sorted(seen) == [d * 1_000_000 + k for d, n in enumerate(lengths) for k in range(n)]
    assert plan.tokens == sum(lengths)


@given(lengths_of, st.integers(4, 64), st.data())
@settings(max_examples=30, deadline=None)
def test_copies_and_extra(lengths, sequence, data):
    lengths = np.array(lengths)
    copies = np.array([data.draw(st.integers(0, 3)) for _ in lengths])
    extra = np.array([data.draw(st.integers(0, int(n))) for n in lengths])
    parts = pieces(lengths, sequence, copies=copies, extra=extra)
    for document, length in enumerate(lengths):
        mine = parts[parts["document"] == document]
        times = np.zeros(length, dtype=int)
        for part in mine:
            times[part["start"] : part["start"] + part["length"]] += 1
        assert times.tolist() == [copies[document] + (k < extra[document]) for k in range(length)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
@settings(max_examples=60, deadline=None)
def test_best_fit_wastes_little(lengths):
    where = pack(np.array(lengths), 50)
    used = np.bincount(where, weights=lengths)
    assert used.max() <= 50
    assert (used > 0).all()
    # Two sequences that fit together would have been one: at most one is half empty.
    assert (used <= 25).sum() <= 1


def test_work_is_balanced_over_steps_and_ranks():
    rng = np.random.default_rng(0)
    lengths = np.minimum((rng.pareto(1.1, 4000) * 200 + 20).astype(int), 60_000)
    plan = Packing.plan(pieces(lengths, 8192), 8192, batch=16, ranks=4, seed=1)
    costs = plan.costs
    steps = len(plan) // 16
    loads = np.array([costs[plan.step(s)].sum() for s in range(steps)])
    order = rng.permutation(len(plan))[: steps * 16]
    chance = costs[order].reshape(steps, 16).sum(1)
    assert loads.std() < 0.25 * chance.std()
    assert loads.max() < 1.1 * loads.mean()
    by_rank = np.array([costs[plan.step(s)].reshape(4, 4).sum(1) for s in range(steps)])
    assert (by_rank.max(1) / by_rank.mean(1)).mean() < 1.3
    assert plan.padding < 0.02


def test_order_is_a_function_of_seed_and_step():
    parts = pieces(np.arange(1, 200), 64)
    one = Packing.plan(parts, 64, batch=3, seed=5)
    two = Packing.plan(parts, 64, batch=3, seed=5)
    forward = [one.step(s) for s in range(300)]
    assert [two.step(s) for s in reversed(range(300))][::-1] == forward
    assert [Packing.plan(parts, 64, batch=3, seed=6).step(s) for s in range(20)] != forward[:20]
    per_epoch = len(one) // 3
    assert forward[:per_epoch] != forward[per_epoch : 2 * per_epoch]


def test_without_boundaries_documents_flow_together():
    plan = Packing.plan(pieces(np.array([5, 6, 7]), 20), 20)
    packed = assemble(plan, 0, Numbered(), keep_boundaries=False)
    assert packed.positions[:18].tolist() == list(range(18))
    assert packed.documents.tolist() == [0] * 18 + [PADDING] * 2
    assert packed.boundaries.tolist() == [0, 18]


def test_bad_input():
    with pytest.raises(UserError, match="sequence length is 8"):
        pieces(np.array([9]), 8, split=False)
    with pytest.raises(UserError, match="no token"):
        Packing.plan(pieces(np.array([0]), 8), 8)
    with pytest.raises(UserError, match="multiple"):
        Packing.plan(pieces(np.array([4]), 8), 8, batch=3, ranks=2)
