"""Turns, the fair queue, kept sessions, and the worker: who computes when, on what, and what is left of it."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse import UserError
from longverse.inference.engine import Engine, Session, common_prefix
from longverse.inference.sampling import Sampling
from longverse.server.generate import Ended, Finished, Generation, Piece
from longverse.server.sessions import Busy, Sessions, planned_length
from longverse.server.turns import Baton, FairQueue
from longverse.server.worker import Failed, Progress, QueueFull, Stopping, Task, Turn, Worker
from tests.server.common import ids_of, load, save_model, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", window=4096)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load(folder)


# ---- turns ----------------------------------------------------------------------------------------------


def test_the_baton_goes_round_in_order_and_to_one_at_a_time() -> None:
    baton, order, inside = Baton(quantum=0), [], []
    gates = [threading.Event() for _ in range(3)]

    def work(name: int) -> None:
        gates[name].wait()
        with baton:
            for _ in range(3):
                inside.append(name)
                assert len(inside) == 1
                order.append(name)
                inside.remove(name)
                baton.pass_on()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    baton.take()
    for name, thread in enumerate(threads):
        thread.start()
        gates[name].set()
        wait_for(lambda name=name: len(baton._waiting) == name + 1)
    baton.give()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2] * 3
    baton.take()  # free again
    baton.give()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 99)), unique=True, max_size=20))
def test_clients_take_turns_and_each_keeps_its_order(pushed: list[tuple[str, int]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for client, number in pushed:
        queue.push(client, (client, number))
    served = []
    while len(queue):
        client, item = next(queue.order())
        queue.remove(client, item)
        served.append(item)
    assert sorted(served) == sorted(pushed)
    for client in "abc":
        assert [i for i in served if i[0] == client] == [i for i in pushed if i[0] == client]
        waiting = sum(1 for i in pushed if i[0] == client)
        others = len({i[0] for i in pushed} - {client})
        if waiting:  # nobody waits for more than one of each other client
            assert [i[0] for i in served].index(client) <= others


# ---- sessions -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_prefix_is_the_naive_one(a: list[int], b: list[int]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(a, b) == expected


@given(st.integers(1, 300_000))
def test_plans_are_few_enough_and_never_too_short(tokens: int) -> None:
    planned = planned_length(tokens, 262_144)
    assert planned >= min(tokens, 262_144)
    assert planned <= max(2048, 1.5 * tokens)
    assert planned_length(planned, 262_144) == planned


def held(session: Session, ids: list[int]) -> None:
    session.read(ids)


def test_a_document_is_kept_from_a_greeting_and_shared_by_questions(engine: Engine) -> None:
    sessions = Sessions(engine, 2**30)
    document = ids_of(900)
    first = sessions.claim(document, 1200)
    held(first.session, document)
    sessions.release(first)
    greeting = sessions.claim(document[:20] + ids_of(30, seed=2), 100)
    assert greeting is not first  # twenty tokens gained, 880 lost
    sessions.release(greeting)
    question = sessions.claim([*document, 7, 8], 1200)
    assert question is first
    with pytest.raises(Busy) as busy:  # another question on it waits for this one, and does not read it again
        sessions.claim([*document, 9], 1200)
    assert not busy.value.memory
    sessions.release(question)
    assert sessions.claim([*document, 9], 1200) is first
    assert sessions.held([*document, 9], 1200) == 900


def test_memory_has_a_limit_and_the_oldest_goes_first(engine: Engine) -> None:
    per = Sessions(engine, 2**30).bytes_per_token
    rounded = Engine(engine.network, engine.tokenizer, engine.chat, kept=torch.bfloat16)
    assert Sessions(rounded, 2**30).bytes_per_token == per // 2
    sessions = Sessions(engine, 1500 * per)
    entries = []
    for seed in range(3):
        entry = sessions.claim(ids_of(500, seed), 500)
        held(entry.session, ids_of(500, seed))
        sessions.release(entry)
        entries.append(entry)
    last = sessions.claim(ids_of(500, 9), 500)
    assert entries[0] not in sessions.entries
    assert entries[1] in sessions.entries
    assert sessions.used_bytes <= 1500 * per
    with pytest.raises(Busy) as busy:
        sessions.claim(ids_of(1100, 10), 1100)
    assert busy.value.memory
    sessions.release(last)
    with pytest.raises(UserError, match=r"needs 1,501 tokens, which take .* at most .* --cache-memory"):
        sessions.check(1501)


def test_on_a_card_a_second_question_waits_for_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan may be half as long again as what was asked for, and past the limit; with nothing running it is taken."""
    sessions = Sessions(engine, 1100 * Sessions(engine, 2**30).bytes_per_token)
    monkeypatch.setattr(type(engine.network), "device", SimpleNamespace(type="cuda"))
    document = ids_of(1000)
    monkeypatch.setattr(sessions, "open", lambda planned: SimpleNamespace(planned_tokens=planned, tokens=document))
    first = sessions.claim(document, 1050)
    sessions.release(first)
    assert sessions.claim([*document, 7], 1060) is first
    with pytest.raises(Busy):
        sessions.claim(ids_of(1000, seed=5), 1050)


