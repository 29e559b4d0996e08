"""Kept documents: the same bits as a fresh reading, whatever happens in between."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longverse import UserError
from longverse.inference import engine as engine_module
from longverse.inference import store as store_module
from longverse.inference import store_entry, store_reading
from longverse.inference.engine import Engine, Session
from longverse.inference.sampling import Sampling
from longverse.inference.store import Store
from longverse.inference.store_keys import checksum, planned_length, weights_digest
from longverse.models.cache import FORMATS
from longverse.models.chat import ChatFormat
from longverse.models.tokenizer import Tokenizer
from tests.helpers import random_network, tiny_config
from tests.models.folders import save_tokenizer

pytestmark = pytest.mark.usefixtures("no_compiling")

LENGTH = 150
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0}
ROPES = {"plain": tiny_config(max_position_embeddings=512)}
ROPES["dynamic"] = tiny_config(rope_theta=None, rope_parameters=DYNAMIC, context_window=512)
NEW = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of several threads differ in their last bits from one thread's, and here bits are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def document(length: int, seed: int = 5) -> list[int]:
    return torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_engine(folder: Path, config: dict[str, Any] | None = None, seed: int = 0) -> Engine:
    (folder / "tokenizer").mkdir(exist_ok=True)
    save_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    network = random_network(config or ROPES["plain"], seed)
    return Engine(network, tokenizer, ChatFormat("plain", tokenizer), "tiny")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many forwards, many stretches, and writing after every forward."""
    monkeypatch.setattr(engine_module, "CHUNK", 7)
    monkeypatch.setattr(store_entry, "STRETCH", 28)
    monkeypatch.setattr(store_reading, "FLUSH_SECONDS", 0.0)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "library")


def fresh(engine: Engine, ids: list[int], planned: int, **more: str) -> Session:
    """The session of one who keeps nothing."""
    session = engine.session(planned, **more)  # type: ignore[arg-type]
    session.boundary = len(ids)
    session.read(ids)
    return session


def answer(session: Session, prompt: list[int], boundary: int) -> tuple[list[int], int]:
    session.boundary = boundary
    done = session.complete(prompt, NEW)
    return done.tokens, done.stats.reused_tokens


def same_cache(a: Session, b: Session, length: int) -> bool:
    """Whether two caches hold the same numbers, as attention sees them."""
    return all(
        torch.equal(getattr(a.cache, part)(layer, 0, length), getattr(b.cache, part)(layer, 0, length))
        for layer in range(a.engine.network.config.num_layers)
        for part in ("keys_of", "values_of")
    )


# ---- reopening ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", FORMATS)
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_a_kept_document_gives_the_answer_of_a_fresh_reading(
    tmp_path: Path, store: Store, cache: str, rope: dict[str, Any]
) -> None:
    engine, ids = make_engine(tmp_path, rope), document(LENGTH)
    planned = planned_length(engine, LENGTH, LENGTH + 50)
    question, other = ids + document(9, 1), ids + document(12, 2)
    plain = fresh(engine, ids, planned, cache=cache)
    store.read(engine, ids, planned, cache=cache)
    kept = store.find(make_engine(tmp_path, rope), question, planned)
    assert kept is not None
    assert kept.cache_format == cache
    assert same_cache(kept, plain, LENGTH)
    assert answer(kept, question, LENGTH) == (answer(plain, question, LENGTH)[0], LENGTH)
    assert answer(kept, other, LENGTH) == (answer(plain, other, LENGTH)[0], LENGTH)
    assert not store.notes


def test_pages_are_kept_too(tmp_path: Path, store: Store) -> None:
    engine, ids = make_engine(tmp_path, tiny_config(max_position_embeddings=1024)), document(1900)
    question = ids + document(9, 1)
    plain = fresh(engine, ids, 2000, attention="pages")
    store.read(engine, ids, 2000, attention="pages")
    kept = store.find(engine, question, 2000, attention="pages")
    assert kept is not None
    assert store.find(engine, question, 2000, attention="exact") is None
    assert answer(kept, question, 1900) == (answer(plain, question, 1900)[0], 1900)


