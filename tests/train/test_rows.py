"""A loss and its gradients do not depend on how documents share rows; documents do not see each other."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from longverse.train import forward
from longverse.train.examples import Example
from longverse.train.forward import LossModel
from longverse.train.rows import document_attention, make_row, make_rows
from tests.helpers import random_network, tiny_config

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}, "rope_theta": None}


def examples(count: int = 7, seed: int = 0, longest: int = 60) -> list[Example]:
    rng = random.Random(seed)
    made = []
    for n in range(count):
        size = rng.randint(6, longest)
        middle = rng.randint(2, size - 2)
        spans = ((1, middle - 1, 1.0), (middle, size, 1.0)) if middle > 2 else ((middle, size, 1.0),)
        made.append(Example(np.array([rng.randrange(151) for _ in range(size)]), spans, f"e{n}"))
    return made


def loss_and_gradients(
    chosen: list[Example], micro: int, ranks: int = 1, weighting: str = "sample", **how: bool
) -> tuple[float, list[torch.Tensor]]:
    network = random_network(tiny_config(**DYNAMIC, max_position_embeddings=24))
    model = LossModel(network).train()
    loss = 0.0
    for rank in range(ranks):
        rows, total = make_rows(chosen, weighting, micro, rank, ranks)
        for row in rows:
            nll = model(row, **how) / total
            nll.backward()
            loss += float(nll.detach())
    return loss, [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("weighting", ["token", "sample", "answer"])
def test_invariant_to_rows_ranks_and_order(weighting: str) -> None:
    chosen = examples()
    loss, gradients = loss_and_gradients(chosen, 1, weighting=weighting)  # a row for each
    for micro, ranks in ((100, 1), (10_000, 1), (64, 2), (64, 3), (1, 5)):
        order = random.Random(micro).sample(chosen, len(chosen))
        other, others = loss_and_gradients(order, micro, ranks, weighting)
        assert other == pytest.approx(loss, rel=1e-5)
        for a, b in zip(gradients, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_between_layers_that_are_computed_anew_the_heap_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(forward, "_trim", lambda: trimmed.append)
    monkeypatch.setattr(forward, "TRIMMED", 2)
    model = LossModel(random_network(tiny_config(num_hidden_layers=5)))
    row = make_row(examples(1), "token")
    model(row).backward()
    assert not trimmed
    model(row, recompute=True).backward()
    assert len(trimmed) == 6  # before the layers 0, 2 and 4, and when their gradients are known


@pytest.mark.parametrize("how", [{"recompute": True}, {"offload": True}, {"recompute": True, "offload": True}])
def test_recompute_and_offload_change_nothing(how: dict) -> None:
    chosen = examples(3)
    loss, gradients = loss_and_gradients(chosen, 10_000)
    other, others = loss_and_gradients(chosen, 10_000, **how)
    assert other == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_a_perturbed_token_moves_its_own_document_only() -> None:
    chosen = examples(4)
    model = LossModel(random_network(tiny_config(**DYNAMIC, max_position_embeddings=24))).eval()
    before = model(make_row(chosen, "token"), per_token=True)
    ids = chosen[1].ids.copy()
    ids[3] = (ids[3] + 1) % 151
    after = model(make_row([chosen[0], dataclasses.replace(chosen[1], ids=ids), *chosen[2:]], "token"), per_token=True)
    labels = np.cumsum([0] + [int((e.weights("token") > 0).sum()) for e in chosen])
    moved = (before != after).numpy()
    assert moved[labels[1] : labels[2]].any()
    assert not moved[: labels[1]].any()
    assert not moved[labels[2] :].any()


def test_parts_of_a_text_pack_are_documents() -> None:
    pack = Example(np.arange(30), ((1, 10, 1.0), (11, 30, 1.0)), "pack", (0, 10))
    apart = [
        Example(np.arange(10), ((1, 10, 1.0),), "a"),
        Example(np.arange(10, 30), ((1, 20, 1.0),), "b"),
    ]
    one, two = make_row([pack], "token"), make_row(apart, "token")
    for field in ("ids", "positions", "rope_length", "places", "targets", "weights"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field
    assert one.bounds == two.bounds


@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (3, 1, 6)])
@pytest.mark.parametrize("groups", [4, 2])
def test_document_attention_equals_a_mask(lengths: tuple[int, ...], groups: int) -> None:
    total = sum(lengths)
    bounds = tuple(int(n) for n in np.cumsum([0, *lengths]))
    q, k, v = torch.randn(1, 4, total, 8), torch.randn(1, groups, total, 8), torch.randn(1, groups, total, 8)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document[None]) & torch.ones(total, total, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups != 4)
    torch.testing.assert_close(document_attention(bounds)(0, q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_the_base_follows_each_documents_own_length() -> None:
    long, short = examples(2, seed=5, longest=20)
    long = Example(np.resize(long.ids, 100), ((50, 100, 1.0),), "long")
    row = make_row([long, short], "token")
    model = LossModel(random_network(tiny_config(**DYNAMIC, max_position_embeddings=24))).eval()
    apart = torch.cat([model(make_row([e], "token"), per_token=True) for e in (long, short)])
    torch.testing.assert_close(model(row, per_token=True), apart, rtol=1e-4, atol=1e-5)
    plan = model.network.config.rope
    cos, _ = plan.cos_sin(row.positions, row.rope_length)
    own, _ = plan.cos_sin(torch.arange(100)[None], 100)
    assert torch.equal(cos[:, :100], own)


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_does_not_attend_twice(autocast: bool) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        attended = projected = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = str(func)
            self.attended += "backward" not in name and any(
                op in name for op in ("attention_for_cpu", "tile_attention", "causal_attention")
            )
            self.projected += name in ("aten.silu.default", "aten.silu_.default")
            return func(*args, **(kwargs or {}))

    network = random_network(tiny_config())
    model, row = LossModel(network, autocast).train(), make_row(examples(1), "token")
    with Count() as count:
        model(row, recompute=True).backward()
    assert count.attended == network.config.num_layers
    assert count.projected == 2 * network.config.num_layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention over documents needs a card")
def test_documents_in_one_call_equal_one_call_a_document() -> None:
    bounds = (0, 70, 73, 74, 300)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 64, generator=generator) for heads in (9, 3, 3))
    expected = document_attention(bounds)(0, q, k, v)
    got = document_attention(bounds)(0, *(x.cuda().bfloat16() for x in (q, k, v)))
    torch.testing.assert_close(got.float().cpu(), expected, rtol=2e-2, atol=2e-2)
