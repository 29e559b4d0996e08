"""Documents that outlive the server: read by one, found by the next, with the same answers; and other attention."""

from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from longverse.inference.engine import Engine
from longverse.inference.store import Store
from longverse.server.keeping import Keeping
from longverse.server.service import Settings
from tests.server.common import Running, load, save_model, serving

TEXT = "\n\n".join(f"Paragraph {n} says that mill {n} stands in town {n * n}." for n in range(30))


def question(server: Running, identity: str, text: str = "Where does mill 7 stand?") -> Any:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=200)
    parts: list[Any] = [{"type": "file", "file": {"file_id": identity}}, {"type": "text", "text": text}]
    return client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": parts}], max_tokens=8, extra_body={"cite": "off"}
    )


def put(server: Running) -> str:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=200)
    return client.files.create(file=("mills.txt", TEXT.encode()), purpose="user_data").id


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rope", [None, {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}])
def test_the_next_server_finds_what_this_one_read(tmp_path: Path, keep: bool, rope: Any) -> None:
    window = {"window": 1024, "rope_theta": None, "rope_parameters": rope} if rope else {"window": 2048}
    engine = load(save_model(tmp_path / "tiny", **window))
    plain = None
    for server_number in range(2):
        keeping = Keeping(engine, Store(tmp_path / "store"), keep)
        with serving(engine, tmp_path / "library", Settings(keeping=keeping)) as server:
            identity = put(server) if server_number == 0 else next(iter(server.library.about))
            first = question(server, identity)
            cached = first.usage.prompt_tokens_details.cached_tokens
            if server_number == 0:
                plain = first.choices[0].message.content
                assert cached == 0
                assert first.timings["prompt_ms"] > 0
            else:
                assert first.choices[0].message.content == plain
                assert cached > 1000 if keep else cached == 0
            second = question(server, identity, "Where does mill 8 stand?")
            assert second.usage.prompt_tokens_details.cached_tokens > 1000
    assert bool(Store(tmp_path / "store").entries()) is keep


def test_what_longverse_read_kept_is_found_without_keep(tmp_path: Path, engine: Engine) -> None:
    from longverse.documents import ask
    from longverse.documents.reader import decode
    from longverse.inference.engine import common_prefix

    document = decode(TEXT.encode(), "mills.txt")
    one, other = ask.prepare(engine, document, ["a", "问"], 8).ids
    store = Store(tmp_path / "store")
    store.read(engine, one[: common_prefix(one, other)], 2048)
    with serving(engine, tmp_path / "library", Settings(keeping=Keeping(engine, Store(tmp_path / "store")))) as server:
        done = question(server, put(server))
        assert done.usage.prompt_tokens_details.cached_tokens > 1000


def test_with_pages_a_document_may_exceed_the_window(tmp_path: Path) -> None:
    engine = load(save_model(tmp_path / "tiny", window=512))

    def pages(tokens: int) -> Any:
        return engine.session(tokens, attention="pages")

    settings = Settings(window=2**16)
    with serving(engine, tmp_path / "library", settings, open_session=pages, window=2**16) as server:
        done = question(server, put(server))
        assert done.usage.prompt_tokens > 1000 > engine.window
        assert done.timings["attention"] == "pages"
        again = question(server, next(iter(server.library.about)), "Where does mill 9 stand?")
        assert again.usage.prompt_tokens_details.cached_tokens > 1000
