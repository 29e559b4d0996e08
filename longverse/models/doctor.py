"""What is wrong with a checkpoint folder for long documents, and what to type about each finding.

Nothing is loaded: config, tokenizer and the headers of the weights are read, so a 26 GB folder takes a second.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch

from ..errors import UserError
from .checkpoint import IGNORED, read_config, stored_dtype
from .network import NetworkConfig
from .quant_linear import SAVED_NAMES, read_form
from .releases import Release, complete, has_sizes, is_size, recognise, states_rope
from .rope import RopePlan
from .shards import TensorFolder, read_json
from .tokenizer import Tokenizer
from .tokenizer_migration import read_backend

LEVELS = ("error", "warning", "note", "ok")
# Names other projects use for the base, which no engine reads from a Llama-shaped config.
UNREAD_KEYS = ("rotary_emb_base", "rope_base", "rope_freq_base", "rope_ratio", "rotary_base", "rope_factor")
SHORT_BASE = 10_000.0
SHORT_WINDOW = 16_384  # tokens: no published model was trained past this with base 10,000


@dataclass(frozen=True)
class Finding:
    """One thing found. `level` is one of LEVELS; `remedy` is what to type or do, empty where nothing is to be done."""

    level: str
    about: str  # config, rope, window, weights, tokenizer, special ids
    what: str
    remedy: str = ""


def diagnose(path: str | Path) -> list[Finding]:
    """Every finding about a checkpoint folder, the worst first. Raises UserError when there is no folder to look at."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of a checkpoint, with config.json and weights.")
    findings: list[Finding] = []
    config = read_config(folder)
    name = folder.resolve().name
    release = recognise(config, name)
    if release is not None:
        findings.append(Finding("note", "config", f"Recognised as {release.name}, window {release.window:,} tokens."))
    shape: NetworkConfig | None = None
    try:
        shape = NetworkConfig.from_dict(complete(config, name)[0])
    except UserError as error:
        findings.append(Finding("error", "config", str(error)))
    findings += rope_findings(config, release, folder, shape)
    findings += window_findings(config, release, folder)
    told = {finding.what for finding in findings if finding.about != "config"}
    findings = [finding for finding in findings if finding.about != "config" or finding.what not in told]
    findings += weight_findings(folder, config, shape)
    findings += tokenizer_findings(folder, config)
    if not any(finding.level in ("error", "warning") for finding in findings):
        findings.append(Finding("ok", "config", "Nothing is wrong with this checkpoint for long documents."))
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _convert(folder: Path) -> str:
    return f"longverse convert {shlex.quote(str(folder))} {shlex.quote(str(folder) + '-fixed')}"


def _export(folder: Path) -> str:
    return f"longverse export {shlex.quote(str(folder))} {shlex.quote(str(folder) + '-llama')} --to llama"


def _patch(config: dict[str, Any], delete: tuple[str, ...], change: dict[str, Any]) -> str:
    """What to edit by hand, as a person or a program reads it."""
    gone = ", ".join(key for key in delete if key in config)
    return f"In config.json {f'delete {gone} and ' if gone else ''}set {json.dumps(change)}"


def _cure(config: dict[str, Any], release: Release) -> str:
    """The RoPE of a release as its config should state it."""
    change: dict[str, Any] = {"rope_parameters": release.rope_parameters()}
    if release.original_window is not None:  # dynamic NTK takes L0 from max_position_embeddings
        change |= {"max_position_embeddings": release.original_window, "context_window": release.window}
    return _patch(config, ("rope_theta", "rope_scaling"), change)


def _plan(config: dict[str, Any]) -> RopePlan | None:
    """The plan of a config whose sizes may be nonsense, which others report; UserError where the plan itself is."""
    return RopePlan.from_config(config) if has_sizes(config) else None


# ---- RoPE and window ---------------------------------------------------------------------------------------


