"""Clients that mean harm, or break: refused in one sentence, and the server goes on."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longverse.inference.engine import Engine
from longverse.server.guard import Guard
from longverse.server.library import ID, Library, shown_name
from longverse.server.metrics import Metrics
from longverse.server.service import Settings
from tests.server.common import Running, load, save_model, serving, wait_for

KEY = "s3cret"


@pytest.fixture(scope="module")
def locked(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with a key and low limits."""
    given = Settings(api_key=KEY, max_body=20_000, max_upload=200_000, answer_tokens=8, hosts=("my.host",))
    with serving(engine, tmp_path_factory.mktemp("library"), given, slots=1, queue_limit=1) as running:
        yield running


def send(
    server: Running, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str = KEY
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=150)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    every = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **(headers or {})}
    connection.request(method, path, data, {name: value for name, value in every.items() if value})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    try:
        parsed = json.loads(raw)
    except ValueError:
        parsed = raw
    return response.status, parsed, {name.lower(): value for name, value in response.getheaders()}


def hello(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **more}


def upload(
    server: Running, name: str, data: bytes, key: str = KEY, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    head = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
    kind = {"Content-Type": "multipart/form-data; boundary=b", **(headers or {})}
    return send(server, "POST", "/v1/files", head + data + b"\r\n--b--\r\n", kind, key)


# ---- who may speak --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1], "é"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/v1/files", "/v1/nothing", "/v1"])
def test_without_the_key_nothing_is_told(locked: Running, key: str, path: str) -> None:
    status, body, headers = send(locked, "GET", path, key=key)
    assert status == 401
    assert body["error"]["code"] == "invalid_api_key"
    assert KEY not in json.dumps(body)
    assert headers["www-authenticate"] == "Bearer"


def test_the_key_opens_and_the_page_and_health_need_none(locked: Running) -> None:
    assert send(locked, "GET", "/v1/models")[0] == 200
    assert send(locked, "GET", "/v1/models", headers={"Authorization": f"Basic {KEY}"})[0] == 401
    assert send(locked, "GET", "/", key="")[0] == 200
    assert send(locked, "GET", "/health", key="")[1]["status"] == "ok"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:8000"}, 200), ({"Host": "localhost"}, 200), ({"Host": "[::1]:80"}, 200),
        ({"Host": "MY.host:99"}, 200), ({"Host": "192.168.0.7"}, 200), ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403), ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": "evil@127.0.0.1"}, 403), ({"Host": "testserver"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403), ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:9000"}, 403),
    ],
)  # fmt: skip
def test_other_pages_and_rebound_names_are_refused(locked: Running, headers: dict[str, str], status: int) -> None:
    got, body, answer = send(locked, "GET", "/v1/models", headers=headers)
    assert got == status, body
    assert not [name for name in answer if name.startswith("access-control")]
    if "Origin" in headers:
        preflight = {**headers, "Access-Control-Request-Method": "POST"}
        assert send(locked, "OPTIONS", "/v1/chat/completions", headers=preflight, key="")[0] in (401, 403, 405)


@given(st.text(max_size=60) | st.from_regex(r"\A[a-z0-9.:@\[\]/%-]{0,40}\Z"))
def test_any_host_header_has_an_answer(host: str) -> None:
    guard = Guard(None, api_key=None, hosts=["my.host"], max_body=1, max_upload=1, metrics=Metrics())  # type: ignore[arg-type]
    if guard.knows(host):
        name = host.rsplit(":", 1)[0].strip("[]").lower().rstrip(".") if not host.endswith("]") else host.strip("[]")
        assert name in guard.hosts or name.replace(".", "").replace(":", "").isalnum()


def test_every_answer_forbids_what_a_page_must_not_do(locked: Running) -> None:
    for path in ("/", "/v1/models", "/nothing", "/static/../app.py"):
        headers = send(locked, "GET", path)[2]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


# ---- what they may send ---------------------------------------------------------------------------------

DEEP = b'{"model": "tiny", "messages": ' + b"[" * 9000 + b"]" * 9000 + b"}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'{"model": "tiny"}', 400), (b"\xff\xfe{", 400),
        (b'{"model": "tiny", "messages": []}', 400), (b"{" + b" " * 30_000 + b"}", 413), (DEEP, 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "tiny", "messages": [{"role": "root", "content": "hi"}]}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": {"a": 1}}]}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400),
        (b'{"model": "tiny", "messages": [{"role": "system", "content": "only"}]}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stop": ""}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stop": ["a", ""]}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 1000000}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tool_choice": "required"}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "<script>": 1}', 400),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused_in_a_sentence(locked: Running, body: bytes, status: int) -> None:
    got, answer, headers = send(locked, "POST", "/v1/chat/completions", body)
    assert (got, headers["content-type"]) == (status, "application/json")
    message = answer["error"]["message"]
    assert "\n" not in message
    assert message.endswith(".")
    assert "Traceback" not in message
    assert len(message) < 400


def test_a_form_of_another_page_is_no_request(locked: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert send(locked, "POST", "/v1/chat/completions", hello(), {"Content-Type": kind})[0] == 400


def test_a_body_without_a_stated_length_has_the_same_limit(locked: Running) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), timeout=20) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        sock.sendall((head + "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n").encode())
        try:
            for _ in range(40):
                sock.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        except OSError:  # it hung up in the middle
            pass
        assert b" 413 " in sock.recv(200)
    assert send(locked, "GET", "/v1/models")[0] == 200


