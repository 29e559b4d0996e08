"""Write GGUF files that llama.cpp runs as the model was meant to run: the resolved RoPE base, the window, a
tokenizer that gives the same ids, the chat template.

Official XVERSE files lose their base on the way into llama.cpp, because their config states none. Here the base
is written as `rope.freq_base`, for dynamic NTK the one of the window the file is made for, since llama.cpp
knows no dynamic base.

Weights arrive one by one and leave one by one; the largest thing held is one tensor. A finished file is read
back with our own reader and compared, ids and weights, before it takes its name.

Not done: splitting into parts, K-quants (use llama.cpp's own `llama-quantize` on the f16 file).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from longverse.errors import UserError
from longverse.models.chat import XVERSE_TEMPLATE
from longverse.models.convert import differs
from longverse.models.gguf import GLOBAL_NAMES, LAYER_NAMES, NUMBERS_AT_ONCE, read_gguf
from longverse.models.gguf_tokenizer import add_tokenizer, compare_tokenizers
from longverse.models.network import NetworkConfig
from longverse.models.rope import RopePlan
from longverse.models.tokenizer import Tokenizer

KINDS = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("f32", "f16", "bf16", "q8_0")}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # general.file_type
# Largest error of a stored number, as a share of the largest number in its block of 32. q8_0: half a step of 1/127,
# and the rounding of the float16 scale.
TOLERANCE = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11}
# And near zero, where float16 (q8_0's scale, times 127) has no finer steps.
FLOOR = {"f32": 0.0, "f16": 1e-7, "bf16": 0.0, "q8_0": 4e-6}
BLOCK, SAMPLES = 32, 256  # numbers a block; blocks of each tensor that are compared after writing

_TO_GLOBAL = {ours: theirs for theirs, ours in GLOBAL_NAMES.items()}
_TO_LAYER = {ours: theirs for theirs, ours in LAYER_NAMES.items()}


def write_gguf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: dict[str, Any],
    tokenizer: Tokenizer,
    path: str | os.PathLike[str],
    dtype: str = "f16",
    on_progress: Callable[[int, int], None] | None = None,
    *,
    window: int | None = None,
    name: str | None = None,
) -> list[str]:
    """Write a model as one GGUF file, read it back and compare; returns what a reader of the file should know,
    in words.

    tensors      (checkpoint name, tensor) in any order and any dtype, each once; a tied lm_head.weight may be left out
    config       config.json of a family that NetworkConfig reads
    dtype        "f32", "f16", "bf16" or "q8_0" for matrices; norms and biases are always float32, as llama.cpp wants
    window       tokens the file is made for (context_length, and the base of dynamic NTK); None is the config's window
    on_progress  (done, total) in tensors written, then read back
    """
    target = Path(path)
    if dtype not in KINDS:
        raise UserError(f"GGUF type {dtype!r} cannot be written: use one of {', '.join(KINDS)}.")
    network = NetworkConfig.from_dict(config)
    window = network.window if window is None else window
    if window < 1:
        raise UserError(f"A window of {window} tokens must be at least 1.")
    notes: list[str] = []
    architecture = _architecture(network)
    shapes = network.parameter_shapes()
    if dtype == "q8_0" and (odd := [n for n, s in shapes.items() if len(s) == 2 and s[1] % BLOCK]):
        raise UserError(f"{odd[0]} has rows of {shapes[odd[0]][1]} numbers, and q8_0 needs a multiple of 32: use f16.")
    kinds = {n: KINDS[dtype] if len(shape) == 2 else KINDS["f32"] for n, shape in shapes.items()}
    sizes = {n: math.prod(shape) * _width(kinds[n]) for n, shape in shapes.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent} cannot be made ({error.strerror}): choose another folder.") from None
    need, free = int(sum(sizes.values())), shutil.disk_usage(target.parent).free
    if need > free:
        raise UserError(
            f"{target} needs {need / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: make room or use q8_0."
        )

    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".gguf")
    except OSError as error:
        raise UserError(f"{target.parent} cannot be written ({error.strerror}): choose another folder.") from None
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        _add_model(writer, network, config, window, dtype, name or target.stem, notes)
        template = tokenizer.chat_template
        if template is None and config.get("model_type") == "xverse":
            template = XVERSE_TEMPLATE
        notes += add_tokenizer(writer, tokenizer, network.vocab_size, template)
        factors = _llama3_factors(network.rope)
        starts = _write_header(writer, shapes, kinds, sizes, factors)
        total = 2 * len(shapes)
        try:
            samples = _write_tensors(
                Path(temporary), tensors, network, shapes, kinds, starts, factors, on_progress, total
            )
        except OSError as error:
            raise UserError(
                f"Writing {target} failed ({error.strerror or error}): make room or choose another disk."
            ) from None
        meant = replace(network, rope=network.rope.pinned(window), window=window)
        _verify(Path(temporary), tokenizer, meant, samples, dtype, notes, on_progress, total)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return notes


def _architecture(network: NetworkConfig) -> str:
    """The llama.cpp architecture whose graph is this network, by its parts and not by its name."""
    if network.qk_norm:
        if network.qkv_bias or network.output_bias or network.mlp_bias:
            raise UserError(
                "llama.cpp has no network with query and key norms and biases: such a model cannot be written."
            )
        return "qwen3"
    if network.qkv_bias and not network.output_bias:
        if network.mlp_bias:
            raise UserError(
                "llama.cpp has no network with biases on query, key, value and MLP alone: it cannot be written."
            )
        return "qwen2"
    return "llama"


def _width(kind: gguf.GGMLQuantizationType) -> float:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return nbytes / block


def _file_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TO_GLOBAL:
        return f"{_TO_GLOBAL[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_TO_LAYER[part]}.{suffix}"


# ---- the header


def _add_model(
    writer: gguf.GGUFWriter,
    network: NetworkConfig,
    config: dict[str, Any],
    window: int,
    dtype: str,
    name: str,
    notes: list[str],
) -> None:
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(network.vocab_size)
    writer.add_block_count(network.num_layers)
    writer.add_context_length(window)
    writer.add_embedding_length(network.hidden_size)
    writer.add_feed_forward_length(network.intermediate_size)
    writer.add_head_count(network.num_heads)
    writer.add_head_count_kv(network.num_kv_heads)
    writer.add_key_length(network.head_dim)
    writer.add_value_length(network.head_dim)
    writer.add_layer_norm_rms_eps(network.norm_eps)
    writer.add_rope_dimension_count(network.head_dim)
    rope = network.rope
    base = rope.base(window)
    writer.add_rope_freq_base(base)
    if rope.kind == "dynamic":
        notes.append(f"dynamic NTK became the fixed base {base:,.0f}, which is right for {window:,} tokens in all")
    elif rope.kind == "ntk":
        notes.append(f"static NTK became the base {base:,.0f}")
    elif rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.kind == "yarn":
        plain = RopePlan("yarn", rope.theta, rope.head_dim, rope.factor, rope.original_window)
        if not math.isclose(rope.attention_scaling, plain.attention_scaling) or not rope.truncate:
            raise UserError(
                "llama.cpp has YaRN with its own attention factor only: leave attention_factor, mscale, truncate out."
            )
        assert rope.original_window is not None
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_window)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    if (sliding := config.get("sliding_window")) and config.get("use_sliding_window", True) and sliding < window:
        notes.append(f"the sliding window of {sliding:,} tokens is not written: attention is full")


def _llama3_factors(rope: RopePlan) -> np.ndarray | None:
    """llama.cpp holds Llama 3's scaling as what each frequency is divided by, float32 [head_dim / 2]."""
    if rope.kind != "llama3":
        return None
    plain = RopePlan("default", rope.theta, rope.head_dim)
    return (plain.inv_freq().double() / rope.inv_freq().double()).float().numpy()


