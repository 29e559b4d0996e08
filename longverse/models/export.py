"""Checkpoints for other engines, with a RoPE that none of them can misread, each compared with its source afterwards.

Two layouts. `llama`: a checkpoint of the plain Llama class (Qwen2's or Qwen3's where biases or norms ask for it), which
transformers, vLLM and SGLang run as it is. `xverse`: the XVERSE layout, with our model files beside the weights as
remote code, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs no longverse.

Dynamic NTK changes its base with the length, and engines disagree on when. So a fixed base for a chosen window is the
default of the `llama` layout: base(262,144) = 7,829,416 for XVERSE-13B-256K.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..errors import UserError, expand
from .checkpoint import Opened, build, open_model, stored_dtype, verify
from .convert import SHARD_BYTES, Cancelled, Written, arrival, chosen_dtype, dequantised, write_folder
from .network import NetworkConfig
from .rope import RopePlan
from .shards import Progress, TensorInfo, numel

LAYOUTS = ("llama", "xverse")
GGUF_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
REMOTE_ENTRY = ("configuration_xverse", "modeling_xverse")
# What tokenizers most often disagree on: scripts, spaces, digits, emoji, code, bytes, the strings of special tokens.
HARD_TEXTS = (
    "The quick brown fox jumps over the lazy dog, twice; then it sleeps.",
    "北京的景点:故宫、天坛、万里长城等。\n深圳的景点:",
    "  two  spaces, a\ttab,\r\nand lines\n\n\nthree of them ",
    "1234567890 3.14159 1,000,000 ２０２４年 Ⅻ ½",
    "👩‍👩‍👧‍👦 🇨🇳 naïve café — “quoted” … ﬁ ﬂ",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # tab\there",
    "Русский, العربية, עברית, हिन्दी, ไทย, 日本語, 한국어",
    "Human: hello\n\nAssistant: <s></s><pad><unk><|im_end|>",
    "",
)


@dataclass
class Check:
    """An export beside its source: the same text, the same ids, the same logits within the error of the format."""

    texts: int
    equal_ids: int
    tokens: int  # of the text whose logits were compared
    kl: float  # mean KL(source || export) over its positions, nats
    largest: float  # largest difference of a log probability, nats
    limit: float  # the largest mean KL that the written type explains
    dtype: str  # what both ran in

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with the export."""
        return self.equal_ids == self.texts and self.kl <= self.limit


