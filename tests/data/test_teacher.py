"""The teacher against a real local server that misbehaves on purpose: refusals, hangs, rubbish, limits."""

import dataclasses
import email.utils
import errno
import http.client
import json
import re
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest

from longverse.data.config import build
from longverse.data.long_sft.asking import locate
from longverse.data.long_sft.builder import build_sft, estimate
from longverse.data.long_sft.draft import Reject
from longverse.data.long_sft.item import read_items
from longverse.data.long_sft.plan import SftConfig
from longverse.data.teacher import Teacher, TeacherConfig, Unusable
from longverse.errors import UserError
from longverse.web import named_wait
from tests.data.texts import history, novel, tokenizer_folder, write_jsonl


class Server:
    """An endpoint whose n-th reply can be made wrong: `script(n, body)` returns None for the right one, or a fault."""

    def __init__(self):
        self.requests = []
        self.script = lambda n, body: None
        self.answer = self.teach
        lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    owner.requests.append((body, dict(self.headers), self.path))
                    number = len(owner.requests)
                fault = owner.script(number, body)
                if fault == "hang":
                    time.sleep(0.6)
                    return
                if fault == "reset":
                    self.connection.close()
                    return
                if isinstance(fault, int):
                    self.send_response(fault)
                    if fault == 429:
                        self.send_header("Retry-After", "0.05")
                    self.end_headers()
                    self.wfile.write(b'{"error": {"message": "no such\\nluck"}}')
                    return
                content = fault[1] if isinstance(fault, tuple) else json.dumps(owner.answer(body), ensure_ascii=False)
                reply = {
                    "choices": [{"message": {"content": content}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 9},
                }
                data = b"<html>busy</html>" if fault == "html" else json.dumps(reply).encode()
                if fault == "empty":
                    data = b'{"choices": []}'
                self.send_response(200)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def teach(self, body):
        """A docile teacher: a question on the first whole sentence of the passage."""
        text = body["messages"][1]["content"]
        if "exam over" not in body["messages"][0]["content"] and "出题" not in body["messages"][0]["content"]:
            return {"answer": "?"}
        if '{"summary"' in text:
            zh = "用中文" in text
            return {"summary": "军队渡河，百姓安居。" if zh else f"Somebody mended things. {len(text)}"}
        if '{"answer": "' in text and "evidence" not in text:
            return {"answer": "I do not know."}
        passages = re.split(r"(?:^|\n)(?:Passage|First passage|Second passage|段落|第一段|第二段)[:：]\n", text)[1:]
        found = []
        for passage in passages:
            sentence = re.search(
                r"(?:On day|次日大雨，城中粮食只剩|太守派人去修)[^.。]*(\d{3,})[^.。]*[.。]", passage
            ) or re.search(r"[^\n.。]*?(\d{2,})[^\n.。]*[.。]", passage)
            found.append((sentence[0], sentence[1]))
        key = sum(map(ord, passages[0])) % 99991
        question = (
            f"Which number goes with note {key} there?"
            if "Write in English" in text
            else f"与第{key}条记载有关的数目是多少？"
        )
        reply = {"question": question, "answer": found[0][1], "evidence": found[0][0]}
        if len(found) > 1:
            reply["other_evidence"] = found[1][0]
        return reply


@pytest.fixture
def server():
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer_folder(folder / "tok")
    write_jsonl(folder / "en.jsonl", [{"id": f"n{i}", "title": f"Book {i}", "text": novel(i, 160)} for i in range(4)])
    write_jsonl(folder / "zh.jsonl", [{"id": f"h{i}", "title": f"史书{i}", "text": history(i, 160)} for i in range(4)])
    return folder


def teacher(server, folder, **changes):
    folder.mkdir(exist_ok=True)
    values = {"url": server.url, "model": "m", "timeout_seconds": 0.3, "retries": 4} | changes
    waits = []
    made = Teacher(build(TeacherConfig, values), folder / "replies.jsonl", sleep=waits.append)
    return made, waits


def ask(made, text="Passage:\nOn day 512 all was well.\nWrite in English", attempt=0):
    return made.ask(
        [{"role": "system", "content": "exam over"}, {"role": "user", "content": text + ' "evidence"'}], attempt=attempt
    )


def test_faults_that_pass_are_waited_out(server, tmp_path):
    faults = [429, 500, "hang", "reset"]
    server.script = lambda n, body: faults[n - 1] if n <= len(faults) else None
    made, waits = teacher(server, tmp_path)
    assert ask(made)["answer"] == "512"
    assert len(server.requests) == 5
    assert waits[0] == 0.05  # as Retry-After says
    assert 1.5 < waits[1] < 2.5
    assert waits[3] > waits[2] > waits[1]
    assert (made.spent.requests, made.spent.retries, made.spent.prompt_tokens) == (1, 4, 100)


@pytest.mark.parametrize("fault", ["html", "empty", 503])
def test_faults_that_stay_are_one_sentence(server, tmp_path, fault):
    server.script = lambda n, body: fault
    made, waits = teacher(server, tmp_path)
    with pytest.raises(UserError, match=r"failed 5 times.*what was paid for is kept"):
        ask(made)
    assert len(waits) == 4


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_repeated(server, tmp_path, status):
    server.script = lambda n, body: status
    made, waits = teacher(server, tmp_path)
    with pytest.raises(UserError, match=f"HTTP {status}: no such luck"):
        ask(made)
    assert len(server.requests) == 1
    assert waits == []


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [("0.05", 0.05, 0.05), ("900", 900, 900), ("date", 600, 1200), ("soon", None, None), ("nan", None, None)],
)
def test_the_time_the_server_names(header, low, high):
    header = email.utils.formatdate(time.time() + 1000, usegmt=True) if header == "date" else header
    named = named_wait(header)
    assert named is None if low is None else low <= named <= high