def rope_findings(
    config: dict[str, Any], release: Release | None, folder: Path, shape: NetworkConfig | None
) -> Iterator[Finding]:
    """No base, two bases, keys that are ignored, dynamic NTK."""
    for key in UNREAD_KEYS:
        if key in config:
            yield Finding(
                "warning",
                "rope",
                f"config.json has {key}, which no engine reads: the base it means is not in force.",
                "Write it as rope_theta, or as rope_parameters with rope_type and rope_theta.",
            )
    if not states_rope(config):
        if release is not None and release.theta:
            yield Finding(
                "error",
                "rope",
                f"config.json states no RoPE base: engines that read only the config run {release.name} at base 10,000,"
                f" and it was trained with {release.theta:,.0f} and dynamic NTK.",
                f"{_convert(folder)} (complete config), or {_export(folder)} (for vLLM, SGLang, transformers)",
            )
        else:
            yield Finding(
                "note" if release else "warning",
                "rope",
                "config.json states no RoPE base: every engine takes 10,000.",
                "If it was trained with another, add rope_theta to config.json.",
            )
        return
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if isinstance(new, dict) and new and "rope_theta" not in new and config.get("rope_theta") is None:
        yield Finding(
            "error",
            "rope",
            "rope_parameters states no rope_theta: transformers then has no base, or takes 10,000 in silence.",
            "Add rope_theta inside rope_parameters.",
        )
    if old and not new and config.get("rope_theta") is None:
        yield Finding(
            "error",
            "rope",
            "rope_scaling stands without rope_theta: transformers 5 sets the base to None and fails.",
            "Add rope_theta to config.json.",
        )
    try:
        plan = _plan(config)
    except UserError as error:
        yield Finding("error", "rope", str(error), "Mend config.json by hand.")
        return
    if plan is None:
        return
    if new and config.get("rope_theta") is not None and "rope_theta" in new:
        yield Finding("note", "rope", "The base stands twice, in rope_theta and rope_parameters, with one value: fine.")
    if release is not None and release.theta and plan.theta < release.theta:
        yield Finding(
            "error",
            "rope",
            f"config.json states base {plan.theta:,.0f}; {release.name} was trained with {release.theta:,.0f}.",
            _cure(config, release),
        )
    elif plan.kind == "dynamic":
        yield Finding(
            "warning",
            "rope",
            f"It runs {plan.describe()}: transformers recomputes that base in every forward, vLLM does once for all"
            " lengths, so they differ from the trained model and from each other (longverse pins it).",
            f"{_export(folder)}{f' --window {shape.window}' if shape else ''} (a fixed base)",
        )
    else:
        yield Finding("note", "rope", f"It runs {plan.describe()}.")


def window_findings(config: dict[str, Any], release: Release | None, folder: Path) -> Iterator[Finding]:
    """The window that is stated against what the model was trained for and what other files say."""
    stated = config.get("max_position_embeddings")
    if not stated:
        yield Finding("error", "window", "config.json has no max_position_embeddings.", "Add the window in tokens.")
        return
    window = config.get("context_window") or stated
    if not is_size(stated) or not is_size(window):
        return  # said where the shape is read
    try:
        plan = _plan(config)
        ready = _plan(complete(config, folder.resolve().name)[0])
    except UserError:
        plan = ready = None
    if release is not None and release.window > window:
        remedy = _patch(config, (), {"max_position_embeddings": release.window})
        if ready is not None and ready.kind == "dynamic":
            remedy = f"{_export(folder)} --window {release.window}"
        elif release.theta and ready is not None and ready.theta <= release.theta:
            remedy = _cure(config, release)
        yield Finding(
            "warning",
            "window",
            f"config.json states a window of {window:,} tokens, so other engines refuse more; {release.name} was"
            f" trained for {release.window:,}.",
            remedy,
        )
    sliding = config.get("sliding_window")
    if (
        is_size(sliding)
        and config.get("use_sliding_window", config.get("model_type") == "mistral")
        and sliding < window
    ):
        yield Finding(
            "warning",
            "window",
            f"A sliding window of {sliding:,} tokens: longverse reads no more than that at once.",
            "Nothing to do: the model was trained so.",
        )
    knows_better = release is not None and release.theta
    if plan and plan.kind == "default" and plan.theta <= SHORT_BASE and window > SHORT_WINDOW and not knows_better:
        yield Finding(
            "warning",
            "window",
            f"A window of {window:,} tokens with base {plan.theta:,.0f} is unlikely: far tokens look alike to it.",
            "Look up the base it was trained with, or try: longverse rope " + shlex.quote(str(folder)),
        )
    if config.get("use_cache") is False:
        yield Finding(
            "warning",
            "window",
            "use_cache is false: `generate` of transformers then reads the whole document again for every new token.",
            "Set use_cache to true in config.json (longverse always keeps a cache).",
        )
    limit = _settings(folder, "tokenizer_config.json").get("model_max_length")
    if isinstance(limit, int) and 0 < limit < window:
        yield Finding(
            "warning",
            "window",
            f"tokenizer_config.json has model_max_length {limit:,}, below the window of {window:,}: some tools cut"
            " there.",
            f"Set model_max_length to {window} in tokenizer_config.json.",
        )


