"""Pages against the definition: exact attention where everything fits, and a slow spelled-out reading where not."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longverse import UserError
from longverse.inference import pages_attention
from longverse.inference.engine import Engine
from longverse.inference.pages import PagesSession, PagesSettings, heaviest_spans
from longverse.inference.pages_choice import Far, _bounds_lse, best_pages, page_mass, scaled_rows
from longverse.inference.sampling import Sampling
from longverse.models.attention import reference_attention
from longverse.models.chat import ChatFormat
from longverse.models.rope import RopePlan
from longverse.models.tokenizer import Tokenizer
from tests.helpers import random_network, tiny_config
from tests.models.folders import save_tokenizer

WINDOW = 512
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def make_engine(tokenizer: Tokenizer, **changes: Any) -> Engine:
    changes.setdefault("max_position_embeddings", WINDOW)
    network = random_network(tiny_config(**changes))
    for end in tokenizer.eos_ids:  # a random model ends soon; a logit of 0 makes that rare
        network.lm_head.weight.data[end] = 0
    return Engine(network, tokenizer, ChatFormat("plain", tokenizer))


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer, num_key_value_heads=2)


def small(**changes: Any) -> PagesSettings:
    """Settings under which 100 tokens are long."""
    base: dict[str, Any] = {"first": 4, "window": 24, "chunk": 16, "page": 8, "block": 4, "budget": 24, "newest": 12}
    base |= {"reserve": 60, "shortlist": 5, "distance": 30, "anew": 0, "margin": 3, "least": 0.0}
    return PagesSettings(**(base | changes))


def prompt(length: int, seed: int = 5) -> list[int]:
    return torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(session: Any, ids: list[int], new: int = 6, **more: Any) -> tuple[list[int], Tensor]:
    """The answer's ids and the logits [n, V] they were chosen from."""
    seen: list[Tensor] = []
    sampling = Sampling(max_new_tokens=new, on_token=lambda token, logits: seen.append(logits))
    return list(session.stream_ids(ids, sampling, **more)), torch.stack(seen)


# ---- everything selected: exact attention ------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(2, 150),
    question=st.integers(1, 20),
    first=st.integers(1, 12),
    chunk=st.integers(8, 64),
    block=st.integers(1, 4),
    blocks=st.integers(1, 4),
    newest=st.integers(1, 40),
    groups=st.sampled_from([4, 2, 1]),
    scope=st.sampled_from(["all", "layer", "head"]),
    seed=st.integers(0, 9),
)
def test_with_every_page_chosen_pages_are_exact_attention(
    tokenizer: Tokenizer, length: int, question: int, first: int, chunk: int, block: int, blocks: int, newest: int,
    groups: int, scope: Any, seed: int,
) -> None:  # fmt: skip
    engine = make_engine(tokenizer, num_key_value_heads=groups, num_hidden_layers=2)
    ids = prompt(length, seed)
    everything = small(
        first=first, window=300, chunk=chunk, block=block, page=block * blocks, budget=300, newest=newest, scope=scope
    )
    session = PagesSession(engine, length + 4, settings=everything, question_tokens=question)
    _, ours = answer(session, ids, 4)
    with torch.no_grad():
        exact = engine.network(torch.tensor([ids]), rope_length=length + 4)[0, -1]  # one shot, float32
    assert (ours[0] - exact).abs().max() < 2e-4
    _, theirs = answer(engine.session(length + 4), ids, 4)
    assert (ours - theirs).abs().max() < 2e-4


@pytest.mark.parametrize("rope", [DYNAMIC, YARN], ids=["dynamic", "yarn"])
def test_every_rope_plan_turns_as_in_the_network(tokenizer: Tokenizer, rope: dict[str, Any]) -> None:
    engine = make_engine(tokenizer, rope_theta=None, rope_parameters=rope, max_position_embeddings=128)
    ids = prompt(150)
    everything = small(window=300, budget=300, newest=40)
    _, ours = answer(PagesSession(engine, 160, settings=everything, question_tokens=9), ids)
    _, theirs = answer(engine.session(160), ids)
    assert (ours - theirs).abs().max() < 2e-4


