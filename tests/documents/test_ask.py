"""The prompt of a question: document first, question last, the document shared, and what does not fit refused."""

from pathlib import Path

import pytest

from longverse.documents.ask import prepare
from longverse.documents.reader import decode
from longverse.errors import UserError
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from longverse.wording import messages
from tests.helpers import tiny_config
from tests.models.folders import save_folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, tiny_config(max_position_embeddings=1024))
    return Engine.load(str(folder), dtype="float32", device="cpu")


def test_document_first_and_question_last() -> None:
    system, user = messages("The text.\n", "Who?")
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"].index("The text.") < user["content"].index("Who?")
    assert messages("中文的正文在这里。", "谁？")[0]["content"] != system["content"]
    assert messages("The text.", "Who?", system="Be brief.")[0]["content"] == "Be brief."


def test_further_questions_reuse_the_document(engine: Engine) -> None:
    document = decode(b"The mill stands in a town. " * 12, "mill.txt")
    prompts = prepare(engine, document, ["Where is it?", "Who owns the mill?"], 8)
    assert prompts.planned_tokens == max(map(len, prompts.ids)) + 8
    session = engine.session(prompts.planned_tokens)
    for ids in prompts.ids:
        session.complete(ids, Sampling(max_new_tokens=8))
    shared = len(engine.tokenizer.encode(document.text))
    assert session.stats.reused_tokens >= shared
    # The answer is what a fresh session gives: earlier questions leave no trace.
    fresh = engine.session(prompts.planned_tokens).complete(prompts.ids[1], Sampling(max_new_tokens=8))
    assert fresh.tokens == session.complete(prompts.ids[1], Sampling(max_new_tokens=8)).tokens


def test_a_document_past_the_window_is_refused_with_both_numbers(engine: Engine) -> None:
    document = decode(b"word " * 2000, "long.txt")
    with pytest.raises(UserError, match=r"long\.txt takes [\d,]+ tokens .* reads 1,024.*--rope") as caught:
        prepare(engine, document, ["Where?"], 8)
    assert "\n" not in str(caught.value)


def test_empty_questions_are_refused(engine: Engine) -> None:
    document = decode(b"word", "a.txt")
    with pytest.raises(UserError, match="no question"):
        prepare(engine, document, [], 8)
    with pytest.raises(UserError, match="is empty"):
        prepare(engine, document, ["Where?", " "], 8)