@pytest.mark.parametrize("attention", ["exact", "pages"])
def test_a_float32_network_that_keeps_bfloat16_finds_only_its_own(tmp_path: Path, store: Store, attention: str) -> None:
    engine, ids = make_engine(tmp_path, tiny_config(max_position_embeddings=1024)), document(900)
    rounded = Engine(engine.network, engine.tokenizer, engine.chat, engine.name, kept=torch.bfloat16)
    question = ids + document(9, 1)
    plain = fresh(rounded, ids, 1000, attention=attention)
    store.read(rounded, ids, 1000, attention=attention)
    assert store.find(engine, question, 1000, attention=attention) is None
    kept = store.find(rounded, question, 1000, attention=attention)
    assert kept is not None
    assert answer(kept, question, 900) == (answer(plain, question, 900)[0], 900)


def test_sparse_readings_are_kept_apart_from_exact_ones(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "CHUNK", 256)
    engine, ids = make_engine(tmp_path, tiny_config(max_position_embeddings=1024)), document(900)
    question = ids + document(9, 1)
    plain = fresh(engine, ids, 1000, attention="sparse")
    assert plain.cache.sparse is not None
    assert plain.cache.sparse.blocks_all > 0  # it had blocks to choose among
    store.read(engine, ids, 1000, attention="sparse")
    kept = store.find(make_engine(tmp_path, tiny_config(max_position_embeddings=1024)), question, 1000)
    assert kept is not None
    assert kept.attention == "sparse"
    for other in ("exact", "sparse:0.9", "sparse:0.95:0.3"):
        assert store.find(engine, question, 1000, attention=other) is None
    store.read(engine, ids, 1000, attention="sparse:0.9")
    less = store.find(engine, question, 1000, attention="sparse:0.9")
    assert less is not None
    assert less.mass == 0.9
    same = store.find(engine, question, 1000, attention="sparse:0.950")
    assert same is not None
    assert (same.mass, same.most) == (0.95, 1)
    assert store.folder_of(engine, ids, 1000, cache="full", attention="sparse:0.95").is_dir()
    store.read(engine, ids, 1000, attention="sparse:0.95:0.3")
    few = store.find(engine, question, 1000, attention="sparse:0.95:0.3")
    assert few is not None
    assert (few.mass, few.most) == (0.95, 0.3)
    assert few.cache.sparse.mass_kept < same.cache.sparse.mass_kept  # type: ignore[union-attr]
    assert same_cache(kept, plain, 900)
    assert answer(kept, question, 900) == (answer(plain, question, 900)[0], 900)
    assert kept.stats.mass_kept == plain.stats.mass_kept  # what reading kept is told with every later answer
    for path in store.folder.glob("*/progress.json"):  # as an earlier version wrote it
        records = [replace(record, shares=None) for record in store_entry.read_progress(path.parent)]
        store_entry.write_progress(path.parent, records)
        assert "shares" not in path.read_text()
    for mass in (0.95, 0.9):
        found = store.find(engine, question, 1000, attention=f"sparse:{mass}")
        assert found is not None
        assert found.cache.sparse.mass_kept == mass  # type: ignore[union-attr]


