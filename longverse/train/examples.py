"""From conversations and texts to labelled token sequences.

An example is a sequence of ids and the *spans* of it that are learned: the answers of a conversation (with the end
token that closes each), or a whole text. What is not in a span is read and not learned.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longverse.data.packing import Packing, pieces
from longverse.data.shards import TokenStore, save_arrays
from longverse.data.vocabulary import fingerprint
from longverse.errors import UserError
from longverse.models.chat import ChatFormat, Messages
from longverse.models.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
LONG = 2_000  # characters: a longer text before the first answer is tokenised once only
CACHE_FORMAT = 2


@dataclass(frozen=True)
class Example:
    """ids: int64 [T]; spans: (first, end, weight) of what is learned, first >= 1; parts: where documents that must
    not see each other begin (text packs; [0] for a conversation); name: what a message calls it."""

    ids: np.ndarray
    spans: tuple[tuple[int, int, float], ...]
    name: str
    parts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.ids)

    def weights(self, weighting: str) -> np.ndarray:
        """float64 [T]: the loss weight of every token as a target. token: every one 1; sample: they sum to 1 over the
        example; answer: over each span. A message's own weight multiplies its span's."""
        weights = np.zeros(len(self.ids))
        for first, end, weight in self.spans:
            weights[first:end] = weight / (end - first) if weighting == "answer" else weight
        if weighting == "sample" and weights.any():
            weights /= weights.sum()
        return weights


class Examples(Protocol):
    """A source of examples by number. `lengths` int64 [n], or empty for a source without end, which then has
    `length(index)`, about how many tokens an example will have. `identity` changes when any example does."""

    label: str
    lengths: np.ndarray
    identity: str

    def get(self, index: int) -> Example: ...


# ---- conversations --------------------------------------------------------------------------------------


def encode_conversation(
    messages: Messages, chat: ChatFormat, weights: list[float] | None = None
) -> tuple[list[int], list[tuple[int, int, float]]]:
    """Ids of a conversation as inference would feed and read it, and the span of each answer up to and including the
    token that ends it. weights: one a message; 0 keeps an answer out of the loss.

    Raises UserError when there is no answer, or when the template rewrites earlier turns, so that what was learned is
    not what a later turn sees.
    """
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError("the conversation has no assistant message, so there is nothing to learn.")
    if answers[0] == 0:
        raise UserError("the conversation begins with an assistant message: begin it with the user's.")
    short = _shortened(messages, answers[0])
    if short is not messages:
        # The text before the first answer is the document, and long: it is tokenised in one prompt, not in each.
        opening = chat.encode(messages[: answers[0]])
        stand_in = chat.encode(short[: answers[0]])
        ids, spans = _encode_turns(short, answers, chat, weights)
        if ids[: len(stand_in)] == stand_in:
            shift = len(opening) - len(stand_in)
            return opening + ids[len(stand_in) :], [(a + shift, b + shift, w) for a, b, w in spans]
    return _encode_turns(messages, answers, chat, weights)


def _shortened(messages: Messages, first_answer: int) -> Messages:
    if not any(len(message["content"]) > LONG for message in messages[:first_answer]):
        return messages
    return [
        message | {"content": "x"} if n < first_answer and len(message["content"]) > LONG else message
        for n, message in enumerate(messages)
    ]


def _encode_turns(
    messages: Messages, answers: list[int], chat: ChatFormat, weights: list[float] | None
) -> tuple[list[int], list[tuple[int, int, float]]]:
    ids: list[int] = []
    spans: list[tuple[int, int, float]] = []
    told: list[int] = []  # how the chat format spells everything up to the last answer
    ends = chat.tokenizer.eos_ids
    for n in answers:
        prompt = chat.encode(messages[:n])
        if prompt[: len(told)] != told:
            raise UserError(
                "the chat template rewrites earlier turns when later ones follow: split the conversation into one"
                " line for each answer."
            )
        ids += prompt[len(told) :]
        told = chat.encode(messages[: n + 1], add_generation_prompt=False)
        if told[: len(prompt)] == prompt:
            answer = told[len(prompt) :]
        else:  # the answer's first letters melt into the prompt's last token: spell it as it will be generated
            answer = chat.tokenizer.encode(messages[n]["content"], special=False, add_bos=False)
            answer += [token for token in told[-2:] if token in ends]
        last = max((at for at, token in enumerate(answer) if token in ends), default=None)
        if last is None and n == answers[-1] and ends:
            answer.append(min(ends))  # formats without an end token would never learn to stop
            last = len(answer) - 1
        learned = len(answer) if last is None else last + 1
        weight = 1.0 if weights is None else weights[n]
        if weight > 0 and learned:
            spans.append((len(ids), len(ids) + learned, weight))
        ids += answer
    return ids, spans


def read_conversation(line: str, where: str) -> tuple[Messages, list[float]]:
    """Messages (role and content only) and their loss weights from a line of JSON. Raises UserError naming `where`."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}): each line must hold one conversation.") from None
    messages = values.get("messages") if isinstance(values, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f'{where} has no list of messages: write {{"messages": [{{"role": "user", "content": ...}}]}}.')
    weights = []
    for message in messages:
        weight = message.get("weight", 1)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight < 0:
            raise UserError(f"{where} has a message weight {weight!r}: it must be a number of at least 0.")
        weights.append(float(weight))
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f"{where} has a message without role and content as texts.")
    return [{"role": message["role"], "content": message["content"]} for message in messages], weights