# ---- the worker -----------------------------------------------------------------------------------------


class Client:
    """Submits and keeps what comes back."""

    def __init__(self, worker: Worker, name: str = "me") -> None:
        self.worker, self.name, self.events = worker, name, []
        self.done = threading.Event()

    def ask(self, ids: list[int], new: int = 8, run: Any = None) -> Task:
        work = Generation(ids, Sampling(max_new_tokens=new), tokens=len(ids) + new)
        task = Task(self.name, ids, len(ids) + new, run or work, self.put)
        self.worker.submit(task)
        return task

    def put(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, Failed | Finished):
            self.done.set()

    def text(self) -> str:
        assert self.done.wait(200)
        assert not [event for event in self.events if isinstance(event, Failed)]
        return "".join(event.text for event in self.events if isinstance(event, Piece))


@pytest.fixture
def worker(engine: Engine) -> Any:
    made = Worker(engine, slots=3, queue_limit=4)
    yield made
    made.stop(0)
    assert not any(thread.is_alive() for thread in made._threads)


def expected(engine: Engine, ids: list[int], new: int = 8) -> str:
    session = engine.session(planned_length(len(ids) + new, engine.window))
    return session.complete(ids, Sampling(max_new_tokens=new)).text


def test_answers_of_many_at_once_are_the_engines(worker: Worker, engine: Engine) -> None:
    prompts = [ids_of(40 + 300 * (n % 3), seed=n) for n in range(6)]
    clients = [Client(worker, f"c{n}") for n in range(6)]
    for client, ids in zip(clients, prompts, strict=True):
        client.ask(ids)
    for client, ids in zip(clients, prompts, strict=True):
        assert client.text() == expected(engine, ids)
        progress = [event for event in client.events if isinstance(event, Progress)]
        assert [p.processed for p in progress] == sorted(p.processed for p in progress)
        assert progress[-1].processed == progress[-1].total == len(ids)
        (ended,) = (event for event in client.events if isinstance(event, Ended))
        assert ended.stats.new_tokens == 8


def test_a_short_question_does_not_wait_for_a_book(engine: Engine) -> None:
    worker = Worker(engine, slots=2)
    worker._baton.quantum = 0
    order: list[str] = []
    started = threading.Event()

    def book(session: Session, turn: Turn) -> None:
        for done in range(200):
            started.set()
            time.sleep(0.005)
            turn.progress(done, 200)
        order.append("book")
        turn.emit(Finished())

    long, short = Client(worker, "a"), Client(worker, "b")
    long.ask(ids_of(500), run=book)
    started.wait(10)
    short.ask(ids_of(5, 2))
    assert short.text()
    order.append("question")
    assert long.done.wait(30)
    assert order == ["question", "book"]
    worker.stop(0)


