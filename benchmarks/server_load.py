"""The server under load, and what it costs beside the engine alone.

    python benchmarks/server_load.py [--model smol] [--clients 32] [--seconds 600] [--tokens 3000 6000]
    python benchmarks/server_load.py --clients 4 --seconds 20 --tokens 1500 --rounds 3       a quick look

Two parts, with the server as a process of its own on loopback:

1. Alone with one client, engine and server in turns on the same questions: seconds to the first token on a document
   that is read already (the engine's own: encoding the prompt and streaming from a session that holds the document),
   and seconds a token after the first.
2. Many clients at once, short chats and questions about documents mixed, each waiting for its answer before the next
   request and coming back after Retry-After on 429. Every answer is greedy, so it is compared with what the same server
   answers alone. "mixed" counts answers that belong to another request: there must be none. An answer may still differ
   in the last bits of a sum, since the pieces in which a prompt is read depend on what was kept of it: "drifted".

Memory is the server's resident memory from /metrics, once a second.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from common import table, write_results

from longverse.commands_demo import sized_report
from longverse.documents import ask
from longverse.documents.reader import decode
from longverse.inference.engine import Engine, common_prefix
from longverse.inference.sampling import Sampling

CHATS = (
    "Name three oceans.", "What is a volcano?", "Write a sentence about rain.", "How do bees make honey?",
    "What is the capital of France?", "Explain what a loan is.", "Give me a rhyme for stone.", "Why is the sky blue?",
    "Name two rivers of Asia.", "What does a mill do?", "How many legs has a spider?", "Tell me about the moon.",
)  # fmt: skip
CHAT_TOKENS, ANSWER_TOKENS = 24, 40


@contextlib.contextmanager
def server(model: str, folder: str) -> Iterator[int]:
    """`longverse serve` on a free port."""
    command = [sys.executable, "-m", "longverse_command", "serve", "-m", model, "--port", "0", "--library", folder]
    running = subprocess.Popen([*command, "--cache-memory", "4"], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert running.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:(\d+)", running.stdout.readline())
    assert found, "the server did not start"
    try:
        yield int(found[1])
    finally:
        running.terminate()
        assert running.wait(60) == 0, "the server did not stop as it should"


@dataclass
class Reply:
    """One streamed answer."""

    status: int
    text: str = ""
    first: float = 0.0  # seconds to the first text
    each: float = 0.0  # seconds a token after the first
    wait: float = 0.0  # Retry-After
    problem: str = ""


def request(port: int, body: dict[str, Any]) -> Reply:
    """POST a chat completion as a stream and read it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body | {"stream": True}), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            said = response.read().decode()
            return Reply(response.status, wait=float(response.headers.get("Retry-After", 0)), problem=said)
        reply = Reply(200)
        times, whole = [], False
        for line in response:
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    reply.problem = event["error"]["message"]
                elif piece := event["choices"][0]["delta"].get("content"):
                    reply.text += piece
                    times.append(time.perf_counter())
        reply.problem = reply.problem or ("" if whole else "the stream ended early")
        if times:
            reply.first = times[0] - started
            reply.each = (times[-1] - times[0]) / max(1, len(times) - 1)
        return reply
    except OSError as error:
        return Reply(0, problem=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def upload(port: int, text: str, name: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    head = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    connection.request(
        "POST", "/v1/files", (head + text + "\r\n--b--\r\n").encode(),
        {"Content-Type": "multipart/form-data; boundary=b"},
    )  # fmt: skip
    return str(json.loads(connection.getresponse().read())["id"])


def memory(port: int) -> float:
    """Resident bytes of the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    found = re.search(rb"^longverse_memory_bytes (\S+)", connection.getresponse().read(), re.MULTILINE)
    assert found
    return float(found[1])


def about(model: str, identity: str, question: str) -> dict[str, Any]:
    parts = [{"type": "file", "file": {"file_id": identity}}, {"type": "text", "text": question}]
    return {
        "model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": ANSWER_TOKENS, "cite": "off",
    }  # fmt: skip


# ---- alone --------------------------------------------------------------------------------------------------


def compare(engine: Engine, port: int, text: str, questions: list[str], rounds: int) -> dict[str, Any]:
    """Engine and server in turns on one document that both hold."""
    identity = upload(port, text, "report.md")
    model = engine.name.rsplit("/", 1)[-1]
    document = decode(text.encode(), "report.md")
    session = engine.session(engine.window)
    figures: dict[str, list[float]] = {name: [] for name in ("engine", "server", "engine_token", "server_token")}
    same = 0
    for number in range(-1, rounds):  # the first round reads the document and warms up
        question = questions[number % len(questions)]
        started = time.perf_counter()
        prompts = ask.prepare(engine, document, [question], ANSWER_TOKENS)
        session.boundary = common_prefix(prompts.ids[0], ask.prepare(engine, document, ["问"], 1).ids[0]) - 1
        begun = time.perf_counter()
        encoding = begun - started
        started = time.perf_counter()
        times, pieces = [], []
        for piece in session.stream(prompts.ids[0], Sampling(max_new_tokens=ANSWER_TOKENS)):
            times.append(time.perf_counter())
            pieces.append(piece)
        reply = request(port, about(model, identity, question))
        assert reply.status == 200, reply.problem
        if number < 0:
            continue
        same += "".join(pieces) == reply.text
        # Half of `encoding` is the second prompt, which only finds the document's end.
        figures["engine"].append(times[0] - started + encoding / 2)
        figures["server"].append(reply.first)
        figures["engine_token"].append((times[-1] - times[0]) / max(1, len(times) - 1))
        figures["server_token"].append(reply.each)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "document_tokens": len(prompts.ids[0]), "rounds": rounds, "same_answers": same,
        "first_token_seconds": {"engine": medians["engine"], "server": medians["server"]},
        "first_token_ratio": medians["server"] / medians["engine"],
        "token_seconds": {"engine": medians["engine_token"], "server": medians["server_token"]},
        "token_overhead": medians["server_token"] / medians["engine_token"] - 1,
    }  # fmt: skip


# ---- many ---------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, list[float]] = field(default_factory=lambda: {"chat": [], "document": []})
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def client(
    port: int, seed: int, until: float, bodies: list[tuple[str, dict[str, Any]]], alone: list[str], load: Load
) -> None:
    """Ask until the time is over."""
    draws = random.Random(seed)
    while time.monotonic() < until:
        number = draws.randrange(len(bodies))
        kind, body = bodies[number]
        reply = request(port, body | {"user": f"client {seed}"})
        with load.lock:
            load.counts["requests"] += 1
            if reply.status == 429:
                load.counts["429"] += 1
            elif reply.status != 200 or reply.problem:
                load.counts["errors"] += 1
                load.problems.append(f"{reply.status} {reply.problem}"[:300])
            else:
                load.counts[kind] += 1
                load.firsts[kind].append(reply.first)
                load.counts["same"] += reply.text == alone[number]
                if reply.text != alone[number]:
                    load.counts["mixed" if reply.text in alone else "drifted"] += 1
        if reply.wait:
            time.sleep(reply.wait * (0.5 + draws.random()))


def crowd(port: int, bodies: list[tuple[str, dict[str, Any]]], clients: int, seconds: float) -> dict[str, Any]:
    alone = [request(port, body).text for _, body in bodies]
    load = Load()
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(port, seed, until, bodies, alone, load)) for seed in range(clients)
    ]
    for thread in threads:
        thread.start()
    rss = []
    while time.monotonic() < until:
        rss.append(memory(port))
        time.sleep(1)
    for thread in threads:
        thread.join()
    quarter = max(1, len(rss) // 4)
    return {
        "clients": clients, "seconds": seconds, **load.counts,
        "distinct_answers": len(set(alone)), "prompts": len(alone), "problems": load.problems[:20],
        "first_token_seconds": {
            kind: {"median": statistics.median(values), "most": max(values)}
            for kind, values in load.firsts.items() if values
        },
        "memory_bytes": {
            "second_quarter_peak": max(rss[quarter : 2 * quarter] or rss), "last_quarter_peak": max(rss[-quarter:]),
            "samples": [int(value) for value in rss[:: max(1, len(rss) // 60)]],
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--tokens", type=int, nargs="+", default=[3000, 6000])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    engine = Engine.load(arguments.model)
    model = engine.name.rsplit("/", 1)[-1]
    reports = [sized_report(engine, seed, tokens, 6, "en") for seed, tokens in enumerate(arguments.tokens, start=2000)]
    results: dict[str, Any] = {"model": engine.name}
    with tempfile.TemporaryDirectory() as folder, server(arguments.model, folder) as port:
        alone = []
        for report in reports:
            questions = [fact.question for fact in report.facts]
            alone.append(compare(engine, port, report.text, questions, arguments.rounds))
        results["alone"] = alone
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("chat", {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": CHAT_TOKENS})
            for text in CHATS
        ]
        for number, report in enumerate(reports):
            identity = upload(port, report.text, f"report {number}.md")
            bodies += [("document", about(model, identity, fact.question)) for fact in report.facts]
        results["crowd"] = crowd(port, bodies, arguments.clients, arguments.seconds)
    rows = [
        [f"{row['document_tokens']:,}", f"{row['first_token_seconds']['engine']:.3f}",
         f"{row['first_token_seconds']['server']:.3f}", f"{row['first_token_ratio']:.2f}",
         f"{1000 * row['token_seconds']['engine']:.1f}", f"{1000 * row['token_seconds']['server']:.1f}",
         f"{row['token_overhead']:+.1%}"]
        for row in alone
    ]  # fmt: skip
    head = ["document", "first token, engine s", "server s", "ratio", "token, engine ms", "server ms", "overhead"]
    print(table(head, rows))
    crowded = results["crowd"]
    counts = ("requests", "chat", "document", "429", "errors", "mixed", "drifted")
    print(", ".join(f"{name} {crowded.get(name, 0):,}" for name in counts))
    held = crowded["memory_bytes"]
    print(f"memory {held['second_quarter_peak'] / 1e6:,.0f} MB, then {held['last_quarter_peak'] / 1e6:,.0f} MB")
    if not arguments.no_write:
        print(write_results("server_load", results))


if __name__ == "__main__":
    main()
