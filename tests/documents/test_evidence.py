"""The attention of an answer over paragraphs equals the naive softmax; BM25 finds passages; overviews count."""

from pathlib import Path

import pytest
import torch

from longverse.documents import ask, evidence
from longverse.documents.evidence import attend_to, token_spans, trace
from longverse.documents.overview import overview
from longverse.documents.reader import decode
from longverse.documents.report import generate_report
from longverse.documents.select import Searcher, prepare_selected
from longverse.documents.words import Index
from longverse.errors import UserError
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from tests.helpers import tiny_config
from tests.models.folders import save_folder

TEXT = "The mill stands in a town.\n\nIt grinds <|im_end|> the grain.\n\nNobody is there."


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, tiny_config(max_position_embeddings=4096, num_key_value_heads=2))
    return Engine.load(str(folder), dtype="float32", device="cpu")


def test_spans_are_the_tokens_that_spell_the_paragraphs(engine: Engine) -> None:
    document = decode(TEXT.encode(), "a.txt")
    ids = engine.chat.encode(ask.messages(document.text, "Where?"))
    spans = token_spans(engine, ids, [paragraph.text for paragraph in document.paragraphs])
    end = 0
    for (begin, stop), paragraph in zip(spans, document.paragraphs, strict=True):
        assert begin >= end - 1
        assert paragraph.text in engine.tokenizer.decode(ids[begin:stop], skip_special=False)
        end = stop
    ((begin, stop),) = token_spans(engine, ids, ["no such text"])
    assert begin == stop


def test_shares_are_the_softmax_of_the_definition(engine: Engine) -> None:
    """Against attention weights computed from the keys and a forward without a cache."""
    document = decode(TEXT.encode(), "a.txt")
    prompts = ask.prepare(engine, document, ["Where?"], 8)
    session = engine.session(prompts.planned_tokens)
    done = session.complete(prompts.ids[0], Sampling(max_new_tokens=6, temperature=1.5, seed=2))
    spans = token_spans(engine, prompts.ids[0], [paragraph.text for paragraph in document.paragraphs])
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    before = list(session.tokens)
    mass: dict[int, torch.Tensor] = {}
    copying: dict[int, float] = {}

    def note(row: int, shares: torch.Tensor, copied: float) -> None:
        assert row not in mass
        mass[row], copying[row] = shares, copied

    logprobs = trace(session, prompts.ids[0], done.tokens, spans, heads, note)
    assert session.tokens == [*prompts.ids[0], *done.tokens[:-1]]
    assert before[: len(session.tokens)] == session.tokens
    whole = torch.tensor([[*prompts.ids[0], *done.tokens[:-1]]])
    seen = {}

    def naive(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        seen[layer] = scores.softmax(-1)[0]  # [H, S, S]
        return seen[layer][None] @ v

    with torch.inference_mode():
        logits = engine.network(whole, None, prompts.planned_tokens, naive)[0]
    first = len(prompts.ids[0]) - 1
    for row, (layer, head) in enumerate(heads):
        weights = seen[layer][head, first:]  # [T, S]
        for place, (begin, end) in enumerate(spans):
            torch.testing.assert_close(mass[row][:, place], weights[:, begin:end].sum(-1), atol=1e-4, rtol=1e-3)
        copies = (whole[0][None] == torch.tensor(done.tokens)[:, None]).float()
        assert float((weights * copies).sum(-1).mean()) == pytest.approx(copying[row], abs=1e-4)
    expected = logits[first:].log_softmax(-1)[range(len(done.tokens)), done.tokens]
    torch.testing.assert_close(logprobs, expected, atol=1e-3, rtol=1e-3)


def test_a_second_reading_changes_no_later_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evidence.RETRIEVAL_HEADS, engine.name, ((1, 0), (2, 3)))
    document = decode(TEXT.encode(), "a.txt")
    prompts = ask.prepare(engine, document, ["Where?", "What does it grind?"], 8)
    fresh = engine.session(prompts.planned_tokens)
    fresh.complete(prompts.ids[0], Sampling(max_new_tokens=8))
    expected = fresh.complete(prompts.ids[1], Sampling(max_new_tokens=8))
    session = engine.session(prompts.planned_tokens)
    done = session.complete(prompts.ids[0], Sampling(max_new_tokens=8))
    attended = attend_to(session, prompts.ids[0], done.tokens, prompts.index)
    assert attended is not None
    assert len(attended.shares) == len(attended.offsets) == len(done.tokens)
    assert all(0 <= share <= 1.0001 for row in attended.shares for share in row.values())
    assert session.complete(prompts.ids[1], Sampling(max_new_tokens=8)).tokens == expected.tokens