def test_asking_never_writes_to_the_files(engine: Engine, store: Store) -> None:
    ids = document(LENGTH)
    store.read(engine, ids, LENGTH + 50)
    [folder] = [path for path in store.folder.iterdir() if path.is_dir()]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept = store.find(engine, [*ids, 7], LENGTH + 50)
    assert kept is not None
    answer(kept, ids[:100] + document(60, 3), 0)  # truncated and written over in memory
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_only_the_pages_that_are_touched_are_held(tmp_path: Path, store: Store) -> None:
    """The files are as large as the window and take the room of the document."""
    engine = make_engine(tmp_path, tiny_config(max_position_embeddings=2**20))
    store.read(engine, document(40), 60)
    [entry] = store.entries()
    apparent = sum(path.stat().st_size for path in (store.folder / entry.id).iterdir())
    assert apparent > 2**30
    assert entry.bytes < 2**20


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(common=st.integers(0, LENGTH), rest=st.integers(1, 30), cache=st.sampled_from(FORMATS))
def test_any_beginning_in_common_is_used_and_changes_nothing(
    kept_in: tuple[Engine, Store], common: int, rest: int, cache: str
) -> None:
    """The tokens decide: all of a kept document, or the whole forwards of what agrees; never a different answer."""
    engine, store = kept_in
    ids = [*document(LENGTH)[:common], 101, *document(rest, 8)]
    found = store.find(engine, ids, 400, cache=cache)
    held = len(found.tokens) if found is not None else 0
    assert held <= common
    if cache == "full":
        assert held == (LENGTH if common == LENGTH else common // 7 * 7)
    if found is not None:
        assert found.tokens == ids[:held]
        plain = engine.session(400, cache=cache)
        boundary = LENGTH if held == LENGTH else 0
        assert answer(found, ids, boundary) == (answer(plain, ids, boundary)[0], held)


PROMPT = document(LENGTH) + document(5, 2)


@pytest.fixture(scope="module")
def plain(kept_in: tuple[Engine, Store]) -> dict[str, Session]:
    """What a fresh reading leaves in each format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "CHUNK", 7)
        return {cache: fresh(kept_in[0], document(LENGTH), 400, cache=cache) for cache in FORMATS}


@pytest.fixture(scope="module")
def expected(kept_in: tuple[Engine, Store]) -> dict[str, list[int]]:
    """The answer to PROMPT after a fresh reading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "CHUNK", 7)
        return {cache: answer(kept_in[0].session(400, cache=cache), PROMPT, LENGTH)[0] for cache in FORMATS}