# ---- not everything: against a slow spelling-out -----------------------------------------------------------


class Slow:
    """The definition, query by query: `sees(token)` gives the tokens a query sees and the position of each, its own
    last. Keys are rotated one by one in float64; nothing is shared with the code under test."""

    def __init__(self, engine: Engine, rope_length: int) -> None:
        self.network, self.rope_length = engine.network, rope_length
        self.inv_freq = engine.network.config.rope.inv_freq(rope_length).double()
        layers = engine.network.config.num_layers
        self.keys: list[list[Tensor]] = [[] for _ in range(layers)]  # a token's unrotated key [G, D]
        self.values: list[list[Tensor]] = [[] for _ in range(layers)]

    def turned(self, x: Tensor, positions: list[int]) -> Tensor:
        """x [n, heads, D] as complex numbers turned to positions [n]."""
        real, imaginary = x.double().chunk(2, -1)
        angle = torch.tensor(positions).double()[:, None, None] * self.inv_freq
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1)

    def run(self, ids: list[int], sees: Callable[[int, int, int], tuple[list[int], list[int]]]) -> Tensor:
        """Append ids; sees(layer, group, token) as above. Hidden states [T, C]."""
        before = len(self.keys[0])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer] += list(k[0].transpose(0, 1))
            self.values[layer] += list(v[0].transpose(0, 1))
            groups = k.shape[1]
            share = q.shape[1] // groups
            out = torch.zeros_like(q)
            for at in range(q.shape[2]):
                for group in range(groups):
                    tokens, positions = sees(layer, group, before + at)
                    assert tokens[-1] == before + at
                    keys = torch.stack([self.keys[layer][t][group] for t in tokens])[:, None]  # [n, 1, D]
                    values = torch.stack([self.values[layer][t][group] for t in tokens]).double()  # [n, D]
                    keys = self.turned(keys, positions)[:, 0]
                    for head in range(group * share, (group + 1) * share):
                        query = self.turned(q[0, head, at][None, None], positions[-1:])[0, 0]
                        weights = (keys @ query / query.shape[0] ** 0.5).softmax(0)
                        out[0, head, at] = (weights @ values).float()
            return out

        positions = torch.zeros(1, len(ids), dtype=torch.int64)
        with torch.no_grad():
            return self.network.model(torch.tensor([ids]), positions, self.rope_length, attend)[0]


