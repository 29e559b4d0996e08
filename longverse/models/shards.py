"""Tensor files on disk: read lazily, written as a stream, so that a model is never in memory twice.

A checkpoint folder keeps its tensors in one `model.safetensors`, or in several shards with an index file that names the
shard of each tensor, or in `pytorch_model*.bin` pickles. `TensorFolder` hides which. Reading a safetensors file costs
nothing until a weight is touched: a tensor is a view of the mapped file.

File format: an 8-byte little-endian length, that many bytes of JSON (`{name: {dtype, shape, data_offsets}}`), then the
data (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import pickle
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .memory import drop_pages

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
ALIGNMENT = 64  # bytes: a mapped weight then starts on a cache line
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
NOT_FINITE = "{} holds numbers that are infinite or NaN: the checkpoint is damaged; take another copy of it."


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor before any of it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return numel(self.shape) * self.dtype.itemsize


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-sentence messages; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; in one pass and no memory, unlike `isfinite().all()`."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(float(end)) for end in tensor.detach().aminmax())


def numel(shape: Iterable[int]) -> int:
    """Number of elements of a shape; 1 for a scalar."""
    product = 1
    for size in shape:
        product *= size
    return product


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError when it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: it belongs to the checkpoint; download or copy the folder again."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): download or copy that file again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object: download or copy that file again.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class replacing:
    """`with replacing(target) as aside:` write `aside`; it becomes `target` only when the block ends well."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        self.aside = self.target.with_name(f".{self.target.name}.{os.getpid()}.{secrets.token_hex(4)}")
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            os.replace(self.aside, self.target)
        else:
            self.aside.unlink(missing_ok=True)


