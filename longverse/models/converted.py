"""GGUF files converted once into a safetensors folder of the cache, so that later starts map the weights at once.

A conversion is written aside and renamed, so two processes may convert the same file at once and a killed one leaves
nothing that could be mistaken for a result. A folder is trusted only when its marker lists every file with the size it
still has; anything else is built again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from .adapters import CONFIG, SETTINGS, WEIGHTS, AdaptedTensors, adapted_config
from .network import NetworkConfig
from .places import cache_folder
from .shards import Progress, SafetensorsWriter, TensorInfo, numel, read_json, write_json

if TYPE_CHECKING:
    from .gguf import GgufModel
    from .tokenizer import Tokenizer

CONVERTER = 3  # raise it when a conversion would come out otherwise: old results are then left alone
MARKER = "longverse.json"
DAY = 86400.0  # seconds


@dataclass
class MemoryTensors:
    """Tensors held in memory, read like a `TensorFolder`."""

    tensors: Mapping[str, Tensor]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype by name."""
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self.tensors[name]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor."""
        yield from self.tensors.items()

    def forget(self, tensor: Tensor) -> None:
        """Nothing: the tensors are held here."""

    def is_mapped(self, name: str) -> bool:
        """Whether a tensor is a view of a file, whose memory the system only lends."""
        return False

    def origin(self, name: str) -> str:
        """What an error message calls the place of a tensor."""
        return "the converted file"


@dataclass
class Converted:
    """A GGUF file as a folder in the cache, or (`folder` None) in memory because `reason` kept it from the disk."""

    folder: Path | None
    config: dict[str, Any]
    notes: list[str]  # what the file left open and how it was read
    tokenizer: Tokenizer | None = None
    tensors: MemoryTensors | None = None
    reason: str = ""


def convert_once(
    path: Path, name: str, on_progress: Progress | None = None, *, adapter: Path | None = None
) -> Converted:
    """The conversion of a GGUF file: from the cache when it is there and whole, else made now. An adapter is
    merged into what is written, so that later starts map the merged weights.

    `on_progress(done, total)` counts bytes of the converted weights; it is not called on a cache hit.
    A cache folder that cannot be written (read-only, full) is no error: the weights then stay in memory.
    Raises UserError when the file is no GGUF, truncated, or of a foreign architecture.
    """
    state = (
        fingerprint(path)
        if adapter is None
        else fingerprint(path, *(adapter / name for name in (WEIGHTS, CONFIG, SETTINGS)))
    )
    target = cache_folder() / "converted" / f"{safe_name(name)}-{state}"
    if is_whole(target):
        return Converted(target, read_json(target / "config.json"), read_json(target / MARKER).get("notes", []))
    from .gguf import read_gguf

    model = read_gguf(path)
    _ = model.tokenizer  # one that cannot be read is said before gigabytes are converted
    if adapter is not None:
        model.config = adapted_config(model.config, adapter)
    aside = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        aside.mkdir(parents=True)
        _write(model, path, aside, on_progress, adapter)
        _put_in_place(aside, target)
        _sweep(target, path, adapter)
        return Converted(target, model.config, model.notes)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno not in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOSPC,
            errno.EDQUOT,
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            raise
        tensors = MemoryTensors(dict(_merged(model, stored_as(model), on_progress, adapter)))
        reason = f"the cache folder {cache_folder()} cannot be written ({error.strerror})"
        return Converted(None, model.config, model.notes, model.tokenizer, tensors, reason)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def safe_name(name: str) -> str:
    """A file name made of a model's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def fingerprint(*paths: Path) -> str:
    """16 hexadecimal digits that change when a file does: of real paths, sizes, times of change and our version."""
    words = [str(CONVERTER)]
    for real in (path.resolve() for path in paths if path.exists()):
        stat = real.stat()
        words += [str(real), str(stat.st_size), str(stat.st_mtime_ns)]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def is_whole(folder: Path) -> bool:
    """Whether a converted folder has every file at its full size."""
    try:
        files = read_json(folder / MARKER)["files"]
        return bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (UserError, OSError, KeyError, AttributeError, TypeError):
        return False