def test_a_wait_too_long_ends_the_build(server, tmp_path, monkeypatch):
    monkeypatch.setattr("longverse.data.teacher._LONGEST_WAIT", 0.01)
    server.script = lambda n, body: 429
    made, waits = teacher(server, tmp_path)
    with pytest.raises(UserError, match=r"asks to wait .* minutes .* run the same command again after that"):
        ask(made)
    assert waits == []


def test_an_interrupt_does_not_wait_for_the_endpoint(server, sources, tmp_path, quick):
    release, hold, held = threading.Event(), threading.Event(), threading.Event()

    def script(n, body):
        if hold.is_set():
            held.set()
            release.wait(20)

    def on_progress(done, total):
        hold.set()
        held.wait(5)
        raise KeyboardInterrupt

    server.script = script
    made = config(server, sources, tmp_path / "out", items=40, tasks={"single_doc_qa": 1})
    made = dataclasses.replace(made, teacher=dataclasses.replace(made.teacher, timeout_seconds=30.0))
    with pytest.raises(KeyboardInterrupt):
        build_sft(made, sources, on_progress=on_progress)
    assert held.is_set()
    assert not release.is_set()  # the request was still under way
    left = [thread for thread in threading.enumerate() if thread.daemon and "(serve)" in thread.name]
    assert left
    release.set()
    for thread in left:  # else they take what the next test has ready
        thread.join(10)


@pytest.mark.parametrize(
    "error", [ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), OSError(errno.ENETDOWN, "Network is down")]
)
def test_a_connection_that_breaks_while_it_is_read_is_made_anew(server, tmp_path, monkeypatch, error):
    real, reads = http.client.HTTPResponse.read, []

    def read(self, *amount):
        reads.append(amount)
        if len(reads) < 3:
            raise error
        return real(self, *amount)

    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    made, waits = teacher(server, tmp_path)
    assert ask(made)["answer"] == "512"
    assert (len(waits), made.spent.retries) == (2, 2)


def test_nobody_there(tmp_path):
    made = Teacher(TeacherConfig("http://127.0.0.1:9/v1", "m", retries=2), tmp_path / "r", sleep=lambda s: None)
    with pytest.raises(UserError, match="failed 3 times"):
        ask(made)


