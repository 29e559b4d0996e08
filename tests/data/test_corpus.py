"""The corpus builder: sources, choice, duplicates, mixture, restart, and what users get wrong."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longverse.data.config import build
from longverse.data.corpus import CorpusConfig, build_corpus, load_corpus_config
from longverse.data.dedup import _BLOCK, Deduplicator, signature, similarity
from longverse.data.lock import FolderLock
from longverse.data.mixture import plan_copies
from longverse.data.shards import TokenStore
from longverse.data.sources import Skipped, SourceConfig, read_source
from longverse.data.text import shingle_hashes
from longverse.data.vocabulary import load_vocabulary
from longverse.errors import UserError
from tests.data.texts import history, law, novel, tokenizer_folder, write_jsonl


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    tokenizer_folder(folder / "tok")
    write_jsonl(
        folder / "novels.jsonl", [{"id": f"n{i}", "title": f"N {i}", "text": novel(i, 12 + 6 * i)} for i in range(8)]
    )
    with gzip.open(folder / "zh.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(12):
            file.write(
                json.dumps({"id": f"z{i}", "text": law(i)[1] if i % 2 else history(i, 30)}, ensure_ascii=False) + "\n"
            )
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "a.md").write_text("# A heading\n\n" + novel(50, 12))
    (folder / "notes" / "deep" / "b.txt").write_text(novel(51, 12))
    return folder


def config(folder, out, **changes):
    values = {
        "out": str(out),
        "tokenizer": "tok",
        "processes": 1,
        "shard_tokens": 9_000,
        "sources": [
            {"name": "novels", "path": "novels.jsonl"},
            {"name": "zh", "path": "zh.jsonl.gz"},
            {"name": "notes", "path": "notes"},
        ],
    }
    return build(CorpusConfig, values | changes)


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("builder.lock", "report.png") and p.suffix != ".npz"
    }


def test_the_store_holds_the_documents(sources, tmp_path):
    store = build_corpus(config(sources, tmp_path / "out"), sources)
    vocabulary = load_vocabulary(str(sources / "tok"))
    end = min(vocabulary.tokenizer.eos_ids)
    assert len(store) == 22
    assert len(store.shards) > 3
    texts = {f"n{i}": novel(i, 12 + 6 * i) for i in range(8)} | {"deep/b.txt": novel(51, 12)}
    for document in range(len(store)):
        if (text := texts.get(store.name(document))) is not None:
            assert store.ids(document).tolist() == [*vocabulary.tokenizer.encode(text, add_bos=False), end]
    assert {store.source(d) for d in range(22)} == {"novels", "zh", "notes"}
    assert store.language(0) == "en"
    assert store.tokens == sum(len(store.ids(d)) for d in range(len(store)))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["by_source"]["novels"]["documents"] == 8
    assert (tmp_path / "out" / "report.png").stat().st_size > 1_000
    again = build_corpus(config(sources, tmp_path / "out"), sources)
    assert again.tokens == store.tokens
    with pytest.raises(UserError, match=r"another configuration.*seed"):
        build_corpus(config(sources, tmp_path / "out", seed=3), sources)
    with pytest.raises(UserError, match="whose vocabulary is not"):
        TokenStore.open(tmp_path / "out", "0" * 16)


def test_two_processes_give_the_same(sources, tmp_path):
    build_corpus(config(sources, tmp_path / "one"), sources)
    build_corpus(config(sources, tmp_path / "two", processes=2), sources)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_stopped_anywhere_and_resumed_gives_the_same(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("longverse.data.corpus._JOB_CHARACTERS", 6_000)
    build_corpus(config(sources, tmp_path / "one"), sources)
    for stop in (1, 5):
        out = tmp_path / f"stopped{stop}"
        calls = iter(range(10_000))
        with pytest.raises(UserError, match="run the same command again"):
            build_corpus(config(sources, out), sources, cancelled=lambda calls=calls, stop=stop: next(calls) >= stop)
        build_corpus(config(sources, out), sources)
        assert files(out) == files(tmp_path / "one")


KILLED = """
import sys
from pathlib import Path
import longverse.data.corpus as corpus
corpus._JOB_CHARACTERS = 6_000
config = corpus.load_corpus_config(sys.argv[1])
corpus.build_corpus(config, Path(sys.argv[1]).parent, on_progress=lambda *_: (print("x", flush=True),
sys.stdin.readline()))
"""


def test_killed_and_resumed_gives_the_same(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("longverse.data.corpus._JOB_CHARACTERS", 6_000)
    build_corpus(config(sources, tmp_path / "one"), sources)
    recipe = sources / "killed.yaml"
    rows = "\n".join(
        f"  - {{name: {n}, path: {p}}}"
        for n, p in (("novels", "novels.jsonl"), ("zh", "zh.jsonl.gz"), ("notes", "notes"))
    )
    recipe.write_text(f"out: {tmp_path / 'out'}\ntokenizer: tok\nprocesses: 1\nshard_tokens: 9000\nsources:\n{rows}\n")
    environment = {"LONGVERSE_COMMAND": "1", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(recipe)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert child.stdout is not None
    assert child.stdin is not None
    for _ in range(5):
        assert child.stdout.readline()
        child.stdin.write(b"\n")
        child.stdin.flush()
    with pytest.raises(UserError, match="another builder"), FolderLock(tmp_path / "out"):
        pass
    child.kill()
    child.communicate()
    assert not (tmp_path / "out" / "store.json").exists()
    store = build_corpus(load_corpus_config(recipe), sources)
    assert len(store) == 22
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_fraction_is_by_hash(sources, tmp_path):
    small = build_corpus(config(sources, tmp_path / "a", fraction=0.5), sources)
    large = build_corpus(config(sources, tmp_path / "b", fraction=0.8), sources)
    few, many = ({(s.source(d), s.name(d)) for d in range(len(s))} for s in (small, large))
    assert few < many  # a larger fraction only adds
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert sum(r.get("not chosen", 0) for r in report["documents_read"].values()) == 22 - len(few)


def test_duplicates_go(sources, tmp_path):
    text = novel(3, 60)
    near = text.replace("lantern", "lamp", 3)
    rows = [text, text.upper().replace(" ", "  "), near, novel(4, 60), "short", "Short!"]
    write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in rows])
    made = {"sources": [{"name": "d", "path": str(tmp_path / "d.jsonl")}]}
    store = build_corpus(config(sources, tmp_path / "near", **made), sources)
    assert [store.name(d) for d in range(len(store))] == ["d.jsonl:1", "d.jsonl:4", "d.jsonl:5"]
    store = build_corpus(config(sources, tmp_path / "exact", near_duplicates=None, **made), sources)
    assert len(store) == 4


def test_minhash_estimates_similarity():
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(4_000)]
    for share in (0.5, 0.8, 0.95):
        other = [w if rng.random() < share else f"new{i}" for i, w in enumerate(words)]

        one, two = " ".join(words), " ".join(other)
        a, b = set(shingle_hashes(one, 20).tolist()), set(shingle_hashes(two, 20).tolist())
        true = len(a & b) / len(a | b)
        assert abs(similarity(signature(one, "en")[1], signature(two, "en")[1]) - true) < 0.15


@pytest.mark.parametrize(
    ("threshold", "similarity", "least"), [(0.3, 0.4, 0.98), (0.4, 0.5, 0.98), (0.5, 0.6, 0.95), (0.8, 0.9, 0.98)]
)
def test_near_duplicates_are_found_at_every_threshold(threshold, similarity, least):
    """Pairs of signatures that agree in so many of their slots: above the threshold all but a few are dropped."""
    rng = np.random.default_rng(2)
    dropped = 0
    for pair in range(400):
        one, two = rng.integers(1, 2**32, (2, 128), dtype=np.uint32)
        same = rng.permutation(128)[: round(128 * similarity)]
        two[same] = one[same]
        dedup = Deduplicator(threshold)
        assert dedup.verdict(2 * pair, one) == "new"
        dropped += dedup.verdict(2 * pair + 1, two) == "near"
    assert dropped >= least * 400


def test_the_usual_bands_are_what_they_were():
    slots = np.arange(1, 129, dtype=np.uint32)
    keys = Deduplicator()._band_keys(slots)
    assert keys.shape == (16,)
    assert (keys == Deduplicator(None)._band_keys(slots)).all()
    assert int(np.bitwise_xor.reduce(keys)) == 1535182017660521390  # stores begun earlier go on with the same ones


def test_the_near_duplicate_index_is_bounded():
    rng = np.random.default_rng(1)
    dedup = Deduplicator(0.8, memory_mb=1)
    first = rng.integers(1, 2**32, 128, dtype=np.uint32)
    assert dedup.verdict(1, first) == "new"
    assert dedup.verdict(2, first) == "near"
    for i in range(5_000):
        assert dedup.verdict(100 + i, rng.integers(1, 2**32, 128, dtype=np.uint32)) == "new"
    assert dedup.forgotten > 0
    assert dedup.verdict(3, first) == "new"  # forgotten, and said to be


@pytest.mark.parametrize("seed", range(5))
def test_mixture_meets_its_shares_exactly(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 5_000, 3_000)
    sources = rng.integers(0, 3, 3_000)
    copies, extra = plan_copies(
        lengths,
        sources,
        ["a", "b", "c"],
        [0.5, 0.3, 0.2],
        total_tokens=4_000_000,
        long_tokens=3_000,
        long_factor=2,
        seed=seed,
    )
    shown = lengths * copies + extra.astype(int)
    for source, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(shown[sources == source].sum() - 4_000_000 * share) <= 1
        mine = sources == source
        long = mine & (lengths >= 3_000)
        ratio = (shown[long].sum() / lengths[long].sum()) / (shown[mine & ~long].sum() / lengths[mine & ~long].sum())
        assert 1.6 < ratio < 2.4
    assert (extra < lengths).all()


def test_mixture_refuses_what_cannot_be():
    lengths, sources = np.array([100, 100]), np.array([0, 1])
    with pytest.raises(UserError, match="limit is 4"):
        plan_copies(lengths, sources, ["a", "b"], [0.9, 0.1], total_tokens=10_000)
    with pytest.raises(UserError, match="'b' has no weight"):
        plan_copies(lengths, sources, ["a", "b"], [0.9, None])


def test_damaged_input_is_counted_and_said(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"text": "good one here"}\n{"text": \n[1]\n{"body": "x"}\n{"text": "  "}\n\xff\xfe\n{"text": "last"}\n'
    )
    skipped = Skipped()
    found = [d.text for d in read_source(SourceConfig("s", path="bad.jsonl"), tmp_path, skipped)]
    assert found == ["good one here", "last"]
    assert sum(skipped.counts.values()) == 5
    assert any("fields: body" in example for example in skipped.examples)
    whole = gzip.compress(b"".join(b'{"text": "number %d"}\n' % i for i in range(5_000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    skipped = Skipped()
    assert len(list(read_source(SourceConfig("s", path="cut.jsonl.gz"), tmp_path, skipped))) > 100
    assert any("breaks off" in reason for reason in skipped.counts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractoin": 0.2}, "unknown key 'fractoin', did you mean 'fraction'"),
        ({"fraction": 2.0}, r"fraction must be in \(0, 1\]"),
        ({"shard_tokens": "lots"}, "whole number such as 32768 or 32K"),
        ({"sources": []}, "at least one source"),
        ({"sources": [{"name": "x", "path": "a", "wieght": 1}]}, "did you mean 'weight'"),
        ({"sources": [{"name": "x"}]}, "either 'path' or 'hub'"),
        ({"processes": True}, "must be a whole number"),
    ],
)
def test_wrong_configurations(sources, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config(sources, tmp_path, **changes)


def test_wrong_sources(sources, tmp_path):
    for path, message in (
        ("nowhere", "does not exist"),
        ("empty.jsonl", "gave no document"),
        ("x.pdf", "kind not known"),
    ):
        (tmp_path / "empty.jsonl").write_text("")
        (tmp_path / "x.pdf").write_text("pdf")
        made = config(sources, tmp_path / f"out-{path}", sources=[{"name": "s", "path": str(tmp_path / path)}])
        with pytest.raises(UserError, match=message):
            build_corpus(made, sources)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        build_corpus(config(sources, tmp_path / "other"), sources)


FULL = """
import resource, sys
from pathlib import Path
import longverse.data.corpus as corpus
config = corpus.load_corpus_config(sys.argv[1])
vocabulary = corpus.load_vocabulary(config.tokenizer, Path(sys.argv[1]).parent)
resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
try:
    corpus.build_corpus(config, Path(sys.argv[1]).parent, vocabulary=vocabulary)
