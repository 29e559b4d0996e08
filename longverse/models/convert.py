"""Checkpoints rewritten from disk to disk: `.bin` shards, GGUF or safetensors in, safetensors shards out.

One tensor is in memory at a time, and the pages of the source are let go as it is read, so a 26 GB checkpoint passes
through a machine of 4 GB. Everything is written into a folder beside the target, which takes the target's name only
when it is complete.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, expand
from .chat import XVERSE_TEMPLATE
from .checkpoint import DTYPES, IGNORED, Opened, open_model, stored_dtype, verify
from .dequantised import DequantisedTensors
from .network import NetworkConfig
from .quant_linear import SAVED_NAMES
from .rope import RopePlan
from .shards import SAFETENSORS_INDEX, Progress, SafetensorsWriter, TensorInfo, numel, read_json, write_json

SHARD_BYTES = 5_000_000_000
Cancelled = Callable[[], bool]
Stream = Iterator[tuple[str, Tensor]]


@dataclass
class Written:
    """What a conversion left on disk."""

    folder: Path
    read_bytes: int
    written_bytes: int
    shards: int
    notes: list[str] = field(default_factory=list)


def convert(
    model: str,
    target: Path,
    *,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> Written:
    """Rewrite a checkpoint as safetensors with a complete config and a tokenizer that today's library reads.

    model    what `load` takes: a folder (`.bin` or safetensors), a `.gguf` file, a name, a hub id
    dtype    keep, bfloat16, float16 or float32; quantised weights are dequantised
    An XVERSE checkpoint comes out with our model files beside it, for `trust_remote_code=True` without longverse.
    Raises UserError when the target exists, the disk is too small, or the source is broken.
    """
    source = open_model(model)
    number = chosen_dtype(source, dtype)
    shape = verify(source)
    config, extras = settled_config(source)
    shapes = shape.parameter_shapes()
    infos = {name: TensorInfo(shapes[name], number) for name in arrival(source, shapes)}
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    config["dtype"] = str(number).removeprefix("torch.")
    made = dequantised(source, number)
    notes = list(source.notes)
    return write_folder(source, target, config, shape, infos, made, notes, shard_bytes, on_progress, cancelled, extras)


def settled_config(source: Opened) -> tuple[dict[str, Any], Callable[[Path], None] | None]:
    """The config of a rewritten checkpoint, and what writes further files: for XVERSE the explicit config, and our
    model files in place of those it named. Other families' Python files stay behind, so their config names none."""
    if source.config["model_type"] != "xverse":
        config = {key: value for key, value in source.config.items() if key != "auto_map"}
        if config["model_type"] in ("Yi", "yi"):  # Llama's network under a name that no engine knows any more
            config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        return config, None
    from .export import write_remote_code, xverse_config

    return xverse_config(source.config), write_remote_code


def chosen_dtype(source: Opened, dtype: str) -> torch.dtype:
    """The type to write: the source's own for keep (for quantised weights that of their scales)."""
    if dtype == "keep":
        return stored_dtype(source.tensors.infos)
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}: use keep, bfloat16, float16 or float32.")
    return DTYPES[dtype]