def reading(s: PagesSettings) -> Callable[[int, int, int], tuple[list[int], list[int]]]:
    """What a token sees while it is read: the first tokens and a window that begins with its chunk's."""

    def sees(layer: int, group: int, token: int) -> tuple[list[int], list[int]]:
        start = max(token // s.chunk * s.chunk - s.window, s.first)
        tokens = [t for t in range(token + 1) if t < s.first or t >= start]
        return tokens, list(range(len(tokens)))

    return sees


def read_slowly(
    engine: Engine, session: PagesSession, s: PagesSettings, ids: list[int], asked: int
) -> tuple[Slow, int, int, list[int]]:
    """All but the question of `asked` tokens, read by the definition: it, the tokens read, the pages of the far past,
    and the newest tokens after those."""
    plain = len(ids) - asked
    slow = Slow(engine, session.rope_length)
    slow.run(ids[:plain], reading(s))
    far = (plain - s.newest - s.first) // s.page
    return slow, plain, far, list(range(s.first + far * s.page, plain))


@pytest.mark.parametrize("scope", ["all", "layer", "head"])
@pytest.mark.parametrize("positions", ["renumbered", "clamped"])
def test_a_question_over_chosen_pages_is_what_the_definition_says(engine: Engine, scope: Any, positions: Any) -> None:
    s = small(scope=scope, positions=positions)
    ids, asked = prompt(100), 7
    session = PagesSession(engine, 110, settings=s, question_tokens=asked)
    _, ours = answer(session, ids, 1)
    slow, plain, far, newest = read_slowly(engine, session, s, ids, asked)
    assert torch.allclose(torch.stack(slow.keys[2], 1), session.cache.keys[2, 0, :, :plain], atol=1e-4)
    chosen = session.chosen
    assert chosen is not None
    assert chosen.shape[2] == 3 < far
    assert (chosen.diff(dim=2) > 0).all()  # in the document's order

    def sees(layer: int, group: int, token: int) -> tuple[list[int], list[int]]:
        pages: list[int] = []
        for page in chosen[layer, group].tolist():
            pages += range(s.first + page * s.page, s.first + (page + 1) * s.page)
        tokens = [*range(s.first), *pages, *newest, *range(plain, token + 1)]
        where = list(range(len(tokens)))
        if positions == "clamped":
            where[s.first : s.first + len(pages)] = [s.first + len(pages) - 1] * len(pages)
        return tokens, where

    hidden = slow.run(ids[plain:], sees)
    with torch.no_grad():
        logits = engine.network.lm_head(hidden[-1])
    assert (ours[0] - logits).abs().max() < 1e-3


@pytest.mark.parametrize("vote", ["best", "sum"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_question_over_text_read_anew_is_what_the_definition_says(
    tokenizer: Tokenizer, vote: Any, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longverse.inference.pages.CHUNK", 9)
    rope = {"rope_theta": None, "rope_parameters": DYNAMIC, "max_position_embeddings": 64} if dynamic else {}
    engine = make_engine(tokenizer, num_key_value_heads=2, **rope)
    s = small(anew=48, budget=48, vote=vote)
    ids, asked = prompt(200), 7
    session = PagesSession(engine, 220, settings=s, question_tokens=asked)
    written, ours = answer(session, ids, 3)
    slow, plain, far, newest = read_slowly(engine, session, s, ids, asked)
    assert session.chosen is not None
    pages = session.chosen[0, 0].tolist()
    assert (session.chosen == session.chosen[:1, :1]).all()
    assert session.working is not None
    by_head = session.working.mass.flatten(0, 1)  # [layers * G, far]
    weights = [max(head[page] for head in by_head) if vote == "best" else sum(by_head)[page] for page in range(far)]
    assert pages == sorted(sorted(range(far), key=lambda page: -weights[page])[: len(pages)])
    assert sum(a + 1 < b for a, b in pairwise(pages)) >= 1  # some stand apart
    around = sorted({t for p in pages for t in range(p * s.page - s.margin, (p + 1) * s.page + s.margin)})
    text = [s.first + t for t in around if 0 <= t < far * s.page]
    assert 2 * s.page < len(text) <= 48

    def within(layer: int, group: int, token: int) -> tuple[list[int], list[int]]:
        tokens = [*range(s.first), *range(plain, token + 1)]
        return tokens, list(range(len(tokens)))

    def over_all(layer: int, group: int, token: int) -> tuple[list[int], list[int]]:
        tokens = [*range(s.first), *range(plain, plain + len(text)), *newest, *range(plain + len(text), token + 1)]
        return tokens, list(range(len(tokens)))

    slow.run([ids[t] for t in text], within)
    hidden = slow.run([*ids[plain:], *written[:2]], over_all)
    with torch.no_grad():
        logits = engine.network.lm_head(hidden[-3:])
    assert (ours - logits).abs().max() < 1e-3


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9]), min_size=1, max_size=30),
    page=st.integers(1, 9), margin=st.integers(0, 12), anew=st.integers(1, 90), more=st.integers(0, 90),
    share=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
)  # fmt: skip
def test_the_heaviest_pages_and_what_stands_around_them(
    weights: list[float], page: int, margin: int, anew: int, more: int, share: float
) -> None:
    room = page + more
    s = small(page=page, block=1, margin=margin, anew=anew, budget=page, least=share)
    spans, pages = heaviest_spans(torch.tensor(weights), s, room)
    read = [t for begin, end in spans for t in range(begin, end)]
    assert read == sorted(set(read))
    assert all(0 <= t < len(weights) * page for t in read)
    assert all(t in read for number in pages.tolist() for t in range(number * page, (number + 1) * page))
    assert len(read) <= max(page, min(anew, room)) <= room
    assert all(end < begin for (_, end), (begin, _) in pairwise(spans))
    least = min(weights[number] for number in pages.tolist())
    assert all(weights[n] <= least for n in range(len(weights)) if n not in pages.tolist())

    def with_margins(numbers: list[int]) -> list[int]:
        around = {t for n in numbers for t in range(n * page - margin, (n + 1) * page + margin)}
        return sorted(t for t in around if 0 <= t < len(weights) * page)

    order = sorted(range(len(weights)), key=lambda number: -weights[number])
    most = min(anew, room)
    heavy = sum(weight >= torch.tensor(max(weights)) * share for weight in torch.tensor(weights))
    fit = [n for n in range(int(heavy) + 1) if len(with_margins(order[:n])) <= most]
    count = max(fit)
    if count:
        assert sorted(order[:count]) == pages.tolist()
        assert read == with_margins(order[:count])
    else:  # the heaviest alone, without them
        assert (pages.tolist(), len(read)) == (order[:1], page)