@pytest.fixture(scope="module")
def kept_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Store]:
    folder = tmp_path_factory.mktemp("kept")
    engine, store = make_engine(folder), Store(folder / "library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "CHUNK", 7)
        patch.setattr(store_reading, "FLUSH_SECONDS", 0.0)
        for cache in FORMATS:
            store.read(engine, document(LENGTH), 400, cache=cache)
    return engine, store


def test_a_changed_document_takes_over_what_it_shares(engine: Engine, store: Store) -> None:
    ids = document(LENGTH)
    store.read(engine, ids, LENGTH + 50)
    edited = ids[:80] + document(60, 4)
    seen: list[int] = []
    session = store.read(engine, edited, LENGTH + 50, on_progress=lambda done, total: seen.append(done))
    assert seen[0] == 77  # the forwards of 7 that lie within the first 80 tokens
    assert same_cache(session, fresh(engine, edited, LENGTH + 50), len(edited))
    assert [one.state for one in store.entries()] == ["whole", "whole"]


@pytest.mark.parametrize("what", ["weight", "tokenizer", "rope", "dtype", "format", "piece"])
def test_nothing_is_found_by_another_model(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    engine, ids = make_engine(tmp_path), document(LENGTH)
    store.read(engine, ids, LENGTH + 50)
    assert store.find(engine, [*ids, 7], LENGTH + 50) is not None
    other, cache = make_engine(tmp_path), None
    if what == "weight":  # one bit of one number of one tensor
        other.network.model.layers[2].mlp.down_proj.weight.data[5, 7] *= 1.0000002
        assert weights_digest(other.network) != weights_digest(engine.network)
    elif what == "tokenizer":
        other.tokenizer.backend.add_tokens(["zebra"])
    elif what == "rope":
        other = make_engine(tmp_path, tiny_config(max_position_embeddings=512, rope_theta=20_000.0))
    elif what == "dtype":
        other.network.bfloat16()
    elif what == "format":
        cache = FORMATS[-1]
    else:
        monkeypatch.setattr(engine_module, "CHUNK", 8)
    found = store.find(other, [*ids, 7], LENGTH + 50, cache=cache)
    assert found is None


def test_weights_written_in_place_are_noticed(engine: Engine) -> None:
    before = weights_digest(engine.network)
    assert weights_digest(engine.network) == before
    engine.network.model.norm.weight.data.mul_(2)
    assert weights_digest(engine.network) != before


def test_the_planned_length_under_dynamic_ntk_is_shared_by_questions(tmp_path: Path) -> None:
    window = {"max_position_embeddings": 4096, "context_window": 65536}
    dynamic = make_engine(tmp_path, tiny_config(rope_theta=None, rope_parameters=DYNAMIC, **window))
    plans = {planned_length(dynamic, 30_000, 30_000 + extra) for extra in (1, 300, 2048)}
    assert plans == {32_768}
    assert planned_length(dynamic, 30_000, 33_000) == 36_864
    assert planned_length(dynamic, 65_000, 65_500) == 65_536
    assert planned_length(make_engine(tmp_path), 300, 311) == 311


# ---- interruptions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["full", "int8"])
def test_killed_at_any_moment_the_reading_goes_on_to_the_same_bits(tmp_path: Path, cache: str) -> None:
    if cache not in FORMATS:
        pytest.skip(f"no {cache} cache here")
    engine, ids = make_engine(tmp_path), document(LENGTH)
    arguments = [str(tmp_path), cache, "4", "3"]
    subprocess.run([sys.executable, "-m", "tests.inference.kill_reading", *arguments], check=True, timeout=200)
    store = Store(tmp_path / "library")
    [left] = store.entries()
    assert left.state in ("unfinished", "whole")
    seen: list[int] = []
    session = store.read(
        engine, ids, LENGTH + 50, cache=cache, on_progress=lambda done, total: seen.append(done)
    )  # fmt: skip
    assert seen[0] == left.length
    plain = fresh(engine, ids, LENGTH + 50, cache=cache)
    assert same_cache(session, plain, LENGTH)
    again = store.find(engine, [*ids, 9, 8], LENGTH + 50)
    assert again is not None
    assert same_cache(again, plain, LENGTH)
    assert answer(again, [*ids, 9, 8], LENGTH)[0] == answer(plain, [*ids, 9, 8], LENGTH)[0]
    assert not store.notes  # nothing of what was counted was torn


@pytest.mark.parametrize("way", ["Ctrl-C", "cancelled"])
def test_what_was_read_before_a_stop_is_kept(engine: Engine, store: Store, way: str) -> None:
    ids = document(LENGTH)

    def stop(done: int, total: int) -> None:
        if way == "Ctrl-C" and done >= 70:
            raise KeyboardInterrupt

    calls = iter([False] * 10 + [True])
    if way == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            store.read(engine, ids, LENGTH + 50, on_progress=stop)
    else:
        session = store.read(engine, ids, LENGTH + 50, cancelled=lambda: next(calls))
        assert len(session.tokens) == 70
    [kept] = store.entries()
    assert (kept.state, kept.length, kept.tokens) == ("unfinished", 70, LENGTH)
    assert store.folder_of(engine, ids, LENGTH + 50, cache="full").is_dir()
    found = store.find(engine, ids, LENGTH + 50)  # an unfinished reading is a beginning like any other
    assert found is not None
    assert len(found.tokens) == 70
    assert len(store.read(engine, ids, LENGTH + 50).tokens) == LENGTH
    assert store.entries()[0].state == "whole"


def test_two_who_read_the_same_document_read_it_once(engine: Engine, store: Store) -> None:
    ids, waited, second = document(LENGTH), [], []
    begun = threading.Event()

    def slowly(done: int, total: int) -> None:
        begun.set()
        time.sleep(0.02)

    first = threading.Thread(target=lambda: store.read(engine, ids, LENGTH + 50, on_progress=slowly))
    first.start()
    begun.wait(60)
    impatient = Store(store.folder)
    loose = impatient.read(engine, ids, LENGTH + 50, must_keep=False)
    assert "Another process" in impatient.notes[0]
    assert len(loose.tokens) == LENGTH
    with pytest.raises(UserError, match="being read by another process"):
        store.remove(store.entries()[0].id)
    session = Store(store.folder).read(
        engine, ids, LENGTH + 50, on_wait=waited.append, on_progress=lambda done, total: second.append(done)
    )
    first.join()
    assert waited in ([os.getpid()], [])  # [] where the first was done before the second came
    assert second == [LENGTH]
    assert same_cache(session, loose, LENGTH)


def test_waiting_can_be_given_up(engine: Engine, store: Store) -> None:
    ids = document(LENGTH)
    place = store._place(engine, ids, LENGTH + 50, "full", "exact")[3]
    with store_entry.locked(store._lock(place), wait=False):
        session = store.read(engine, ids, LENGTH + 50, cancelled=lambda: True)
    assert session.tokens == []


# ---- damage ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300), place=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_checksum_notices_any_changed_byte(data: bytes, place: int, change: int) -> None:
    whole = checksum(data, 3)
    assert checksum(data, 4) != whole
    assert checksum(data + b"\0", 3) != whole
    if data:
        changed = bytearray(data)
        changed[place % len(data)] ^= change
        assert checksum(bytes(changed), 3) != whole


def test_a_checksum_notices_long_damage() -> None:
    data = np.random.default_rng(1).integers(0, 256, 2_000_000, dtype=np.uint8)
    whole = checksum(data)
    moved = data.copy()
    moved[4096:8192], moved[8192:12288] = data[8192:12288], data[4096:8192]
    zeroed = data.copy()
    zeroed[1_000_000:1_004_096] = 0
    assert len({whole, checksum(moved), checksum(zeroed), checksum(data[:-1])}) == 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 10**6), place=st.integers(0, 10**9), bit=st.integers(0, 7), cache=st.sampled_from(FORMATS))