class SafetensorsFile:
    """One safetensors file, mapped. Raises UserError when it is truncated or no such file."""

    mapped = True

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
            names = list(self._file.keys())
        except FileNotFoundError:
            raise UserError(f"{path} is missing: download or copy that shard again.") from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or no safetensors file ({error}): download or copy it again."
            ) from None
        self.infos: dict[str, TensorInfo] = {}
        for name in names:
            part = self._file.get_slice(name)
            code = part.get_dtype()
            if code not in DTYPES:
                raise UserError(
                    f"{path} keeps {name} as {code}, which longverse does not read: use a file in bf16, f16 or f32."
                )
            self.infos[name] = TensorInfo(tuple(part.get_shape()), DTYPES[code])

    def get(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file."""
        return self._file.get_tensor(name)


def _looks_like_torch(path: Path) -> bool:
    """Whether a file begins as a zip or as a pickle."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


class BinFile:
    """One `.bin` shard: a zip of raw storages and a pickle of names, read with `weights_only` and mapped.

    Raises UserError when the file is truncated, or when its pickle would run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = self._load(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: download or copy that shard again.") from None
        except PermissionError:
            raise UserError(f"{path} may not be read: mend its permissions.") from None
        except pickle.UnpicklingError as error:
            reason = str(error)
            if not _looks_like_torch(path):
                raise UserError(
                    f"{path} is no PyTorch checkpoint but something else, such as a Git-LFS pointer or a web page:"
                    " download it again."
                ) from None
            if "Unsupported" in reason or "GLOBAL" in reason or "weights_only" in reason.lower():
                raise UserError(
                    f"{path} would run code when loaded, not only give tensors, so it is refused: take a safetensors"
                    " version from a source you trust."
                ) from None
            raise UserError(
                f"{path} is no PyTorch checkpoint ({first_line(error)}): download or copy it again."
            ) from None
        except (
            RuntimeError,
            EOFError,
            OSError,
            ValueError,
            LookupError,
            AssertionError,
            TypeError,
            AttributeError,
        ) as error:
            raise UserError(
                f"{path} is truncated or no PyTorch checkpoint ({first_line(error)}): download it again."
            ) from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise UserError(
                f"{path} holds something other than a table of tensors: it is no model shard; take another file."
            )
        self._tensors: dict[str, Tensor] = state
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}

    def _load(self, path: Path) -> Any:
        with path.open("rb") as file:
            self.mapped = file.read(4) == b"PK\x03\x04"
        # Files of torch < 1.6 are bare pickles, which cannot be mapped: the shard is then in memory while it is read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)

    def get(self, name: str) -> Tensor:
        """The tensor; a view of the mapped file for today's format."""
        return self._tensors[name]


class Tensors(Protocol):
    """A checkpoint's tensors, wherever they come from. A streamed one may be forgotten when it is done with."""

    @property
    def infos(self) -> dict[str, TensorInfo]: ...
    def get(self, name: str) -> Tensor: ...
    def stream(self) -> Iterator[tuple[str, Tensor]]: ...
    def forget(self, tensor: Tensor) -> None: ...
    def is_mapped(self, name: str) -> bool: ...
    def origin(self, name: str) -> str: ...


class TensorFolder:
    """All tensors of a checkpoint folder, by name, whatever files they are in.

    `infos` is known at once; the files stay mapped. Old `.bin` files that cannot be mapped are read again, one at a
    time, when their tensors are asked for: use `stream()`, which goes through each of them once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kind, self.shards, index = self.find(folder)
        self._open: dict[str, SafetensorsFile | BinFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.where: dict[str, str] = {}
        self._mapped = True
        for shard in self.shards:
            file = self._file(shard)
            for name, info in file.infos.items():
                if index.get(name, shard) != shard:
                    continue  # a copy; the index says which file counts
                if name in self.infos:
                    raise UserError(
                        f"{folder} has {name} in {self.where[name]} and in {shard}, and no index that says which"
                        " counts: delete the files that do not belong to this model."
                    )
                self.infos[name] = info
                self.where[name] = shard
            self._mapped &= file.mapped
            if not file.mapped:
                self._open.pop(shard)
        for name, shard in index.items():
            if name not in self.infos:
                raise UserError(
                    f"{folder / shard} lacks the tensor {name} that the index file promises: download that shard again."
                )

    @staticmethod
    def find(folder: Path) -> tuple[str, list[str], dict[str, str]]:
        for kind, index_name in (("safetensors", SAFETENSORS_INDEX), ("bin", BIN_INDEX)):
            if not (folder / index_name).exists():
                continue
            index = read_json(folder / index_name).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
                raise UserError(f"{folder / index_name} has no weight_map: download or copy that file again.")
            if strange := next((v for v in index.values() if not v.strip(".") or set(v) & set("/\\\0")), None):
                raise UserError(
                    f"{folder / index_name} names {strange!r}, which is no file of this folder: it is refused; take the"
                    " model from a source you trust."
                )
            shards = sorted(set(index.values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent and not (kind == "safetensors" and (folder / BIN_INDEX).exists()):
                more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
                raise UserError(
                    f"{folder} lacks {absent[0]}{more} of {len(shards)} shards named in {index_name}: download what is"
                    " missing."
                )
            if not absent:
                return kind, shards, index
        for kind, pattern in (("safetensors", "*.safetensors"), ("bin", "pytorch_model*.bin")):
            shards = sorted(path.name for path in folder.glob(pattern) if not path.name.startswith("."))
            if kind == "safetensors" and (folder / "model.safetensors").exists():
                shards = ["model.safetensors"]
            if shards:
                return kind, shards, {}
        raise UserError(
            f"{folder} holds no weights (*.safetensors or pytorch_model*.bin): download the weight files too."
        )

    def _file(self, shard: str) -> SafetensorsFile | BinFile:
        if shard not in self._open:
            path = self.folder / shard
            self._open[shard] = SafetensorsFile(path) if self.kind == "safetensors" else BinFile(path)
        return self._open[shard]

    def get(self, name: str) -> Tensor:
        """One tensor; KeyError when no file has it."""
        return self._file(self.where[name]).get(name)

    def forget(self, tensor: Tensor) -> None:
        """Let go of the memory behind a tensor of this folder that is not needed again. The file keeps its data."""
        if self._mapped:
            drop_pages(tensor)

    def is_mapped(self, name: str) -> bool:
        """Whether a tensor is a view of a file, whose memory the system only lends."""
        return self._mapped

    def origin(self, name: str) -> str:
        """What an error message calls the place of a tensor."""
        return str(self.folder / self.where[name])

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, shard by shard."""
        for shard in self.shards:
            file = self._file(shard)
            for name in file.infos:
                if self.where.get(name) == shard:
                    yield name, file.get(name)
            if not file.mapped:
                del self._open[shard], file

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in any order: names, shapes and dtypes are known beforehand.

    Memory: one tensor. The file is complete only after `close()`, which checks that nothing is missing.
    """

    def __init__(self, path: Path, infos: dict[str, TensorInfo], metadata: dict[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        start = 0
        self._starts: dict[str, int] = {}
        # Wide types first: then every tensor starts at a multiple of its own element size, as readers require.
        for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
            header[name] = {
                "dtype": DTYPE_CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, start + info.nbytes],
            }
            self._starts[name] = start
            start += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.infos = infos
        self.path = path
        self._data = 8 + len(text)
        self._missing = set(infos)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._data + start)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place; its dtype is turned into the promised one, its shape must be right. UserError for
        numbers that are infinite or NaN, or become so in that dtype."""
        info = self.infos[name]
        assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} is not {info.shape}"
        assert name in self._missing, f"{name} written twice"
        raw = tensor.detach().to("cpu", info.dtype).contiguous()
        if not is_finite(raw):
            if is_finite(tensor):
                raise UserError(
                    f"{name} holds numbers beyond what {DTYPE_CODES[info.dtype]} can hold"
                    f" ({torch.finfo(info.dtype).max:,.0f}): write bfloat16 instead."
                )
            raise UserError(NOT_FINITE.format(name))
        self._file.seek(self._data + self._starts[name])
        self._file.write(raw.reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def missing(self) -> list[str]:
        """Names promised and not yet written."""
        return sorted(self._missing)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
        assert not self._missing, f"never written: {sorted(self._missing)[:3]}"

    def abort(self) -> None:
        """Let go of the file after an error."""
        self._file.close()