def _settings(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(folder / name)
    except UserError:
        return {}


# ---- weights -----------------------------------------------------------------------------------------------


def weight_findings(folder: Path, config: dict[str, Any], shape: NetworkConfig | None) -> Iterator[Finding]:
    """Missing and broken shards, tensors that do not fit the config, types."""
    try:
        tensors = TensorFolder(folder)
        form = read_form(config)
    except UserError as error:
        yield Finding("error", "weights", str(error))
        return
    if tensors.kind == "bin":
        yield Finding(
            "warning",
            "weights",
            f"The weights are {len(tensors.shards)} pickle files (.bin): other tools load them slowly, and may run code"
            " in them.",
            _convert(folder),
        )
    frequencies = sum(name.endswith("rotary_emb.inv_freq") for name in tensors.infos)
    if frequencies:
        yield Finding(
            "note", "weights", f"{frequencies} rotary_emb.inv_freq tensors of old versions are in the files: ignored."
        )
    stored = stored_dtype(tensors.infos)
    size = f"{tensors.nbytes / 1e9:.1f} GB in {len(tensors.shards)} files"
    yield Finding(
        "note", "weights", f"{size}, {str(stored).removeprefix('torch.') if form is None else f'int{form.bits}'}."
    )
    if stored == torch.float16 and form is None:
        yield Finding(
            "note", "weights", "float16 is unusably slow on CPUs: longverse runs it as bfloat16 or float32 there."
        )
    if shape is None:
        return
    wanted = shape.parameter_shapes()
    held = {f"{name.rpartition('.')[0]}.weight" if name.endswith(SAVED_NAMES) else name for name in tensors.infos}
    lacking = [name for name in wanted if name not in held]
    if lacking:
        yield Finding(
            "error",
            "weights",
            f"{len(lacking)} tensors are missing, the first {lacking[0]}.",
            "Download the missing shards again.",
        )
    strange = [
        n for n in held if n not in wanted and not n.endswith(IGNORED) and not (shape.tied and n == "lm_head.weight")
    ]
    if strange:
        yield Finding(
            "error",
            "weights",
            f"{len(strange)} tensors belong to no part of this network, the first {sorted(strange)[0]}.",
        )
    for name, info in tensors.infos.items():
        if name in wanted and info.shape != wanted[name]:
            yield Finding(
                "error",
                "weights",
                f"{name} is {list(info.shape)} where config.json asks for {list(wanted[name])}.",
                "config.json and weights belong to different models: download both again.",
            )
            break


# ---- tokenizer ---------------------------------------------------------------------------------------------


def tokenizer_findings(folder: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """Old file formats, gaps in the vocabulary, special ids that disagree."""
    fix = f"longverse convert {shlex.quote(str(folder))} --tokenizer"
    try:
        read_backend(folder)
        tokenizer = Tokenizer.from_folder(folder)
    except UserError as error:
        yield Finding("error", "tokenizer", str(error), "Download tokenizer.json and tokenizer_config.json again.")
        return
    try:
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the tokenizers library raises nothing narrower for a file it cannot read
        yield Finding(
            "error",
            "tokenizer",
            f"tokenizer.json was written for tokenizers below 0.19: version {tokenizers.__version__} and transformers"
            " refuse it (longverse reads it).",
            fix,
        )
    updates = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / f"{name}.update").exists()]
    differ = [
        n
        for n in updates
        if (folder / n).exists() and (folder / n).read_bytes() != (folder / f"{n}.update").read_bytes()
    ]
    if differ:
        yield Finding(
            "warning", "tokenizer", f"{' and '.join(differ)} must be replaced by the .update files beside them.", fix
        )
    ids = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    size = config.get("vocab_size")
    if isinstance(size, int) and (lacking := tokenizer.lacking(size)):
        yield Finding(
            "error",
            "tokenizer",
            f"The tokenizer has ids up to {lacking[-1]:,} and the model has {size:,} embeddings: some text cannot be"
            " read.",
            "Take the tokenizer files of this very model.",
        )
    elif isinstance(size, int) and ids and ids[-1] >= size:
        yield Finding(
            "warning",
            "tokenizer",
            f"Added tokens have ids up to {ids[-1]:,} and the model has {size:,} embeddings: longverse leaves those"
            " tokens out, and other engines may fail at them.",
            "Delete them from tokenizer.json and tokenizer_config.json.",
        )
    gaps = ids[-1] + 1 - len(set(ids)) if ids else 0
    if gaps:
        yield Finding(
            "warning",
            "tokenizer",
            f"{gaps} ids below {ids[-1]:,} have no token: some converters shift every id after a gap.",
            "Compare ids after any conversion; longverse's own exports do.",
        )
    yield from special_id_findings(folder, config, tokenizer, fix)


def special_id_findings(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, fix: str) -> Iterator[Finding]:
    """Begin, end and padding ids: one statement each, or a finding."""
    settings = _settings(folder, "tokenizer_config.json")
    sources = {"config.json": config, "generation_config.json": _settings(folder, "generation_config.json")}
    for short in ("bos", "eos", "pad"):
        token = settings.get(f"{short}_token")
        text = token.get("content") if isinstance(token, dict) else token
        named = tokenizer.backend.token_to_id(text) if isinstance(text, str) else None
        for file, values in sources.items():
            stated = values.get(f"{short}_token_id")
            listed = stated if isinstance(stated, list) else [stated]
            if stated is not None and named is not None and named not in listed:
                yield Finding(
                    "warning",
                    "special ids",
                    f"{file} says {short} is {stated}, and the tokenizer says {named} ({text}).",
                    f"Set {short}_token_id to {named} in {file}.",
                )
    if not tokenizer.eos_ids:
        yield Finding(
            "error",
            "special ids",
            "No file names an end token: answers would run to the length limit.",
            "Add eos_token to tokenizer_config.json or eos_token_id to config.json.",
        )
    if tokenizer.pad_id is None:
        yield Finding(
            "note", "special ids", "No padding token: needed only for batches of unequal length in other tools."
        )