def test_no_changed_bit_reaches_an_answer(
    kept_in: tuple[Engine, Store],
    plain: dict[str, Session],
    expected: dict[str, list[int]],
    tmp_path: Path,
    which: int,
    place: int,
    bit: int,
    cache: str,
) -> None:
    """Any bit of any file: it is noticed, or it lies where nothing is read from; the answer stays the same."""
    engine, whole = kept_in
    ids, prompt = document(LENGTH), PROMPT
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    name = next(one.id for one in whole.entries() if one.cache == cache)
    shutil.copytree(whole.folder / name, copy / name)
    files = sorted((copy / name).iterdir())
    path = files[which % len(files)]
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(bytes(content))
    damaged = Store(copy)
    found = damaged.find(engine, prompt, 400, cache=cache)
    noticed = found is None or len(found.tokens) < LENGTH
    if found is not None:
        assert same_cache(found, plain[cache], len(found.tokens)) or cache != "full"  # the newest are no longer in full
        assert answer(found, prompt, LENGTH)[0] == expected[cache]
    mended = damaged.read(engine, ids, 400, cache=cache)
    assert same_cache(mended, plain[cache], LENGTH)
    assert bool(damaged.notes) == noticed
    again = Store(copy)
    found = again.find(engine, prompt, 400, cache=cache)
    assert found is not None
    assert len(found.tokens) == LENGTH
    assert not again.notes


@pytest.mark.parametrize("name", ["manifest.json", "tokens.bin", "progress.json", "keys.bin"])
@pytest.mark.parametrize("how", ["missing", "short"])
def test_missing_and_short_files_are_made_anew(engine: Engine, store: Store, name: str, how: str) -> None:
    ids = document(LENGTH)
    store.read(engine, ids, LENGTH + 50)
    [entry] = store.entries()
    path = store.folder / entry.id / name
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:-2])
    assert store.find(engine, ids, LENGTH + 50) is None
    assert len(store.entries()) == 1
    session = store.read(engine, ids, LENGTH + 50)
    assert same_cache(session, fresh(engine, ids, LENGTH + 50), LENGTH)
    assert any("damaged" in note for note in store.notes)
    assert store.find(engine, ids, LENGTH + 50) is not None