def test_no_reply_is_paid_twice_even_after_a_torn_write(server, tmp_path):
    made, _ = teacher(server, tmp_path)
    first = [ask(made, f"Passage:\nOn day {n} all was well.\nWrite in English") for n in (111, 222, 333)]
    made.close()
    store = tmp_path / "replies.jsonl"
    store.write_bytes(store.read_bytes()[:-5])  # the third is lost
    made, _ = teacher(server, tmp_path)
    again = [ask(made, f"Passage:\nOn day {n} all was well.\nWrite in English") for n in (111, 222, 333)]
    assert again == first
    assert len(server.requests) == 4
    assert (made.spent.kept, made.spent.requests) == (2, 1)


def test_rubbish_is_told_from_an_answer(server, tmp_path):
    made, _ = teacher(server, tmp_path)
    for reply in ("I cannot help with that.", '{"question": "half', "[1, 2]"):
        server.script = lambda n, body, reply=reply: ("say", reply)
        with pytest.raises(Unusable):
            ask(made, text=reply)
    server.script = lambda n, body: ("say", 'Sure!\n```json\n{"answer": "7"}\n```')
    assert ask(made) == {"answer": "7"}


def test_the_rate_is_kept_and_the_key_sent(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-1")
    made, waits = teacher(server, tmp_path, requests_per_minute=60, key_variable="SOME_KEY")
    for n in range(3):
        ask(made, attempt=n)
    assert sum(waits) > 2.5  # 1 and 2 seconds after the first, less what passed
    assert server.requests[0][1]["Authorization"] == "Bearer sk-1"
    assert server.requests[0][2] == "/v1/chat/completions"


def test_a_key_with_a_line_end_is_sent_without_it_and_never_shown(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-1\n")
    made, _ = teacher(server, tmp_path, key_variable="SOME_KEY")
    ask(made)
    assert server.requests[0][1]["Authorization"] == "Bearer sk-1"
    monkeypatch.setenv("SOME_KEY", "sk-1\nsk-2")
    with pytest.raises(UserError, match="SOME_KEY holds characters") as error:
        ask(made, attempt=1)
    assert "sk-" not in str(error.value)


def test_quotations_are_found_whatever_the_white_space():
    assert locate("He said\n  yes to it.", "said yes") == (3, 13)
    with pytest.raises(Reject, match="evidence is not in the passage"):
        locate("He said yes", "said no")


def config(server, sources, out, **changes):
    values = {
        "out": str(out), "tokenizer": "tok", "items": 12, "seed": 1, "attempts": 12,
        "tasks": {"single_doc_qa": 2, "multi_doc_qa": 1, "summary": 1, "multi_turn": 1},
        "lengths": [{"low": 2500, "high": 5000}], "questions_high": 3,
        "sources": [{"name": "en", "path": "en.jsonl"}, {"name": "zh", "path": "zh.jsonl"}],
        "teacher": {"url": server.url, "model": "m", "timeout_seconds": 0.5, "retries": 3, "chunk_tokens": 600,
                    "concurrency": 4},
    }  # fmt: skip
    return build(SftConfig, values | changes)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("longverse.data.teacher.time.sleep", lambda s: None)
    monkeypatch.setattr(Teacher.__init__, "__defaults__", (lambda s: None, *Teacher.__init__.__defaults__[1:]))


def test_a_build_through_a_bad_endpoint(server, sources, tmp_path, quick):
    """Every seventh reply is an error, every ninth rubbish, every eleventh in the wrong language; yet the build ends,
    with the same file as a build that was interrupted."""

    def script(n, body):
        if n % 7 == 0:
            return 500
        if json.dumps(body).count("512") % 2 and n % 3 == 0:
            return None
        text = json.dumps(body, ensure_ascii=False)
        digest = sum(map(ord, text)) % 97
        if digest < 8:
            return ("say", "sorry, no")
        if digest < 16:
            return (
                "say",
                json.dumps(
                    {
                        "question": "这是什么？" if "Write in English" in text else "What?",
                        "answer": "1",
                        "evidence": "x",
                    }
                ),
            )
        return None

    server.script = script
    spent = []
    result = build_sft(config(server, sources, tmp_path / "one"), sources, on_spent=spent.append)
    items = [item for _, item, problem in read_items(result.path) if item is not None or pytest.fail(problem)]
    assert len(items) == 12, result.report["rejected"]
    assert {item.teacher for item in items} == {"m"}
    assert Counter(item.task for item in items)["single_doc_qa"] >= 4
    for item in items:
        for evidence in item.evidence:
            if evidence.complete:
                assert item.answers[evidence.question][0] in evidence.text
    assert any("no JSON" in gate for gate in result.report["rejected"])
    assert result.report["closed_book_check"] == "by the endpoint"
    assert spent[-1].requests > 12

    calls = iter(range(100))
    made = config(server, sources, tmp_path / "two")
    with pytest.raises(UserError, match="run the same command again"):
        build_sft(made, sources, cancelled=lambda: next(calls) >= 4)
    before = len(server.requests)
    second = build_sft(made, sources)
    assert second.path.read_bytes() == result.path.read_bytes()
    assert second.spent is not None
    assert second.spent.kept > 0
    asked = [json.dumps(body, sort_keys=True) for body, _, _ in server.requests[before:]]
    assert len(asked) < spent[-1].requests + spent[-1].retries


@pytest.mark.parametrize("chunk", [600, 3_000])
def test_no_question_twice_in_a_conversation(server, sources, tmp_path, quick, chunk):
    """Neither where a chunk is as long as what is shown, nor by a teacher who knows few questions."""
    real = server.answer

    def few(body):
        reply = real(body)
        if "evidence" in reply:
            reply["question"] = f"Which number goes with note {int(reply['answer']) % 3} there?"
        return reply

    server.answer = few
    made = config(server, sources, tmp_path / "out", items=6, tasks={"multi_turn": 1}, languages={"en": 1},
                  questions_low=3, questions_high=6)  # fmt: skip
    made = dataclasses.replace(made, teacher=dataclasses.replace(made.teacher, chunk_tokens=chunk))
    several = 0
    for _, item, _ in read_items(build_sft(made, sources).path):
        asked = re.findall(r"Which number goes with note \d there", json.dumps(item.messages))
        assert len(asked) == len(set(asked)) >= 2
        spans = sorted((e.start, e.end) for e in item.evidence)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        several += 1
    assert several >= 3
    first = [body["messages"][1]["content"] for body, _, _ in server.requests if body["seed"] == 0]
    passages = [text for text in first if "evidence" in text]
    assert len(passages) == len(set(passages)) > 6


def test_what_the_teacher_knows_anyway_is_dropped(server, sources, tmp_path, quick):
    real = server.answer

    def knows(body):
        text = body["messages"][1]["content"]
        return {"answer": "it is " + " ".join(map(str, range(10, 99999)))} if "evidence" not in text else real(body)

    server.answer = knows
    made = config(server, sources, tmp_path / "out", items=2, attempts=3, tasks={"single_doc_qa": 1})
    with pytest.raises(UserError, match="answerable without the document"):
        build_sft(made, sources)


def test_a_refusing_endpoint_stops_the_build(server, sources, tmp_path, quick):
    server.script = lambda n, body: 401
    with pytest.raises(UserError, match="HTTP 401"):
        build_sft(config(server, sources, tmp_path / "out"), sources)


def test_the_cost_is_known_before(server, sources, tmp_path):
    made = config(
        server, sources, tmp_path, teacher={"url": server.url, "model": "m", "price_in": 2.0, "price_out": 10.0}
    )
    cost = estimate(made)
    assert cost["requests"] > 12
    assert cost["money"] == pytest.approx((cost["prompt_tokens"] * 2 + cost["reply_tokens"] * 10) / 1e6)
    assert estimate(config(server, sources, tmp_path, teacher=None))["requests"] == 0
