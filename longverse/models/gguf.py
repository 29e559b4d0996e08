"""Read GGUF files of Llama-shaped models: config, tokenizer, and weights tensor by tensor.

Source: the GGUF specification (ggml, docs/gguf.md) and, for what keys mean, llama.cpp. The header is parsed
here (one pass over the bytes, a tenth of a second for 50,000 tokens); weights are dequantised by the `gguf`
package.

Not done: mixtures of experts, split files, big-endian files, long-context factor tensors of Phi (`rope_factors_long`).
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from longverse.errors import UserError
from longverse.models.gguf_tokenizer import build_tokenizer
from longverse.models.tokenizer import Tokenizer

MAGIC = b"GGUF"
# value type in the file: struct code (8 is a string, 9 an array)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
NUMBERS_AT_ONCE = 1 << 20  # dequantised together: stays in the cache, whatever the size of the tensor

# architecture in the file: (model_type, are the rows of Q and K interleaved?)
ARCHITECTURES = {
    "llama": ("llama", True),
    "xverse": ("xverse", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "xverse": "XverseForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_REQUIRED = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `shape` is torch's order (rows first); `start` counts bytes from the beginning of
    the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    nbytes: int


def checkpoint_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; None for a name we do not know."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{suffix}"
    return None


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads, d/2, 2] (pairs side by side, as llama.cpp rotates) to [heads, 2, d/2] (halves, as Llama's
    checkpoints).
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


@dataclass
class GgufModel:
    """An opened file. `metadata`: its keys and values; `config`: config.json as transformers would have it;
    `notes`: what the file leaves open and how it was read.
    """

    path: Path
    metadata: dict[str, Any]
    infos: dict[str, StoredTensor]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built from the metadata on first use."""
        return build_tokenizer(self.metadata, str(self.path))

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, tensor in `dtype`) one by one, at most one of them held here. Progress counts tensors."""
        names = [name for name in self.infos if name != "rope_freqs.weight"]
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        _, interleaved = ARCHITECTURES[self.metadata["general.architecture"]]
        for done, name in enumerate(names):
            target = checkpoint_name(name)
            assert target is not None  # read_gguf checked
            tensor = self.tensor(name, dtype)
            if interleaved and ".self_attn.q_proj." in target:
                tensor = unpermute(tensor, heads)
            elif interleaved and ".self_attn.k_proj." in target:
                tensor = unpermute(tensor, kv_heads)
            yield target, tensor
            if on_progress:
                on_progress(done + 1, len(names))

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One tensor under its name in the file, dequantised, rows as the file has them."""
        info = self.infos[name]
        rows = math.prod(info.shape[:-1])
        raw = np.memmap(self.path, np.uint8, "r", info.start, (info.nbytes,)).reshape(rows, -1)
        result = torch.empty((rows, info.shape[-1]), dtype=dtype)
        step = max(1, NUMBERS_AT_ONCE // info.shape[-1])
        for start in range(0, rows, step):
            result[start : start + step] = _plain(raw[start : start + step], info.kind)
        return result.reshape(info.shape)


def _plain(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """Bytes [rows, bytes a row] of one tensor type to numbers [rows, columns]."""
    kinds = gguf.GGMLQuantizationType
    if kind == kinds.F32:
        return torch.from_numpy(raw.copy().view(np.float32))
    if kind == kinds.F16:
        return torch.from_numpy(raw.copy().view(np.float16))
    if kind == kinds.BF16:  # the bits are torch's own
        return torch.from_numpy(raw.copy().view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(gguf.quants.dequantize(raw, kind))


def read_gguf(path: str | os.PathLike[str]) -> GgufModel:
    """Open a GGUF file of a Llama-shaped model; nothing of the weights is read yet. UserError for anything we
    cannot run.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"There is no file {file}; give the path of a .gguf file.")
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file} is empty; fetch it again.")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != MAGIC:
            raise UserError(
                f"{file} is not a GGUF file (it does not begin with the letters GGUF); give a .gguf model file."
            )
        try:
            metadata, infos = _Header(data, file).read()
        except (struct.error, IndexError, UnicodeDecodeError):
            raise UserError(
                f"{file} breaks off or is damaged inside its header ({size:,} bytes); fetch it again."
            ) from None
    end = max((info.start + info.nbytes for info in infos.values()), default=0)
    if end > size:
        raise UserError(f"{file} is truncated: its tensors need {end:,} bytes and it has {size:,}; fetch it again.")
    config, notes = _config(metadata, infos, file)
    return GgufModel(file, metadata, infos, config, notes)


class _Header:
    """One pass over the header."""

    def __init__(self, data: mmap.mmap, file: Path) -> None:
        self.data, self.file, self.at = data, file, 4

    def take(self, layout: str) -> Any:
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values[0] if len(values) == 1 else values

    def string(self) -> str:
        length = self.take("<Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) < length:
            raise IndexError
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.take("<" + SCALARS[kind])
        if kind == ARRAY:
            inner, count = self.take("<I"), self.take("<Q")
            if inner in SCALARS:
                values = self.take(f"<{count}{SCALARS[inner]}") if count <= len(self.data) else self._damaged()
                return list(values) if isinstance(values, tuple) else [values]
            return [self.value(inner) for _ in range(count)]
        return self._damaged()

    def _damaged(self) -> Any:
        raise IndexError

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        version = self.take("<I")
        if version not in (2, 3):
            reason = "is big-endian" if version & 0xFFFF == 0 else f"has GGUF version {version}"
            raise UserError(
                f"{self.file} {reason}, and little-endian versions 2 and 3 are read; convert it with a newer llama.cpp."
            )
        tensor_count, value_count = self.take("<Q"), self.take("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.string()
            metadata[key] = self.value(self.take("<I"))
        raw = []
        for _ in range(tensor_count):
            name = self.string()
            dimensions = self.take("<I")
            if dimensions > 8:
                self._damaged()
            shape = tuple(self.take("<Q") for _ in range(dimensions))[::-1]  # the file counts columns first
            raw.append((name, shape, self.take("<I"), self.take("<Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            self._damaged()
        base = -(-self.at // alignment) * alignment
        infos = {}
        for name, shape, code, offset in raw:
            try:
                kind = gguf.GGMLQuantizationType(code)
                block, width = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                raise UserError(
                    f"{self.file} stores {name} in tensor type number {code}, which is not known; {_REQUANTISE}."
                ) from None
            if not _readable(kind):
                raise UserError(f"{self.file} stores {name} as {kind.name}, which cannot be read; {_REQUANTISE}.")
            if not shape or shape[-1] % block:
                self._damaged()
            infos[name] = StoredTensor(name, shape, kind, base + offset, math.prod(shape) // block * width)
        return metadata, infos


_REQUANTISE = "quantise the model to F16, Q8_0, Q4_0, Q4_1 or a K-quant instead"


def _readable(kind: gguf.GGMLQuantizationType) -> bool:
    kinds = gguf.GGMLQuantizationType
    return kind in (kinds.F32, kinds.F16, kinds.BF16) or kind in gguf.quants._type_traits


def _config(metadata: dict[str, Any], infos: dict[str, StoredTensor], file: Path) -> tuple[dict[str, Any], list[str]]:
    """config.json's fields out of the file's keys and tensor shapes."""
    notes: list[str] = []
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{file} holds a model of architecture {architecture!r}, and {', '.join(ARCHITECTURES)} are read."
        )
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{file} is one part of {metadata['split.count']}; merge them first with llama-gguf-split --merge."
        )
    model_type, _ = ARCHITECTURES[architecture]

    def need(key: str) -> Any:
        value = metadata.get(f"{architecture}.{key}")
        if value is None:
            raise UserError(f"{file} does not state {architecture}.{key}; fetch or convert it again.")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(
                    f"{file} has layers of different {key}, which cannot be read; use a model with equal layers."
                )
            return value[0]
        return value

    def get(key: str, default: Any = None) -> Any:
        return need(key) if f"{architecture}.{key}" in metadata else default

    if get("expert_count", 0):
        raise UserError(f"{file} holds a mixture of experts, which cannot be read; use a dense model.")
    layers, hidden, heads = need("block_count"), need("embedding_length"), need("attention.head_count")
    kv_heads = get("attention.head_count_kv", heads)
    head_dim = get("attention.key_length", hidden // heads if heads else 0)
    rotated = get("rope.dimension_count", head_dim)
    if rotated != head_dim or get("attention.value_length", head_dim) != head_dim:
        raise UserError(
            f"{file} rotates {rotated} of {head_dim} dimensions a head or has other value heads, which cannot be read."
        )
    _check_tensors(infos, layers, file)
    window = need("context_length")
    # llama.cpp's own default when a file states no base
    theta = get("rope.freq_base")
    silent = model_type == "xverse" and theta is None and not get("rope.scaling.type")  # its release knows more
    if theta is None and not silent:
        notes.append("the file states no RoPE base; 10,000 is used, as llama.cpp does")
    theta = 10000.0 if theta is None else theta
    if (sliding := get("attention.sliding_window", 0)) and sliding < window:
        notes.append(f"the file states a sliding window of {sliding:,} tokens, up to which attention is full")

    biased = {part: f"blk.0.{part}.bias" in infos for part in ("attn_q", "attn_output", "ffn_gate")}
    if model_type == "llama" and biased["attn_q"] and not biased["attn_output"]:
        model_type = (
            "qwen2"  # the same network with biases on query, key and value only, which Llama's config cannot say
        )
    config: dict[str, Any] = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": window,
        "rms_norm_eps": _short_float(need("attention.layer_norm_rms_epsilon")),
        "vocab_size": infos["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in infos,
        "rope_parameters": None if silent else _rope(get, infos, theta, window, head_dim, file, notes),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if sliding and sliding < window:
        config |= {"sliding_window": sliding, "use_sliding_window": True}
    if model_type in ("llama", "xverse", "qwen3"):
        config["attention_bias"] = biased["attn_q"]
    if model_type in ("llama", "xverse"):
        config["mlp_bias"] = biased["ffn_gate"]
    return config, notes


def _check_tensors(infos: dict[str, StoredTensor], layers: int, file: Path) -> None:
    expected = ["token_embd.weight", "output_norm.weight"]
    expected += [f"blk.{layer}.{part}.weight" for layer in range(layers) for part in LAYER_REQUIRED]
    missing = [name for name in expected if name not in infos]
    if missing:
        raise UserError(f"{file} lacks {len(missing)} tensors, {missing[0]} first; fetch or convert it again.")
    unknown = [name for name in infos if checkpoint_name(name) is None and name != "rope_freqs.weight"]
    if unknown:
        raise UserError(
            f"{file} holds a tensor {unknown[0]} that no Llama-shaped model has; use a file of another model."
        )


def _rope(
    get: Callable[..., Any],
    infos: dict[str, StoredTensor],
    theta: float,
    window: int,
    head_dim: int,
    file: Path,
    notes: list[str],
) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    kind = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _short_float(theta)}
    if kind == "none" and get("rope.scale_linear", 1.0) != 1.0:
        kind = "linear"
    if "rope_freqs.weight" in infos:
        if kind != "none":
            raise UserError(
                f"{file} has both a {kind} scaling and a table of RoPE factors, which contradict each other."
            )
        return rope | _llama3_parameters(file, infos["rope_freqs.weight"], rope["rope_theta"], head_dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": _short_float(factor)}
    if kind == "yarn":
        original = get("rope.scaling.original_context_length")
        if original is None:
            raise UserError(f"{file} asks for YaRN without the original window (rope.scaling.original_context_length).")
        rope |= {"rope_type": "yarn", "factor": _short_float(factor), "original_max_position_embeddings": original}
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (beta := get(f"rope.scaling.{key}")) is not None:
                rope[name] = _short_float(beta)
        attention = get("rope.scaling.attn_factor", get("rope.scaling.yarn_attn_factor", 1.0))
        if attention != 1.0:  # llama.cpp multiplies YaRN's own factor by this one
            rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        return rope
    raise UserError(f"{file} asks for RoPE scaling {kind!r}, and none, linear, yarn and Llama 3's table are read.")


def llama3_factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What Llama 3 divides each frequency by: [head_dim / 2] float64 (Llama 3.1's release; llama.cpp stores this
    table).
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))


def _llama3_parameters(file: Path, info: StoredTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters behind a table of factors. The file does not state them; the releases all have low 1, high
    4, window 8,192.
    """
    raw = np.memmap(file, np.uint8, "r", info.start, (info.nbytes,))
    table = raw.view(np.float32) if info.kind == gguf.GGMLQuantizationType.F32 else np.zeros(0, np.float32)
    if table.shape == (head_dim // 2,):
        factor = float(table.max())
        if np.allclose(table, llama3_factors(theta, head_dim, factor, 1.0, 4.0, 8192), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise UserError(
        f"{file} carries a table of RoPE factors that is not Llama 3's (low 1, high 4, window 8,192); "
        "use the model's safetensors folder, whose config states the scaling."
    )


def _short_float(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