class Held:
    """Work that waits until it may go on, and looks whether it was cancelled."""

    def __init__(self) -> None:
        self.started, self.go, self.stopped = threading.Event(), threading.Event(), False

    def __call__(self, session: Session, turn: Turn) -> None:
        self.started.set()
        while not self.go.wait(0.01):
            if turn.cancelled():
                self.stopped = True
                turn.emit(Failed(turn.task.reason, ""))
                return
            turn.pause()
        turn.emit(Finished())


def test_a_full_queue_says_when_to_come_again(worker: Worker) -> None:
    blocks = [Held() for _ in range(3)]
    clients = [Client(worker, f"c{n}") for n in range(9)]
    for client, block in zip(clients, blocks, strict=False):
        client.ask(ids_of(5), run=block)
    wait_for(lambda: len(worker.active) == 3)
    for client in clients[3:7]:
        client.ask(ids_of(5))
    with pytest.raises(QueueFull, match="4 requests are waiting") as full:
        clients[7].ask(ids_of(5))
    assert 1 <= full.value.retry_after <= 60
    worker.cancel(next(task for _, task in worker.waiting.order()))  # a place is free at once
    clients[8].ask(ids_of(5))
    for block in blocks:
        block.go.set()
    assert clients[8].text()
    assert isinstance(clients[3].events[-1], Failed)


def test_one_client_cannot_fill_the_queue(worker: Worker) -> None:
    blocks = [Held() for _ in range(3)]
    for block in blocks:
        Client(worker).ask(ids_of(5), run=block)
    wait_for(lambda: len(worker.active) == 3)
    greedy, other = Client(worker, "greedy"), Client(worker, "other")
    other.ask(ids_of(5))
    greedy.ask(ids_of(6))
    greedy.ask(ids_of(7))
    with pytest.raises(QueueFull):
        greedy.ask(ids_of(8))
    Client(worker, "third").ask(ids_of(5))
    for block in blocks:
        block.go.set()
    assert other.text()


def test_cancelling_stops_reading_and_the_session_stays_good(worker: Worker, engine: Engine) -> None:
    client = Client(worker)
    ids = ids_of(3900)
    task = client.ask(ids, new=100)
    wait_for(lambda: any(isinstance(event, Progress) and event.processed for event in client.events))
    worker.cancel(task)
    assert client.done.wait(20)
    assert client.events[-1] == Failed("cancelled", "The request was stopped.")
    wait_for(lambda: not worker.active)
    again = Client(worker)
    again.ask(ids, new=5)
    text = again.text()
    (ended,) = (event for event in again.events if isinstance(event, Ended))
    assert ended.stats.reused_tokens > 0  # what was read is not read again
    assert text == expected(engine, ids, 5)


def test_a_defect_ends_its_request_alone(worker: Worker) -> None:
    def broken(session: Session, turn: Turn) -> None:
        raise RuntimeError("boom")

    client = Client(worker)
    client.ask(ids_of(5), run=broken)
    assert client.done.wait(10)
    assert client.events == [Failed("defect", "The server failed on this request (RuntimeError).")]
    wait_for(lambda: not worker.active)
    assert not worker.sessions.entries  # its session is not trusted any more
    again = Client(worker)
    again.ask(ids_of(5))
    assert again.text()


def test_the_stop_lets_what_runs_finish_then_cancels(engine: Engine) -> None:
    worker = Worker(engine, slots=1)
    first, second = Held(), Held()
    one, two = Client(worker, "one"), Client(worker, "two")
    one.ask(ids_of(5), run=first)
    two.ask(ids_of(6), run=second)
    first.started.wait(10)
    stopper = threading.Thread(target=worker.stop, args=(1.0,))
    stopper.start()
    wait_for(lambda: worker.stopping)
    with pytest.raises(Stopping):
        Client(worker).ask(ids_of(5))
    first.go.set()  # finishes within the grace; the second starts, and is cancelled at its end
    stopper.join(20)
    assert not stopper.is_alive()
    assert isinstance(one.events[-1], Finished)
    assert isinstance(two.events[-1], Failed)
    assert two.events[-1].kind == "stopping"
    assert second.stopped
