"""Back ends: the engine, transformers, and an endpoint that serves the engine or misbehaves."""

import email.utils
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from longverse.errors import UserError
from longverse.evaluation.backends import IN_A_ROW, Failure, Reply, Request, answer_all, check_window, load_tokenizer
from longverse.evaluation.endpoint import EndpointBackend
from longverse.evaluation.engine_backend import EngineBackend, EngineProcesses, fingerprint
from longverse.evaluation.files import Journal
from longverse.evaluation.longbench.runner import LongBenchRun
from longverse.evaluation.longbench.tasks import read_config
from longverse.evaluation.needle import NeedleSettings, run_needle
from longverse.evaluation.perplexity import token_losses
from longverse.evaluation.transformers_backend import TransformersBackend
from longverse.inference import memory
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling

from .conftest import Echo

Handle = Callable[[str, dict[str, Any]], tuple[int, bytes] | None]
ASK = Request.user("Where?", max_new_tokens=4)


@contextmanager
def server(handle: Handle) -> Iterator[str]:
    """A local endpoint; handle(path, body) gives status and raw reply, None breaks the connection off."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: dict[str, Any]) -> None:
            made = handle(self.path, body)
            if made is None:
                self.connection.close()
                return
            status, raw = made
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()


def said(text: str, **usage: int) -> tuple[int, bytes]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, json.dumps({"choices": [choice], "usage": usage}).encode()


def client(url: str, **more: Any) -> EndpointBackend:
    return EndpointBackend(url, "tiny", sleep=lambda seconds: None, **{"retries": 2, "timeout": 5.0, **more})


def serve_engine(engine: Engine) -> Handle:
    """What an OpenAI-compatible server does, in a dozen lines, on the engine."""
    lock = threading.Lock()

    def handle(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "tiny"}]}).encode()
        with lock:
            inner = EngineBackend(engine)
            stop = tuple(body.get("stop", ()))
            if path == "/v1/chat/completions":
                request = Request(messages=tuple(body["messages"]), max_new_tokens=body["max_tokens"], stop=stop)
            else:
                request = Request(prompt=body["prompt"], max_new_tokens=body["max_tokens"], stop=stop)
            reply = inner.answer(request)
        message = {"text": reply.text} if "prompt" in body else {"message": {"content": reply.text}}
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens}
        done = {"choices": [message | {"finish_reason": reply.finish_reason}], "usage": usage}
        return 200, json.dumps(done).encode()

    return handle


def test_the_endpoint_gives_the_engines_answers(engine: Engine, model_folder: Path) -> None:
    requests = [
        Request.user("The miller walked slowly.", max_new_tokens=12),
        Request(prompt="The river made people", max_new_tokens=12),
        Request.user("清晨，花匠慢慢走过小小的码头。", max_new_tokens=12),
    ]
    direct = [EngineBackend(engine).answer(request) for request in requests]
    assert any(reply.text for reply in direct)
    tokenizer, chat = load_tokenizer(str(model_folder))
    with server(serve_engine(engine)) as url:
        remote = client(url, tokenizer=tokenizer, chat=chat)
        remote.check()
        for index, _, reply in answer_all(remote, [(request,) for request in requests]):
            assert isinstance(reply, Reply)
            assert reply.text == direct[index].text
            assert reply.prompt_tokens == direct[index].prompt_tokens == remote.count(requests[index])


def test_needles_through_the_endpoint_equal_those_of_the_engine(engine: Engine, model_folder: Path) -> None:
    settings = NeedleSettings(lengths=(400,), depths=(0.0, 1.0), repeats=1, max_new_tokens=4, one_per_document=True)
    tokenizer, chat = load_tokenizer(str(model_folder))
    with server(serve_engine(engine)) as url:
        there = run_needle(client(url, tokenizer=tokenizer, chat=chat, window=4096), settings)
    here = run_needle(EngineBackend(engine), settings)
    assert [t.answer for t in there.trials] == [t.answer for t in here.trials]
    assert {t.prompt_tokens for t in there.trials} == {400}


def test_transformers_gives_the_engines_answers(engine: Engine, model_folder: Path) -> None:
    other = TransformersBackend(str(model_folder), dtype="float32")
    ours = EngineBackend(engine)
    for request in (
        Request.user("The miller walked slowly.", max_new_tokens=10),
        Request(prompt="The river made people", max_new_tokens=10),
        Request(prompt="Towards evening\n", max_new_tokens=10, end_line=True),
    ):
        assert ours.count(request) == other.count(request)
        assert ours.answer(request).text == other.answer(request).text


def test_a_model_transformers_cannot_load_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        TransformersBackend(str(tmp_path / "absent"))


def test_an_answer_of_one_line_never_begins_with_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = EngineBackend(engine)
    free = backend.answer(Request(prompt="The dust", max_new_tokens=6))
    # Call the first token of the free answer a line feed: it may neither begin the answer nor pass without ending it.
    first = next(engine.session(40).stream_ids(engine.tokenizer.encode("The dust"), Sampling(max_new_tokens=1)))
    real = engine.tokenizer.encode
    monkeypatch.setattr(
        engine.tokenizer, "encode", lambda text, **more: [first] if text == "\n" else real(text, **more)
    )
    line = backend.answer(Request(prompt="The dust", max_new_tokens=6, end_line=True))
    assert line.new_tokens
    assert not line.text.startswith(engine.tokenizer.decode([first]))
    assert free.text.startswith(engine.tokenizer.decode([first]))


def test_the_window_is_kept(engine: Engine) -> None:
    with pytest.raises(Failure, match="window of 4,096"):
        EngineBackend(engine).answer(Request(prompt="a b c " * 3000, max_new_tokens=4))
    with pytest.raises(UserError, match="window of 4,096"):
        check_window(EngineBackend(engine), 4093, 4)
    check_window(EngineBackend(engine), 4092, 4)


def test_what_may_pass_is_tried_again() -> None:
    replies: list[tuple[int, bytes] | None] = [(503, b"busy"), None, (200, b"not json"), said("here", prompt_tokens=7)]
    pauses: list[float] = []
    with server(lambda path, body: replies.pop(0)) as url:
        backend = EndpointBackend(url, "tiny", retries=3, pause=1.0, sleep=pauses.append)
        assert backend.answer(ASK).text == "here"
    assert len(pauses) == 3
    assert pauses == sorted(pauses)
    assert pauses[0] >= 1.0
    assert pauses[2] >= 4.0


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((500, b'{"error": {"message": "out of memory"}}'), "HTTP 500: out of memory, after 3 tries"),
        ((200, b""), "the reply is empty, after 3 tries"),
        ((200, b'{"choices": []}'), "the reply holds no choices, after 3 tries"),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "the reply holds no text, after 3 tries"),
        ((200, b"[1]"), "not a JSON object, after 3 tries"),
        (None, "after 3 tries"),
        ((400, b'{"error": "prompt too long"}'), "HTTP 400: prompt too long"),
    ],
)
def test_what_stays_wrong_is_a_failure(reply: tuple[int, bytes] | None, reason: str) -> None:
    with server(lambda path, body: reply) as url, pytest.raises(Failure, match=reason):
        client(url).answer(ASK)


def test_a_slow_endpoint_times_out() -> None:
    def slow(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(0.5)
        return said("late")

    with server(slow) as url, pytest.raises(Failure, match=r"no answer within 0\.1 seconds, after 2 tries"):
        client(url, timeout=0.1, retries=1).answer(ASK)


def test_an_empty_answer_is_an_answer() -> None:
    with server(lambda path, body: said("")) as url:
        assert client(url).answer(ASK).text == ""


def test_what_no_retry_mends_ends_the_run() -> None:
    with server(lambda path, body: (401, b'{"error": "bad key"}')) as url:
        with pytest.raises(UserError, match="refuses the key"):
            client(url).answer(ASK)
        with pytest.raises(UserError, match="refuses the key"):
            client(url).check()
    with server(lambda path, body: (404, b"")) as url, pytest.raises(UserError, match="has no /completions"):
        client(url).answer(Request(prompt="x"))
    with pytest.raises(UserError, match="does not answer"):
        client("http://127.0.0.1:9/v1").check()
    with (
        server(lambda path, body: (200, b'{"data": [{"id": "other"}]}')) as url,
        pytest.raises(UserError, match="serves no model called 'tiny'; it serves other"),
    ):
        client(url).check()


def test_bad_addresses_and_missing_tokenizers_are_said() -> None:
    with pytest.raises(UserError, match="is no endpoint"):
        EndpointBackend("localhost:8000", "tiny")
    with pytest.raises(UserError, match="--tokenizer"):
        client("http://127.0.0.1:9/v1").count(ASK)
    with pytest.raises(UserError, match="--concurrency"):
        client("http://127.0.0.1:9/v1", concurrency=0)


def test_another_tokenizer_is_noticed(model_folder: Path) -> None:
    tokenizer, chat = load_tokenizer(str(model_folder))
    settings = NeedleSettings(lengths=(400,), depths=(0.5,), repeats=1, max_new_tokens=4)
    with (
        server(lambda path, body: said("x", prompt_tokens=391)) as url,
        pytest.raises(UserError, match="counted 391 tokens where 400 were sent"),
    ):
        run_needle(client(url, tokenizer=tokenizer, chat=chat, window=4096), settings)


def test_requests_run_side_by_side_and_failures_stay_with_their_row(echo: Echo) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def handle(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        text = body["messages"][0]["content"]
        return (400, b"") if text == "3" else said(f"re {text}")

    with server(handle) as url:
        backend = client(url, concurrency=3)
        jobs = [(Request.user(str(n)),) for n in range(8)]
        replies = {n: reply for n, _, reply in answer_all(backend, jobs)}
        stopped = list(answer_all(backend, jobs, cancelled=lambda: True))
    assert most == 3
    assert isinstance(replies.pop(3), Failure)
    assert {n: r.text for n, r in replies.items() if isinstance(r, Reply)} == {n: f"re {n}" for n in range(8) if n != 3}
    assert stopped == []


@pytest.mark.parametrize(("side_by_side", "good"), [(1, 0), (1, 5), (3, 0)])
def test_many_failures_in_a_row_end_the_run(echo: Echo, side_by_side: int, good: int) -> None:
    jobs = [(Request.user(str(n)),) for n in range(100)]
    echo.side_by_side, echo.fail = side_by_side, range(good, 100)
    with pytest.raises(UserError, match=f"{IN_A_ROW} requests in a row got no answer"):
        list(answer_all(echo, jobs))
    # A lane gets work only when its last outcome was taken, so no more than one a lane is under way at the end.
    assert good + IN_A_ROW <= echo.calls <= good + IN_A_ROW + side_by_side
    echo.calls, echo.side_by_side, echo.fail = 0, 1, [n for n in range(100) if n % IN_A_ROW]
    assert len(list(answer_all(echo, jobs))) == 100


def test_requests_of_one_job_follow_each_other_on_one_lane(echo: Echo) -> None:
    lanes: list[Any] = [Lane(), Lane(), Lane()]

    class Several(Echo):
        @property
        def lanes(self) -> Any:
            return lanes

    jobs = [[Request.user(f"{job} {place}") for place in range(3)] for job in range(7)]
    came = [(job, place) for job, place, _ in answer_all(Several(echo.tokenizer, echo.chat), jobs)]
    assert sorted(came) == [(job, place) for job in range(7) for place in range(3)]
    for lane in lanes:
        assert [text for text in lane.asked if text.endswith(" 0")] == lane.asked[::3]
        assert all(
            lane.asked[i][0] == lane.asked[i + 1][0] == lane.asked[i + 2][0] for i in range(0, len(lane.asked), 3)
        )


class Lane:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, request: Request) -> Reply:
        assert request.messages is not None
        self.asked.append(request.messages[0]["content"])
        time.sleep(0.001)
        return Reply("", None, None, "stop", 0.0)


def test_a_run_that_is_given_up_does_not_wait_for_the_endpoint() -> None:
    release = threading.Event()

    def handle(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if body["messages"][0]["content"] != "0":
            release.wait(20)
        return said("x")

    with server(handle) as url:
        start = time.monotonic()
        answers = answer_all(client(url, concurrency=3, timeout=30.0), [(Request.user(str(n)),) for n in range(8)])
        assert next(answers)[0] == 0
        answers.close()  # as an exception or a Ctrl-C in the loop does
        assert time.monotonic() - start < 10
        release.set()


def test_the_wait_a_server_names_is_kept_within_a_minute() -> None:
    waits = ["7", email.utils.formatdate(time.time() + 9, usegmt=True), "3600", "soon"]
    pauses: list[float] = []

    class Busy(EndpointBackend):
        def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
            from longverse.evaluation.endpoint import _Passing
            from longverse.web import named_wait

            if waits:
                raise _Passing("HTTP 429: slow down", named_wait(waits.pop(0)))
            return json.loads(said("here")[1])

    backend = Busy("http://127.0.0.1:9/v1", "tiny", retries=4, pause=1.0, sleep=pauses.append)
    assert backend.answer(ASK).text == "here"
    assert pauses[0] == 7
    assert 7 <= pauses[1] <= 9.1
    assert pauses[2] == 60
    assert 8 <= pauses[3] <= 10


def test_a_key_that_is_none_is_refused_without_showing_it() -> None:
    with pytest.raises(UserError, match="no key has") as refused:
        client("http://127.0.0.1:9/v1", key="geheim\nX-Other: 1")
    assert "geheim" not in str(refused.value)
    assert client("http://127.0.0.1:9/v1", key=" k \n").key == "k"


def test_half_a_character_and_odd_usage_do_no_harm() -> None:
    seen: list[str] = []

    def handle(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        seen.append(body["messages"][0]["content"])
        return 200, json.dumps({"choices": [{"message": {"content": "x"}}], "usage": [1]}).encode()

    with server(handle) as url:
        assert client(url).answer(Request.user("a \ud83d b")).prompt_tokens is None
    assert seen == ["a \ud83d b"]


def test_half_a_character_in_a_reply_ends_no_run(echo: Echo, tmp_path: Path) -> None:
    replies = [said("half \ud83d"), (400, b'{"error": {"message": "no \\ude00 here"}}')]
    journal = Journal(tmp_path / "j.jsonl", {})
    with server(lambda path, body: replies.pop(0)) as url:
        for number, _, reply in answer_all(client(url, concurrency=1), [(ASK,), (ASK,)]):
            journal.add(str(number), {"text": reply.text if isinstance(reply, Reply) else str(reply)})
    rows = Journal(tmp_path / "j.jsonl", {}).rows
    assert [rows[key]["text"] for key in "01"] == ["half ?", "HTTP 400: no ? here"]


def test_other_weights_and_other_numbers_are_another_model(engine: Engine, model_folder: Path) -> None:
    about = EngineBackend(engine).describe()
    again = Engine.load(str(model_folder), dtype="float32", device="cpu")
    assert EngineBackend(again).describe() == about
    assert EngineBackend(again, cache="int8").describe() != about
    rounded = Engine(again.network, again.tokenizer, again.chat, again.name, kept=torch.bfloat16)
    assert EngineBackend(rounded).describe() == {**EngineBackend(again).describe(), "kept": "bfloat16"} != about
    assert (
        EngineBackend(Engine.load(str(model_folder), dtype="bfloat16", device="cpu")).describe()["dtype"] == "bfloat16"
    )
    linear = again.network.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight * 1.001, requires_grad=False)
    assert fingerprint(again.network) != about["weights"]


def test_other_plans_of_rope_are_another_model(model_folder: Path, tmp_path: Path) -> None:
    def about(rope: str) -> dict[str, Any]:
        return EngineBackend(
            Engine.load(str(model_folder), rope=rope, window=4096, dtype="float32", device="cpu")
        ).describe()

    early = about("dynamic:2:1024")
    assert early["rope"]["original_window"] == 1024
    assert about("dynamic:2:2048") != early
    Journal(tmp_path / "j.jsonl", {"model": early})
    Journal(tmp_path / "j.jsonl", {"model": about("dynamic:2:1024")})
    with pytest.raises(UserError, match="made with other settings"):
        Journal(tmp_path / "j.jsonl", {"model": about("dynamic:2:2048")})


def test_an_endpoint_with_another_tokenizer_is_another_model(model_folder: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    tokenizer, chat = load_tokenizer(str(model_folder))
    about = client(url, tokenizer=tokenizer, chat=chat).describe()
    assert client(url).describe() == {name: about[name] for name in ("backend", "model", "window")}
    assert about["chat"] == chat.kind
    again, chat = load_tokenizer(str(model_folder))
    assert client(url, tokenizer=again, chat=chat).describe() == about
    again.backend.add_tokens(["walked"])
    assert client(url, tokenizer=again, chat=chat).describe() != about
    shutil.copytree(model_folder, tmp_path / "other")
    settings = tmp_path / "other" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|start|>", "<|end|>", 1))
    other, chat = load_tokenizer(str(tmp_path / "other"))
    assert client(url, tokenizer=other, chat=chat).describe() != about


@pytest.mark.slow
def test_processes_give_the_engines_answers_and_say_when_one_is_killed(
    engine: Engine, model_folder: Path, bench: Path, tmp_path: Path
) -> None:
    alone = EngineBackend(engine)
    jobs = [
        [Request.user("The miller walked slowly.", max_new_tokens=9), Request.user("The river.", max_new_tokens=9)],
        [Request(prompt="Towards evening\n", max_new_tokens=9, end_line=True)],
        [Request.user("清晨，花匠慢慢走过小小的码头。", lead=" It", max_new_tokens=9)],
        [Request(prompt="a b c " * 3000, max_new_tokens=4)],
    ]
    with EngineProcesses(str(model_folder), processes=2, dtype="float32", device="cpu") as several:
        assert several.describe() == alone.describe()
        assert several.window == alone.window
        assert several.count(jobs[0][0]) == alone.count(jobs[0][0])
        told = {(job, place): reply for job, place, reply in answer_all(several, jobs[:3])}
        for job, requests in enumerate(jobs[:3]):
            for place, request in enumerate(requests):
                reply = told[job, place]
                assert isinstance(reply, Reply)
                expected = alone.answer(request)
                assert (reply.text, reply.new_tokens) == (expected.text, expected.new_tokens)
        ((_, _, refused),) = answer_all(several, jobs[3:])
        assert isinstance(refused, Failure)
        assert "window of 4,096" in str(refused)
        # A whole run: journals hold the same rows, in whatever order; predictions are the same to the byte.
        tasks = ("hotpotqa", "samsum")
        config = read_config(bench / "config", tasks)
        for backend, folder in ((alone, "one"), (several, "two")):
            LongBenchRun(backend, bench, config, tmp_path / folder, tasks, max_length=300).run()
        for task in tasks:
            one, two = ((tmp_path / folder / f"pred/{task}.jsonl").read_bytes() for folder in ("one", "two"))
            assert one == two
            one, two = ((tmp_path / folder / f"journal/{task}.jsonl").read_text() for folder in ("one", "two"))
            assert one.splitlines()[0] == two.splitlines()[0]
            kept = [
                sorted((row["key"], row["pred"]) for row in map(json.loads, text.splitlines()[1:]))
                for text in (one, two)
            ]
            assert kept[0] == kept[1]
        os.kill(several.lanes[0].process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"worker process ended \(exit code -9"):
            list(answer_all(several, jobs[:2]))


def test_a_model_that_processes_cannot_load_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no model"):
        EngineProcesses(str(tmp_path / "absent"), processes=2)


def test_too_little_memory_is_said_before_a_row_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = EngineBackend(engine)
    monkeypatch.setattr(memory, "memory_of_machine", lambda: (2**40, 4096))
    with pytest.raises(UserError, match="are free"):
        backend.answer(ASK)
    with pytest.raises(UserError, match="are free"):
        token_losses(backend, [5, 6, 7])
