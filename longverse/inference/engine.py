"""The engine: a loaded model, and sessions that read a prompt in chunks, keep what they read, and write an answer.

    engine = Engine.load("smol")
    session = engine.session(planned_tokens=4096)
    for piece in session.stream(engine.chat.encode(messages), Sampling(max_new_tokens=64)):
        print(piece, end="")

A session is one conversation: its cache holds the tokens read so far, and the next prompt pays only for what follows
the longest common beginning. So a second question about a document reads the question alone.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..models import kernels
from ..models.cache import Allocate, KVCache
from ..models.chat import ChatFormat, cut_at_stop, may_stop
from ..models.checkpoint import load
from ..models.network import CausalLM
from ..models.sparse import Sparse
from ..models.tokenizer import Tokenizer
from .sampling import Sampler, Sampling

# on_progress(done, total): tokens of the prompt held and tokens of the whole prompt
Progress = Callable[[int, int], None]
Cancelled = Callable[[], bool]
HOMES = ("device", "machine")
ATTENTIONS = ("exact", "sparse", "pages")
WEIGHTS = ("auto", "full", "int8", "int4")
MASS = 0.95  # of the attention that sparse reading keeps, where nothing else is said
EXACT_END = 128  # tokens at the end of a prompt that are read exactly then
CHUNK = 1024  # tokens a forward reads at once: enough for products at full speed, and the past is laid out seldom


class Attention(NamedTuple):
    """How a session attends: one of ATTENTIONS, and what only sparse asks for: the share of the attention to keep, and
    the part of the past that reading keeps it in at most (models/sparse.py)."""

    kind: str = "exact"
    mass: float = MASS
    most: float = 1.0

    @property
    def name(self) -> str:
        """What `parse_attention` reads; one name for one way."""
        if self.kind != "sparse":
            return self.kind
        if self.most < 1:
            return f"sparse:{self.mass}:{self.most}"
        return "sparse" if self.mass == MASS else f"sparse:{self.mass}"


def parse_attention(text: str) -> Attention:
    """Of "sparse:0.9" the kind and the share, in whatever part of the past that takes; of "sparse:0.9:0.2" that part,
    too. Raises UserError for another kind, and for what is no share."""
    kind, colon, share = text.partition(":")
    if kind not in ATTENTIONS or (colon and kind != "sparse"):
        raise UserError(
            f"There is no attention {text!r}: choose one of {', '.join(ATTENTIONS)}, or sparse with the share to keep,"
            " like sparse:0.9, and the most of the past to read for it, like sparse:0.9:0.1."
        )
    if not colon:
        return Attention(kind)
    share, colon, part = share.partition(":")
    try:
        mass, most = float(share), float(part) if colon else 1.0
    except ValueError:
        raise UserError(
            f"The attention {text!r} names no share to keep: give a number above 0 and up to 1, like sparse:0.9, or"
            " two, with the most of the past to read for it, like sparse:0.9:0.1."
        ) from None
    Sparse(mass, most)  # refuses what cannot be kept
    return Attention(kind, mass, most)


@dataclass
class Stats:
    """Figures of one answer. Seconds are wall time; rates count only the tokens really computed."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the session's cache
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0  # of the whole process (CPU) or of torch's allocations (GPU)
    attention: str = "exact"
    mass_kept: float = 1.0  # the share of the attention that reading really kept, measured over the session
    mass_written: float = 1.0  # the same of writing
    cache: str = "full"  # the format of the keys and values
    cache_home: str = "device"  # where they lie: with the model, or in the "machine"'s memory beside its card
    weights: str = "full"  # what single tokens are computed with: "full", or the weights rounded to "int8" or "int4"
    kernels: str = ""  # who computed them: "compiled", or "torch" and why; "" on a GPU
    finish_reason: str = ""  # "stop": end token or stop text; "length": max_new_tokens; "cancelled"
    rope_base: float = 0.0  # the effective base, pinned for the session
    unread_tokens: int = 0  # of the prompt, where reading was cancelled

    @property
    def fresh_tokens(self) -> int:
        """Tokens of the prompt that were read, the reused ones not counted."""
        return self.prompt_tokens - self.reused_tokens - self.unread_tokens

    @property
    def prefill_rate(self) -> float:
        """Tokens read per second, or 0 before anything was read."""
        return self.fresh_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens written per second, the first (which the reading yields) and the listener's time not counted."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 and self.new_tokens > 1 else 0.0


