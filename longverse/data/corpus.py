"""`longverse data corpus`: sources, chosen by hash, without duplicates, tokenised into a store with a mixture.

One pass. The parent reads documents in a fixed order and cuts them into jobs of about a megabyte; workers tokenise
and fingerprint them; the parent takes results in order, drops duplicates and appends the rest to the current shard. A
finished shard records where the sources stood, so a restart re-reads (but does not re-tokenise) what is done and
continues; the result is the same as of one run. The mixture is planned last, over documents already stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longverse.data.config import build, load_yaml, resolve
from longverse.data.dedup import Deduplicator
from longverse.data.lock import FolderLock, disk_errors, read_claim, refuse_changes, refuse_foreign
from longverse.data.mixture import plan_copies
from longverse.data.report import corpus_report
from longverse.data.shards import (
    DOCUMENT,
    FORMAT,
    ShardWriter,
    TokenStore,
    finished_shards,
    replace_file,
    save_array,
)
from longverse.data.sources import Document, Skipped, SourceConfig, read_source, source_stamps
from longverse.data.text import unit_hash
from longverse.data.vocabulary import Vocabulary, load_vocabulary, require_eos
from longverse.data.workers import ordered, start_tokenising, tokenise
from longverse.errors import UserError

_JOB_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class CorpusConfig:
    """The whole of a corpus recipe; see docs/data.md."""

    out: str  # folder of the store
    sources: tuple[SourceConfig, ...]
    tokenizer: str = "smol"  # a model name, a checkpoint folder or a folder with tokenizer.json
    fraction: float = 1.0  # share of the documents, chosen by a hash of the document (the model card's 20 %: 0.2)
    seed: int = 0  # of the choice by hash and of the mixture
    total_tokens: int | None = None  # of the mixture; None: as much as the weights allow without repeating a source
    long_tokens: int | None = None  # documents of at least so many tokens are oversampled ...
    long_factor: float = 1.0  # ... this many times, within their source
    max_copies: float = 4.0  # an average document is repeated at most so often
    near_duplicates: float | None = 0.8  # Jaccard similarity from which a document is dropped; null: exact only
    dedup_memory_mb: int = 256
    end_of_document: bool = True  # append the end token to each document
    min_characters: int = 1  # shorter documents are dropped and counted
    shard_tokens: int = 16 * 1024 * 1024
    processes: int = 2

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("a corpus needs at least one source; add one under 'sources'.")
        names = [source.name for source in self.sources]
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise UserError(f"two sources are called {twice[0]!r}; give each its own name.")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], not {self.fraction}; 0.2 keeps a fifth of the documents.")
        if self.near_duplicates is not None and not 0.3 <= self.near_duplicates <= 1:
            raise UserError(f"near_duplicates must be 0.3 to 1 or null, not {self.near_duplicates}.")
        if not self.out.strip():
            raise UserError("out is empty; give the folder that the store is to be written to.")
        if not self.max_copies >= 1:
            raise UserError(f"max_copies must be at least 1, not {self.max_copies}; 1 repeats no document.")
        if self.min_characters < 0:
            raise UserError(f"min_characters must not be negative, not {self.min_characters}.")
        if self.long_tokens is not None and self.long_tokens < 1:
            raise UserError(f"long_tokens must be at least 1, not {self.long_tokens}; leave it out for none.")
        if not self.long_factor > 0:
            raise UserError(f"long_factor must be above 0, not {self.long_factor}; 1 leaves lengths as they are.")
        for name in ("shard_tokens", "processes", "dedup_memory_mb"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.total_tokens is not None and self.total_tokens < 1:
            raise UserError(f"total_tokens must be at least 1, not {self.total_tokens}; leave it out for all.")


@dataclass
class _Progress:
    """Counts since the first document; saved with each shard."""

    source: int = 0  # index of the source being read
    read: int = 0  # documents of it already dealt with
    counts: Counter[str] = dataclasses.field(default_factory=Counter)  # "source reason" -> documents

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "read": self.read, "counts": dict(self.counts)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _Progress:
        return cls(values["source"], values["read"], Counter(values["counts"]))


Job = list[tuple[int, int, Document | None]]  # (source index, documents of it read so far, the document if chosen)
OnProgress = Callable[[int, int], None]


def load_corpus_config(path: str | Path) -> CorpusConfig:
    """A CorpusConfig from YAML; UserError names the file and the key."""
    return build(CorpusConfig, load_yaml(path), str(path))


def build_corpus(
    config: CorpusConfig,
    base: Path,
    *,
    vocabulary: Vocabulary | None = None,
    on_progress: OnProgress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> TokenStore:
    """Build (or finish) the store of `config`; relative paths start at `base`.

    on_progress: (tokens stored, documents stored). cancelled: asked after every job; the finished shards stay and a
    later call goes on from them (UserError then says so). UserError for every mistake of the user, a full disk and
    a folder that another builder or another configuration holds.
    """
    vocabulary = vocabulary or load_vocabulary(config.tokenizer, base)
    end = require_eos(vocabulary) if config.end_of_document else None
    folder = resolve(config.out, base)
    with disk_errors(folder), FolderLock(folder):
        _claim(folder, config, base, vocabulary)
        if (folder / "store.json").exists():
            return TokenStore.open(folder)
        progress, skipped = _tokenise(folder, config, base, vocabulary, end, on_progress, cancelled)
        _finish(folder, config, vocabulary, progress, skipped)
        return TokenStore.open(folder)


def _claim(folder: Path, config: CorpusConfig, base: Path, vocabulary: Vocabulary) -> None:
    """Refuse a folder that was begun with another configuration: mixed shards would be silently wrong. What only
    changes speed may differ."""
    values = dataclasses.asdict(config) | {"tokenizer": vocabulary.fingerprint}
    for free in ("processes", "out"):
        values.pop(free)
    values["stamps"] = source_stamps(config.sources, base)
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    if (old := read_claim(folder)) is not None:
        refuse_changes(folder, old, json.loads(text))
    else:
        refuse_foreign(folder, "a corpus")
        replace_file(folder / "config.json", text.encode())
    (folder / "shards").mkdir(exist_ok=True)


def chosen(config: CorpusConfig, source: SourceConfig, document: str) -> bool:
    """Whether the fraction of a source takes the document of this id."""
    fraction = config.fraction if source.fraction is None else source.fraction
    return fraction >= 1 or unit_hash(document, f"{config.seed} {source.name}") < fraction


def _jobs(config: CorpusConfig, base: Path, start: _Progress, skipped: dict[str, Skipped]) -> Iterator[Job]:
    """Documents in order from where `start` stands, in jobs of about a megabyte; unchosen ones as None."""
    for index, source in enumerate(config.sources):
        job: Job = []
        size = number = 0
        for number, document in enumerate(read_source(source, base, skipped[source.name]), start=1):
            if index < start.source or (index == start.source and number <= start.read):
                continue
            taken = chosen(config, source, document.id)
            job.append((index, number, document if taken else None))
            size += len(document.text) if taken else 0
            if size >= _JOB_CHARACTERS or len(job) >= 2_000:
                yield job
                job, size = [], 0
        if number == 0:
            why = "; ".join(skipped[source.name].examples[:2]) or "it is empty"
            raise UserError(f"source {source.name!r} gave no document ({why}); correct it or drop it.")
        if job:
            yield job


def _tokenise(
    folder: Path,
    config: CorpusConfig,
    base: Path,
    vocabulary: Vocabulary,
    end: int | None,
    on_progress: OnProgress | None,
    cancelled: Callable[[], bool] | None,
) -> tuple[_Progress, dict[str, Skipped]]:
    shards = folder / "shards"
    dedup = Deduplicator(config.near_duplicates, config.dedup_memory_mb)
    progress, tokens, documents = _Progress(), 0, 0
    done = finished_shards(shards)
    for index in done:
        with np.load(index) as arrays:
            for exact, slots in zip(arrays["exact"].tolist(), arrays["signatures"], strict=True):
                dedup.remember(exact, slots)
            tokens += int(arrays["lengths"].sum())
            documents += len(arrays["lengths"])
            progress = _Progress.from_json(json.loads(arrays["place"].tobytes()))
    for remnant in shards.iterdir():
        if int(remnant.name[:5]) >= len(done) if remnant.name[:5].isdigit() else True:
            remnant.unlink()
    dtype = _dtype(vocabulary)
    tail = b"" if end is None else np.array([end], dtype=dtype).tobytes()
    skipped = {source.name: Skipped() for source in config.sources}
    jobs = _jobs(config, base, progress, skipped)
    writer = ShardWriter(shards, len(done))
    results = ordered(jobs, _work, config.processes, start_tokenising, (vocabulary.tokenizer.backend.to_str(),))
    try:
        for job, answers in results:
            answer = iter(answers)
            for source, number, document in job:
                progress.source, progress.read = source, number
                name = config.sources[source].name
                progress.counts[f"{name}\tread"] += 1
                if document is None:
                    progress.counts[f"{name}\tnot chosen"] += 1
                    continue
                exact, slots, ids = next(answer)
                if len(document.text) < config.min_characters:
                    progress.counts[f"{name}\ttoo short"] += 1
                    continue
                if (verdict := dedup.verdict(exact, slots)) != "new":
                    progress.counts[f"{name}\t{verdict} duplicate"] += 1
                    continue
                progress.counts[f"{name}\tkept"] += 1
                ids += tail
                length = len(ids) // dtype.itemsize
                writer.add(ids, length, source, document.language, document.id, exact, slots)
                tokens, documents = tokens + length, documents + 1
                if writer.tokens >= config.shard_tokens:
                    progress.counts["forgotten"] = dedup.forgotten
                    writer.finish(progress.to_json())
                    writer = ShardWriter(shards, writer.number + 1)
            if on_progress is not None:
                on_progress(tokens, documents)
            if cancelled is not None and cancelled():
                raise UserError(
                    f"stopped after {writer.number} finished shards; run the same command again to go on from there."
                )
        progress.counts["forgotten"] = dedup.forgotten
        if len(writer):
            writer.finish(progress.to_json())
    finally:
        results.close()  # type: ignore[attr-defined]
        writer.abandon()
    return progress, skipped


def _work(job: Job) -> list[Any]:
    return tokenise([(d.text, d.language) for _, _, d in job if d is not None])


def _dtype(vocabulary: Vocabulary) -> np.dtype:
    highest = max(vocabulary.tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=0)
    return np.dtype("<u2" if highest < 1 << 16 else "<u4")


def _finish(
    folder: Path, config: CorpusConfig, vocabulary: Vocabulary, progress: _Progress, skipped: dict[str, Skipped]
) -> None:
    indexes = finished_shards(folder / "shards")
    parts, id_lengths, id_bytes, shard_tokens = [], [], [], []
    for number, index in enumerate(indexes):
        with np.load(index) as arrays:
            lengths = arrays["lengths"]
            part = np.zeros(lengths.size, dtype=DOCUMENT)
            part["shard"], part["length"] = number, lengths
            part["offset"] = np.cumsum(lengths) - lengths
            part["source"], part["language"] = arrays["sources"], arrays["languages"]
            parts.append(part)
            id_lengths.append(np.diff(arrays["id_ends"]))
            id_bytes.append(arrays["ids"].tobytes())
            shard_tokens.append(int(lengths.sum()))
    if not parts:
        raise UserError("no document was left after choosing and deduplicating; raise 'fraction' or add sources.")
    documents = np.concatenate(parts)
    documents["copies"], documents["extra"] = plan_copies(
        documents["length"].astype(np.int64),
        documents["source"],
        [source.name for source in config.sources],
        [source.weight for source in config.sources],
        total_tokens=config.total_tokens,
        long_tokens=config.long_tokens,
        long_factor=config.long_factor,
        max_copies=config.max_copies,
        seed=config.seed,
    )
    save_array(folder / "documents.npy", documents)
    save_array(folder / "ids.npy", np.cumsum([0, *np.concatenate(id_lengths)], dtype=np.uint64))
    replace_file(folder / "ids.bin", b"".join(id_bytes))
    corpus_report(folder, config, vocabulary.name, documents, dict(progress.counts), skipped)
    info = {
        "format": FORMAT,
        "tokenizer": {"name": vocabulary.name, "fingerprint": vocabulary.fingerprint},
        "vocab_size": vocabulary.tokenizer.vocab_size,
        "dtype": _dtype(vocabulary).str,
        "end_of_document": config.end_of_document,
        "sources": [source.name for source in config.sources],
        "shard_tokens": shard_tokens,
        "digest": hashlib.sha256(documents.tobytes()).hexdigest()[:16],
    }
    replace_file(folder / "store.json", json.dumps(info, indent=2, ensure_ascii=False).encode())
