"""Builders killed at random points, again and again, and resumed: the files are those of one run.

The points change with every run of the tests; a failure shows its seed, and LONGVERSE_SEED=… repeats it.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.texts import history, law, novel, tokenizer_folder, write_jsonl

ROUNDS, KILLS = 2, 5
SOURCES = [{"name": name, "path": f"{name}.jsonl"} for name in ("novels", "histories", "laws")]
CONFIGS = {
    "sft": {
        "tokenizer": "tok", "items": 8, "processes": 1, "sources": SOURCES, "questions_high": 4,
        "lengths": [{"low": 500, "high": 900}], "decontaminate": ["laws.jsonl"], "decontaminate_hits": 1_000_000,
        "tasks": {"stated_facts": 2, "single_doc_qa": 1, "multi_doc_qa": 1, "multi_turn": 1},
    },
    "corpus": {"tokenizer": "tok", "processes": 1, "shard_tokens": 1_500, "sources": SOURCES},
}  # fmt: skip
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Imports everything, then forks a builder for each line of its input (a thread pool of the tests' own process would not
# live through a fork). A builder is killed at a given one of its dealings with files, or after a given time; what
# became of it, the dealings and the seconds are the answer.
SERVER = """
import json, os, signal, sys, threading, time
from pathlib import Path
import longverse.data.corpus as corpus, longverse.data.report as report
from longverse.data.config import build
from longverse.data.long_sft.builder import build_sft
from longverse.data.long_sft.plan import SftConfig
import longverse.models.chat, longverse.models.tokenizer, longverse.models.tokenizer_migration, tokenizers, numpy.random

corpus._JOB_CHARACTERS = 2_000
report.importlib.util.find_spec = lambda name: None  # no plot
EVENTS = "open os.rename os.truncate os.remove os.mkdir os.rmdir shutil.rmtree".split()

def run(kind, values, base, at, after):
    seen = 0
    def watch(event, _):
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    if after is not None:
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if kind == "sft":
        build_sft(build(SftConfig, values), base)
    else:
        corpus.build_corpus(build(corpus.CorpusConfig, values), base)
    return seen

for line in sys.stdin:
    kind, values, base, at, after = json.loads(line)
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(run(kind, values, Path(base), at, after)).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([status, int(os.read(reader, 20) or 0), time.monotonic() - began]), flush=True)
    os.close(reader)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    tokenizer_folder(folder / "tok")
    write_jsonl(
        folder / "novels.jsonl", [{"id": f"n{i}", "title": f"Book {i}", "text": novel(i, 24)} for i in range(3)]
    )
    write_jsonl(folder / "histories.jsonl", [{"id": f"h{i}", "text": history(i, 30)} for i in range(3)])
    write_jsonl(folder / "laws.jsonl", [{"id": f"l{i}", "title": law(i)[0], "text": law(i, 12)[1]} for i in range(9)])
    return folder


def files(folder):
    """What a build leaves, without what tells one run from another (times, the builder's process)."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("builder.lock", "report.json")
    }


def tear(folder, rng):
    """What a power cut may take beside: the last bytes of a file that was being written."""
    for path in (folder / "items.jsonl.part", folder / "progress.jsonl"):
        if path.exists() and rng.random() < 0.3:
            os.truncate(path, max(0, path.stat().st_size - rng.randint(1, 300)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_killed_at_random_and_resumed(kind, sources, tmp_path):
    seed = int(os.environ.get("LONGVERSE_SEED") or random.SystemRandom().randrange(10**9))
    rng = random.Random(seed)
    environment = os.environ | {
        "LONGVERSE_COMMAND": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(out, at=None, after=None):
            """(the wait status, dealings with files, seconds) of a builder."""
            order = [kind, CONFIGS[kind] | {"out": str(out)}, str(sources), at, after]
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        status, events, seconds = run(tmp_path / "one")
        assert status == 0
        wanted = files(tmp_path / "one")
        for turn in range(ROUNDS):
            out, kills = tmp_path / f"out{turn}", []
            while len(kills) < KILLS:
                at, after = (rng.randint(1, events), None) if rng.random() < 0.6 else (None, rng.uniform(0, seconds))
                status, *_ = run(out, at, after)
                kills.append((at, after, status))
                assert not os.WIFEXITED(status) or status == 0, f"LONGVERSE_SEED={seed}, round {turn}: {kills}"
                if status == 0:
                    break
                tear(out, rng)
            assert run(out)[0] == 0, f"LONGVERSE_SEED={seed}, round {turn}: {kills}"
            left = files(out)
            wrong = sorted(name for name in left.keys() | wanted.keys() if left.get(name) != wanted.get(name))
            assert not wrong, f"LONGVERSE_SEED={seed}, round {turn}: {wrong} differ after {kills}"
        server.stdin.close()