@dataclass
class Conversations:
    """A messages file, tokenised once; ids are kept as uint32, 4 bytes a token."""

    label: str
    lengths: np.ndarray  # int64 [n], of the examples that are kept
    left_out: dict[str, int]  # why, and how many
    identity: str
    _ids: np.ndarray = field(repr=False)  # uint32 [all tokens]
    _starts: np.ndarray = field(repr=False)  # int64 [lines + 1]
    _spans: np.ndarray = field(repr=False)  # float64 [spans, 4]: line, first, end, weight
    _numbers: np.ndarray = field(repr=False)  # int64 [lines]: number of the line in the file
    _kept: np.ndarray = field(repr=False)  # int64 [n]: which lines
    first_weight: float = 1.0  # of a conversation's first learned answer, times its own

    @classmethod
    def open(
        cls,
        path: str | Path,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        *,
        min_tokens: int = 2,
        max_tokens: int | None = None,
        first: float = 1.0,
        cache: Path | None = None,
        on_progress: Progress | None = None,
    ) -> Conversations:
        """Tokenise a JSON-lines file. first: see Source. cache: a folder in which the result is kept, and found again
        as long as neither the file nor the tokenizer nor the template changed. Raises UserError naming the line."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: give a JSON-lines file with messages.") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from None
        digest = hashlib.sha256(data)
        digest.update(f"{CACHE_FORMAT} {fingerprint(tokenizer)} {chat.kind} {tokenizer.chat_template}".encode())
        identity = digest.hexdigest()[:16]
        stored = cache / f"{path.stem}-{identity}.npz" if cache is not None else None
        arrays = _load_arrays(stored)
        if arrays is None:
            arrays = _tokenise(data, path, chat, on_progress)
            if stored is not None:
                stored.parent.mkdir(parents=True, exist_ok=True)
                save_arrays(stored, **arrays)
        lengths = np.diff(arrays["starts"])
        longest = lengths.max(initial=0) if max_tokens is None else max_tokens
        fits = (lengths >= min_tokens) & (lengths <= longest)
        if not fits.any():
            what = "holds no conversation" if not len(lengths) else (
                f"holds conversations of {lengths.min():,} to {lengths.max():,} tokens, none of them within"
                f" {min_tokens:,} to {longest:,}"
            )  # fmt: skip
            raise UserError(f"{path} {what}: change min_tokens and max_tokens, or the file.")
        left_out = {"longer": int((lengths > longest).sum()), "shorter": int((lengths < min_tokens).sum())}
        return cls(
            path.name, lengths[fits], {k: v for k, v in left_out.items() if v}, identity, arrays["ids"],
            arrays["starts"], arrays["spans"], arrays["numbers"], np.flatnonzero(fits), first,
        )  # fmt: skip

    def get(self, index: int) -> Example:
        line = int(self._kept[index])
        first, last = np.searchsorted(self._spans[:, 0], [line, line + 1])
        spans = [(int(a), int(b), float(w)) for _, a, b, w in self._spans[first:last]]
        spans[:1] = [(a, b, w * self.first_weight) for a, b, w in spans[:1]]
        ids = self._ids[self._starts[line] : self._starts[line + 1]].astype(np.int64)
        return Example(ids, tuple(spans), f"{self.label}, line {self._numbers[line]}")


def _load_arrays(path: Path | None) -> dict[str, np.ndarray] | None:
    if path is None or not path.exists():
        return None
    try:
        with np.load(path) as file:
            return {name: file[name] for name in ("ids", "starts", "spans", "numbers")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # damaged: it is made again


def _tokenise(data: bytes, path: Path, chat: ChatFormat, on_progress: Progress | None) -> dict[str, np.ndarray]:
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    spans: list[tuple[int, int, int, float]] = []
    numbers: list[int] = []
    done = 0
    for number, raw in enumerate(data.split(b"\n"), start=1):
        done += len(raw) + 1
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8 text.") from None
        messages, weights = read_conversation(text, where)
        try:
            own, answers = encode_conversation(messages, chat, weights)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if not answers:
            raise UserError(f"{where}: every answer has weight 0, so there is nothing to learn.")
        spans += [(len(numbers), first, end, weight) for first, end, weight in answers]
        ids.append(np.array(own, dtype=np.uint32))
        lengths.append(len(own))
        numbers.append(number)
        if on_progress is not None:
            on_progress(min(done, len(data)), len(data))
    return {
        "ids": np.concatenate(ids) if ids else np.zeros(0, np.uint32),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "spans": np.array(spans, dtype=np.float64).reshape(-1, 4),
        "numbers": np.array(numbers, dtype=np.int64),
    }


# ---- text ---------------------------------------------------------------------------------------------


@dataclass
class Texts:
    """Sequences of a token store: documents cut and packed into `sequence` tokens, every token learned but each
    document's first (nothing before it tells of it)."""

    label: str
    lengths: np.ndarray
    identity: str
    store: TokenStore
    packing: Packing
    keep: bool

    @classmethod
    def open(
        cls, folder: str | Path, tokenizer: Tokenizer, *, sequence: int, keep: bool = True, seed: int = 0
    ) -> Texts:
        """keep: whether the documents of a sequence stay invisible to each other. Raises UserError for a store of
        another tokenizer."""
        store = TokenStore.open(folder, fingerprint(tokenizer))
        documents = store.documents
        parts = pieces(documents["length"], sequence, copies=documents["copies"], extra=documents["extra"])
        packing = Packing.plan(parts, sequence, seed=seed)
        lengths = np.add.reduceat(packing.pieces["length"], packing.first[:-1])
        identity = hashlib.sha256((Path(folder) / "store.json").read_bytes()).hexdigest()[:16]
        return cls(Path(folder).name, lengths, identity, store, packing, keep)

    def get(self, index: int) -> Example:
        own = self.packing.sequence_pieces(index)
        ids = np.concatenate([self._ids(piece) for piece in own])
        starts = np.concatenate([[0], np.cumsum(own["length"])])
        if not self.keep:
            return Example(ids, ((1, len(ids), 1.0),), f"{self.label}, sequence {index}")
        spans = tuple((int(a) + 1, int(b), 1.0) for a, b in itertools.pairwise(starts) if b - a > 1)
        return Example(ids, spans, f"{self.label}, sequence {index}", tuple(int(a) for a in starts[:-1]))

    def _ids(self, piece: Any) -> np.ndarray:
        start = int(piece["start"])
        return self.store.ids(int(piece["document"]), start, start + int(piece["length"])).astype(np.int64)