def naive_mass(q: Tensor, near: Tensor, keys: Tensor, page: int) -> Tensor:
    """Softmax of q [H, T, D] over all far keys [G, n, D] and one more of score `near`, summed over a page's keys and
    over the queries."""
    groups, _, size = keys.shape
    rows = q.double().reshape(groups, -1, size) * size**-0.5
    scores = torch.cat((rows @ keys.double().transpose(1, 2), near.double()[..., None]), -1)
    return scores.softmax(-1)[..., :-1].sum(1).unflatten(1, (-1, page)).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3), heads=st.integers(1, 3), tokens=st.integers(1, 4), pages=st.integers(1, 30),
    block=st.integers(1, 4), blocks=st.integers(1, 3), first=st.integers(0, 5), step=st.integers(1, 50),
    shortlist=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_page_scores(
    groups: int, heads: int, tokens: int, pages: int, block: int, blocks: int, first: int, step: int, shortlist: int,
    seed: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    page = block * blocks
    q = 3 * torch.randn(groups * heads, tokens, 8, generator=draw)
    kept = torch.randn(2, 1, groups, first + pages * page + 3, 8, generator=draw)
    keys = kept[1, 0, :, first : first + pages * page]
    near = 3 * torch.randn(groups, heads * tokens, generator=draw)
    cut = keys.unflatten(1, (-1, block))
    far = Far(kept, 1, first, pages, {"means": cut.mean(2), "lows": cut.amin(2), "highs": cut.amax(2)}, page, block)
    assert torch.equal(far.keys, keys)
    expected = naive_mass(q, near, keys, page).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longverse.inference.pages_choice.STEP", step)
        mass = page_mass(q, near, far, "mass", shortlist)
        two_step = page_mass(q, near, far, "two-step", shortlist)
        means = page_mass(q, near, far, "mean", shortlist)
        bounds = page_mass(q, near, far, "bounds", shortlist)
    assert torch.allclose(mass, expected, atol=1e-5)
    if shortlist >= pages:
        assert torch.allclose(two_step, expected, atol=1e-5)
    else:
        weighed = two_step.sum(0) > 0
        assert weighed.sum() <= shortlist
        assert set(weighed.nonzero()[:, 0].tolist()) <= set(best_pages(means.sum(0), shortlist).tolist())
    if block == 1:
        assert torch.allclose(means, expected, atol=1e-5)
    # A bound is no share; it is tested by its logarithm: never below the best key of the page.
    assert bounds.shape == expected.shape
    rows = scaled_rows(q, groups)
    best = (rows @ keys.transpose(1, 2)).unflatten(2, (-1, page)).amax(-1)
    assert (_bounds_lse(rows, far) >= best - 1e-5).all()


@pytest.mark.parametrize("page", [64, 128])
def test_pages_are_weighed_by_the_kernel_as_without_it(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    kept = torch.randn(2, 1, 3, 64 + 6 * page + 20, 64, generator=draw).bfloat16()
    q, near = 2 * torch.randn(9, 5, 64, generator=draw), torch.randn(3, 15, generator=draw)
    far = Far(kept, 1, 64, 6, {}, page, 16)
    found = page_mass(q, near, far, "mass", 1)
    monkeypatch.setattr("longverse.inference.pages_choice.compiled_fits", lambda q, keys: False)
    torch.testing.assert_close(found, page_mass(q, near, far, "mass", 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, naive_mass(q, near, far.keys, page).float(), rtol=1e-4, atol=1e-6)


def test_best_pages_keep_their_order_and_ties_fall_to_the_earlier() -> None:
    mass = torch.tensor([[0.1, 0.5, 0.1, 0.9, 0.1], [0.0, 0.0, 0.0, 0.0, 1.0]])
    assert best_pages(mass, 3).tolist() == [[0, 1, 3], [0, 1, 4]]


def test_the_page_a_question_repeats_is_chosen(tokenizer: Tokenizer) -> None:
    """A network whose heads look for equal tokens: the page that holds the question's token wins every vote."""
    engine = make_engine(tokenizer, rope_theta=1e6, num_hidden_layers=2)
    for layer in engine.network.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data = 3 * torch.eye(64)
    ids = [int(t) for t in torch.randint(3, 90, (200,), generator=torch.Generator().manual_seed(1))]
    ids[83] = 95
    for scope in ("all", "layer", "head"):
        # At distance 0 nothing is turned, so a query's best key is its own token's.
        s = small(budget=16, scope=scope, score="mass", distance=0)
        session = PagesSession(engine, 210, settings=s, question_tokens=1)
        answer(session, [*ids, 95], 2)
        assert session.chosen is not None
        assert (session.chosen == (83 - 4) // 8).any(-1).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"least": 1.5}, "least of pages is 1.5 and must be a share from 0 to 1"),
        ({"anew": -1}, "anew of pages is -1 and must be at least 0"),
        ({"margin": -2}, "margin of pages is -2"),
        ({"page": 0}, "page of pages is 0 and must be at least 1"),
        ({"page": 6}, "A page of 6 tokens must be a multiple of its blocks of 4"),
        ({"budget": 7}, "A budget of 7 tokens holds no page of 8"),
        ({"vote": "most"}, "The vote of pages is 'most' and must be best or sum"),
        ({"anew": 64, "positions": "clamped"}, "clamped positions need anew 0"),
        ({"scope": "one"}, "The scope of pages is 'one' and must be all or layer or head"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        small(**change)


# ---- sessions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"anew": 24}, {}, {"vote": "sum"}, {"scope": "layer"}, {"score": "bounds"}])
def test_a_second_question_is_answered_as_by_a_fresh_session(engine: Engine, more: dict[str, Any]) -> None:
    document, first, second = prompt(150), prompt(9, 1), prompt(12, 2)
    session = PagesSession(engine, 200, settings=small(**more), question_tokens=9)
    answer(session, document + first)
    assert (session.stats.attention, session.stats.reused_tokens, session.stats.prompt_tokens) == ("pages", 0, 159)
    session.question_tokens = 12
    again, logits = answer(session, document + second)
    assert session.stats.reused_tokens == 150 == len(session.tokens) == session.cache.length
    fresh, expected = answer(PagesSession(engine, 200, settings=small(**more), question_tokens=12), document + second)
    assert again == fresh
    assert torch.equal(logits, expected)
    assert session.stats.prefill_seconds > 0


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 149), max_size=5, unique=True), chunk=st.integers(7, 40))
def test_a_document_read_in_any_pieces_is_the_same(engine: Engine, cuts: list[int], chunk: int) -> None:
    whole, pieces = (PagesSession(engine, 200, settings=small(chunk=chunk), question_tokens=5) for _ in range(2))
    ids = prompt(150)
    whole.read(ids)
    for cut in [*sorted(cuts), len(ids)]:
        pieces.read(ids[:cut])
        assert pieces.tokens == ids[:cut]
    for name, array in pieces.cache.storage().items():
        rows = pieces.cache.rows(150)[name]
        assert torch.allclose(array[:, :, :, :rows], whole.cache.storage()[name][:, :, :, :rows], atol=1e-4)


def test_cancelled_in_the_middle_of_reading_and_taken_up_again(engine: Engine) -> None:
    session, calls = PagesSession(engine, 200, settings=small(), question_tokens=5), iter([False, False, True])
    stopped = session.complete(prompt(100), Sampling(max_new_tokens=4), cancelled=lambda: next(calls))
    assert (stopped.stats.finish_reason, stopped.tokens) == ("cancelled", [])
    assert session.cache.length == len(session.tokens) == 32
    seen: list[int] = []
    again, logits = answer(session, prompt(100), 4, on_progress=lambda done, total: seen.append(done))
    assert seen == [32, 48, 64, 80, 95, 100]
    assert session.stats.reused_tokens == 32
    fresh, expected = answer(PagesSession(engine, 200, settings=small(), question_tokens=5), prompt(100), 4)
    assert again == fresh
    assert torch.equal(logits, expected)


def test_an_interrupt_inside_a_forward_leaves_the_document_usable(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = PagesSession(engine, 200, settings=small(), question_tokens=5)
    attend, calls = session.cache.attend, iter(range(100))

    def interrupted(layer: int, *qkv: Tensor) -> Tensor:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return attend(layer, *qkv)

    monkeypatch.setattr(session.cache, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.complete(prompt(100), Sampling(max_new_tokens=4))
    monkeypatch.undo()
    assert session.cache.length == 32
    again, _ = answer(session, prompt(100), 4)
    assert again == answer(PagesSession(engine, 200, settings=small(), question_tokens=5), prompt(100), 4)[0]


def test_a_float32_network_may_keep_its_pages_in_bfloat16(engine: Engine) -> None:
    """Asked anew it answers alike to the last bit, and otherwise as near as such keys allow."""
    rounded = Engine(engine.network, engine.tokenizer, engine.chat, kept=torch.bfloat16)
    document, question = prompt(150), prompt(9, 1)
    for more in ({"anew": 24}, {"scope": "layer"}, {"score": "bounds"}):
        session = PagesSession(rounded, 200, settings=small(**more), question_tokens=9)
        _, logits = answer(session, document + question)
        assert {x.dtype for x in session.cache.storage().values()} == {torch.bfloat16}
        assert torch.equal(answer(session, document + question)[1], logits)
        plain = PagesSession(engine, 200, settings=small(**more), question_tokens=9)
        _, exact = answer(plain, document + question)
        if torch.equal(session.chosen, plain.chosen):  # pages that weigh nearly the same may change places
            assert (logits[0] - exact[0]).abs().max() < 0.05 * exact[0].abs().max()


def test_a_session_rebuilt_from_its_storage_answers_alike(engine: Engine) -> None:
    ids, asked = prompt(150), prompt(6, 3)
    session = PagesSession(engine, 200, settings=small(), question_tokens=6)
    assert session.read(ids)
    kept = {name: array.clone() for name, array in session.cache.storage().items()}
    rows = session.cache.rows(120)
    assert rows == {"keys": 120, "values": 120, "means": 29}
    expected, logits = answer(session, ids[:120] + asked)
    handed: list[str] = []

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        array = torch.full(shape, float("nan"), dtype=dtype)
        array[:, :, :, : rows[name]] = kept[name][:, :, :, : rows[name]]
        handed.append(name)
        return array

    rebuilt = PagesSession(engine, 200, settings=small(), question_tokens=6, allocate=allocate)
    assert set(handed) == set(rows)
    rebuilt.cache.restore(120)
    rebuilt.tokens = ids[:120]
    again, same = answer(rebuilt, ids[:120] + asked)
    assert rebuilt.stats.reused_tokens == 120
    assert again == expected
    assert torch.equal(same, logits)


def test_the_engine_opens_pages_past_the_window_where_exact_refuses(tokenizer: Tokenizer) -> None:
    engine = make_engine(tokenizer, max_position_embeddings=4 * 1024, num_hidden_layers=1)
    with pytest.raises(UserError, match="reads 4,096"):
        engine.session(6000)
    session = engine.session(6000, attention="pages")
    assert isinstance(session, PagesSession)
    assert session.reach <= 4096
    done = session.complete(prompt(5000), Sampling(max_new_tokens=3))
    assert (done.stats.attention, done.stats.prompt_tokens, session.planned_tokens) == ("pages", 5000, 6000)
    assert done.stats.cache == "pages"
    with pytest.raises(UserError, match="too short for pages"):
        make_engine(tokenizer, max_position_embeddings=200).session(1000, attention="pages")


def test_positions_never_pass_the_trained_window(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tokenizer, max_position_embeddings=150)
    session = PagesSession(engine, 420, settings=small().within(150), question_tokens=10)
    assert session.angles.reach == session.reach <= 150
    answer(session, prompt(400), 12)
    assert session.working is not None
    assert session.working.held.length <= session.reach


def test_refusals(engine: Engine) -> None:
    session = PagesSession(engine, 400, settings=small(), question_tokens=10)
    with pytest.raises(UserError, match="no room for pages"):
        session.complete(prompt(200), Sampling(max_new_tokens=150))
    assert session.cache.length == 0
    with pytest.raises(UserError, match=r"exceeds the 400 planned"):
        session.complete(prompt(399), Sampling(max_new_tokens=2))


@pytest.mark.parametrize("text", ["word " * 40 + "\n\nWho is the chair of the whole board, and since when?"])
def test_the_question_begins_after_the_last_blank_line(engine: Engine, text: str) -> None:
    encode = engine.tokenizer.encode
    session = PagesSession(engine, 400, settings=small())
    ids = encode(text)
    assert engine.tokenizer.decode(ids[-session._question(ids) :]).strip() == text.rsplit("\n\n", 1)[1]
    # A blank line at the very end belongs to a template; without any, the newest tokens ask.
    ended = encode(text + "\n\nGo: ")
    assert engine.tokenizer.decode(ended[-session._question(ended) :]).strip().startswith("Who")
    assert session._question(encode("word " * 400)) == 256
    assert session._question(encode("word")) == len(encode("word"))
    session.boundary = len(ids) - 3
    answer(session, ids, 2)
    assert session.plain == len(ids) - 3


# ---- reading in bfloat16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "groups", "new", "past"), [(9, 3, 300, 500), (4, 4, 128, 0), (6, 1, 129, 7)])
def test_blocked_attention_in_bfloat16_follows_the_reference(heads: int, groups: int, new: int, past: int) -> None:
    draw = torch.Generator().manual_seed(new)
    q, k, v = (
        torch.randn(1, n, t, 64, generator=draw).bfloat16()
        for n, t in ((heads, new), (groups, new + past), (groups, new + past))
    )
    k = (k + 5).bfloat16()  # a common part, as trained keys have one
    blocked, ours = (f(q, k, v).float() for f in (pages_attention.blocked_attention, pages_attention.read_attention))
    exact = reference_attention(q.float(), k.float(), v.float())
    for found in (blocked, ours):
        assert (found - exact).norm() / exact.norm() < 0.01
    single = pages_attention.read_attention(q.float(), k.float(), v.float())
    assert torch.allclose(single, exact, atol=1e-4)


def test_angles_of_a_plan_without_its_attention_scaling() -> None:
    from longverse.inference.pages_cache import Angles
    from longverse.models.rope import rotate

    plan = RopePlan("yarn", 10_000.0, 16, 4.0, 128)
    assert plan.attention_scaling > 1
    angles = Angles(plan, 50, 50, torch.float32, "cpu")
    x = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = plan.cos_sin(torch.arange(40, 45)[None], 50)
    at_zero = x * plan.attention_scaling  # what the network hands over at position 0
    assert torch.allclose(angles.rotate(at_zero, 40), rotate(x, cos[:, None], sin[:, None]), atol=1e-5)
