"""`longverse serve` as a process: how it starts, what it refuses, how it stops."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "longverse_command", "serve"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def process(model: Path, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [*COMMAND, "--model", str(model), "--port", "0", "--library", str(folder), "--dtype", "float32", *options]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET, cwd=ROOT)
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, (line, running.stderr.read() if running.stderr else "")
        yield running, found[0]
    finally:
        running.kill()
        running.communicate()


def post(url: str, body: Any, key: str = "") -> Any:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def hello(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **more}


def test_sigterm_lets_an_answer_finish_and_leaves_with_0(model_folder: Path, tmp_path: Path) -> None:
    with process(model_folder, tmp_path, "--grace", "60") as (running, url):
        response = post(url, hello(stream=True, max_tokens=300, temperature=1, seed=1))
        assert response.readline().startswith(b"data: ")
        running.send_signal(signal.SIGTERM)
        rest = response.read().rstrip()
        assert rest.endswith(b"data: [DONE]")
        assert running.wait(30) == 0
        assert "Traceback" not in (running.stderr.read() if running.stderr else "")


def test_a_second_signal_ends_the_grace(model_folder: Path, tmp_path: Path) -> None:
    with process(model_folder, tmp_path, "--grace", "600", "--api-key", "k") as (running, url):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(url, hello())
        response = post(url, hello(stream=True, max_tokens=1900, temperature=1, seed=1), "k")
        assert response.readline().startswith(b"data: ")
        running.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(0.3)
        running.send_signal(signal.SIGINT)
        response.read()
        assert running.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "others can reach the server: set a key"),
        (["--host", "256.1.1.1"], "others can reach|no address of this machine"),
        (["--api-key", "two words"], "without spaces"),
        (["--model", "no/such/model.gguf", "--port", "0"], "no"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(options: list[str], said: str) -> None:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, env=QUIET, cwd=ROOT, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.search(said, line)


def test_a_taken_port_is_said_before_the_model_loads() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--port", port], capture_output=True, text=True, env=QUIET, cwd=ROOT, check=False
        )
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened at (it is in use)" in done.stderr
