"""What the chat does with documents, citations and tool results, over a pipe with a tiny random model."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

from longverse import commands_chat
from longverse.commands_chat import Chat
from longverse.documents import ask as asking
from longverse.documents import second_look
from longverse.documents.reader import decode
from longverse.errors import UserError
from longverse.inference import memory
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from longverse.wording import SYSTEM
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
    assert chat.messages[0] == {"role": "system", "content": SYSTEM["en"]}
    content = chat.messages[1]["content"]
    places = [
        content.index(text)
        for text in ("a.txt:\n\nThe mill", "b.md:\n\n# Two", "c.txt:\n\nA third", "Where is the mill?")
    ]
    assert places == sorted(places)
    assert [document.name for document in chat.read] == ["a.txt", "b.md", "c.txt"]
    assert not chat.waiting
    chat.answer("And now?")
    assert chat.messages[3]["content"] == "And now?"
    chat.attach([decode(b"A fourth one.", "d.txt")])
    chat.answer("And then?")
    assert chat.messages[5]["content"].startswith("Document:\nA fourth one.\n\nQuestion: And then?")
    assert [message["role"] for message in chat.messages] == ["system"] + 3 * ["user", "assistant"]
    assert [document.name for document in chat.read] == ["a.txt", "b.md", "c.txt", "d.txt"]
    chat.command("/reset")
    assert not chat.read


def test_a_document_is_asked_about_as_ask_asks(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is the one that `longverse read` keeps; instructions of one's own take the place of ours; a model that
    numbers paragraphs sees them counted on in a document that comes later."""
    document, question = decode(b"# Mills\n\nThe mill stands in a town.\n\nIt grinds.", "a.txt"), "Where is the mill?"
    for system in (None, "Be brief."):
        for way in ("attention", "numbers"):
            monkeypatch.setattr(asking, "way_for", lambda engine, cite, way=way: way)
            chat.system = system
            chat.reset()
            expected = asking.prepare(chat.engine, document, [question], 4, system=system, numbered=way == "numbers")
            assert chat.engine.chat.encode(chat.with_documents(question, [document])) == expected.ids[0]
    chat.messages, chat.read = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "."}], [document]
    last = chat.with_documents("And that?", [decode(b"A second one.", "b.txt")])[-1]
    assert "\n[4] A second one." in last["content"]


def test_what_read_kept_is_found_and_keep_keeps(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longverse.inference.store.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    document = decode(b"The mill stands in a town. It grinds the grain of the valley. " * 20, "mill.txt")

    def first_answer(keep: bool) -> tuple[str, int, str]:
        chat = Chat(engine, Sampling(max_new_tokens=4), keep=keep)
        chat.attach([document])
        chat.command("/cite off")
        chat.answer("Where is the mill?")
        assert chat.session is not None
        return chat.messages[-1]["content"], chat.session.stats.reused_tokens, capsys.readouterr().err

    plain, kept, again = (first_answer(keep) for keep in (False, True, False))
    assert plain[0] == kept[0] == again[0]
    assert plain[1] == 0
    assert again[1] > 200
    assert "kept, not read again" in again[2]
    assert "kept, not read again" not in kept[2]


def test_a_stopped_answer_is_not_checked(
    chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.attach([decode(b"The mill stands in a town.", "a.txt")])
    monkeypatch.setattr(second_look, "checked", lambda *arguments, **more: pytest.fail("it was stopped"))
    stopping = iter([False, False, True, True, True, True, True, True])
    monkeypatch.setattr(
        commands_chat.console, "interruptible", lambda: contextlib.nullcontext(lambda: next(stopping, True))
    )
    chat.answer("Where does the mill stand?")
    assert "Stopped" in capsys.readouterr().err


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
    chat.attach([decode(b"The mill stands in a town.\n\nIt grinds the grain.", "a.txt")])
    chat.answer("Where does the mill stand?")
    said = capsys.readouterr()
    assert ("[1]" in said.out) != ("Not found in the document." in said.out)
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
