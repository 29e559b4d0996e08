"""longverse in a program: five lines, and the same answers as the engine's."""

from pathlib import Path
from typing import Any

import pytest

import longverse
from longverse import UserError, api
from longverse.documents import ask
from longverse.documents.reader import decode
from longverse.inference.sampling import Sampling
from tests.server.common import save_model

TEXT = "The mill stands in Ost.\n\nIt was built by Ada Rell in 1871.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> api.Model:
    folder = save_model(tmp_path_factory.mktemp("models") / "tiny")
    return longverse.load(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    (tmp_path / "mill.txt").write_text(TEXT)
    (tmp_path / "bridge.md").write_text("# The bridge\n\nIt crosses the Orn.\n")
    return [tmp_path / "mill.txt", tmp_path / "bridge.md"]


def test_answers_are_those_of_ask(model: api.Model, paths: list[Path]) -> None:
    reading = model.read(*paths)
    documents = [decode(path.read_bytes(), path.name) for path in paths]
    assert reading.documents == tuple(documents)
    for number, question in enumerate(["Who built the mill?", "Where does it stand?", "河在哪里？"]):
        answer = reading.ask(question, max_new_tokens=12)
        prompts = ask.prepare(model.engine, documents, [question], 12)
        session = model.engine.session(2048)
        done = session.complete(prompts.ids[0], Sampling(max_new_tokens=12, stop=("\n\n",)))
        cited = ask.cited(session, prompts, 0, done.text.lstrip(), done.tokens)
        assert answer.found is cited.found
        assert answer.model_text == cited.answer
        assert answer.text == (cited.answer if cited.found else ask.not_found(prompts, 0))
        assert answer.citations == (cited.citations if cited.found else ())
        assert answer.stats.prompt_tokens == len(prompts.ids[0])
        if number:
            assert answer.stats.reused_tokens > len(model.engine.tokenizer.encode(TEXT))


def test_the_stream_is_the_models_text(model: api.Model, paths: list[Path]) -> None:
    reading = model.read(paths[0])
    seen: list[tuple[int, int]] = []
    drawn = Sampling(max_new_tokens=20, temperature=0.8, seed=4)
    pieces = list(
        reading.stream("Who?", sampling=drawn, cite="off", on_progress=lambda done, total: seen.append((done, total)))
    )
    ids = ask.prepare(model.engine, reading.documents, ["Who?"], 20).ids[0]
    expected = model.engine.session(2048).complete(ids, drawn)
    assert "".join(pieces).strip() == expected.text.strip()
    assert reading.answer is not None
    assert reading.answer.text == expected.text.strip()
    assert reading.answer.citations == ()
    assert seen[-1] == (len(ids), len(ids))
    stopped = list(reading.stream("Who?", cancelled=lambda: True))
    assert stopped == []
    assert reading.answer.stats.finish_reason == "cancelled"


def test_what_cannot_be_is_said_before_it_is_read(model: api.Model, paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 3000)
    with pytest.raises(UserError, match=r"long\.txt takes [\d,]+ tokens .* reads 2,048"):
        model.read(tmp_path / "long.txt")
    with pytest.raises(UserError, match="no document"):
        model.read()
    with pytest.raises(UserError, match="no file"):
        model.read(tmp_path / "none.txt")
    reading = model.read(paths[0])
    with pytest.raises(UserError, match="is empty"):
        reading.ask(" ")
    with pytest.raises(UserError, match="choose one of auto"):
        reading.ask("Who?", cite="perhaps")
    with pytest.raises(UserError, match="reads 2,048"):
        reading.ask("Who?", max_new_tokens=10**6)


@pytest.mark.parametrize("options", [{"attention": "pages"}, {"cache": "int8"}])
def test_other_attention_and_caches_are_named_in_the_statistics(
    tmp_path: Path, paths: list[Path], options: dict[str, Any]
) -> None:
    save_model(tmp_path / "tiny")
    reading = longverse.load(str(tmp_path / "tiny"), dtype="float32", device="cpu", **options).read(paths[0])
    stats = reading.ask("Who?", max_new_tokens=4).stats
    assert all(getattr(stats, name) == value for name, value in options.items())


def test_nothing_else_is_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        longverse.lode  # noqa: B018