def export(
    model: str,
    target: Path,
    *,
    layout: str = "llama",
    rope: str = "fixed",
    window: int | None = None,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
    check: bool = True,
    on_progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> tuple[Written, Check | None]:
    """Write a checkpoint for another engine; quantised weights are dequantised.

    layout  llama or xverse
    rope    fixed (dynamic NTK becomes one base, for `window` tokens) or dynamic (kept as it is)
    window  tokens the fixed base is for; default the model's own window
    check   compare ids and logits with the source; None is returned in its place where memory does not allow it
    Raises UserError as `convert` does, or for a request that the layout cannot hold.
    """
    if layout not in LAYOUTS:
        raise UserError(
            f"Unknown layout {layout!r}: use {' or '.join(LAYOUTS)} (GGUF files: `longverse export --to gguf`)."
        )
    if rope not in ("fixed", "dynamic"):
        raise UserError(f"Unknown RoPE choice {rope!r}: use fixed or dynamic.")
    source = open_model(model)
    shape = verify(source)
    fixed = rope == "fixed" and shape.rope.kind == "dynamic" and (layout == "llama" or window is not None)
    length, notes = chosen_window(source, shape, window, fixed)
    plan = shape.rope.pinned(length) if fixed else shape.rope
    if layout == "llama":
        plan = replace(plan, bucket=None)  # no other engine has one
        config = plain_config(source.config, plan, length)
    else:
        config = xverse_config(source.config, plan, length)
    number = chosen_dtype(source, dtype)
    shapes = shape.parameter_shapes()
    infos = {name: TensorInfo(shapes[name], number) for name in arrival(source, shapes)}
    config["dtype"] = str(number).removeprefix("torch.")
    extras = write_remote_code if layout == "xverse" else None
    result: Check | None = None

    def approve(folder: Path) -> None:
        nonlocal result
        result = compare(source, folder, layout, plan, length if fixed else 0)
        if result is not None and not result.passed:
            raise UserError(
                f"The export differs from its source ({result.equal_ids} of {result.texts} texts give the same ids,"
                f" mean KL {result.kl:.1e} with {result.limit:.0e} allowed), so it was not kept: report this, or write"
                " it with --no-check."
            )

    written = write_folder(
        source,
        target,
        config,
        replace(shape, rope=plan, window=length),
        infos,
        dequantised(source, number),
        [*source.notes, *notes],
        shard_bytes,
        on_progress,
        cancelled,
        extras,
        approve if check else None,
    )
    if fixed:
        written.notes.append(f"RoPE written as the fixed base {plan.theta:,.0f}, for {length:,} tokens.")
    elif layout == "llama" and plan.kind == "dynamic":
        written.notes.append(
            "Dynamic NTK kept: transformers recomputes the base with each forward, so its chunked runs differ."
        )
    if check and result is None:
        written.notes.append("Not compared with its source: this machine has too little free memory to run it.")
    return written, result


def chosen_window(source: Opened, shape: NetworkConfig, window: int | None, fixed: bool) -> tuple[int, list[str]]:
    """The window of an export in tokens, and what to know about it. UserError for one that cannot be."""
    if window is not None and not fixed:
        raise UserError(
            "A window can be chosen where dynamic NTK becomes a fixed base, and here the file keeps"
            f" {shape.rope.describe()}: leave --window out."
        )
    if window is not None and window < 1:
        raise UserError(f"A window of {window} tokens must be at least 1.")
    notes = []
    if window is not None and window > shape.window:
        notes.append(f"A window of {window:,} tokens is more than the {shape.window:,} that the model is meant for.")
    if shape.window == source.config.get("sliding_window") and shape.window < source.config["max_position_embeddings"]:
        notes.append(
            f"The model attends over a sliding window of {shape.window:,} tokens; it is written as the whole window, up"
            " to which the two are equal."
        )
    return (shape.window if window is None else window), notes


def export_gguf(
    model: str,
    target: Path,
    *,
    dtype: str = "keep",
    window: int | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Write a GGUF file for llama.cpp; the writer reads it back and compares ids and weights before it takes its name.

    dtype   keep (float32 and bfloat16 stay, float16 and quantised weights become f16), f32, f16, bf16 or q8_0
    window  tokens the file is for: dynamic NTK is written as the one base of that window
    Returns what a reader of the file should know. Progress counts tensors. UserError as `convert`.
    """
    target = expand(target)
    if target.exists():
        raise UserError(f"{target} exists already: give another name, or delete it first.")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target.absolute().parent} is no folder: make it first.")
    source = open_model(model)
    shape = verify(source)
    window, remarks = chosen_window(source, shape, window, shape.rope.kind == "dynamic")
    stored = stored_dtype(source.tensors.infos) if source.form is None else torch.float16
    kind = (
        {torch.float32: "f32", torch.bfloat16: "bf16"}.get(stored, "f16")
        if dtype == "keep"
        else GGUF_NAMES.get(dtype, dtype)
    )
    shapes = shape.parameter_shapes()
    tensors = ((name, tensor) for name, tensor in dequantised(source, torch.float32) if name in shapes)
    from .gguf_writer import write_gguf

    notes = write_gguf(
        tensors, source.config, source.tokenizer, target, kind, on_progress, window=window, name=source.name
    )
    return [*source.notes, *remarks, *notes]


# ---- configs -----------------------------------------------------------------------------------------------

SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path",
)  # fmt: skip


def plain_config(config: dict[str, Any], plan: RopePlan, window: int) -> dict[str, Any]:
    """The config of a class that every engine has. RoPE stands in `rope_parameters` and in the older fields too."""
    shape = NetworkConfig.from_dict(config)
    family, architecture = "llama", "LlamaForCausalLM"
    if shape.qk_norm:
        family, architecture = "qwen3", "Qwen3ForCausalLM"
    elif shape.qkv_bias and not shape.output_bias:
        family, architecture = "qwen2", "Qwen2ForCausalLM"
    written: dict[str, Any] = {"model_type": family, "architectures": [architecture]}
    written |= shared_fields(config, shape)
    written |= {
        # Dynamic NTK takes L0 from this field; everything else reads it as the window.
        "max_position_embeddings": plan.original_window if plan.kind == "dynamic" else window,
    }
    if shape.mlp_bias and family != "llama":
        raise UserError("No common class has both biases in the MLP and Qwen's attention: export with --to xverse.")
    written |= both_spellings(plan)
    if NetworkConfig.from_dict(written).window != window:  # our own field, for reading the file back
        written["context_window"] = window
    return written


def both_spellings(plan: RopePlan) -> dict[str, Any]:
    """`rope_parameters` for today's transformers and vLLM, `rope_theta` and `rope_scaling` for older engines."""
    parameters = plan.to_rope_parameters()
    parameters.pop("bucket", None)
    written: dict[str, Any] = {"rope_parameters": parameters, "rope_theta": parameters["rope_theta"]}
    if parameters["rope_type"] != "default":
        written["rope_scaling"] = {"type": parameters["rope_type"]} | {
            key: value for key, value in parameters.items() if key != "rope_theta"
        }
    return written


def xverse_config(config: dict[str, Any], plan: RopePlan | None = None, window: int | None = None) -> dict[str, Any]:
    """The config of the XVERSE layout, everything explicit, pointing at the remote code beside it."""
    shape = NetworkConfig.from_dict(config)
    plan = plan or shape.rope
    written: dict[str, Any] = {
        "model_type": "xverse",
        "architectures": ["XverseForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_xverse.XverseConfig",
            "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM",
        },
    }
    written |= shared_fields(config, shape)
    written |= {
        "qkv_bias": shape.qkv_bias,
        "qk_norm": shape.qk_norm,
        "context_window": window or shape.window,
        "max_position_embeddings": plan.original_window if plan.kind == "dynamic" else window or shape.window,
        "rope_parameters": plan.to_rope_parameters(),
    }
    return written


def shared_fields(config: dict[str, Any], shape: NetworkConfig) -> dict[str, Any]:
    """What every layout's config.json states alike."""
    return {
        **{key: config[key] for key in SHARED_KEYS if config.get(key) is not None},
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "attention_bias": shape.output_bias,
        "mlp_bias": shape.mlp_bias,
        "use_cache": True,
    }


def write_remote_code(folder: Path) -> None:
    """Put our model files into a checkpoint folder, flat, with all they import."""
    package = Path(__file__).parent
    waiting, done = list(REMOTE_ENTRY), set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        home = package if (package / f"{module}.py").exists() else package.parent
        text = (home / f"{module}.py").read_text(encoding="utf-8")
        text = text.replace("from .rowwise import", "from .rows import")  # torch alone, without our kernels
        text = re.sub(r"^(\s*from )\.\.(\w+ import)", r"\1.\2", text, flags=re.MULTILINE)
        waiting += re.findall(r"^\s*from \.(\w+) import", text, flags=re.MULTILINE)
        (folder / f"{module}.py").write_text(text, encoding="utf-8")


# ---- the check ---------------------------------------------------------------------------------------------


def compare(source: Opened, folder: Path, layout: str, plan: RopePlan, rope_length: int) -> Check | None:
    """Run the source through our network and then the export through transformers; None where memory does not hold one
    of them at a time.

    plan         the RoPE that the export must run, compared with the frequencies in the loaded model: a short text's
                 logits hardly see a wrong base
    rope_length  the window of a fixed base, which the source is then run with; 0 for the length of the text itself
    """
    parameters = sum(numel(shape) for shape in NetworkConfig.from_dict(source.config).parameter_shapes().values())
    written = stored_dtype_of(folder)
    room = psutil.virtual_memory().available / 1.1 / parameters  # bytes a parameter
    number = torch.float32 if parameters <= 2e9 and room >= torch.float32.itemsize else torch.bfloat16
    if room < number.itemsize:
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    equal = 0
    for text in HARD_TEXTS:
        ours = source.tokenizer.encode(text, special=True)
        equal += ours == tokenizer(text).input_ids
    ids = source.tokenizer.encode("\n".join(HARD_TEXTS))[:256]
    tokens = torch.tensor([ids])
    network = build(NetworkConfig.from_dict(source.config), source.tensors, number, torch.device("cpu"), source.form)
    with torch.no_grad():
        expected = network(tokens, rope_length=rope_length or len(ids)).log_softmax(-1)
        del network
        loader: Any = AutoModelForCausalLM
        if layout == "xverse":  # our own class; that the copy beside the weights equals it, the tests show
            from .modeling_xverse import XverseForCausalLM

            loader = XverseForCausalLM
        with silence():
            twin = loader.from_pretrained(folder, dtype=number).eval()
        plan.verify(twin)
        found = twin(tokens).logits.float().log_softmax(-1)
    stored = stored_dtype(source.tensors.infos) if source.form is None else None
    limit = kl_limit(written, stored, number)
    largest = float((expected - found).abs().max())
    ran = str(number).removeprefix("torch.")
    return Check(len(HARD_TEXTS), equal, len(ids), kl_mean(expected, found), largest, limit, ran)


@contextmanager
def silence() -> Iterator[None]:
    """transformers draws progress bars of its own; not while a library call of ours runs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def kl_mean(expected: Tensor, found: Tensor) -> float:
    """Mean KL divergence over positions, in nats, of log probabilities [B, T, V]."""
    return float((expected.exp() * (expected - found)).sum(-1).mean().clamp(min=0))


def kl_limit(written: torch.dtype, stored: torch.dtype | None, run: torch.dtype) -> float:
    """What rounding explains: next to nothing when no weight changed and both ran in float32."""
    if run != torch.float32:
        return 2e-2
    if written == stored or written == torch.float32:
        return 1e-6
    return 1e-2 if written == torch.bfloat16 else 1e-4


def stored_dtype_of(folder: Path) -> torch.dtype:
    """The type a folder's weights are in."""
    from .shards import TensorFolder

    return stored_dtype(TensorFolder(folder).infos)