# ---- the folder --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write")
def test_a_folder_that_cannot_be_written(engine: Engine) -> None:
    closed, ids = Store(Path("/proc/longverse/library")), document(LENGTH)
    assert closed.find(engine, ids, LENGTH + 50) is None
    assert closed.entries() == []
    with pytest.raises(UserError, match=r"cannot be written .*: set LONGVERSE_CACHE"):
        closed.read(engine, ids, LENGTH + 50)
    session = closed.read(engine, ids, LENGTH + 50, must_keep=False)
    assert len(session.tokens) == LENGTH
    assert len(closed.notes) == 1


def test_a_disk_that_fills_up_on_the_way(engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, calls = document(LENGTH), iter(range(10**6))
    write = os.pwrite

    def full(file: int, data: bytes, place: int) -> int:
        if next(calls) > 130:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, place)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"is full; \d+ of 150 tokens are kept.* goes on from there"):
        store.read(engine, ids, LENGTH + 50)
    monkeypatch.setattr(os, "pwrite", write)
    [kept] = store.entries()
    assert 0 < kept.length < LENGTH
    session = store.read(engine, ids, LENGTH + 50)
    assert same_cache(session, fresh(engine, ids, LENGTH + 50), LENGTH)


def test_a_full_disk_costs_nothing_but_the_keeping(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_entry, "_pwrite", full)
    session = store.read(engine, document(LENGTH), LENGTH + 50, must_keep=False)
    assert len(session.tokens) == LENGTH
    assert "is full" in store.notes[0]


def test_what_does_not_fit_is_refused_before_any_work(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Session, "_forward", no_work)
    ids = document(LENGTH)
    with pytest.raises(
        UserError, match=r"takes 0.2 MB and the library's limit is 0.1 MB: raise it with LONGVERSE_LIBRARY_LIMIT"
    ):
        Store(tmp_path, limit_bytes=100_000).read(engine, ids, LENGTH + 50)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="make room"):
        Store(tmp_path).read(engine, ids, LENGTH + 50)


def test_the_documents_used_longest_ago_make_room(engine: Engine, store: Store) -> None:
    texts = {name: document(60, seed) for seed, name in enumerate(("a", "b", "c"))}
    for age, (name, ids) in enumerate(texts.items()):
        store.read(engine, ids, 100, name=name)
        os.utime(store.folder / store.entries()[0].id / "manifest.json", (age, age))
    assert store.find(engine, texts["a"], 100) is not None  # used now
    sizes = {one.name: one.bytes for one in store.entries()}
    removed = store.prune(sizes["a"] + sizes["c"])
    assert [one.name for one in removed] == ["b"]
    assert [one.name for one in store.entries()] == ["a", "c"]
    small = Store(store.folder, limit_bytes=sizes["a"])
    small.read(engine, document(60, 9), 100, name="d")
    assert [one.name for one in small.entries()] == ["d"]


def test_removing_by_name_and_by_the_beginning_of_an_id(engine: Engine, store: Store) -> None:
    for seed in range(2):
        store.read(engine, document(60, seed), 100, name=f"{seed}.txt")
    assert [one.name for one in store.remove("0.txt")] == ["0.txt"]
    [left] = store.entries()
    store.remove(left.id[:6])
    assert store.entries() == []
    assert not list(store.folder.iterdir())
    for which in ("0.txt", ""):
        with pytest.raises(UserError, match="keeps no document"):
            store.remove(which)


def test_what_another_version_kept_is_left_alone(engine: Engine, store: Store) -> None:
    ids = document(LENGTH)
    store.read(engine, ids, LENGTH + 50, name="mill.txt")
    [entry] = store.entries()
    path = store.folder / entry.id / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    assert store.find(engine, ids, LENGTH + 50) is None
    assert [one.state for one in store.entries()] == ["other version"]
    assert [one.name for one in store.remove(entry.id)] == ["mill.txt"]


def test_leftovers_of_killed_processes_are_swept(engine: Engine, store: Store) -> None:
    store.read(engine, document(60), 100)
    for name in (".new.abc.1", ".gone.abc.2"):
        (store.folder / name).mkdir()
        os.utime(store.folder / name, (1, 1))
    store.prune(10**9)
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".")] == []
    assert len(store.entries()) == 1
