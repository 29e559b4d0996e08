"""What the chat does with documents, citations and tool results, over a pipe with a tiny random model."""

import io
import sys
from pathlib import Path

import pytest

from longverse import commands_chat
from longverse.commands_chat import Chat
from longverse.documents.reader import decode
from longverse.errors import UserError
from longverse.inference import memory
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from tests.helpers import tiny_config
from tests.models.folders import save_folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, tiny_config(max_position_embeddings=2048))
    return Engine.load(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def chat(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return Chat(engine, Sampling(max_new_tokens=4))


def test_several_documents_go_with_one_message_and_stay(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.md").write_text("# Two\n\nIt grinds the grain.")
    (tmp_path / "more" / "c.txt").write_text("A third one.")
    chat.attach([decode(b"The mill stands in a town.", "a.txt")])
    assert chat.command(f"/read {tmp_path / 'more'}")
    assert "They go with your next message." in capsys.readouterr().err
    chat.answer("Where is the mill?")
    content = chat.messages[0]["content"]
    places = [
        content.index(text) for text in ("a.txt:\nThe mill", "b.md:\n# Two", "c.txt:\nA third", "Where is the mill?")
    ]
    assert places == sorted(places)
    assert [document.name for document in chat.read] == ["a.txt", "b.md", "c.txt"]
    assert not chat.waiting
    chat.answer("And now?")
    assert chat.messages[2]["content"] == "And now?"
    chat.command("/reset")
    assert not chat.read


def test_cite_shows_passages_or_says_that_there_are_none(
    chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no answer to cite"):
        chat.command("/cite")
    chat.answer("Hello")
    with pytest.raises(UserError, match="No document stands"):
        chat.command("/cite")
    with pytest.raises(UserError, match="on, off or nothing"):
        chat.command("/cite maybe")
    chat.command("/cite on")
    chat.attach([decode(b"The mill stands in a town.\n\nIt grinds the grain.", "a.txt")])
    chat.answer("Where does the mill stand?")
    said = capsys.readouterr()
    assert ("[1]" in said.out) != ("Not found in the document." in said.err)
    # With an answer that is there, the passage and its place are shown.
    assert chat.last is not None
    chat.last = (*chat.last[:2], "Where does the mill stand?", "The mill stands in a town.")
    chat.command("/cite")
    said = capsys.readouterr()
    assert "[1] line 1 · verified" in said.out
    assert "“The mill stands in a town.”" in said.out


def test_tool_results_and_instructions(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("/tool", "/system"):
        with pytest.raises(UserError, match="needs a text"):
            chat.command(line)
    monkeypatch.setattr(chat.engine.chat, "kind", "xverse", raising=False)
    monkeypatch.setattr(chat.engine.chat, "_eos_id", min(chat.engine.tokenizer.eos_ids), raising=False)
    with pytest.raises(UserError, match="follows an answer"):
        chat.command("/tool 42")
    chat.answer("What is 6 times 7?")
    chat.command("/tool 42")
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "exec", "assistant"]
    assert "Exec: 42" in chat.engine.chat.render(chat.messages)
    chat.command("/system Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    monkeypatch.setattr(chat.engine.chat, "kind", "plain")
    with pytest.raises(UserError, match="knows no tool results"):
        chat.command("/tool 42")


def test_help_names_every_command() -> None:
    for name in ("/read", "/cite", "/tool", "/system", "/save", "/stats", "/reset", "/quit"):
        assert name in commands_chat.HELP


def test_where_memory_is_short_a_chat_leaves_no_room_to_grow(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat.session_for(300).planned_tokens == 2048
    least = min(memory.requirements(chat.engine, 300)[0].values())
    monkeypatch.setattr(memory, "memory_of_machine", lambda: (2**40, int(least / 0.97) + 4096))
    chat.session = None
    assert chat.session_for(300).planned_tokens == 300
    monkeypatch.setattr(memory, "memory_of_machine", lambda: (2**40, 4096))
    with pytest.raises(UserError, match="are free"):
        chat.session_for(400)
