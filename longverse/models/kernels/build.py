"""The compiled kernels of a cache format and a model: which exist, and the binding of their constants. No torch: a
process that compiles them starts without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from . import cpu_decode
from .team import Team, specialise


@dataclass(frozen=True)
class CacheForm:
    """What the machine code for a cache depends on. `packed` is "" for a cache in full precision."""

    size: int  # D
    heads: int  # query heads of one key/value head
    kept: str  # layout of the tokens in full precision
    packed: str = ""
    group: int = 0
    rotated: int = 1
    sparse: bool = False  # whether writing leaves pages of values out

    @property
    def runs(self) -> bool:
        """Whether there is a kernel: whole vectors of 16 elements."""
        unit = {"": 1, "int8": 16, "int4": 32}[self.packed]
        return self.size % 16 == 0 and self.group % unit == 0

    @property
    def name(self) -> str:
        return f"{self.size}x{self.heads}_{self.kept}_{self.packed or 'full'}{self.group}{'s' * self.sparse}"

    def constants(self) -> dict[str, Any]:
        """Names of cpu_decode and what they are bound to."""
        # The sums of all heads over a group should fit in registers.
        group = next(g for g in (64, 32, 16) if self.size % g == 0 and (g == 16 or self.heads * g <= 256))
        return {
            "SIZE": self.size, "HEADS": self.heads, "KEPT": self.kept, "KEPT_BF16": self.kept == "bf16",
            "KEPT_GROUP": group, "QUANTISED": bool(self.packed), "PACKED": self.packed or "int8",
            "GROUP": self.group or group, "ROTATED": self.rotated, "SPARSE": self.sparse,
        }  # fmt: skip


@dataclass(frozen=True)
class DecoderForm:
    """What the machine code for a whole decoder depends on, beside its cache."""

    weights: str  # layout of the matrices
    head: str  # and of the head, never int4
    group: int
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def name(self) -> str:
        flags = (self.qk_norm, self.qkv_bias, self.output_bias, self.mlp_bias)
        return f"{self.weights}_{self.head}_{self.group}_{''.join(str(int(flag)) for flag in flags)}"

    def constants(self) -> dict[str, Any]:
        return {
            "WEIGHTS": self.weights, "WEIGHT_GROUP": self.group, "HEAD": self.head, "QK_NORM": self.qk_norm,
            "QKV_BIAS": self.qkv_bias, "OUTPUT_BIAS": self.output_bias, "MLP_BIAS": self.mlp_bias,
        }  # fmt: skip


PIECES = (
    "exp_negative", "rms_norm", "hadamard", "rotate_scaled", "rotate_position", "sum_groups", "keep_in_full",
    "pack_row", "keep", "fold", "attend_kept", "attend_packed", "attend_stretch", "hand_over", "merge", "product",
)  # fmt: skip  # each may call those before it


def _bound(constants: dict[str, Any]) -> dict[str, Any]:
    bound = dict(constants)
    for piece in PIECES:
        bound[piece] = specialise(getattr(cpu_decode, piece), **bound)
    return bound


@lru_cache(maxsize=32)
def attention_kernel(form: CacheForm) -> Any:
    """`cpu_decode.attend_one` for a cache, compiled or loaded at its first call."""
    return specialise(
        cpu_decode.attend_one, f"attend_{form.name}", ("attention_kernel", form), **_bound(form.constants())
    )


@lru_cache(maxsize=32)
def decoder_kernel(cache: CacheForm, decoder: DecoderForm) -> Any:
    """`cpu_decode.decode_one` for a cache and a model."""
    constants = {**cache.constants(), **decoder.constants()}
    name = f"decode_{cache.name}_{decoder.name}"
    return specialise(cpu_decode.decode_one, name, ("decoder_kernel", cache, decoder), **_bound(constants))


@lru_cache(maxsize=32)
def chunk_kernel(cache: CacheForm, kind: str, name: str) -> Any:
    """A function of cpu_prefill over one kind of tiles, "f32", "bf16" or "amx" (the modules of these names):
    fold_stretch, weigh_blocks or choose_blocks."""
    from . import cpu_prefill

    maker = ("chunk_kernel", cache, kind, name)
    return specialise(getattr(cpu_prefill, name), f"{name}_{cache.name}_{kind}", maker, **_chunk_pieces(cache, kind))


@lru_cache(maxsize=32)
def _chunk_pieces(cache: CacheForm, kind: str) -> dict[str, Any]:
    """What the names in cpu_prefill are bound to: compiled once for its three kernels."""
    from . import amx, bf16, cpu_prefill, f32

    tiles: Any = {"f32": f32, "bf16": bf16, "amx": amx}[kind]
    wide, widened = kind == "f32", kind == "f32" and cache.kept == "bf16"
    everything = cache.constants()
    bound = {name: everything[name] for name in ("SIZE", "HEADS", "QUANTISED", "PACKED", "GROUP")}
    bound |= {"BF16": not wide, "WORDS": cache.size // (1 if wide else 2), "WIDENED": widened}
    bound["AS_KEPT"] = not (cache.packed or widened)
    tile_names = ("TILE_ROWS", "ITEM_TILES", "begin_tiles", "end_tiles", "attend_tile", "weigh_tile")
    bound |= {name: getattr(tiles, name) for name in tile_names}
    for piece in (
        "rounded", "restore_row", "copy_row", "clear_row", "take_kept", "gather_block", "pair_values", "row_mass",
        "anyone_keeps",
    ):  # fmt: skip
        bound[piece] = specialise(getattr(cpu_prefill, piece), **bound)
    layouts: tuple[Callable[..., Any], ...]
    if wide:
        layouts = (cpu_prefill.turn_keys, cpu_prefill.copy_rows, cpu_prefill.copy_rows, cpu_prefill.take_rows)
    elif kind == "amx":
        layouts = (cpu_prefill.copy_rows, cpu_prefill.turn_values, cpu_prefill.turn_queries, cpu_prefill.take_columns)
    else:
        layouts = (cpu_prefill.pair_keys, cpu_prefill.pair_values, cpu_prefill.copy_rows, cpu_prefill.take_rows)
    for piece, layout in zip(("lay_keys", "lay_values", "lay_tile", "take_tile"), layouts, strict=True):
        bound[piece] = specialise(layout, **bound)
    for piece in ("lay_block", "lay_queries", "give_results"):
        bound[piece] = specialise(getattr(cpu_prefill, piece), **bound)
    bound["attend_tiles"] = amx.attend_tiles if kind == "amx" else specialise(cpu_prefill.attend_tiles, **bound)
    return bound


@lru_cache(maxsize=8)
def training_kernel(size: int, heads: int, name: str) -> Any:
    """A function of cpu_training for heads of D = size, `heads` query heads of each key/value head."""
    from . import cpu_prefill, cpu_training

    bound: dict[str, Any] = {"SIZE": size, "HEADS": heads, "WORDS": size // 2}
    bound["TILE_ROWS"] = cpu_training.TILE_ROWS  # in cpu_prefill another's, unless it is bound
    for piece in ("pair_values", "copy_row", "clear_row", "copy_rows", "turn_values", "turn_queries", "take_columns"):
        bound[piece] = specialise(getattr(cpu_prefill, piece), **bound)
    for piece in ("gather_rows", "gather_keys", "lay_rows"):
        bound[piece] = specialise(getattr(cpu_training, piece), **bound)
    maker = ("training_kernel", size, heads, name)
    return specialise(getattr(cpu_training, name), f"{name}_{size}x{heads}", maker, **bound)


@lru_cache(maxsize=8)
def row_kernel(name: str) -> Any:
    """A function of cpu_rows."""
    from . import cpu_rows

    return specialise(getattr(cpu_rows, name), name, ("row_kernel", name))


@lru_cache(maxsize=4)
def team(size: int) -> Team:
    """The threads of this process; as many as torch uses is the usual choice."""
    return Team(size)


def stretches(kv_heads: int, threads: int) -> int:
    """Into how many stretches the keys of a head are split, so that every thread has the same number of them."""
    return threads // int(np.gcd(kv_heads, threads))