# ---- which example when ---------------------------------------------------------------------------------


class Mixture:
    """The examples of every step, as a function of (seed, step) alone: a run killed at step n resumes by asking for
    step n. Each source is gone through in an order of its own, anew every epoch; `weights` settle its share exactly."""

    def __init__(self, sources: list[Examples], weights: list[float], steps: int, batch: int, seed: int) -> None:
        self.sources, self.batch, self.seed = sources, batch, seed
        slots = steps * batch
        share = np.array(weights) / sum(weights)
        ends = np.round(np.cumsum(share) * slots).astype(np.int64)
        which = np.repeat(np.arange(len(sources)), np.diff(ends, prepend=0))
        self._which = np.random.default_rng([seed, 0]).permutation(which)  # [slots]: source of each example
        self._turn = np.zeros(slots, dtype=np.int64)  # [slots]: how many of that source came before
        for n in range(len(sources)):
            mine = self._which == n
            self._turn[mine] = np.arange(mine.sum())
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def identities(self) -> list[str]:
        """What the sources are: another list means other examples."""
        return [f"{source.label} {source.identity}" for source in self.sources]

    def step(self, step: int) -> list[Example]:
        """The `batch` examples of a step."""
        return [self._example(slot) for slot in range(step * self.batch, (step + 1) * self.batch)]

    def lengths(self) -> Iterator[np.ndarray]:
        """int64 [batch]: the lengths of every step's examples in turn, without reading or making them."""
        for step in range(len(self._which) // self.batch):
            slots = range(step * self.batch, (step + 1) * self.batch)
            yield np.array([self._length(slot) for slot in slots])

    def _place(self, slot: int) -> tuple[Examples, int]:
        number, turn = int(self._which[slot]), int(self._turn[slot])
        source = self.sources[number]
        size = len(source.lengths)
        if not size:
            return source, turn
        epoch, place = divmod(turn, size)
        if (number, epoch) not in self._orders:
            if len(self._orders) > 2 * len(self.sources):
                self._orders.clear()
            self._orders[number, epoch] = np.random.default_rng([self.seed, 1, number, epoch]).permutation(size)
        return source, int(self._orders[number, epoch][place])

    def _example(self, slot: int) -> Example:
        source, index = self._place(slot)
        return source.get(index)

    def _length(self, slot: int) -> int:
        source, index = self._place(slot)
        if not len(source.lengths):
            return source.length(index)  # type: ignore[attr-defined, no-any-return]
        return int(source.lengths[index])