@pytest.mark.parametrize(
    "name",
    ["../../../../tmp/evil.txt", "/etc/passwd", "..\\..\\evil.txt", "C:\\evil.txt", "a/b/c.txt", ".", "..",
     "\u202egnp.txt", "-rf.txt", "$(touch evil).txt", "x" * 900 + ".txt", "con.txt", "evil.txt;rm -rf .txt"],
)  # fmt: skip
def test_names_of_uploads_lead_nowhere(locked: Running, name: str, tmp_path: Path) -> None:
    before = {path for path in locked.library.folder.parent.rglob("*") if locked.library.folder not in path.parents}
    status, body, _ = upload(locked, name, b"A plain text.\n")
    assert status == 200, body
    shown = body["filename"]
    assert not set(shown) & set("/\\\0\n")
    assert len(shown) <= 200
    after = {path for path in locked.library.folder.parent.rglob("*") if locked.library.folder not in path.parents}
    assert before == after
    assert {path.name for path in (locked.library.folder / body["id"]).iterdir()} == {
        "source", "document.json", "about.json",
    }  # fmt: skip
    assert send(locked, "DELETE", f"/v1/files/{body['id']}")[0] == 200
    assert not (locked.library.folder / body["id"]).exists()


@given(st.text(max_size=300))
def test_shown_names_are_printable_and_short(name: str) -> None:
    shown = shown_name(name)
    assert shown
    assert len(shown) <= 200
    assert not set(shown) & set("/\\\0\n\r\x1b\u202e")
    assert shown not in (".", "..")


@pytest.mark.parametrize(
    "identity",
    ["..", "../../etc/passwd", "%2e%2e%2fabout.json", "file-" + "0" * 24, "file-" + "g" * 24, "a" * 3000, "%00"],
)
@pytest.mark.parametrize("suffix", ["", "/content", "/paragraphs"])
def test_ids_of_files_lead_nowhere(locked: Running, identity: str, suffix: str) -> None:
    status, body, _ = send(locked, "GET", f"/v1/files/{identity}{suffix}")
    assert status in (404, 405, 307), body


@pytest.mark.parametrize(
    ("name", "data", "status"),
    [
        ("empty.txt", b"", 400), ("a.pdf", b"%PDF-1.7 nothing more", 400),
        ("b.png", b"\x89PNG\r\n\x1a\n" + bytes(99), 400), ("zeros.txt", bytes(5000), 400),
        ("c.docx", b"PK\x03\x04 broken", 400), ("big.txt", b"a " * 150_000, 413),
    ],
)  # fmt: skip
def test_what_is_no_document_is_named(locked: Running, name: str, data: bytes, status: int) -> None:
    got, body, _ = upload(locked, name, data)
    assert got == status, body
    assert body["error"]["message"].endswith(".")
    assert not [path for path in locked.library.folder.iterdir() if path.name.startswith(".")]


def test_a_reader_that_hangs_or_crashes_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse import UserError
    from longverse.server import reading

    source = tmp_path / "source"
    source.write_bytes(b"text")
    with pytest.raises(UserError, match=r"was not read within 0 seconds"):
        reading.read_apart(source, tmp_path / "out.json", "slow.txt", seconds=0.001)
    monkeypatch.setattr(reading.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"bad\.txt broke the program that reads"):
        reading.read_apart(source, tmp_path / "out.json", "bad.txt")


def test_a_full_library_says_so(tmp_path: Path) -> None:
    from longverse.server.errors import ApiError

    library = Library(tmp_path / "library", len, most=1)
    kept = library.add(io.BytesIO(b"one"), "a.txt", "user_data")
    assert ID.fullmatch(kept.id)
    with pytest.raises(ApiError, match=r"holds 1 documents .* takes 1"):
        library.add(io.BytesIO(b"two"), "b.txt", "user_data")
    library.delete(kept.id)
    assert library.add(io.BytesIO(b"two"), "b.txt", "user_data").filename == "b.txt"


def test_damage_in_the_library_costs_that_document_alone(tmp_path: Path) -> None:
    library = Library(tmp_path, len)
    good = library.add(io.BytesIO(b"good"), "a.txt", "user_data")
    bad = library.add(io.BytesIO(b"bad"), "b.txt", "user_data")
    (tmp_path / bad.id / "about.json").write_text("{")
    (tmp_path / ".file-0.part").mkdir()
    (tmp_path / "file-notours").mkdir()
    again = Library(tmp_path, len)
    assert set(again.about) == {good.id}
    (tmp_path / good.id / "document.json").write_text("[]")
    with pytest.raises(Exception, match=r"a\.txt is damaged: delete"):
        Library(tmp_path, len).document(good.id)


# ---- how they may behave --------------------------------------------------------------------------------