def arrival(source: Opened, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The float tensors of a verified source in the order their parts lie in it."""
    order: dict[str, None] = {}
    for name in source.tensors.infos:
        base, _, ending = name.rpartition(".")
        plain = f"{base}.weight" if ending in SAVED_NAMES else name
        if plain in shapes:
            order[plain] = None
    assert len(order) == len(shapes)
    return list(order)


def dequantised(source: Opened, dtype: torch.dtype) -> Stream:
    """(name, float tensor) of a checkpoint, whatever form it keeps its weights in."""
    plain = source.tensors if source.form is None else DequantisedTensors(source.tensors, source.form, dtype)
    for name, tensor in plain.stream():
        if not name.endswith(IGNORED):
            yield name, tensor
        plain.forget(tensor)


# ---- writing -----------------------------------------------------------------------------------------------


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty and may be renamed over: no mount, and not the one we are in."""
    return folder.is_dir() and not any(folder.iterdir()) and not folder.is_mount() and not folder.samefile(Path.cwd())


def write_folder(
    source: Opened,
    target: Path,
    config: dict[str, Any],
    meant: NetworkConfig,
    infos: dict[str, TensorInfo],
    tensors: Stream,
    notes: list[str],
    shard_bytes: int,
    on_progress: Progress | None,
    cancelled: Cancelled | None,
    extras: Callable[[Path], None] | None = None,
    approve: Callable[[Path], None] | None = None,
) -> Written:
    """Write a checkpoint folder: config, tokenizer, generation_config, licence files, and the tensors in shards.

    meant     the network that a reader of the config must see; compared with what it does see
    infos     what will be written, in the order `tensors` yields it; a tensor not among them is skipped
    extras    writes further files into the folder
    approve   looks at the finished folder before it takes its name, and raises where it is wrong
    """
    target = expand(target)
    if target.is_symlink() or (target.exists() and not _replaceable(target)):
        raise UserError(f"{target} exists already: give another folder, or delete it first.")
    need = sum(info.nbytes for info in infos.values())
    home = target.absolute().parent
    if not home.is_dir():
        raise UserError(f"{home} is no folder: make it first.")
    free = shutil.disk_usage(home).free
    if need + 64_000_000 > free:
        raise UserError(
            f"{target} needs {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free: make room, or write"
            " elsewhere."
        )
    aside = home / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        aside.mkdir()
        shards = _write_shards(aside, infos, tensors, shard_bytes, on_progress, cancelled)
        _copy_beside(source.path, aside)
        _save_tokenizer(source, aside)
        write_json(aside / "config.json", config)
        if extras is not None:
            extras(aside)
        if difference := differs(meant, NetworkConfig.from_dict(read_json(aside / "config.json"))):
            raise UserError(f"The config written for {target} is read back wrong ({difference}): nothing was kept.")
        if approve is not None:
            approve(aside)
        if target.exists():
            target.rmdir()  # empty, as was checked
        os.rename(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"The disk is full while writing {target}: it needs {need / 1e9:.1f} GB.") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{home} cannot be written ({error.strerror}): choose another folder.") from None
        raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Written(target, sum(i.nbytes for i in source.tensors.infos.values()), need, shards, notes)


def differs(meant: NetworkConfig, found: NetworkConfig) -> str | None:
    """Where a network read back is not the one meant, in words; None where it is. RoPE plans are compared by their
    angles: static NTK and a larger base are one thing under two names."""
    for field_ in fields(NetworkConfig):
        ours, theirs = getattr(meant, field_.name), getattr(found, field_.name)
        if isinstance(ours, RopePlan):
            if not _same_angles(ours, theirs, meant.window):
                return f"{theirs.describe()}, and {ours.describe()} was meant"
        elif not math.isclose(ours, theirs, rel_tol=1e-6):
            return f"{field_.name} {theirs}, and {ours} was meant"
    return None


def _same_angles(ours: RopePlan, theirs: RopePlan, window: int) -> bool:
    """As `RopePlan.same_angles`, for a base that went through float32."""
    if ours.head_dim != theirs.head_dim or not math.isclose(
        ours.attention_scaling, theirs.attention_scaling, rel_tol=1e-6
    ):
        return False
    far = 16 * max(window, ours.original_window or 1, theirs.original_window or 1)
    return all(
        torch.allclose(ours.inv_freq(length), theirs.inv_freq(length), rtol=1e-5, atol=0) for length in (1, window, far)
    )


def _write_shards(
    folder: Path,
    infos: dict[str, TensorInfo],
    tensors: Stream,
    shard_bytes: int,
    on_progress: Progress | None,
    cancelled: Cancelled | None,
) -> int:
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if size and size + info.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.nbytes
    count = len(groups)
    files = (
        ["model.safetensors"] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    )
    where = {name: number for number, group in enumerate(groups) for name in group}
    total = sum(info.nbytes for info in infos.values())
    writers: dict[int, SafetensorsWriter] = {}
    written: set[str] = set()
    done = 0
    try:
        for name, tensor in tensors:
            if cancelled is not None and cancelled():
                raise KeyboardInterrupt
            if name not in infos:
                continue
            number = where[name]
            if number not in writers:
                writers[number] = SafetensorsWriter(folder / files[number], groups[number])
            writers[number].write(name, tensor)
            written.add(name)
            if not writers[number].missing():
                writers.pop(number).close()
            done += infos[name].nbytes
            if on_progress is not None:
                on_progress(done, total)
    finally:
        for writer in writers.values():
            writer.abort()
    assert written == set(infos), f"never came: {sorted(set(infos) - written)[:3]}"
    if count > 1:
        index = {name: files[number] for name, number in where.items()}
        parameters = sum(numel(info.shape) for info in infos.values())
        metadata = {"total_size": total, "total_parameters": parameters}
        write_json(folder / SAFETENSORS_INDEX, {"metadata": metadata, "weight_map": index})
    return count


def _save_tokenizer(source: Opened, folder: Path) -> None:
    """Its files, and for an XVERSE chat model the template that its own files lack and other tools ask for."""
    tokenizer = source.tokenizer
    own = tokenizer.chat_template
    if own is None and source.chat().kind == "xverse":
        tokenizer.chat_template = XVERSE_TEMPLATE
    try:
        tokenizer.save(folder)
    finally:
        tokenizer.chat_template = own


def _copy_beside(source: Path, target: Path) -> None:
    """Licence, model card and generation settings go with the weights; another's Python files do not."""
    if not source.is_dir():
        return
    for file in source.iterdir():
        name = file.name.lower()
        told = "license" in name or "licence" in name or name.startswith(("notice", "readme"))
        told |= name == "generation_config.json"
        if told and file.is_file() and not name.startswith(".") and not name.endswith(".py"):
            shutil.copyfile(file, target / file.name)
