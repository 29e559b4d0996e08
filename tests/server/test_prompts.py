"""A prompt that is put together from a kept beginning is the prompt that encoding the whole conversation gives."""

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longverse.documents import ask
from longverse.documents.reader import decode
from longverse.inference.engine import Engine
from longverse.server.library import Library
from longverse.server.prompts import Prompts
from longverse.server.schemas import ChatRequest
from tests.server.common import load, save_model

ENDS = [
    "It ends here.",
    "它在这里结束。",
    "1, 2, 3",
    "  code()\n\n}\n\n",
    "word " * 200,
    "“Quoted”",
    "😀",
    "<|im_end|>",
    "# Heading\n",
]
QUESTIONS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@pytest.fixture(scope="module", params=["bytes", "smol"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """smol's tokenizer beside the bytes of the random model."""
    made = load(save_model(tmp_path_factory.mktemp("models") / "tiny"))
    if request.param == "smol":
        from longverse.models.embedded import find

        if find("smol") is None:
            pytest.skip("smol is not installed")
        other = Engine.load("smol")
        made.tokenizer, made.chat = other.tokenizer, other.chat
    return made


@pytest.fixture(scope="module")
def prompts(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prompts, list[str]]:
    library = Library(tmp_path_factory.mktemp("library"), len)
    identities = [
        library.add(io.BytesIO(f"# Title {n}\n\nSome text.\n\n{end}".encode()), f"{n}.txt", "user_data").id
        for n, end in enumerate(ENDS)
    ]
    return Prompts(engine, library), identities


def request(identities: list[str], question: str, *more: dict[str, Any], **fields: Any) -> ChatRequest:
    parts: list[Any] = [{"type": "file", "file": {"file_id": identity}} for identity in identities]
    first = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return ChatRequest.model_validate({"model": "m", "messages": [first, *more], **fields})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_put_together_or_encoded_whole(prompts: tuple[Prompts, list[str]], data: st.DataObject) -> None:
    made, identities = prompts
    chosen = data.draw(st.lists(st.sampled_from(identities), min_size=1, max_size=2, unique=True))
    question = data.draw(QUESTIONS)
    numbered = data.draw(st.booleans())
    got = made.chat(request(chosen, question, cite="numbers" if numbered else "attention"))
    documents = [made.library.document(identity) for identity in chosen]
    expected = ask.prepare(made.engine, documents, [question], 8, numbered=numbered, limited=False).ids[0]
    assert got.ids == expected
    assert got.ids[: got.boundary] == made.beginning(tuple(chosen), numbered)
    assert got.boundary > len(made.engine.tokenizer.encode(documents[0].text)) / 2
    assert got.asked is not None
    assert got.asked.questions == (question,)


def test_instructions_and_later_turns_are_the_clients(prompts: tuple[Prompts, list[str]]) -> None:
    made, identities = prompts
    document = made.library.document(identities[0])
    follow: Any = [{"role": "assistant", "content": "Here."}, {"role": "user", "content": "And then?"}]
    got = made.chat(request(identities[:1], "Where?", *follow))
    turns = [*ask.messages(document.text, "Where?"), *follow]
    assert got.ids == made.engine.chat.encode(turns)
    assert got.asked is not None
    assert got.asked.questions == ("And then?",)
    asked = request(identities[:1], "Where?")
    system = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "system", "content": "Be brief."}, asked.messages[0].model_dump()]}
    )
    assert made.chat(system).ids == made.engine.chat.encode(ask.messages(document.text, "Where?", system="Be brief."))


def test_json_and_calls_are_not_tied_to_sentences(prompts: tuple[Prompts, list[str]]) -> None:
    made, identities = prompts
    got = made.chat(request(identities[:1], "Where?", response_format={"type": "json_object"}))
    assert (got.asked, got.way) == (None, "off")


def test_a_document_needs_a_question(prompts: tuple[Prompts, list[str]]) -> None:
    made, identities = prompts
    with pytest.raises(Exception, match="holds no question"):
        made.chat(request(identities[:1], " "))


def test_a_long_document_is_tokenised_once(prompts: tuple[Prompts, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = prompts
    identity = made.library.add(io.BytesIO(b"A long line of words. " * 3000), "long.txt", "user_data").id
    made.beginning((identity,))
    seen: list[int] = []
    encode = made.engine.chat.encode
    monkeypatch.setattr(
        made.engine.chat, "encode", lambda turns, **m: (seen.append(len(turns[-1]["content"])), encode(turns, **m))[1]
    )
    got = made.chat(request([identity], "Where is it?"))
    assert max(seen) < 1000
    document = decode(b"A long line of words. " * 3000, "long.txt")
    monkeypatch.undo()
    assert got.ids == ask.prepare(made.engine, document, ["Where is it?"], 8, limited=False).ids[0]


def test_forgotten_documents_are_gone(prompts: tuple[Prompts, list[str]], tmp_path: Path) -> None:
    made, identities = prompts
    made.beginning((identities[1],))
    made.forget(identities[1])
    assert made.kept((identities[1],)) is None