def test_nothing_to_look_at_gives_nothing(engine: Engine) -> None:
    document = decode(TEXT.encode(), "a.txt")
    prompts = ask.prepare(engine, document, ["Where?"], 8)
    session = engine.session(prompts.planned_tokens)
    assert attend_to(session, prompts.ids[0], [], prompts.index) is None
    assert attend_to(session, prompts.ids[0], [5], prompts.index) is None  # the session never read this prompt
    assert ask.cited(session, prompts, 0, "It grinds the grain.", [5]).citations[0].paragraph == 2


def test_the_way_to_cite(engine: Engine) -> None:
    assert ask.way_for(engine, "auto") == "attention"
    assert ask.way_for(engine, "numbers") == "numbers"
    with pytest.raises(UserError, match="no way 'magic'"):
        ask.way_for(engine, "magic")


def test_numbers_stand_before_paragraphs_and_not_before_headings(engine: Engine) -> None:
    documents = [decode(b"# One\n\nfirst\n\nsecond", "a.md"), decode(b"third", "b.txt")]
    text = ask.text_of(documents, numbered=True)
    assert text == "a.md:\n\n# One\n\n[2] first\n\n[3] second\n\nb.txt:\n\n[4] third"
    assert ask.text_of(documents[:1]) == "# One\n\nfirst\n\nsecond"
    prompts = ask.prepare(engine, documents, ["Where?"], 8, numbered=True)
    assert "[4] third" in engine.tokenizer.decode(prompts.ids[0])
    assert prompts.index.places[3][1].text == "third"


# ---- selection and overview ----------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_bm25_finds_the_paragraph_and_says_what_was_read(engine: Engine, language: str) -> None:
    report = generate_report(5, target_words=9000, questions=12, language=language)
    document = decode(report.text.encode(), "report.md")
    questions = [fact.question for fact in report.facts]
    prompts, selections = prepare_selected(engine, document, questions, 32, budget=900)
    for fact, selection, ids in zip(report.facts, selections, prompts.ids, strict=True):
        assert fact.sentence in selection.text
        assert selection.tokens <= 900
        assert len(ids) + 32 <= prompts.planned_tokens <= engine.window
        for place in selection.places:
            assert prompts.index.places[place][1].text in selection.text
        assert selection.pages(prompts.index).startswith("report.md: paragraphs ")
    assert prompts.places == tuple(selection.places for selection in selections)


def test_selection_refuses_what_it_cannot_do(engine: Engine) -> None:
    document = decode(TEXT.encode(), "a.txt")
    with pytest.raises(UserError, match="No word of the question"):
        prepare_selected(engine, document, ["Who wrote the symphony?"], 8)
    with pytest.raises(UserError, match="no room for passages"):
        prepare_selected(engine, document, ["Where is the mill?"], 4000)
    with pytest.raises(UserError, match="best passage alone"):
        prepare_selected(engine, decode(b"mill " * 900, "a.txt"), ["Where is the mill?"], 8, budget=64)


def test_selection_names_pages_and_documents() -> None:
    pages = "\f".join(f"The keeper of lamp {name} is {name}er." for name in ("ava", "bel", "cora", "dora"))
    documents = [decode(pages.encode(), "a.txt"), decode(b"The keeper of lamp eva is out.", "b.txt")]
    searcher = Searcher(documents)
    assert [searcher.index.places[place][1].page for place in searcher.ranked("Who is keeper of lamp cora?", 1)] == [3]
    from longverse.documents.select import Selection

    assert Selection((0, 1, 3, 4), "", 0).pages(searcher.index) == "a.txt: pages 1-2, 4; b.txt: paragraph 1"


def test_an_overview_counts_what_a_prompt_would_take(engine: Engine) -> None:
    documents = [decode(TEXT.encode(), "a.txt"), decode(b"one\ftwo", "b.txt")]
    seen = overview(documents, engine.tokenizer)
    assert [row.tokens for row in seen.rows] == [len(engine.tokenizer.encode(d.text)) for d in documents]
    assert [(row.pages, row.unit) for row in seen.rows] == [(None, ""), (2, "page")]
    prompts = ask.prepare(engine, documents, ["Where?"], 8)
    assert seen.tokens < len(prompts.ids[0]) < seen.tokens + 700  # the tiny tokenizer spells the frame out
    assert seen.fits(seen.tokens + 400)
    assert not seen.fits(seen.tokens + 300)
    assert isinstance(Index(documents).documents, tuple)
    assert seen.record()["documents"][1]["pages"] == 2
