"""What a kept document is known by: checksums, the fingerprint of whatever shaped it, and the planned length.

A cache may be used again only by the very network that made it. The fingerprint names everything its numbers depend
on; two that are equal give the same keys and values for the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..models.network import CausalLM
    from ..models.rope import RopePlan
    from .engine import Engine

VERSION = 1  # of the files; raise it when an older reading must not be used any more
STEP = 4096  # tokens: planned lengths under dynamic NTK are multiples of it
ROOM = 2048  # tokens a plan leaves after a document for a question and its answer
WORDS = 1 << 16  # 64-bit words hashed at once: half a megabyte, which the processor's cache holds
MASK = (1 << 64) - 1
PRIME = 0x9E3779B97F4A7C15  # odd, far from a power of two

# Odd weights: a change confined to one 64-bit word changes the sum whatever it is, since an odd number has an inverse
# modulo 2 ** 64; any other damage passes with a chance of about 2 ** -60.
_WEIGHTS = np.random.PCG64(0x4C6F6E67).random_raw(WORDS) | np.uint64(1)


def checksum(data: bytes | np.ndarray, begin: int = 0) -> int:
    """A 64-bit checksum of bytes, continued from `begin`; about 8 GB/s a core, since a kept document is checked whole
    each time it is opened. Against damage, not against forgery.

    Sum of word * weight modulo 2 ** 64 over stretches of WORDS words, each stretch's sum chained to the one before.
    """
    flat = np.frombuffer(data, dtype=np.uint8)
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(np.uint64)
    total = (begin * PRIME + len(flat)) & MASK
    for start in range(0, len(words), WORDS):
        part = words[start : start + WORDS]
        total = (total * PRIME + int(np.dot(part, _WEIGHTS[: len(part)]))) & MASK
    if whole < len(flat):
        rest = int.from_bytes(flat[whole:].tobytes(), "little")
        total = (total * PRIME + rest * PRIME) & MASK
    return total


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, uint8 [n]; a view where it is contiguous and in this machine's memory."""
    return tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()


# ---- fingerprints ------------------------------------------------------------------------------------------

_digests: WeakKeyDictionary[CausalLM, tuple[Any, str]] = WeakKeyDictionary()


def weights_digest(network: CausalLM) -> str:
    """16 hexadecimal digits of every weight of a live network: what was loaded, merged and quantised, whatever files
    it came from. Reads them once at memory speed (smol 0.05 s, 26 GB some seconds); a network whose tensors are the
    same ones, with the same numbers at 64 places each, is not read again."""
    tensors = network.state_dict()
    state = tuple((name, tensor.data_ptr(), _sample(tensor)) for name, tensor in tensors.items())
    if (known := _digests.get(network)) is not None and known[0] == state:
        return known[1]
    total = 0
    done: dict[int, int] = {}  # tied weights are read once
    for name, tensor in tensors.items():
        total = checksum(np.frombuffer(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), np.uint8), total)
        if tensor.data_ptr() not in done or not tensor.numel():
            done[tensor.data_ptr()] = checksum(tensor_bytes(tensor))
        total = (total * PRIME + done[tensor.data_ptr()]) & MASK
    digest = f"{total:016x}"
    _digests[network] = (state, digest)
    return digest


def _sample(tensor: Tensor) -> int:
    flat = tensor.detach().reshape(-1)
    return checksum(tensor_bytes(flat[:: max(1, flat.numel() // 64)]))


def tokenizer_digest(engine: Engine) -> str:
    """16 hexadecimal digits of the tokenizer's whole definition."""
    return hashlib.blake2b(engine.tokenizer.backend.to_str().encode(), digest_size=8).hexdigest()


def fingerprint(engine: Engine, *, capacity: int, cache: str, attention: str, reading: str) -> dict[str, Any]:
    """Everything besides the tokens that the numbers of a cache depend on.

    reading: how the tokens are cut into forwards, and what else shapes reading in this attention
    """
    plan = engine.network.config.rope
    return {
        "weights": weights_digest(engine.network),
        "tokenizer": tokenizer_digest(engine),
        "rope": {name: value for name, value in asdict(plan).items() if value is not None},
        # Only dynamic NTK's angles depend on the planned length.
        "rope_length": rope_length(plan, capacity),
        "cache": cache,
        "dtype": str(engine.network.dtype).removeprefix("torch."),
        **({"kept": str(engine.kept).removeprefix("torch.")} if engine.kept != engine.network.dtype else {}),
        "attention": attention,
        "reading": reading,
    }


def rope_length(plan: RopePlan, planned: int) -> int | None:
    """What of a planned length the angles depend on; None for every kind but dynamic NTK."""
    if plan.kind != "dynamic":
        return None
    return max(plan.pinned_length(planned), plan.original_window or 0)  # one base up to the original window


def name_of(print_: dict[str, Any], capacity: int, tokens: np.ndarray) -> str:
    """The name of a kept document, 16 hexadecimal digits: of its tokens int32 [n] and of all that shaped its cache."""
    text = json.dumps([VERSION, print_, capacity], sort_keys=True).encode()
    return hashlib.blake2b(text + b"\0" + tokens.astype("<i4").tobytes(), digest_size=8).hexdigest()


def planned_length(engine: Engine, document: int, needed: int, attention: str = "exact") -> int:
    """Tokens to plan for when a document of `document` tokens is read for questions of any length.

    document  tokens of the prompt up to the document's end
    needed    tokens of the longest prompt with its answer

    Where the RoPE base does not depend on the plan (every kind but dynamic NTK), it is just `needed`; for pages, whose
    room is kept with them, at least the document with ROOM tokens more, so that a reading and every usual question plan
    the same. Under dynamic NTK every question must come with the base that the document was read with: the plan is the
    document with ROOM tokens more, rounded up to a multiple of STEP, so that all questions that end within it share one
    reading. A longer one is rounded up by itself and reads the document anew. Never past the window, but for pages.
    """
    if engine.network.config.rope.kind != "dynamic":
        return max(document + ROOM, needed) if attention == "pages" else needed
    rounded = max(-(-(document + ROOM) // STEP), -(-needed // STEP)) * STEP
    return rounded if attention == "pages" else max(min(rounded, engine.window), needed)
