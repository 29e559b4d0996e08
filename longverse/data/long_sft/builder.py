"""`longverse data sft`: the plan, built item by item, in order, restartable at any point.

Every item is a function of (configuration, index, attempt), so a build that is killed and resumed writes the same
file as
one that is not. Two files grow together: `items.jsonl.part` and `progress.jsonl` (for each index: how far the items'
file then reached, what was rejected, the keys of its questions). A resumed build cuts both back to the last index that
stands in both, and goes on. Replies of an endpoint are kept by `Teacher`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longverse.data.config import resolve
from longverse.data.lock import FolderLock, disk_errors, read_claim, refuse_changes, refuse_foreign
from longverse.data.long_sft.asking import Asker, estimate_requests
from longverse.data.long_sft.code_completion import calls_across_files, code_completion
from longverse.data.long_sft.context import Context, Spec
from longverse.data.long_sft.draft import Reject, fit
from longverse.data.long_sft.few_shot import few_shot
from longverse.data.long_sft.gates import Contamination, check, keys_of
from longverse.data.long_sft.item import Item
from longverse.data.long_sft.multi_doc import multi_doc_qa
from longverse.data.long_sft.plan import SftConfig, plan_items
from longverse.data.long_sft.pool import Pool, UnitCounter, write_pool
from longverse.data.long_sft.report import sft_report
from longverse.data.long_sft.single_doc import multi_turn, single_doc_qa
from longverse.data.long_sft.stated_facts import stated_facts
from longverse.data.long_sft.summary import summary
from longverse.data.shards import replace_file
from longverse.data.sources import source_stamps, stamp
from longverse.data.teacher import Spent, Teacher
from longverse.data.vocabulary import ChatCounter, Vocabulary, load_vocabulary
from longverse.data.workers import ordered
from longverse.errors import UserError

BUILDERS = {
    "single_doc_qa": single_doc_qa,
    "multi_doc_qa": multi_doc_qa,
    "summary": summary,
    "code_completion": code_completion,
    "few_shot": few_shot,
    "multi_turn": multi_turn,
    "stated_facts": stated_facts,
}


@dataclass(frozen=True)
class Built:
    """What became of an index: the item's line ("" after too many attempts), its keys, rejections by gate, and the
    attempt that passed."""

    line: str
    keys: tuple[str, ...]
    rejected: dict[str, int]
    attempt: int
    summary: dict[str, Any]  # what the report needs of the item


@dataclass
class Result:
    """A finished build."""

    path: Path  # the items
    report: dict[str, Any]
    spent: Spent | None


def build_one(context: Context, spec: Spec, attempts: int, contamination: Contamination | None) -> Built:
    """Try an index from `spec.attempt` on until an item passes all gates."""
    rejected: Counter[str] = Counter()
    for attempt in range(spec.attempt, attempts):
        spec = dataclasses.replace(spec, attempt=attempt)
        try:
            draft = BUILDERS[spec.task](context, spec)
            item = fit(draft, spec.target, f"sft-{spec.index:06d}", spec.seed, context.chat, context.counter)
            questions = [turn.question for turn in draft.turns]
            check(item, questions, contamination)
        except Reject as gate:
            rejected[f"{spec.task}: {gate.gate}"] += 1
            continue
        return Built(item.line(), tuple(keys_of(item, questions)), dict(rejected), attempt, _summary(item))
    return Built("", (), dict(rejected), attempts, {"task": spec.task, "language": spec.language})


def _summary(item: Item) -> dict[str, Any]:
    return {
        "task": item.task, "kind": item.kind, "language": item.language, "tokens": item.tokens, "recite": item.recite,
        "depths": [e.depth for e in item.evidence],
    }  # fmt: skip


# ---- worker processes: a context each, built once

_own: list[tuple[Context, int, Contamination | None]] = []


def _vocabulary(folder: Path, name: str, config: dict[str, Any]) -> Vocabulary:
    """The tokenizer as the parent saved it: workers import neither torch nor the checkpoint."""
    from longverse.models.chat import ChatFormat
    from longverse.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    return Vocabulary(name, tokenizer, ChatFormat.for_model(tokenizer, config, name), "")


def make_context(folder: Path, vocabulary: Vocabulary, asker: Asker | None = None) -> Context:
    """A context over the pool in `folder`."""
    chat = ChatCounter(vocabulary)
    counter = UnitCounter(chat.encoder)
    return Context(Pool(folder, counter), chat, counter, asker)


def _start(folder: Path, name: str, config: dict[str, Any], attempts: int, decontaminate: bool) -> None:
    context = make_context(folder, _vocabulary(folder, name, config))
    _own[:] = [(context, attempts, Contamination.load(folder) if decontaminate else None)]


def _work(spec: Spec) -> Built:
    [(context, attempts, contamination)] = _own
    return build_one(context, spec, attempts, contamination)


# ---- the build


@dataclass
class _State:
    """What stands on the disk. keys: of all accepted items."""

    done: int = 0
    keys: set[str] = field(default_factory=set)
    rejected: Counter[str] = field(default_factory=Counter)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)

    def take(self, index: int, built: Built) -> None:
        self.done = index + 1
        self.keys.update(built.keys)
        self.rejected.update(built.rejected)
        if built.line:
            self.summaries.append(built.summary)
        else:
            self.given_up.append(index)


def build_sft(
    config: SftConfig,
    base: Path,
    *,
    vocabulary: Vocabulary | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_spent: Callable[[Spent], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Result:
    """Build (or finish) the items of `config`; relative paths start at `base`.

    on_progress: (indices done, all). on_spent: the teacher's use so far, after each item. cancelled: asked after each
    item; what is done stays. UserError for every mistake of the user, an endpoint that cannot be used, a full disk and
    a folder that another builder or configuration holds.
    """
    vocabulary = vocabulary or load_vocabulary(config.tokenizer, base)
    folder = resolve(config.out, base)
    with disk_errors(folder), FolderLock(folder):
        files = [resolve(path, base) for path in config.decontaminate]
        claim = _claim(folder, config, base, vocabulary, files)
        if (finished := _finished(folder, config)) is not None:
            return finished
        contamination = Contamination.of_files(files) if files else None
        if claim is not None:  # written when the files it names could be read, and before any other
            replace_file(folder / "config.json", claim)
        if contamination is not None:
            contamination = contamination.mapped(folder)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        vocabulary.tokenizer.save(folder / "tokenizer")

        def keep(text: str, language: str) -> bool:
            return contamination is None or contamination.hits(text, language) < config.decontaminate_hits

        skipped = write_pool(folder, config.sources, base, keep)
        specs = plan_items(config)
        _feasible(folder, config, vocabulary, specs)
        if (folder / "items.jsonl").exists():  # finished, and damaged since
            os.replace(folder / "items.jsonl", folder / "items.jsonl.part")
        state = _resume(folder)
        teacher = Teacher(config.teacher, folder / "replies.jsonl") if config.teacher else None
        began = time.monotonic()
        try:
            _grow(folder, config, vocabulary, specs, state, teacher, contamination, on_progress, on_spent, cancelled)
        finally:
            if teacher is not None:
                teacher.close()
        if not state.summaries:
            why = state.rejected.most_common(1)
            raise UserError(
                f"no item passed the gates (most often: {why[0][0] if why else 'nothing tried'}); see docs/data.md."
            )
        seconds = time.monotonic() - began
        report = sft_report(
            folder, config, vocabulary.name, state.summaries, state.rejected, state.given_up, skipped, seconds
        )
        os.replace(folder / "items.jsonl.part", folder / "items.jsonl")
        return Result(folder / "items.jsonl", report, teacher.spent if teacher else None)


def _claim(
    folder: Path, config: SftConfig, base: Path, vocabulary: Vocabulary, decontaminate: list[Path]
) -> bytes | None:
    """What a new folder is to be claimed with; None for one that was begun with the same. UserError for another."""
    values = json.loads(json.dumps(dataclasses.asdict(config) | {"tokenizer": vocabulary.fingerprint}))
    for free in ("processes", "out"):
        values.pop(free)
    if values["teacher"]:
        values["teacher"] = {
            k: values["teacher"][k] for k in ("model", "temperature", "max_tokens", "chunk_tokens", "closed_book")
        }
    values["stamps"] = source_stamps(config.sources, base) | {str(path): stamp([path]) for path in decontaminate}
    if (old := read_claim(folder)) is not None:
        # Keys younger than folders that may exist: a claim without one was of the usual value.
        usual_values = {"quote": False, "facts": ["life"], "rivals": 0.0, "real": 0.0, "ask": 0.0}
        refuse_changes(folder, usual_values | old, values)
        return None
    refuse_foreign(folder, "items")
    return json.dumps(values, ensure_ascii=False, indent=1).encode()


def _finished(folder: Path, config: SftConfig) -> Result | None:
    """The result of a build that ended before, with nothing touched; None where something is left to do."""
    try:
        with (folder / "progress.jsonl").open("rb") as lines:
            last = json.loads(deque(lines, maxlen=1)[0])
        if last["index"] != config.items - 1 or last["end"] != (folder / "items.jsonl").stat().st_size:
            return None
        report = json.loads((folder / "report.json").read_bytes())
    except (FileNotFoundError, IndexError, KeyError, TypeError, ValueError):
        return None
    return Result(folder / "items.jsonl", report, Spent() if config.teacher else None)


def _resume(folder: Path) -> _State:
    """Cut both files back to the last index that stands in both, and take in what they hold."""
    state, items, progress = _State(), folder / "items.jsonl.part", folder / "progress.jsonl"
    size = items.stat().st_size if items.exists() else 0
    good = end = 0
    if progress.exists():
        with progress.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    if not line.endswith(b"\n") or row["index"] != state.done or row["end"] > size:
                        break
                    line_kept = "x" if row["summary"].get("tokens") else ""
                    built = Built(line_kept, tuple(row["keys"]), row["rejected"], row["attempt"], row["summary"])
                except (ValueError, KeyError, TypeError):
                    break
                state.take(row["index"], built)
                good, end = good + len(line), row["end"]
    for path, length in ((items, end), (progress, good)):
        with path.open("ab") as file:
            file.truncate(length)
    return state


def _feasible(folder: Path, config: SftConfig, vocabulary: Vocabulary, specs: list[Spec]) -> None:
    """Refuse before any work what the documents cannot give: a family without documents, a length none reaches."""
    context = make_context(folder, vocabulary)
    for task, language in sorted({(spec.task, spec.language) for spec in specs}):
        targets = [spec.target for spec in specs if (spec.task, spec.language) == (task, language)]
        kind = "code" if task == "code_completion" else language
        documents = context.documents(kind)
        if not documents:
            raise UserError(
                f"{task} in {language} needs documents of the kind {kind!r} and the sources have none; add a source or "
                f"take the family or the language out."
            )
        if task == "code_completion" and not calls_across_files(context):
            raise UserError(
                "code_completion needs Python files that import one another and call what they import, and the sources "
                "have none; add a repository or take the family out."
            )
        if task in ("single_doc_qa", "multi_turn", "stated_facts", "summary"):
            longest = max(documents, key=lambda d: d.characters)
            has = context.pool.estimate(longest.index)
            if has < max(targets) * 1.1:
                raise UserError(
                    f"{task} in {language} is to reach {max(targets):,} tokens and the longest document ({longest.id}) "
                    f"has about {has:,}; "
                    f"lower the lengths, add longer documents, or leave the long ones to multi_doc_qa."
                )
        elif sum(map(context.pool.estimate, (d.index for d in documents))) < max(targets):
            raise UserError(
                f"{task} in {language} is to reach {max(targets):,} tokens and all its documents together have "
                f"fewer; lower the lengths or add documents."
            )


def _grow(
    folder: Path,
    config: SftConfig,
    vocabulary: Vocabulary,
    specs: list[Spec],
    state: _State,
    teacher: Teacher | None,
    contamination: Contamination | None,
    on_progress: Callable[[int, int], None] | None,
    on_spent: Callable[[Spent], None] | None,
    cancelled: Callable[[], bool] | None,
) -> None:
    todo = specs[state.done :]
    lock = threading.Lock()
    own: list[Context] = []

    def context() -> Context:
        """A context of this process: for threads that wait for an endpoint, and for the rare item drawn again."""
        if not own:
            own.append(make_context(folder, vocabulary, Asker(teacher, lock) if teacher else None))
        return own[0]

    if teacher is not None:
        results = _threads(todo, context(), lock, config, contamination)
    else:
        settings = {"model_type": "xverse"} if vocabulary.chat.kind == "xverse" else {}
        arguments = (folder, vocabulary.name, settings, config.attempts, contamination is not None)
        results = ordered(todo, _work, min(config.processes, max(len(todo), 1)), _start, arguments, ahead=3)
    with (folder / "items.jsonl.part").open("ab") as items, (folder / "progress.jsonl").open("ab") as progress:
        try:
            for spec, built in results:
                while built.line and state.keys.intersection(built.keys):
                    again = dataclasses.replace(spec, attempt=built.attempt + 1)
                    counts = Counter(built.rejected) + Counter({f"{spec.task}: near-duplicate": 1})
                    with lock:
                        built = build_one(context(), again, config.attempts, contamination)
                    built = dataclasses.replace(built, rejected=dict(counts + Counter(built.rejected)))
                items.write(built.line.encode())
                items.flush()
                os.fsync(items.fileno())
                row = {
                    "index": spec.index, "end": items.tell(), "attempt": built.attempt, "keys": built.keys,
                    "rejected": built.rejected, "summary": built.summary,
                }  # fmt: skip
                progress.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                progress.flush()
                state.take(spec.index, built)
                if on_progress is not None:
                    on_progress(state.done, len(specs))
                if on_spent is not None and teacher is not None:
                    on_spent(dataclasses.replace(teacher.spent))
                if cancelled is not None and cancelled() and state.done < len(specs):
                    raise UserError(
                        f"stopped after {state.done} of {len(specs)} items; "
                        f"run the same command again to go on from there."
                    )
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):
                results.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
            raise
        finally:
            results.close()  # type: ignore[attr-defined]


def _threads(
    todo: Iterable[Spec], context: Context, lock: threading.Lock, config: SftConfig, contamination: Contamination | None
) -> Iterator[tuple[Spec, Built]]:
    """Items in order, built by threads: one builds at a time, the others wait for the endpoint."""
    assert config.teacher is not None

    def work(spec: Spec) -> Built:
        with lock:
            return build_one(context, spec, config.attempts, contamination)

    # Daemon threads, which a ThreadPoolExecutor's are not: Ctrl-C ends the build without waiting for an endpoint that
    # takes its time. What `cancelled` stops waits for the replies under way, which are paid for.
    jobs: queue.SimpleQueue[tuple[Spec, Future[Built]] | None] = queue.SimpleQueue()

    def serve() -> None:
        while (job := jobs.get()) is not None:
            spec, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(spec))
                except BaseException as error:
                    future.set_exception(error)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(config.teacher.concurrency)]
    for thread in threads:
        thread.start()
    waiting: deque[tuple[Spec, Future[Built]]] = deque()
    interrupted = False
    try:
        for spec in todo:
            waiting.append((spec, Future()))
            jobs.put(waiting[-1])
            if len(waiting) >= 2 * config.teacher.concurrency:
                yield waiting[0][0], waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][0], waiting[0][1].result()
            waiting.popleft()
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        for _, future in waiting:
            future.cancel()
        for _ in threads:
            jobs.put(None)
        for thread in threads if not interrupted else ():
            thread.join()


def estimate(config: SftConfig) -> dict[str, float]:
    """Requests, tokens, money and least time of a build with an endpoint, before it starts (zeros without one)."""
    teacher = config.teacher
    if teacher is None:
        return {"requests": 0, "prompt_tokens": 0, "reply_tokens": 0, "money": 0.0, "seconds": 0.0}
    specs = plan_items(config)
    mean = sum(spec.target for spec in specs) / len(specs)
    questions = sum(spec.questions for spec in specs) / len(specs)
    tasks = dict(Counter(spec.task for spec in specs))
    requests = estimate_requests(tasks, mean, teacher.chunk_tokens, questions, teacher.closed_book)
    prompt, reply = requests * (teacher.chunk_tokens + 300), requests * 120
    rate = teacher.requests_per_minute / 60 if teacher.requests_per_minute else teacher.concurrency / 4
    return {
        "requests": requests, "prompt_tokens": prompt, "reply_tokens": reply,
        "money": (prompt * teacher.price_in + reply * teacher.price_out) / 1e6, "seconds": requests / rate,
    }  # fmt: skip