def stored_as(model: GgufModel) -> torch.dtype:
    """The type a file's weights are kept in: float32 and float16 files lose nothing, quantised ones become bfloat16
    (whose rounding is far below theirs)."""
    sizes: Counter[str] = Counter()
    for info in model.infos.values():
        sizes[info.kind.name] += info.nbytes
    main = sizes.most_common(1)[0][0] if sizes else ""
    return {"F32": torch.float32, "F16": torch.float16}.get(main, torch.bfloat16)


def _checked(model: GgufModel, dtype: torch.dtype, on_progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor in dtype) of every weight, checked against the shapes that the config asks for."""
    shapes = NetworkConfig.from_dict(model.config).parameter_shapes()
    total = sum(dtype.itemsize * numel(shape) for shape in shapes.values())
    done = 0
    for name, tensor in model.tensors(dtype):
        if name not in shapes:
            raise UserError(
                f"The GGUF file has a tensor {name} that its architecture does not know: longverse cannot run it."
            )
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"The GGUF file has {name} as {list(tensor.shape)} where its metadata asks for {list(shapes[name])}:"
                " download it again."
            )
        yield name, tensor
        done += tensor.nbytes
        if on_progress:
            on_progress(done, total)


def _merged(
    model: GgufModel, dtype: torch.dtype, on_progress: Progress | None, adapter: Path | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor in dtype) of every weight, with the adapter merged in where there is one."""
    tensors = _checked(model, dtype, on_progress)
    # An adapter is checked against every shape before it is merged, so the model it belongs to is held meanwhile.
    yield from tensors if adapter is None else AdaptedTensors(MemoryTensors(dict(tensors)), adapter).stream()


def _write(
    model: GgufModel, path: Path, folder: Path, on_progress: Progress | None, adapter: Path | None = None
) -> None:
    dtype = stored_as(model)
    shapes = NetworkConfig.from_dict(model.config).parameter_shapes()
    infos = {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}
    writer = SafetensorsWriter(folder / "model.safetensors", infos)
    try:
        for name, tensor in _merged(model, dtype, on_progress, adapter):
            writer.write(name, tensor)
    except BaseException:
        writer.abort()
        raise
    if lacking := writer.missing():
        writer.abort()
        raise UserError(f"{path} lacks the tensor {lacking[0]}: download the file again.")
    writer.close()
    write_json(folder / "config.json", {**model.config, "dtype": str(dtype).removeprefix("torch.")})
    model.tokenizer.save(folder)
    stat = path.stat()
    write_json(
        folder / MARKER,
        {
            "converter": CONVERTER,
            "source": {"path": str(path.resolve()), "bytes": stat.st_size, "changed_ns": stat.st_mtime_ns},
            "adapter": None if adapter is None else str(adapter.resolve()),
            "notes": model.notes,
            "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        },
    )


def _put_in_place(aside: Path, target: Path) -> None:
    for attempt in (1, 2):
        try:
            os.rename(aside, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if is_whole(target):  # another process was first, with the same result
                shutil.rmtree(aside, ignore_errors=True)
                return
            if attempt == 2:
                raise
            broken = target.with_name(f".{target.name}.broken.{secrets.token_hex(4)}")
            os.rename(target, broken)
            shutil.rmtree(broken, ignore_errors=True) if broken.is_dir() else broken.unlink()


def _sweep(target: Path, source: Path, adapter: Path | None = None) -> None:
    """Drop what this conversion replaces (an older state of the same file) and what killed processes left."""
    real = str(source.resolve()), None if adapter is None else str(adapter.resolve())
    for other in target.parent.iterdir():
        if other == target or not other.is_dir():
            continue
        if not other.name.startswith(".") and other.name.rpartition("-")[0] != target.name.rpartition("-")[0]:
            continue  # the same file under another name
        try:
            if other.name.startswith("."):
                stale = time.time() - other.stat().st_mtime > DAY
            else:
                marker = read_json(other / MARKER)
                stale = (marker["source"]["path"], marker.get("adapter")) == real
        except (UserError, OSError, KeyError, TypeError):
            continue
        if stale:
            shutil.rmtree(other, ignore_errors=True)