except ValueError as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_is_one_sentence(sources, tmp_path):
    recipe = sources / "full.yaml"
    recipe.write_text(
        f"out: {tmp_path / 'out'}\ntokenizer: tok\nprocesses: 1\nsources:\n  - {{name: n, path: novels.jsonl}}\n"
    )
    environment = {"LONGVERSE_COMMAND": "1", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", FULL, str(recipe)], capture_output=True, text=True, env=environment)
    assert "UserError the disk of" in done.stdout, done.stderr
    assert "finished work is kept" in done.stdout
    store = build_corpus(load_corpus_config(recipe), sources)
    assert len(store) == 8


def test_workers_import_no_torch():
    code = "import sys, longverse.data.workers; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    environment = {"LONGVERSE_COMMAND": "1", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_texts_without_letters_differ():
    marks = [signature(text, "en")[0] for text in ("*** ---", "???", "... !!!", "", "*** \n ---")]
    assert len(set(marks)) == 4
    assert marks[0] == marks[4]  # spacing aside
    assert 0 not in marks


def test_rare_letters_count():
    one, two = "\U00020000" * 40 + "\U00020001", "\U00020000" * 40 + "\U00020002"
    assert signature(one, "zh")[0] != signature(two, "zh")[0]
    assert signature(one, "zh")[1].any()


def test_blocks_are_of_letters():
    text = novel(4, 3_000)
    assert len(text) > 2 * _BLOCK
    spaced = text.replace(" ", "  ").replace(".", " .\n")
    (exact, slots), (other, others) = signature(text, "en"), signature(spaced, "en")
    assert exact == other
    assert (slots == others).all()