@dataclass
class Completion:
    """A finished answer."""

    text: str
    tokens: list[int]
    stats: Stats


class Engine:
    """A model ready to run.

    window  the longest conversation it takes, in tokens
    kept    the type of keys and values that caches hold in full; the network's unless told otherwise
    """

    def __init__(
        self,
        network: CausalLM,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        name: str = "model",
        config: dict[str, Any] | None = None,
        notes: list[str] | None = None,
        window: int | None = None,
        weights: str = "full",
        kept: torch.dtype | None = None,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.chat = chat
        self.name = name
        self.config = config or {}
        self.notes = notes or []
        self.window = window or network.config.window
        if weights not in WEIGHTS:
            raise UserError(f"There are no {weights!r} weights: choose one of {', '.join(WEIGHTS)}.")
        self._weights = weights
        self.kept = kept or network.dtype
        self._decoder: Any = None  # models.kernels.decoder.Decoder; built for the first token that is written

    @classmethod
    def load(
        cls,
        model: str = "smol",
        *,
        dtype: str = "auto",
        device: str = "auto",
        rope: str | None = None,
        window: int | None = None,
        weights: str = "auto",
        on_progress: Progress | None = None,
    ) -> "Engine":
        """Load a model by embedded name, path or hub id. `rope` changes its RoPE plan (RopePlan.parse); `window`
        overrides the longest conversation in tokens, for measuring what happens past it. `weights` is what answers are
        written with on a CPU (prompts are always read in `dtype`): "full", rounded to "int8" or "int4", or "auto":
        rounded where that loses no more than bf16 does (models/kernels/decoder.py).

        Who asks for float32 by name wants its digits: weights and caches stay in it. A `dtype` left at "auto" may be
        float32 because this processor multiplies nothing faster; then caches are kept in bfloat16 all the same."""
        if window is not None and window < 1:
            raise UserError(f"A window of {window} tokens must be at least 1.")
        loaded = load(model, dtype=dtype, device=device, rope=rope, on_progress=on_progress)
        kept, notes = None, list(loaded.notes)
        if loaded.network.dtype == torch.float32 and dtype == "auto":
            kept = torch.bfloat16
            notes.append("Keys and values are kept as bfloat16; --dtype float32 keeps all their digits.")
        elif loaded.network.dtype == torch.float32 and weights == "auto":
            weights = "full"
        return cls(
            loaded.network,
            loaded.tokenizer,
            loaded.chat,
            loaded.name,
            loaded.config,
            notes,
            window,
            weights,
            kept,
        )

    def decoder(self) -> Any:
        """The compiled decoder for single tokens, built at the first call; None where none fits."""
        if self._decoder is None and self.network.device.type == "cpu" and not kernels.unavailable():
            from ..models.kernels.decoder import Decoder

            self._decoder = Decoder.of(self.network, self._weights) or False
        return self._decoder or None

    @property
    def holds_decoder(self) -> bool:
        """Whether the copy of the weights that answers are written with is made already."""
        return bool(self._decoder)

    def session(
        self,
        planned_tokens: int,
        *,
        attention: str = "exact",
        cache: str = "full",
        allocate: Allocate | None = None,
        home: str = "device",
    ) -> "Session":
        """A conversation of at most `planned_tokens` tokens, prompt and answers together. The RoPE base is chosen
        from that number and stays for the session's life. Raises UserError past the window, but for pages.

        attention  "exact"; "sparse": a prompt's tokens leave out the past's blocks that weigh least (models/sparse.py),
                   all but its last ones, which are the question, and an answer's tokens the values that weigh next to
                   nothing; "sparse:0.9" names the share of the attention to keep, else MASS, and "sparse:0.9:0.1"
                   also the part of the past that reading keeps it in at most; "pages": in linear time, for
                   documents past the window (inference/pages.py)
        cache      format of the keys and values, one of models.cache.FORMATS
        allocate   where the cache's storage comes from; memory when left out
        home       where the cache lies: on the model's "device", or, for a card without the room, in the "machine"'s
                   memory, from which every forward brings it over (not for pages)
        """
        if home not in HOMES:
            raise UserError(f"A cache cannot lie in {home!r}: choose one of {', '.join(HOMES)}.")
        kind, mass, most = parse_attention(attention)
        if kind == "pages":
            from .pages import PagesSession

            if home != "device" or cache != "full":
                raise UserError("Pages keep their cache in full precision, with the model: leave out cache and home.")

            return PagesSession(self, planned_tokens, cache_format=cache, allocate=allocate)
        if planned_tokens > self.window:
            raise UserError(
                f"The conversation needs {planned_tokens:,} tokens and {self.name} reads {self.window:,}:"
                " shorten the text, or use a model with a larger window."
            )
        return Session(
            self, planned_tokens, cache_format=cache, allocate=allocate, attention=kind, mass=mass, most=most, home=home
        )


@dataclass
class Session:
    """One conversation and its cache. `tokens` are the ids the cache holds; `stats` are of the latest answer."""

    engine: Engine
    planned_tokens: int
    tokens: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    cache_format: str = "full"
    allocate: Allocate | None = None
    attention: str = "exact"
    mass: float = MASS
    most: float = 1.0
    # A forward always ends after this many tokens: the document's, so that an answer has the same bits whether the
    # document was read just before it or kept (inference/store.py).
    boundary: int = 0
    home: str = "device"  # where the cache lies

    def __post_init__(self) -> None:
        network = self.engine.network
        shape = network.config
        sizes = (shape.num_layers, shape.num_kv_heads, shape.head_dim, self.planned_tokens)
        self.cache = KVCache(
            *sizes, network.dtype, network.device, format=self.cache_format, allocate=self.allocate,
            home="cpu" if self.home == "machine" else None, kept=self.engine.kept,
        )  # fmt: skip
        if self.attention == "sparse":
            self.cache.sparse = Sparse(self.mass, self.most)

    def complete(
        self,
        prompt_ids: list[int],
        sampling: Sampling | None = None,
        *,
        on_progress: Progress | None = None,
        cancelled: Cancelled | None = None,
    ) -> Completion:
        """Read a prompt and write the whole answer; arguments as in `stream`."""
        ids: list[int] = []
        text = "".join(self.stream(prompt_ids, sampling, on_progress=on_progress, cancelled=cancelled, ids=ids))
        return Completion(text, ids, self.stats)

    def stream(
        self,
        prompt_ids: list[int],
        sampling: Sampling | None = None,
        *,
        on_progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        ids: list[int] | None = None,
    ) -> Iterator[str]:
        """Yield the answer as text, in pieces that never break a character, as soon as they are certain (a piece
        that might be the beginning of a stop text waits). Special tokens are left out. The sampled ids are appended
        to `ids` when given. `self.stats` is complete when the iterator ends or is closed.

        Raises UserError before any work when the prompt and the answer exceed the plan.
        """
        sampling = sampling or Sampling()
        tokens = self.stream_ids(prompt_ids, sampling, on_progress=on_progress, cancelled=cancelled)
        stop = (*sampling.stop, *self.engine.chat.stop_strings)
        return self._text(tokens, stop, [] if ids is None else ids)

    def stream_ids(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        on_progress: Progress | None = None,
        cancelled: Cancelled | None = None,
    ) -> Iterator[int]:
        """Yield the answer's token ids; the end token is not among them. Knows nothing of stop texts."""
        if not prompt_ids:
            raise UserError("The prompt is empty: give at least one token.")
        needed = len(prompt_ids) + sampling.max_new_tokens
        if needed > self.planned_tokens:
            raise UserError(
                f"The prompt has {len(prompt_ids):,} tokens, and with {sampling.max_new_tokens:,} for the answer it"
                f" exceeds the {self.planned_tokens:,} planned for this conversation: start one with a longer plan."
            )
        return self._run(list(prompt_ids), sampling, on_progress, cancelled)

    def read(self, ids: list[int], *, on_progress: Progress | None = None, cancelled: Cancelled | None = None) -> bool:
        """Read `ids`, the beginning of prompts to come, and write nothing. Returns whether all were read; where it was
        cancelled, the next call goes on from there. on_progress comes before every forward and at the end."""
        if len(ids) > self.planned_tokens:
            raise UserError(
                f"The document has {len(ids):,} tokens and {self.planned_tokens:,} were planned: plan a longer session."
            )
        held = common_prefix(self.tokens, ids)
        self.cache.truncate(held)
        del self.tokens[held:]
        self.cache.expect(len(ids))
        for begin, end in self._read_pieces(held, len(ids)):
            if cancelled is not None and cancelled():
                return False
            if on_progress is not None:
                on_progress(begin, len(ids))
            self._forward(ids[begin:end])
        if on_progress is not None:
            on_progress(len(ids), len(ids))
        return True

    # ---- reading and writing ----------------------------------------------------------------------------

    def _run(
        self, prompt: list[int], sampling: Sampling, on_progress: Progress | None, cancelled: Cancelled | None
    ) -> Iterator[int]:
        network, end_ids = self.engine.network, self.engine.tokenizer.eos_ids
        self.stats = stats = Stats(
            prompt_tokens=len(prompt), attention=Attention(self.attention, self.mass, self.most).name,
            cache=self.cache_format, cache_home=self.home,
        )  # fmt: skip
        held = stats.reused_tokens = self._begin(prompt, stats, sampling.max_new_tokens)
        stats.unread_tokens = len(prompt) - held
        self.cache.expect(len(prompt))
        started = time.perf_counter()
        try:
            for begin, end in self._pieces(held, len(prompt)):
                if cancelled is not None and cancelled():
                    stats.finish_reason = "cancelled"
                    return
                if on_progress is not None:
                    on_progress(begin, len(prompt))
                hidden = self._forward(prompt[begin:end])
                stats.unread_tokens = len(prompt) - end
            if on_progress is not None:
                on_progress(len(prompt), len(prompt))
            sampler = Sampler(sampling, prompt, network.device)
            token = sampler(self._logits(hidden))  # its value is awaited, so a GPU has done the reading by now
            stats.prefill_seconds = time.perf_counter() - started
            while True:
                if token in end_ids:
                    stats.finish_reason = "stop"
                    return
                stats.new_tokens += 1
                yield token
                if stats.new_tokens == sampling.max_new_tokens:
                    stats.finish_reason = "length"
                    return
                if cancelled is not None and cancelled():
                    stats.finish_reason = "cancelled"
                    return
                started_token = time.perf_counter()
                token = sampler(self._next(token))
                stats.decode_seconds += time.perf_counter() - started_token  # the listener's time is not counted
        finally:  # also when the caller stops listening, or Ctrl-C falls into a forward
            if not stats.prefill_seconds:
                stats.prefill_seconds = time.perf_counter() - started
            stats.finish_reason = stats.finish_reason or "cancelled"
            if (sparse := getattr(self.cache, "sparse", None)) is not None:
                stats.mass_kept, stats.mass_written = sparse.mass_kept, sparse.mass_written
            stats.peak_memory_bytes = peak_memory(network.device)

    def _begin(self, prompt: list[int], stats: Stats, new_tokens: int) -> int:
        """Keep of the cache what begins the prompt, forget the rest; returns how many tokens are held.
        `new_tokens` is the longest answer."""
        stats.rope_base = self.engine.network.config.rope.base(self.planned_tokens)
        # At least the last token of the prompt is read anew: its logits begin the answer.
        held = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        forgets = held < len(self.tokens) and 0 < held - self.boundary <= CHUNK and self.boundary > 0
        if self.cache.packing is not None and forgets:
            held = self.boundary  # where the newest tokens are remembered as they were (KVCache.mark)
        self.cache.truncate(held)
        del self.tokens[held:]
        return held

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Where the prompt is cut: (begin, end) of each forward."""
        middle = min(max(begin, self.boundary), end)
        marks = {begin, middle, end}
        if self.attention == "sparse":  # the question is short and is read exactly
            marks.add(max(middle, end - EXACT_END))
        for first, last in pairwise(sorted(marks)):
            for start in range(first, last, CHUNK):
                yield start, min(start + CHUNK, last)

    def _read_pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Where a document is cut that is read without a question."""
        return self._pieces(begin, end)

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> torch.Tensor:
        """Read `ids` after what the cache holds; returns the hidden state [1, C] of the last one."""
        network, begin = self.engine.network, self.cache.length
        if 0 < begin == self.boundary:
            self.cache.mark()
        input_ids = torch.tensor([ids], device=network.device)  # [1, T]
        positions = torch.arange(begin, begin + len(ids), device=network.device)[None]  # [1, T]
        hidden = network.model(input_ids, positions, self.cache.rope_length, self.cache.attend)  # [1, T, C]
        self.cache.advance(len(ids))
        self.tokens.extend(ids)
        return hidden[:, -1]

    def _next(self, token: int) -> torch.Tensor:
        """Read one token of the answer; float32 logits [V] of what follows it."""
        sparse = getattr(self.cache, "sparse", None)
        if sparse is None:
            return self._next_logits(token)
        sparse.writing = True
        try:
            return self._next_logits(token)
        finally:
            sparse.writing = False

    def _next_logits(self, token: int) -> torch.Tensor:
        on_cpu = self.engine.network.device.type == "cpu"
        decoder = self.engine.decoder() if type(self.cache) is KVCache else None
        logits = decoder.step(token, self.cache) if decoder is not None else None
        if decoder is None or logits is None:
            reason = kernels.unavailable()
            self.stats.kernels = f"torch ({reason})" if reason and on_cpu else "torch" if on_cpu else ""
            return self._logits(self._forward([token]))
        self.stats.kernels, self.stats.weights = "compiled", decoder.weights
        self.tokens.append(token)
        return logits

    @torch.inference_mode()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [V] from a hidden state [1, C]; apart from `_forward`, since most chunks need none."""
        return self.engine.network.lm_head(hidden)[0].float()

    def _text(self, tokens: Iterator[int], stop: tuple[str, ...], ids: list[int]) -> Iterator[str]:
        characters = self.engine.tokenizer.stream()
        pending = ""  # decoded and not yet given out
        try:
            for token in tokens:
                ids.append(token)
                pending += characters.push(token)
                text = cut_at_stop(pending, stop)
                if text != pending:
                    self.stats.finish_reason = "stop"
                    if text:
                        yield text
                    return
                ready = len(pending) - may_stop(pending, stop)
                if ready:
                    yield pending[:ready]
                    pending = pending[ready:]
            rest = characters.flush()
            # Cut short, an answer may end inside a character: its first bytes are not shown as one.
            pending += rest.rstrip("\ufffd") if self.stats.finish_reason in ("length", "cancelled") else rest
            if pending:
                yield pending
        finally:
            reason = self.stats.finish_reason
            tokens.close()  # type: ignore[attr-defined]
            if reason:
                self.stats.finish_reason = reason


def free_on_card(device: torch.device) -> int:
    """Bytes of a card that this process may still take: what is free, and what torch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share at their beginning; by slices, a hundred times faster than item by item."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:  # a[:low] agrees, a[:high] does not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, in bytes: of the process on CPU, of torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