def _write_header(
    writer: gguf.GGUFWriter,
    shapes: dict[str, tuple[int, ...]],
    kinds: dict[str, gguf.GGMLQuantizationType],
    sizes: dict[str, float],
    factors: np.ndarray | None,
) -> dict[str, int]:
    """Everything before the weights; returns where each tensor starts, by checkpoint name, and "end"."""
    starts, offset = {}, 0

    def place(key: str, file_name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, nbytes: int) -> None:
        nonlocal offset
        writer.add_tensor_info(file_name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        starts[key] = offset
        offset += gguf.GGUFWriter.ggml_pad(nbytes, writer.data_alignment)

    if factors is not None:
        place("rope_freqs.weight", "rope_freqs.weight", factors.shape, KINDS["f32"], factors.nbytes)
    for name, shape in shapes.items():
        place(name, _file_name(name), shape, kinds[name], int(sizes[name]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    base = gguf.GGUFWriter.ggml_pad(writer.fout[0].tell(), writer.data_alignment)
    writer.close()
    return {name: base + start for name, start in starts.items()} | {"end": base + offset}


# ---- the weights


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads, 2, d/2] (halves) to [heads, d/2, 2] (pairs side by side): how llama.cpp's `llama` graph rotates."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _write_tensors(
    file: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    network: NetworkConfig,
    shapes: dict[str, tuple[int, ...]],
    kinds: dict[str, gguf.GGMLQuantizationType],
    starts: dict[str, int],
    factors: np.ndarray | None,
    on_progress: Callable[[int, int], None] | None,
    total: int,
) -> dict[str, torch.Tensor]:
    """Returns, for the comparison afterwards, some blocks of every tensor as it came: float32 [blocks, 32]."""
    interleaved = _architecture(network) == "llama"
    samples: dict[str, torch.Tensor] = {}
    with file.open("r+b") as handle:
        handle.truncate(starts["end"])
        if factors is not None:
            handle.seek(starts["rope_freqs.weight"])
            handle.write(factors.tobytes())
        for name, tensor in tensors:
            if (name == "lm_head.weight" and network.tied) or name.endswith("rotary_emb.inv_freq"):
                continue  # a copy of the embedding; a buffer that old checkpoints carry and nobody reads
            if name not in shapes:
                raise UserError(f"The model has a tensor {name} that its config knows nothing of: check the config.")
            if name in samples:
                raise UserError(f"The tensor {name} came twice: check the checkpoint's index.")
            if tuple(tensor.shape) != shapes[name]:
                raise UserError(
                    f"{name} has the shape {list(tensor.shape)} and the config says {list(shapes[name])}: check both."
                )
            tensor = tensor.detach().cpu()
            samples[name] = _sample(tensor)
            if interleaved and ".q_proj." in name:
                tensor = permute(tensor, network.num_heads)
            elif interleaved and ".k_proj." in name:
                tensor = permute(tensor, network.num_kv_heads)
            handle.seek(starts[name])
            for raw in _encoded(name, tensor, kinds[name]):
                handle.write(raw)
            if on_progress:
                on_progress(len(samples), total)
    missing = [name for name in shapes if name not in samples]
    if missing:
        raise UserError(f"The model lacks {len(missing)} tensors, {missing[0]} first: check that all shards are there.")
    return samples


def _encoded(name: str, tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> Iterator[bytes]:
    """The bytes of a tensor, some rows at a time."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, NUMBERS_AT_ONCE // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step].float()
        if not torch.isfinite(part).all():
            raise UserError(f"{name} holds numbers that are infinite or NaN: the checkpoint is damaged.")
        if kind == KINDS["f16"]:
            stored = part.half()
            if not torch.isfinite(stored).all():
                raise UserError(f"{name} holds numbers beyond float16's 65,504: write bf16 instead.")
            yield stored.numpy().tobytes()
        elif kind == KINDS["bf16"]:
            yield part.bfloat16().view(torch.int16).numpy().tobytes()
        elif kind == KINDS["f32"]:
            yield part.numpy().tobytes()
        else:
            yield gguf.quants.quantize(part.numpy(), kind).tobytes()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some blocks of 32 consecutive numbers, spread evenly over the tensor: float32 [blocks, 32] (or all, if it
    is small).
    """
    flat = tensor.reshape(-1)
    blocks = flat.numel() // BLOCK
    if blocks < 2:
        return flat.float().reshape(1, -1)
    chosen = torch.linspace(0, blocks - 1, min(blocks, SAMPLES)).long()
    return flat[: blocks * BLOCK].reshape(blocks, BLOCK)[chosen].float()


# ---- the check


def _verify(
    file: Path,
    tokenizer: Tokenizer,
    meant: NetworkConfig,
    samples: dict[str, torch.Tensor],
    dtype: str,
    notes: list[str],
    on_progress: Callable[[int, int], None] | None,
    total: int,
) -> None:
    model = read_gguf(file)
    read = NetworkConfig.from_dict(model.config)
    if read.rope.kind == "yarn":  # whose reader counts the stretched window, whatever the file is for
        read = replace(read, window=model.config["max_position_embeddings"])
    if difference := differs(meant, read):
        raise UserError(f"The file is read back wrong ({difference}): it was not kept.")
    compare_tokenizers(model.tokenizer, tokenizer, notes)
    compared = 0
    for name, tensor in model.tensors():
        expected, found = samples[name], _sample(tensor)
        largest = expected.abs().amax(dim=1, keepdim=True)
        relative, absolute = (TOLERANCE[dtype], FLOOR[dtype]) if tensor.dim() == 2 else (0.0, 0.0)
        allowed = relative * 1.01 * largest + absolute  # 1.01: the difference is itself rounded
        if not ((expected - found).abs() <= allowed).all():
            raise UserError(
                f"{name} came back from the file changed by more than its type allows: the disk may be faulty."
            )
        compared += 1
        if on_progress:
            on_progress(len(samples) + compared, total)
    assert compared == len(samples)