def test_a_client_that_vanishes_frees_the_engine(locked: Running) -> None:
    asked = [{"role": "user", "content": "word " * 100}]  # and an answer too long to end unseen
    body = json.dumps(hello(messages=asked, stream=True, max_tokens=1400)).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", locked.port)) as sock:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            wait_for(lambda: locked.worker.active)
        wait_for(lambda: not locked.worker.active and not len(locked.worker.waiting), 20)
    assert send(locked, "POST", "/v1/chat/completions", hello())[0] == 200


def test_a_full_queue_is_429_with_retry_after(locked: Running) -> None:
    streams = []
    for _ in range(2):  # one computes, one waits
        sock = socket.create_connection(("127.0.0.1", locked.port))
        body = json.dumps(hello(stream=True, max_tokens=1800)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        sock.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        streams.append(sock)
        wait_for(lambda: len(locked.worker.active) + len(locked.worker.waiting) == len(streams))
    status, answer, headers = send(locked, "POST", "/v1/chat/completions", hello())
    assert status == 429
    assert answer["error"]["type"] == "rate_limit_error"
    assert 1 <= int(headers["retry-after"]) <= 60
    for sock in streams:
        sock.close()
    wait_for(lambda: not locked.worker.active and not len(locked.worker.waiting), 20)


def test_a_hundred_connections_that_say_nothing_keep_nobody_out(
    locked: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longverse.server import run

    monkeypatch.setattr(run, "SILENCE", 1.0)
    silent = [socket.create_connection(("127.0.0.1", locked.port)) for _ in range(100)]
    for sock in silent[:50]:
        sock.sendall(b"GET /hea")
    assert send(locked, "GET", "/health")[0] == 200
    for sock in silent:
        sock.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(10) == b""  # hung up on
        sock.close()


def test_a_reader_that_stops_reading_is_cut_off(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longverse.server import stream

    monkeypatch.setattr(stream, "STALL", 0.3)
    with serving(engine, tmp_path, Settings(keep_alive=0.001)) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.connect(("127.0.0.1", server.port))
        body = json.dumps(hello(stream=True, max_tokens=1900, logprobs=True, top_logprobs=20)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: server.worker.active, 20)
        wait_for(lambda: not server.worker.active, 40)
        wait_for(lambda: not server.server.server_state.connections, 10)
        sock.close()


def test_silence_in_a_stream_is_filled_with_comments(engine: Engine, tmp_path: Path) -> None:
    with serving(engine, tmp_path, Settings(keep_alive=0.05), slots=1) as server:
        server.worker._baton.take()  # nothing computes
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps(hello(stream=True)),
                           {"Content-Type": "application/json"})  # fmt: skip
        response = connection.getresponse()
        lines = [response.readline() for _ in range(8)]
        assert lines.count(b": keep-alive\n") >= 2
        server.worker._baton.give()
        rest = response.read()
        assert rest.rstrip().endswith(b"data: [DONE]")
        connection.close()


def test_metrics_are_prometheus(server: Running) -> None:
    """Read by Prometheus' own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    before = send(server, "POST", "/v1/chat/completions", hello())
    assert before[0] == 200
    _, raw, headers = send(server, "GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(raw.decode())}
    assert families["longverse_generated_tokens"].samples[0].value >= 4
    assert families["longverse_first_token_seconds"].type == "histogram"
    counts = {
        s.labels.get("le"): s.value for s in families["longverse_first_token_seconds"].samples if "le" in s.labels
    }
    assert counts["+Inf"] >= 1
    assert list(counts.values()) == sorted(counts.values())
    assert families["longverse_window_tokens"].samples[0].value == 2048
    assert families["longverse_sessions_evicted"].type == "counter"
    assert "x 123456789\n" in Metrics().render({"x": 123456789})  # every digit


def test_schemathesis_finds_no_500(server: Running) -> None:
    """The server's own description, and what it does with requests made from it, valid and not."""
    import schemathesis
    from schemathesis import Response
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: list[int] = []

    for operation in schema.get_all_operations():
        made = operation.ok()

        @settings(
            max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
        )
        @given(case=made.as_strategy())
        def check(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body.pop("max_tokens", None)
                case.body.pop("max_completion_tokens", None)
            response: Response = case.call(base_url=server.url, timeout=150)
            statuses.append(response.status_code)
            case.validate_response(response, checks=[not_a_server_error])

        check()
    assert len(statuses) > 60
    assert max(statuses) < 500
    wait_for(lambda: not server.worker.active, 20)


def test_a_stop_in_the_middle_ends_streams_with_an_error(tmp_path: Path) -> None:
    engine = load(save_model(tmp_path / "tiny"))
    running = Running(engine, tmp_path / "library", Settings())
    got: list[bytes] = []

    def listen() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=150)
        body = json.dumps(hello(stream=True, max_tokens=1900))
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        got.append(connection.getresponse().read())

    thread = threading.Thread(target=listen)
    thread.start()
    wait_for(lambda: running.worker.active)
    started = time.monotonic()
    running.stop()
    thread.join()
    assert time.monotonic() - started < 20
    assert b'"code":"stopping"' in got[0]
    assert b"[DONE]" not in got[0]
