"""Rotary position embedding as a contract: a typed plan, its frequencies, and a check that a model really uses it.

A plan is a pure function from a *planned total length* (prompt plus new tokens) to the frequencies of a run. Only
dynamic NTK depends on that length. It is chosen before the first token is read and stays the same for the life of a
cache: hidden states from layer 2 on depend on the base that earlier tokens were read with, so recomputing it
on the way (as transformers' own dynamic RoPE does) makes chunked and one-shot runs disagree.

Shapes: D = head_dim, T = tokens, B = batch. Angles are float32 everywhere; a float16 angle is wrong past a few
thousand positions.

Sources: RoPE, Su et al. 2021 (arXiv 2104.09864), eq. 15. ABF, Xiong et al. 2023 (arXiv 2309.16039). Position
interpolation, Chen et al. 2023 (arXiv 2306.15595). Static and dynamic NTK, as fixed by transformers' `dynamic` type.
YaRN, Peng et al. 2023 (arXiv 2309.00071), eqs. 17-22. Llama-3 scaling, Llama 3.1's reference code.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError

RopeKind = Literal["default", "linear", "ntk", "dynamic", "yarn", "llama3"]
KINDS: tuple[RopeKind, ...] = ("default", "linear", "ntk", "dynamic", "yarn", "llama3")
MAX_BASE, MAX_FACTOR = 1e15, 1e6  # far past any use; larger ones leave float32's range
YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")


@dataclass(frozen=True)
class RopePlan:
    """How positions become angles.

    kind             one of KINDS. ABF (adjusted base frequency) is `default` with a larger theta.
    theta            the RoPE base before any scaling (10,000 in XVERSE-13B-2, 500,000 after ABF)
    head_dim         D, the rotated size of a head; even
    factor           scaling factor of linear, ntk, dynamic, yarn and llama3; 1 for default
    original_window  L0 in tokens: where dynamic NTK begins, what yarn and llama3 measure wavelengths against
    bucket           dynamic only: planned lengths are rounded up to a multiple of it, so that runs of similar
                     length share one base (and a stored document stays usable for a longer question)
    """

    kind: RopeKind
    theta: float
    head_dim: int
    factor: float = 1.0
    original_window: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    bucket: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"RoPE kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}.")
        if not 1 < self.theta <= MAX_BASE:
            raise UserError(f"RoPE base {self.theta!r} must be above 1 and at most {MAX_BASE:.0e}, such as 500000.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"RoPE needs an even head size of at least 2, and this model's is {self.head_dim}.")
        if not 1 <= self.factor <= MAX_FACTOR:
            raise UserError(f"RoPE factor {self.factor!r} must be from 1 to {MAX_FACTOR:,.0f}.")
        if self.kind == "default" and self.factor != 1:
            raise UserError(f"RoPE kind 'default' takes no factor, and {self.factor} was given: name a kind.")
        if self.kind in ("dynamic", "yarn", "llama3") and not (self.original_window and self.original_window > 0):
            raise UserError(f"RoPE kind {self.kind!r} needs the original window in tokens.")
        if self.bucket is not None and (self.kind != "dynamic" or self.bucket < 1):
            raise UserError(f"A RoPE bucket ({self.bucket}) must be positive and belongs to kind 'dynamic' only.")

    # ---- from planned length to frequencies -------------------------------------------------------------

    def pinned_length(self, total_length: int) -> int:
        """The planned length in tokens that the frequencies are computed for, after rounding up to the bucket."""
        if total_length < 1:
            raise UserError(f"A planned length of {total_length} tokens must be at least 1.")
        if self.bucket is None:
            return total_length
        return -(-total_length // self.bucket) * self.bucket

    def base(self, total_length: int = 1) -> float:
        """The effective RoPE base for a run of `total_length` tokens (YaRN and Llama-3 scale single frequencies
        instead and keep theta).

        dynamic: theta * (factor * L / L0 - (factor - 1)) ** (D / (D - 2)) for L > L0, else theta.
        """
        exponent = self.head_dim / (self.head_dim - 2) if self.head_dim > 2 else 1.0
        if self.kind == "ntk":
            return self.theta * self.factor**exponent
        if self.kind == "dynamic":
            assert self.original_window is not None
            length = max(self.pinned_length(total_length), self.original_window)
            return self.theta * (self.factor * length / self.original_window - (self.factor - 1)) ** exponent
        return float(self.theta)

    def inv_freq(self, total_length: int = 1) -> Tensor:
        """Frequencies in radians per token, float32 [D / 2], for a run of `total_length` planned tokens."""
        length = self.pinned_length(total_length) if self.kind == "dynamic" else 1
        return _inv_freq(self, length)

    @property
    def attention_scaling(self) -> float:
        """The factor on cos and sin (YaRN's temperature, eq. 22); 1 for every other kind."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)

        def magnitude(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)

    def cos_sin(self, positions: Tensor, rope_length: int | Tensor) -> tuple[Tensor, Tensor]:
        """Angles for the half-split rotation.

        positions    int64 [B, T]
        rope_length  planned total length in tokens: one number for the whole run, or int64 [B, 1] per row or
                     [B, T] per token (packed documents: each token carries its own document's length)
        returns      cos, sin: float32 [B, T, D], the two halves alike
        """
        if isinstance(rope_length, int) or self.kind != "dynamic":
            length = rope_length if isinstance(rope_length, int) else 1
            inv_freq = self.inv_freq(length).to(positions.device)  # [D/2]
        else:
            lengths, where = torch.unique(rope_length, return_inverse=True)
            table = torch.stack([self.inv_freq(int(n)) for n in lengths.tolist()])  # [unique, D/2]
            inv_freq = table.to(positions.device)[where]  # [B, 1 or T, D/2]
        angles = positions[..., None].float() * inv_freq  # [B, T, D/2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, T, D]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    # ---- reading and writing configs --------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RopePlan":
        """Read a config.json: today's `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

        A base stated twice with two values is an error, since engines differ in which one they obey. A config
        that states no base at all means 10,000, as every engine reads it (XVERSE-13B-256K is such a file, and
        wrong that way; the loader of known releases fills in the rest).
        """
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        window = config.get("max_position_embeddings")
        new, old = config.get("rope_parameters"), config.get("rope_scaling")
        for name, value in (("rope_parameters", new), ("rope_scaling", old)):
            if value is not None and not isinstance(value, dict):
                raise UserError(f"The config's {name} is {value!r} and must be an object with a rope_type.")
        if new and old and _settings(new) != _settings(old):
            raise UserError(
                "The config holds rope_parameters and rope_scaling that differ, and engines obey different ones:"
                " delete rope_scaling, or make the two agree."
            )
        stated = dict(new or old or {})
        kind = stated.pop("rope_type", None) or stated.pop("type", None) or "default"
        stated.pop("type", None)
        outer, inner = config.get("rope_theta"), stated.pop("rope_theta", None)
        outer = None if outer is None else number("rope_theta", outer)
        inner = None if inner is None else number("rope_theta", inner)
        if outer is not None and inner is not None and outer != inner:
            raise UserError(
                f"The config states two RoPE bases, rope_theta {outer:,.0f} and rope_parameters.rope_theta"
                f" {inner:,.0f}: delete the one that is not meant."
            )
        theta = inner if inner is not None else outer if outer is not None else 10_000.0
        if (stated.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise UserError("Partly rotated heads (partial_rotary_factor below 1) are not supported.")
        if kind not in KINDS:
            raise UserError(f"RoPE kind {kind!r} is not supported: use one of {', '.join(KINDS)}.")
        if kind == "default":
            return cls("default", theta, head_dim)

        original = stated.pop("original_max_position_embeddings", None) or config.get(
            "original_max_position_embeddings"
        )
        stated.pop("finetuned", None)  # of YaRN's first checkpoints: says how they were made, nothing of angles
        factor = stated.pop("factor", None)
        if factor is None and kind == "yarn" and original and window:
            factor = window / original
        if factor is None:
            raise UserError(f"RoPE kind {kind!r} needs a factor, and the config states none.")
        allowed = {
            "yarn": YARN_KEYS,
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "dynamic": ("bucket",),
        }
        unknown = set(stated) - set(allowed.get(kind, ()))
        if unknown:
            raise UserError(f"RoPE kind {kind!r} does not know {', '.join(sorted(unknown))}: delete it.")
        details: dict[str, Any] = {
            key: value if key == "truncate" else number(key, value)
            for key, value in stated.items()
            if value is not None
        }
        if "bucket" in details:
            details["bucket"] = int(details["bucket"])
        if kind in ("dynamic", "yarn", "llama3"):
            details["original_window"] = int(number("original_max_position_embeddings", original or window or 0))
        return cls(kind, theta, head_dim, number("factor", factor), **details)

    def to_rope_parameters(self) -> dict[str, Any]:
        """The `rope_parameters` of a config.json that transformers 5, vLLM and SGLang read the same way.

        Static NTK has no name of its own there: it is written as `default` with the base it amounts to. Dynamic
        NTK takes L0 from `max_position_embeddings`, so write that field as `original_window` beside it.
        """
        if self.kind in ("default", "ntk"):
            return {"rope_type": "default", "rope_theta": self.base()}
        written: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor}
        if self.kind in ("yarn", "llama3"):
            written["original_max_position_embeddings"] = self.original_window
        if self.kind == "llama3":
            written |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind == "yarn":
            default = replace(self, attention_factor=None, beta_fast=32.0, beta_slow=1.0, mscale=None)
            default = replace(default, mscale_all_dim=None, truncate=True)
            written |= {key: v for key in YARN_KEYS if (v := getattr(self, key)) != getattr(default, key)}
        if self.bucket is not None:
            written["bucket"] = self.bucket
        return written

    def pinned(self, total_length: int) -> "RopePlan":
        """The same angles with the dependence on length removed: for export to engines that recompute the base."""
        if self.kind != "dynamic":
            return self
        return RopePlan("default", self.base(total_length), self.head_dim)

    # ---- changing a plan --------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str, current: "RopePlan", window: int) -> "RopePlan":
        """Read a change such as `abf:500000`, `linear:4`, `ntk:4`, `dynamic:2`, `yarn:4`, or two joined by a comma
        (`abf:500000,dynamic:2`), on top of `current`, whose trained window is `window` tokens.

        A third field of dynamic and yarn names the original window, `dynamic:2:32768`; else it is the current
        plan's, else `window`. A change that changes
        nothing is an error: it would look like a step of the recipe and be none.
        """
        plan, changed_kind = current, ""
        for part in text.split(","):
            name, *values = part.strip().split(":")
            try:
                numbers = [float(value.replace("_", "")) for value in values]
            except ValueError:
                raise UserError(f"RoPE change {part!r} must look like abf:500000 or dynamic:2.") from None
            if name == "abf" and len(numbers) == 1:
                plan = replace(plan, theta=numbers[0])
                continue
            if changed_kind:
                raise UserError(f"RoPE change {text!r} asks for {changed_kind} and for {name}: choose one.")
            changed_kind = name
            if len(numbers) == 2 and not (numbers[1].is_integer() and numbers[1] >= 1):
                raise UserError(f"The original window in RoPE change {part!r} must be a whole number of tokens.")
            if name in ("linear", "ntk") and len(numbers) == 1:
                plan = cls(name, plan.theta, plan.head_dim, numbers[0])  # type: ignore[arg-type]
            elif name in ("dynamic", "yarn") and len(numbers) in (1, 2):
                original = int(numbers[1]) if len(numbers) == 2 else current.trained_window or window
                # The same kind with another factor keeps the rest of its settings (bucket, betas).
                rest = plan if plan.kind == name else cls("default", plan.theta, plan.head_dim)
                plan = replace(rest, kind=name, factor=numbers[0], original_window=original)  # type: ignore[arg-type]
            elif name == "default" and not numbers:
                plan = cls("default", plan.theta, plan.head_dim)
            else:
                raise UserError(
                    f"RoPE change {part!r} is unknown: write abf:BASE, linear:FACTOR, ntk:FACTOR,"
                    " dynamic:FACTOR[:WINDOW], yarn:FACTOR[:WINDOW] or default."
                )
        if plan.same_angles(current, window):
            raise UserError(f"RoPE change {text!r} changes nothing: the model already runs {current.describe()}.")
        return plan

    def same_angles(self, other: "RopePlan", window: int = 1) -> bool:
        """Whether two plans turn every position alike, whatever their names: compared far past `window` and both
        plans' original windows."""
        if self.head_dim != other.head_dim or self.attention_scaling != other.attention_scaling:
            return False
        far = 16 * max(window, self.original_window or 1, other.original_window or 1, self.bucket or 1)
        lengths = (1, window, far)
        return all(torch.equal(self.inv_freq(length), other.inv_freq(length)) for length in lengths)

    @property
    def trained_window(self) -> int | None:
        """The window before this plan stretched it, where the plan knows it."""
        return self.original_window if self.kind in ("dynamic", "yarn") else None

    def window_after(self, trained: int) -> int:
        """The window in tokens that this plan is meant for, on a model trained for `trained` tokens. ABF alone
        promises nothing (training does), so the trained window stays."""
        if self.kind in ("linear", "ntk"):
            return int(trained * self.factor)
        if self.kind in ("dynamic", "yarn"):
            return max(trained, int((self.original_window or trained) * self.factor))
        return trained

    def describe(self) -> str:
        """One phrase for people, e.g. `dynamic NTK, base 500,000, factor 2 past 32,768 tokens`."""
        base = f"base {self.theta:,.0f}"
        if self.kind == "default":
            return f"plain RoPE, {base}"
        if self.kind == "dynamic":
            bucket = f", in steps of {self.bucket:,}" if self.bucket else ""
            return f"dynamic NTK, {base}, factor {self.factor:g} past {self.original_window:,} tokens{bucket}"
        name = {
            "linear": "position interpolation",
            "ntk": "static NTK",
            "yarn": "YaRN",
            "llama3": "Llama-3 scaling",
        }
        return f"{name[self.kind]}, {base}, factor {self.factor:g}"

    # ---- the check on a live model ----------------------------------------------------------------------

    def verify(self, model: nn.Module, total_length: int = 1) -> None:
        """Compare this plan with the frequencies that `model` will really use for `total_length` planned tokens.

        Works on our network (which computes them from its own plan) and on any transformers model that keeps an
        `inv_freq` buffer. Raises UserError when they differ, naming both bases: transformers silently ignores
        `rope_theta` given to `from_pretrained` or set on a config afterwards.
        """
        expected = self.inv_freq(total_length)
        live = live_inv_freq(model, total_length)
        if not live:
            raise UserError("This model keeps no RoPE frequencies (no inv_freq), so the plan cannot be verified.")
        for name, inv_freq in live.items():
            if inv_freq.shape != expected.shape:
                raise UserError(
                    f"{name} holds {inv_freq.numel()} frequencies and the plan has {expected.numel()}:"
                    " the plan was made for another head size."
                )
            if not torch.allclose(inv_freq.float().cpu(), expected, rtol=1e-5, atol=0):
                raise UserError(
                    f"The model runs RoPE base {implied_base(inv_freq):,.0f} ({name}), not {self.describe()}: the"
                    " change was ignored; set config.rope_parameters before the model is built."
                )


def live_inv_freq(model: nn.Module, total_length: int = 1) -> dict[str, Tensor]:
    """Every set of frequencies in a model by name: those our rotary modules compute for `total_length` planned
    tokens, and the `inv_freq` buffers of transformers' models as they stand; float [D / 2]."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Rotary):
            found[f"{name}.inv_freq"] = module.plan.inv_freq(total_length)
        elif isinstance(getattr(module, "inv_freq", None), Tensor):
            found[f"{name}.inv_freq"] = module.inv_freq  # type: ignore[assignment]
    return found


def implied_base(inv_freq: Tensor) -> float:
    """The base of unscaled frequencies: inv_freq[i] = base ** (-2 i / D), read off the last one."""
    half = inv_freq.numel()
    return float(inv_freq[-1].double()) ** (-half / (half - 1)) if half > 1 else float("nan")


class Rotary(nn.Module):
    """Holds the plan of a network; has no weights and no buffer that a dtype change could round."""

    def __init__(self, plan: RopePlan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, positions: Tensor, rope_length: int | Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [B, T]; returns cos, sin float32 [B, 1, T, D], ready for q and k [B, heads, T, D]."""
        cos, sin = self.plan.cos_sin(positions, rope_length)
        return cos[:, None], sin[:, None]

    def extra_repr(self) -> str:
        return self.plan.describe()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of x [B, heads, T, D] by cos, sin [B, 1, T, D] (in x's dtype); returns x's shape."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@lru_cache(maxsize=256)
def _inv_freq(plan: RopePlan, length: int) -> Tensor:
    # Cached: the same tensor is handed out again, so callers must not write into it.
    half = torch.arange(0, plan.head_dim, 2, dtype=torch.int64).float() / plan.head_dim  # [D/2]: 2i/D
    if plan.kind == "linear":
        return (1.0 / plan.theta**half) / plan.factor
    if plan.kind == "yarn":
        return _yarn(plan, half)
    if plan.kind == "llama3":
        return _llama3(plan, 1.0 / plan.theta**half)
    return 1.0 / plan.base(length) ** half


def _yarn(plan: RopePlan, half: Tensor) -> Tensor:
    """NTK by parts: fast dimensions keep their frequency, slow ones are interpolated, a ramp lies between."""
    assert plan.original_window is not None

    def dimension(rotations: float) -> float:  # the dimension that turns `rotations` times within L0 (eq. 18)
        turns = math.log(plan.original_window / (rotations * 2 * math.pi))  # type: ignore[operator]
        return plan.head_dim * turns / (2 * math.log(plan.theta))

    low, high = dimension(plan.beta_fast), dimension(plan.beta_slow)
    if plan.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, plan.head_dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(plan.head_dim // 2).float() - low) / (high - low)).clamp(0, 1)  # [D/2]
    power = plan.theta**half
    return (1.0 / (plan.factor * power)) * (1 - keep) + (1.0 / power) * keep


def _llama3(plan: RopePlan, inv_freq: Tensor) -> Tensor:
    """Wavelengths under L0 / high_freq_factor stay, those over L0 / low_freq_factor are divided by the factor."""
    assert plan.original_window is not None
    turns = plan.original_window * inv_freq / (2 * math.pi)  # turns within the original window
    smooth = (turns - plan.low_freq_factor) / (plan.high_freq_factor - plan.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 0: interpolate, 1: keep
    return (1 - smooth) * inv_freq / plan.factor + smooth * inv_freq


def number(name: str, value: Any) -> float:
    """`value` of a config's field as a float; UserError, naming the field, when it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"The config's {name} is {value!r} and must be a number.")
    return float(value)


def _settings(rope: dict[str, Any]) -> dict[str, Any]:
    """A rope dict without its base and with the kind under one name, for comparing old and new spellings."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rest = {k: v for k, v in rope.items() if k not in ("type", "rope_type", "rope_theta") and v is not None}
    return {"kind": kind, **rest}
