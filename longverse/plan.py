"""What fits where: bytes of weights, cache and working memory, and predicted seconds, for every choice of formats.

    shape = Shape.from_config(config)
    plan = make_plan(shape, 262_144, 80 * 10**9, rates)
    plan.choice, plan.reason

Arithmetic on a config.json alone: no weights, no torch. Times are floating-point operations and bytes divided by rates
that were measured on this machine (inference/rates.py), or taken from a card's published peaks; the latter are
predictions and say so. How near they come: benchmarks/plan_check.py.

Units: bytes, seconds, tokens. A cache in full takes two bytes a number, but for a model put into float32 by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import UserError

WEIGHTS = ("float32", "bf16", "int8", "int4")
CACHES = ("full", "int8", "int4")
WIDTH = {"float32": 4, "bf16": 2}
# From what keeps most to what keeps least: the first that fits is chosen.
ORDER = (
    ("bf16", "full"), ("bf16", "int8"), ("int8", "full"), ("int8", "int8"), ("bf16", "int4"), ("int8", "int4"),
    ("int4", "full"), ("int4", "int8"), ("int4", "int4"),
)  # fmt: skip
# On a CPU answers are written with a copy of the weights rounded in groups of 32, unless it would be larger than this
# (models/kernels/decoder.py); prompts are read with the weights as they are.
COPY_LIMIT = 4 << 30
ROUNDED = ("rounded int8", "rounded int4")
CHUNK = 1024  # tokens of a forward (inference/engine.py)
STRETCH = 4096  # tokens of a quantised past in floating point at a time (models/cache.py)
PROCESS = 490 * 10**6  # of a process with torch, numba's kernels and the tokenizer, their libraries' pages counted
CUDA_CONTEXT = 600 * 10**6  # of a card, before any tensor
SLACK = 0.97  # of the memory may be planned: what stays is for the system's own moves

Json = dict[str, Any]


# ---- sizes as people write them ------------------------------------------------------------------------------

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """`80GB` (80 * 10**9), `24GiB` (24 * 2**30), `500 MB`, `20G`, or a plain number of bytes. UserError for others."""
    match = re.fullmatch(r"\s*([1-9]\d{0,2}(?:,\d{3})+|\d+(?:[.,]\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    count = 0
    if match is not None:  # 20,000 is twenty thousand, 1,5 one and a half
        number = match[1].replace(",", "" if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", match[1]) else ".")
        count = int(float(number) * (_UNITS | _BINARY)[(match[2] or "").lower()])
    if count < 1:
        raise UserError(f"{text!r} is no amount of memory: write it like 80GB, 24GiB or 500MB.")
    return count


def parse_tokens(text: str) -> int:
    """`256K` (262,144), `1M` (1,048,576), `8192`, `32_768`. UserError for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km])?\s*", text.replace("_", "").replace(",", ""), re.IGNORECASE)
    count = float(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[(match[2] or "").lower()] if match else 0
    if count < 1:
        raise UserError(f"{text!r} is no length in tokens: write it like 256K, 1M or 8192.")
    return int(count)


def say_bytes(count: float) -> str:
    """`25.6 GiB`, `77 MiB`."""
    if count >= 2**30:
        return f"{count / 2**30:,.1f} GiB"
    return f"{count / 2**20:,.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:,.1f} MiB"


def gigabytes(count: float) -> str:
    """`6.0 GB`, `77 MB`, `5.2 MB`: as sizes on a disk and limits are given."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:,.1f} MB"


def memory_of_machine() -> tuple[int, int]:
    """Bytes of memory that this process may use in all, and that are free now: the machine's, or what the limits of a
    container, a job or a service leave of them."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit, held in group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        total, free = min(total, limit), min(free, max(0, limit - held))
    return total, free


def group_limits(own: Path, root: Path) -> list[tuple[int, int]]:
    """(limit, held) in bytes of every control group of Linux, version 1 or 2, that `own` names below `root` or that one
    of those lies in. What a group holds of files is not counted: it is given back when asked."""
    limits = []
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        kinds, _, place = line.partition(":")[2].partition(":")
        if not kinds:  # version 2
            base, most, now, files = root, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in kinds.split(","):
            base, most, now = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = ("total_inactive_file", "total_active_file")
        else:
            continue
        group = base / place.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            try:
                limit = (folder / most).read_text().strip()
                held = int((folder / now).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # a group that is not seen from here
            if limit.isdigit():
                limits.append((int(limit), held - sum(int(stat.get(name, 0)) for name in files)))
    return limits


# ---- the model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-shaped network; see models/network.py for what they mean."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int  # tokens
    tied: bool = False
    norms: int = 2  # a layer

    @classmethod
    def from_config(cls, config: Json, name: str = "model") -> Shape:
        """From a config.json (of a release that leaves something out: completed). UserError for one without sizes."""

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"The config's {key} is {value!r} and must be a whole number of at least 1.")
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        return cls(
            name=name, layers=size("num_hidden_layers"), hidden=hidden, mlp=size("intermediate_size"), heads=heads,
            kv_heads=size("num_key_value_heads", heads), head_dim=size("head_dim", max(1, hidden // heads)),
            vocab=size("vocab_size"), window=_window(config, size), tied=bool(config.get("tie_word_embeddings", False)),
        )  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Numbers in the linear maps of one layer."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        norms = (self.norms * self.layers + 1) * self.hidden
        return self.layers * self.layer_weights + self.head_weights * (1 if self.tied else 2) + norms

    def weights_bytes(self, form: str, width: int = 2) -> int:
        """Bytes of all weights. int8 (one bf16 scale a row) and int4 (groups of 64, scale and offset) are the linear
        layers'; embedding and head stay in the type that is computed in, whose numbers have `width` bytes."""
        if form in WIDTH:
            return WIDTH[form] * self.parameters
        rest = width * (self.parameters - self.layers * self.layer_weights)
        rows = self.head_dim * (self.heads + 2 * self.kv_heads) + 2 * self.hidden + 2 * self.mlp
        if form == "int8":
            return rest + self.layers * (self.layer_weights + 2 * rows)
        return rest + self.layers * (self.layer_weights // 2 + 4 * self.layer_weights // 64)

    def read_bytes(self, form: str, width: int = 2) -> int:
        """Bytes of weights that one new token reads: all of them but an embedding of its own. For a form of ROUNDED it
        is also what the copy takes: int8 with a scale, or int4 with scale and offset, for 32 weights; the head int8."""
        if form in ROUNDED:
            layers, head = self.layers * self.layer_weights, self.head_weights
            return int((34 if form == "rounded int8" else 20) / 32 * layers + 34 / 32 * head)
        return self.weights_bytes(form, width) - (0 if self.tied else WIDTH.get(form, width) * self.head_weights)

    def written_with(self, form: str, gpu: bool = False, rounded: str = "rounded int8") -> str:
        """The form of the weights that answers are written with, where prompts are read in `form`."""
        fits = self.read_bytes("rounded int8") <= COPY_LIMIT and self.head_dim % 16 == 0
        return rounded if form in WIDTH and fits and not gpu else form

    def cache_bytes_per_token(self, cache: str, width: int = 2) -> int:
        """As models/cache.py lays them out. width: bytes of a number in full precision."""
        group = next((g for g in (64, 32, 16, 8, 4, 2) if self.head_dim % g == 0), 1)
        groups = self.head_dim // group
        row = {"full": width * self.head_dim, "int8": self.head_dim + 2 * groups}
        row["int4"] = self.head_dim // 2 + 4 * groups
        return 2 * self.layers * self.kv_heads * row[cache]

    def linear_flops(self, tokens: int, *, heads: int = 1) -> float:
        """Of the linear maps for `tokens` tokens; the head is computed for `heads` of them."""
        return 2.0 * (self.layers * self.layer_weights * tokens + self.head_weights * heads)

    def attention_flops(self, tokens: int, reach: int | None = None) -> float:
        """Of causal attention over a text of `tokens` tokens. reach: what a token sees at most (pages); None: all."""
        pairs = tokens * (tokens + 1) / 2
        if reach is not None and tokens > reach:
            pairs = reach * (reach + 1) / 2 + (tokens - reach) * float(reach)
        return 4.0 * self.layers * self.heads * self.head_dim * pairs

    def buffer_bytes(self, weights: str, cache: str, tokens: int, width: int = 2) -> int:
        """Working memory of a forward of CHUNK tokens, its largest moment: the residual stream and a layer's
        activations, and for quantised formats what is turned into floating point at a time."""
        width = WIDTH.get(weights, width)
        chunk = min(CHUNK, tokens)
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widest = max(3 * self.mlp, 4 * q_size + 4 * kv_size)
        total = chunk * width * (4 * self.hidden + widest) + 4 * 2 * self.vocab
        if cache != "full":
            total += min(STRETCH, tokens) * kv_size * (4 + width) * 2 + chunk * q_size * 4 * 4
        elif width == WIDTH["float32"]:  # bfloat16 that is kept, in floats
            total += min(STRETCH, tokens) * kv_size * 2 * width
        if weights in ("int8", "int4"):
            total += (1 << 19) * (width + 1)
        return total


def _window(config: Json, size: Any) -> int:
    """As models/network.py has it, for the kinds of RoPE that a planner meets."""
    if config.get("context_window") is not None:
        return int(size("context_window"))
    stated = int(size("max_position_embeddings"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") if isinstance(rope, dict) else None
    if kind in ("dynamic", "yarn") and isinstance(rope.get("factor"), int | float):
        original = rope.get("original_max_position_embeddings") or stated
        stated = max(stated, int(original * rope["factor"]))
    return stated


# ---- rates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a device does a second, by format. linear, attention: floating-point operations while a prompt is read;
    weights (also the forms of ROUNDED), cache: bytes while one token is written. Effective ones: all that goes with the
    operation counts. launches: seconds that a card's kernels take to be started for one token in one layer."""

    device: str
    linear: dict[str, float]
    attention: dict[str, float]
    weights: dict[str, float]
    cache: dict[str, float]
    measured: bool = True
    launches: float = 0.0

    def to_json(self) -> Json:
        return dict(vars(self))


@dataclass(frozen=True)
class Card:
    """A graphics card by its maker's data sheet: dense bf16 operations a second, bytes a second, bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: int


CARDS = (
    Card("H200", 989e12, 4.8e12, 141 * 10**9),
    Card("H100", 989e12, 3.35e12, 80 * 10**9),
    Card("A100", 312e12, 2.04e12, 80 * 10**9),
    Card("A100-40GB", 312e12, 1.56e12, 40 * 10**9),
    Card("L40S", 362e12, 0.864e12, 48 * 10**9),
    Card("L40", 181e12, 0.864e12, 48 * 10**9),
    Card("A6000", 155e12, 0.768e12, 48 * 10**9),
    Card("5090", 209e12, 1.79e12, 32 * 10**9),
    Card("4090", 165e12, 1.01e12, 24 * 10**9),
    Card("3090", 71e12, 0.936e12, 24 * 10**9),
    Card("L4", 121e12, 0.3e12, 24 * 10**9),
    Card("A10", 125e12, 0.6e12, 24 * 10**9),
)
# Shares of those peaks that are planned with: in full precision usual ones of torch's own kernels; of quantised caches,
# int8 weights and starting kernels what an H200 gave the 13B shape (benchmarks/results/gpu_13b.json, gpu_check.json;
# reading over an int8 cache as over an int4 one); int4 weights are estimated from the int8 ones, whose work is alike.
LINEAR = 0.55
ATTENTION = {"full": 0.40, "int8": 0.05, "int4": 0.05}
WEIGHTS_READ = {"float32": 0.60, "bf16": 0.60, "int8": 0.045, "int4": 0.025}
CACHE_READ = {"full": 0.60, "int8": 0.20, "int4": 0.105}
LAUNCHES = 1.1e-3  # seconds a layer


def find_card(text: str) -> tuple[Card, str]:
    """A card by name (`H100`, `rtx 4090`), or the slowest known one with that memory (`80GB`); and a remark, empty
    where it was named. UserError for a name that is not known."""
    plain = text.lower()
    if re.match(r"\s*\d+\s*[x×]\s*\S", plain) or re.search(r"\s[x×]\s*\d+\s*$", plain):
        raise UserError(f"{text!r} names several cards, and a plan is for one: name one card, or one card's memory.")
    stated = re.findall(r"\d+(?:\.\d+)?\s*gi?b", plain)
    memory = parse_bytes(stated[-1]) if stated and "gh200" not in plain else None  # a slice's size comes last
    plain = plain.replace("gh200", "h200")  # the same card beside a processor, whose memory its name tells
    for card in sorted(CARDS, key=lambda card: -len(card.name)):
        name, _, size = card.name.lower().partition("-")
        if re.search(rf"(?<!\d){name}(?!\d)" if name.isdigit() else rf"(?<![a-z]){name}(?!\d)", plain) is None:
            continue
        if size and memory != card.memory:
            continue
        return (card if memory in (None, card.memory) else replace(card, name=text.strip(), memory=memory)), ""
    try:
        memory = parse_bytes(text)
    except UserError:
        names = ", ".join(card.name for card in CARDS)
        raise UserError(f"The card {text!r} is not known: name one of {names}, or its memory like 80GB.") from None
    fitting = [card for card in CARDS if card.memory >= memory] or list(CARDS[:1])
    like = min(fitting, key=lambda card: (card.memory, card.flops))
    return Card(
        f"a card with {text.strip()}", like.flops, like.bandwidth, memory
    ), f"times are as of the {like.name}, since no card was named"


def card_rates(card: Card) -> Rates:
    """Rates of a card: published peaks times the shares above. Predictions, never measured here."""
    flops, moved = card.flops, card.bandwidth
    return Rates(
        device=card.name,
        linear={form: flops * LINEAR * (0.5 if form == "float32" else 1) for form in WEIGHTS},
        attention={form: flops * share for form, share in ATTENTION.items()},
        weights={form: moved * share for form, share in WEIGHTS_READ.items()},
        cache={form: moved * share for form, share in CACHE_READ.items()},
        measured=False,
        launches=LAUNCHES,
    )


# ---- the plan ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One choice of formats. Seconds are None where there are no rates."""

    weights: str
    cache: str
    weights_bytes: int
    cache_bytes: int
    buffer_bytes: int
    fits: bool
    written_with: str  # form of the weights that answers are written with
    copy_bytes: int  # of those, where they are a copy
    prefill_seconds: float | None  # of the whole context
    token_seconds: float | None  # of one token written at its end

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.copy_bytes + self.cache_bytes + self.buffer_bytes


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. `reason` is a sentence; `choice` None where nothing fits."""

    shape: Shape
    context: int
    device: str
    memory: int
    measured: bool
    options: list[Option] = field(default_factory=list)
    choice: Option | None = None
    reason: str = ""

    def to_json(self) -> Json:
        def record(option: Option) -> Json:
            return vars(option) | {"total_bytes": option.total_bytes}

        return {
            "model": self.shape.name, "parameters": self.shape.parameters, "window": self.shape.window,
            "context": self.context, "device": self.device, "memory_bytes": self.memory, "measured": self.measured,
            "linear_flops": self.shape.linear_flops(self.context),
            "attention_flops": self.shape.attention_flops(self.context),
            "options": [record(option) for option in self.options],
            "choice": record(self.choice) if self.choice else None, "reason": self.reason,
        }  # fmt: skip


def prefill_seconds(
    shape: Shape, tokens: int, rates: Rates, weights: str, cache: str, *, begin: int = 0, reach: int | None = None
) -> float:
    """Predicted time to read tokens begin .. tokens."""
    linear = shape.linear_flops(tokens - begin) / rates.linear[weights]
    pairs = shape.attention_flops(tokens, reach) - shape.attention_flops(begin, reach)
    return linear + pairs / rates.attention[cache]


def token_seconds(shape: Shape, held: int, rates: Rates, weights: str, cache: str, width: int = 2) -> float:
    """Predicted time to write one token after `held` others, with weights in a form of rates.weights; width: bytes of a
    number in full precision."""
    read = shape.layers * rates.launches + shape.read_bytes(weights) / rates.weights[weights]
    return read + held * shape.cache_bytes_per_token(cache, width) / rates.cache[cache]


def make_plan(
    shape: Shape, context: int, memory: int, rates: Rates | None, *, device: str = "", gpu: bool = False,
    forms: tuple[str, ...] = ("bf16", "int8", "int4"),
) -> Plan:  # fmt: skip
    """Every choice of weights and cache for `context` tokens, prompt and answer together, on a device with `memory`
    bytes.

    forms  weight formats to look at; the first is the one that needs no quantising
    gpu    whether the device is a card, which carries a context of its own instead of a process
    """
    base = CUDA_CONTEXT if gpu else PROCESS
    width = WIDTH.get(forms[0], 2)  # of what is not quantised
    options = []
    for weights in forms:
        for cache in CACHES:
            held = context * shape.cache_bytes_per_token(cache)
            of_weights = shape.weights_bytes(weights, width)
            buffers = base + shape.buffer_bytes(weights, cache, context, width)
            written = shape.written_with(weights, gpu)
            copy = shape.read_bytes(written) if written in ROUNDED else 0
            total = of_weights + copy + held + buffers
            reading = writing = None
            if rates is not None and weights in rates.linear and cache in rates.attention:
                reading = prefill_seconds(shape, context, rates, weights, cache)
            if rates is not None and written in rates.weights and cache in rates.cache:
                writing = token_seconds(shape, context, rates, written, cache)
            fits = total <= SLACK * memory
            options.append(Option(weights, cache, of_weights, held, buffers, fits, written, copy, reading, writing))
    by_formats = {(option.weights, option.cache): option for option in options}
    first = forms[0]
    order = [(first if weights == "bf16" else weights, cache) for weights, cache in ORDER]
    choice = next((by_formats[pair] for pair in order if pair in by_formats and by_formats[pair].fits), None)
    name = device or (rates.device if rates else "this machine")
    plan = Plan(shape, context, name, memory, rates is not None and rates.measured, options, choice)
    return Plan(**(vars(plan) | {"reason": _reason(plan, first)}))


def _reason(plan: Plan, first: str) -> str:
    room = say_bytes(plan.memory)
    if plan.choice is None:
        least = min(plan.options, key=lambda option: option.total_bytes)
        fitting = _longest(plan, least)
        ways = f"a context of {fitting:,} tokens at most or" if fitting >= 1024 else "a smaller model or"
        return (
            f"Nothing fits: {plan.context:,} tokens take at least {say_bytes(least.total_bytes)} ({least.weights}"
            f" weights, {least.cache} cache) and {plan.device} has {room}: take {ways} more memory."
        )
    choice = plan.choice
    if choice.weights == first and choice.cache == "full":
        return f"Everything fits in full precision ({say_bytes(choice.total_bytes)} of {room})."
    full = plan.options[0]
    return (
        f"In full precision it would take {say_bytes(full.total_bytes)}, and there are {room}: {choice.weights} weights"
        f" with {'a full' if choice.cache == 'full' else 'an ' + choice.cache} cache are the most precise choice that"
        f" fits ({say_bytes(choice.total_bytes)})."
    )


def _longest(plan: Plan, option: Option) -> int:
    """Tokens that would fit in an option's formats, in steps of 1,024."""
    rest = SLACK * plan.memory - (option.total_bytes - option.cache_bytes)
    return max(0, int(rest / (option.cache_bytes / plan.context)) // 1024 * 1024)
