"""What the chat does with documents, citations and tool results, over a pipe with a tiny random model."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longverse import commands_chat, commands_open
from longverse.commands_chat import Chat
from longverse.documents import ask as asking
from longverse.documents import second_look
from longverse.documents.citations import Cited
from longverse.documents.reader import decode
from longverse.errors import UserError
from longverse.inference import memory, store_keys
from longverse.inference.engine import Engine, Session, Stats
from longverse.inference.sampling import Sampling
from longverse.wording import SYSTEM
from tests.helpers import tiny_config
from tests.models.folders import save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, tiny_config(max_position_embeddings=2048))
    return str(folder)


@pytest.fixture(scope="module")
def engine(folder: str) -> Engine:
    return Engine.load(folder, dtype="float32", device="cpu")


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
    assert chat.messages[5]["content"].startswith("Document:\nd.txt:\n\nA fourth one.\n\nQuestion: And then?")
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
    assert "\nb.txt:\n\n[4] A second one." in last["content"]


MILL = decode(b"The mill stands in a town. It grinds the grain of the valley.\n\n" * 12, "mill.txt")


@pytest.fixture
def talk(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Chat, str]]:
    """A chat over a library of its own that is asked some questions about the mill, unchecked; and what it said."""
    monkeypatch.setattr("longverse.inference.store.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("longverse.inference.rates._file", lambda: tmp_path / "rates.json")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(commands_chat, "STEP", 64)

    def talk(*questions: str, engine: Engine = engine, **options: Any) -> tuple[Chat, str]:
        chat = Chat(engine, Sampling(max_new_tokens=8, temperature=1.0, seed=1), **options)
        chat.attach([MILL])
        chat.command("/cite off")
        for question in questions:
            chat.answer(question)
        return chat, capsys.readouterr().err

    return talk


def reused(chat: Chat) -> int:
    assert chat.session is not None
    return chat.session.stats.reused_tokens


@pytest.mark.parametrize("attention", ["exact", "pages"])
@pytest.mark.parametrize("rope", ["", "dynamic:2:1024"])
def test_what_is_kept_is_found_in_every_turn(
    talk: Callable[..., tuple[Chat, str]], folder: str, tmp_path: Path, rope: str, attention: str
) -> None:
    engine = Engine.load(folder, dtype="float32", device="cpu", rope=rope or None)
    long = "And what does it grind? " * 4
    plain, _ = talk("Where is the mill?", engine=engine, attention=attention)
    assert reused(plain) == 0
    kept, said = talk("Where is the mill?", long, long, engine=engine, attention=attention, keep=True)
    assert kept.messages[:3] == plain.messages[:3]
    assert said.count("Read ") == 1
    assert len([*(tmp_path / "library").glob("*/manifest.json")]) == 1
    again, said = talk("Where is the mill?", *[long] * 12, engine=engine, attention=attention)
    assert again.messages[:3] == plain.messages[:3]
    assert reused(again) > 700
    assert "kept, not read again" in said
    assert "outgrew" not in said


def test_a_conversation_that_outgrows_its_plan_takes_the_document_from_the_disk(
    talk: Callable[..., tuple[Chat, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, _ = talk("Where is the mill?", keep=True)
    assert chat.session is not None
    chat.session.planned_tokens = len(chat.session.tokens)
    chat.answer("And what does it grind?")
    assert 700 < reused(chat) < len(chat.session.tokens)


def test_under_dynamic_ntk_a_growing_conversation_is_kept_once(
    talk: Callable[..., tuple[Chat, str]], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_keys, "STEP", 256)
    monkeypatch.setattr(store_keys, "ROOM", 64)
    dynamic = Engine.load(folder, dtype="float32", device="cpu", rope="dynamic:4:512")
    _, said = talk("Where is the mill?", *["And what does it grind? " * 12] * 5, engine=dynamic, keep=True)
    assert said.count("outgrew") >= 1
    assert said.count("Read ") == len([*(tmp_path / "library").glob("*/manifest.json")]) == 1


def test_under_dynamic_ntk_a_chat_has_room_to_grow_where_nothing_is_kept(
    talk: Callable[..., tuple[Chat, str]], folder: str
) -> None:
    dynamic = Engine.load(folder, dtype="float32", device="cpu", rope="dynamic:4:512")
    chat, _ = talk("Where is the mill?", engine=dynamic)
    assert chat.session is not None
    assert chat.session.planned_tokens > 1.9 * len(chat.session.tokens)


def test_beside_a_card_a_chat_goes_on(talk: Callable[..., tuple[Chat, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    beside = lambda engine, tokens, *_, room, **__: ("full", max(tokens, room))  # noqa: E731
    monkeypatch.setattr(commands_open, "choose_beside", beside)
    monkeypatch.setattr(commands_open, "cache_needs", lambda *_: {"full": (2.0, 1.0)})  # nothing fits the card
    chat, said = talk("Where is the mill?", "And what does it grind?")
    assert "outgrew" not in said
    assert [message["role"] for message in chat.messages] == ["system"] + 2 * ["user", "assistant"]
    assert chat.session is not None
    assert chat.session.stats.cache_home == "machine"


def test_documents_of_mid_conversation_are_not_kept_and_that_is_said(
    engine: Engine, talk: Callable[..., tuple[Chat, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(engine, Sampling(max_new_tokens=8, temperature=1.0, seed=1), keep=True)
    chat.answer("Hello")
    chat.attach([MILL])
    chat.answer("Where is the mill?")
    assert "mid-conversation is not kept" in capsys.readouterr().err
    assert not (tmp_path / "library").exists()


def test_another_document_before_the_first_answer_is_another_beginning(
    talk: Callable[..., tuple[Chat, str]], tmp_path: Path
) -> None:
    chat, _ = talk(keep=True)
    first = chat.prompts("Where?", chat.fitting(chat.with_documents("Where?", [MILL]), ""), [MILL])
    chat.begin(first, [MILL])
    chat.session_for(first.planned_tokens)
    other = decode(b"A second one.", "b.txt")
    both = chat.prompts("Where?", chat.fitting(chat.with_documents("Where?", [MILL, other]), ""), [MILL, other])
    chat.begin(both, [MILL, other])
    assert chat.session is None
    assert chat.begun is both
    chat.begin(chat.prompts("Hello", [1, 2], []), [])
    chat.session_for(300)
    chat.begin(both, [MILL, other])
    assert chat.session is None


WORDS = "The mill stands in a town."


def writing(chat: Chat, monkeypatch: pytest.MonkeyPatch, reason: str = "stop") -> None:
    """Sessions of this engine write WORDS."""

    def stream(self: Session, prompt: list[int], *_: object, **named: Any) -> Iterator[str]:
        named["ids"].extend(self.engine.tokenizer.encode(WORDS, add_bos=False))
        self.read(prompt)
        self.stats = Stats(finish_reason=reason, new_tokens=9)
        yield WORDS

    monkeypatch.setattr(Session, "stream", stream)
    chat.attach([MILL])


def test_a_stopped_answer_is_not_checked(
    chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(chat, monkeypatch, "cancelled")
    monkeypatch.setattr(second_look, "checked", lambda *arguments, **more: pytest.fail("it was stopped"))
    chat.answer("Where does the mill stand?")
    said = capsys.readouterr()
    assert WORDS in said.out
    assert "Stopped." in said.err
    assert chat.messages[-1]["content"] == WORDS


def test_a_stop_in_the_second_look_leaves_the_first_answer(
    chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(chat, monkeypatch)
    nothing = Cited("", (), (), False)
    pressed: list[int] = []

    def checked(*arguments: object, **more: object) -> Cited:
        pressed.append(1)
        return nothing

    monkeypatch.setattr(second_look, "checked", checked)
    interruptible = lambda: contextlib.nullcontext(lambda: bool(pressed))  # noqa: E731
    monkeypatch.setattr(commands_chat.console, "interruptible", interruptible)
    chat.answer("Where does the mill stand?")
    said = capsys.readouterr()
    assert "Stopped." in said.err
    assert "Not found" not in said.out
    assert chat.messages[-1]["content"] == WORDS


def test_cite_shows_again_what_was_shown(
    chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(chat, monkeypatch)
    chat.answer("Where does the mill stand?")
    shown = capsys.readouterr().out
    assert "· verified" in shown
    monkeypatch.setattr(asking, "cited", lambda *arguments: pytest.fail("it was looked for already"))
    chat.command("/cite")
    assert capsys.readouterr().out in shown


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
    chat.last = replace(chat.last, text="The mill stands in a town.", cited=None)
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
    assert chat.session_for(300).session.planned_tokens == 2048
    least = min(memory.requirements(chat.engine, 300)[0].values())
    monkeypatch.setattr(memory, "memory_of_machine", lambda: (2**40, int(least / 0.97) + 4096))
    chat.session = None
    assert chat.session_for(300).session.planned_tokens == 300
    monkeypatch.setattr(memory, "memory_of_machine", lambda: (2**40, 4096))
    with pytest.raises(UserError, match="are free"):
        chat.session_for(400)
