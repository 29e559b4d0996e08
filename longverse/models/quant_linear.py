"""Linear layers on int8 and int4 weights: packed matrix-vector products for one token, dequantising for many.

Shapes: N outputs, K inputs, g group size along K, G = K / g groups (G = 1 for one scale a channel), T tokens.

A weight is `(q - zero) * scale`, q unsigned in [0, 2**bits), scale and zero of its row and group. Saved form
(`pack-quantized` of compressed-tensors, https://github.com/vllm-project/compressed-tensors):

    weight_packed      int32 [N, K * bits / 32]   q, element i of a row at bits (i * bits) of the row, little-endian
    weight_scale       bf16 or f32 [N, G]
    weight_zero_point  int32 [N * bits / 32, G]   packed along N; absent when symmetric (zero = 2 ** (bits - 1))
    weight_shape       int64 [2]                  (N, K)

On a CPU `pack()` turns the saved form into what torch's kernels read: `_weight_int8pack_mm` (one scale a row; once for
each group where there are groups) and `_weight_int4pack_mm_for_cpu` (groups of 32 to 256). These read a quarter to a
half of the bytes of bf16, which is what one-token decode waits for; with many tokens their arithmetic is slower than a
bf16 product, so past `PACKED_TOKENS` the weight is dequantised, a block of rows at a time, for an ordinary product.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .shards import NOT_FINITE, is_finite

PACKED_TOKENS = {
    "int4": 96,
    "int8": 32,
    "int8 groups": 8,
}  # above these many tokens a dequantised product is faster (benchmarks/quant_quality.py)
GROUPS = (32, 64, 128)
SAVED_NAMES = ("weight_packed", "weight_scale", "weight_zero_point")


@dataclass(frozen=True)
class QuantFormat:
    """How the weights of a checkpoint are quantised. `group` 0 means one scale a channel."""

    bits: int
    group: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UserError(f"Weights can be quantised to 8 or 4 bits, not {self.bits}.")
        if self.group not in (0, *GROUPS):
            raise UserError(
                f"A group of {self.group} weights is not supported: use 32, 64 or 128, or 0 for one scale a row."
            )
        if self.bits == 4 and self.group == 0:
            raise UserError("int4 needs groups of 32, 64 or 128 weights: one scale a row loses too much.")

    def groups(self, inputs: int) -> int:
        """G for K inputs."""
        return inputs // self.group if self.group else 1

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a [N, K] weight can be packed in this form."""
        return outputs % 8 == 0 and inputs % (self.group or 32) == 0

    def shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """The saved tensors of a [N, K] weight, by the ending of their names."""
        shapes: dict[str, tuple[int, ...]] = {
            "weight_packed": (outputs, inputs * self.bits // 32),
            "weight_scale": (outputs, self.groups(inputs)),
        }
        if not self.symmetric:
            shapes["weight_zero_point"] = (outputs * self.bits // 32, self.groups(inputs))
        return {**shapes, "weight_shape": (2,)}


def read_form(config: dict[str, Any]) -> QuantFormat | None:
    """The form that a config.json's `quantization_config` states; None when the weights are not quantised.

    Raises UserError for methods and schemes other than ours.
    """
    stated = config.get("quantization_config")
    if not stated:
        return None
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    try:
        groups = list(stated["config_groups"].values())
        weights = groups[0]["weights"]
        known = (
            method == "compressed-tensors"
            and stated.get("format") == "pack-quantized"
            and len(groups) == 1
            and not groups[0].get("input_activations")
            and weights["type"] == "int"
            and weights["strategy"] in ("group", "channel")
        )
        group = 0 if weights["strategy"] == "channel" else int(weights["group_size"])
        form = (int(weights["num_bits"]), group, bool(weights["symmetric"]))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        known = False
    if not known:
        raise UserError(
            f"These weights are quantised by {method or 'an unnamed method'} in a form longverse does not read (it"
            " reads int8 and int4 pack-quantized): take the bf16 model and run `longverse quantize` on it."
        )
    return QuantFormat(*form)


def write_form(form: QuantFormat, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a config.json, as compressed-tensors defines it."""
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "group" if form.group else "channel",
        "group_size": form.group or None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


# ---- arithmetic --------------------------------------------------------------------------------------------


def group_grid(grouped: Tensor, form: QuantFormat, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero level [..., G] of float32 groups [..., G, g]; the zero level as float.

    Asymmetric: the range [min(w, 0), max(w, 0)] of a group is spread over all levels. Symmetric: the largest magnitude
    over half of them. The scale is rounded to its saved type first, so levels are nearest for the scale that is used.
    """
    top = 2**form.bits - 1
    if form.symmetric:
        scale = (grouped.abs().amax(-1) / (top / 2)).to(scale_dtype)
        return scale, torch.full_like(scale, 2 ** (form.bits - 1), dtype=torch.float32)
    low, high = grouped.aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / top).to(scale_dtype)
    return scale, (-low / step_of(scale)).round_().clamp_(0, top)


def step_of(scale: Tensor) -> Tensor:
    """A scale as a float32 divisor: 1 where a group is all zeros."""
    return torch.where(scale > 0, scale, 1).float()


def quantize_rows(
    weight: Tensor, form: QuantFormat, scale_dtype: torch.dtype, name: str = "A weight"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight [N, K] to nearest: q uint8 [N, K], scale [N, G], zero uint8 [N, G] (None when symmetric).
    UserError, with the weight's `name`, when it is not finite."""
    outputs, inputs = weight.shape
    grouped = weight.float().view(outputs, form.groups(inputs), -1)  # [N, G, g]
    scale, zero = group_grid(grouped, form, scale_dtype)
    if not torch.isfinite(scale).all():  # one such number makes the scale of its group another
        raise UserError(NOT_FINITE.format(name))
    q = (grouped / step_of(scale)[..., None]).add_(zero[..., None]).round_().clamp_(0, 2**form.bits - 1)
    return q.to(torch.uint8).view(outputs, inputs), scale, None if form.symmetric else zero.to(torch.uint8)


def dequantize_rows(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, from q uint8 [N, K], scale [N, G] and zero uint8 [N, G]."""
    outputs, groups = scale.shape
    # Small whole numbers are exact in every float type, so only the product with the scale rounds.
    levels = q.view(outputs, groups, -1).to(dtype)
    levels -= 2 ** (bits - 1) if zero is None else zero.to(dtype)[..., None]
    return (levels * scale.to(dtype)[..., None]).view(outputs, -1)


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] with values below 2**bits to int32 [N, K * bits / 32], the first element in the lowest bits."""
    if bits == 4:
        q = q[:, 0::2] | (q[:, 1::2] << 4)
    return q.reshape(-1).view(torch.int32).view(q.shape[0], -1)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [N, K]."""
    raw = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], -1)
    if bits == 8:
        return raw
    return torch.stack((raw & 15, raw >> 4), dim=-1).view(raw.shape[0], -1)


def save_form(weight: Tensor, form: QuantFormat, scale_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The saved tensors of a weight rounded to nearest, by the ending of their names."""
    return save_levels(*quantize_rows(weight, form, scale_dtype), form)


def save_levels(q: Tensor, scale: Tensor, zero: Tensor | None, form: QuantFormat) -> dict[str, Tensor]:
    """The saved tensors of levels [N, K], scale [N, G] and zero [N, G], by the ending of their names."""
    saved = {"weight_packed": pack_bits(q, form.bits), "weight_scale": scale}
    if zero is not None:
        saved["weight_zero_point"] = pack_bits(zero.t().contiguous(), form.bits).t().contiguous()
    return {**saved, "weight_shape": torch.tensor(q.shape)}


def load_form(saved: dict[str, Tensor], form: QuantFormat, dtype: torch.dtype) -> Tensor:
    """The dequantised weight [N, K] of saved tensors."""
    zero = saved.get("weight_zero_point")
    if zero is not None:
        zero = unpack_bits(zero.t().contiguous(), form.bits).t().contiguous()
    q = unpack_bits(saved["weight_packed"], form.bits)
    return dequantize_rows(q, saved["weight_scale"], zero, form.bits, dtype)


# ---- torch's int4 layout on CPUs ---------------------------------------------------------------------------


@lru_cache(maxsize=1)
def int4_block() -> int:
    """Rows in a block of torch's packed int4 layout on this processor, or 0 when it is laid out in a way unknown to us.

    The layout is torch's own affair and differs between processors, so it is asked, not assumed. Expected is, within a
    block, [K, block / 2] bytes: byte [k, d] holds rows d (low) and d + block/2 (high) of column k.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (128, 64), dtype=torch.int32, generator=generator)
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
    except (RuntimeError, AttributeError):
        return 0
    for block in (64, 32):
        if torch.equal(int4_layout(pack_bits(q.to(torch.uint8), 4), block), packed):
            return block
    return 0


def int4_layout(saved: Tensor, block: int) -> Tensor:
    """The saved int32 [N, K / 8] in the kernel's layout, uint8 [N, K / 2]: what `_convert_weight_to_int4pack_for_cpu`
    gives, fifteen times as fast, since it never unpacks the nibbles to int32."""
    rows, inputs = saved.shape[0], saved.shape[1] * 8
    laid = torch.empty(rows // block, inputs // 2, 2, block // 2, dtype=torch.uint8)
    step = 1024 // block  # blocks at a time: what fits the processor's cache
    for start in range(0, rows // block, step):
        part = saved[start * block : (start + step) * block].contiguous().view(torch.uint8)
        first, second = part.view(-1, 2, block // 2, inputs // 2).unbind(
            1
        )  # [blocks, block / 2, K / 2], two columns a byte
        laid[start : start + step, :, 0] = ((first & 15) | (second << 4)).transpose(1, 2)
        laid[start : start + step, :, 1] = ((first >> 4) | (second & 240)).transpose(1, 2)
    return laid.view(rows, inputs // 2)


# ---- the module --------------------------------------------------------------------------------------------


class QuantLinear(nn.Module):
    """A linear layer that keeps its weight quantised. x [..., K] to [..., N], in the type of x.

    Built empty in the saved form, so that `load_state_dict(assign=True)` fills it from a checkpoint; `pack()` then
    turns it into the fastest form this device has. Gradients do not flow into the weight.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    packed: Tensor
    scale: Tensor
    shift: Tensor | None

    def __init__(self, inputs: int, outputs: int, form: QuantFormat, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = inputs, outputs, form
        for name, shape in form.shapes(outputs, inputs).items():
            if name not in SAVED_NAMES:
                continue  # the shape is known from the config
            dtype = torch.bfloat16 if name == "weight_scale" else torch.int32
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self.kernel = ""  # "", "int8", "int4": which packed form the buffers are in

    @classmethod
    def from_linear(cls, linear: nn.Linear, form: QuantFormat) -> QuantLinear:
        """Quantise a layer of a live model."""
        scale_dtype = torch.float32 if linear.weight.dtype == torch.float32 else torch.bfloat16
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, form, linear.bias is not None)
        for name, tensor in save_form(linear.weight.detach(), form, scale_dtype).items():
            if name in SAVED_NAMES:
                setattr(layer, name, tensor)
        layer.bias = linear.bias
        return layer

    def pack(self, dtype: torch.dtype) -> None:
        """Turn the saved form into the one the CPU kernels read, for inputs of `dtype`, and let go of the saved form.
        Does nothing where no kernel fits."""
        if self.kernel or self.weight_packed.device.type != "cpu":
            return
        shift: Tensor | None = None
        if self.form.bits == 8:
            # Offset binary to two's complement: the top bit flips.
            levels = self.weight_packed.view(torch.uint8).bitwise_xor(128).view(torch.int8)  # [N, K]
            scale = self.weight_scale.t().contiguous()  # [G, N]
            packed = levels.view(self.out_features, scale.shape[0], -1).transpose(0, 1).contiguous()  # [G, N, g]
            if not self.form.symmetric:  # q - zero = level + (128 - zero)
                zero = unpack_bits(self.weight_zero_point.t().contiguous(), 8)  # [G, N]
                shift = (128 - zero.float()) * scale.float()  # rounded, its error would add up over a whole row
            self.kernel = "int8"
        elif self.form.bits == 4 and int4_block() and self.out_features % int4_block() == 0:
            packed = int4_layout(self.weight_packed, int4_block())
            scale = self.weight_scale  # [N, G]
            offset = torch.zeros_like(scale)
            if not self.form.symmetric:  # the kernel computes (q - 8) * scale + offset
                zero = unpack_bits(self.weight_zero_point.t().contiguous(), 4).t()
                offset = ((8 - zero.float()) * scale.float()).to(scale.dtype)
            scale = torch.stack((scale, offset), dim=-1).transpose(0, 1).contiguous()  # [G, N, 2]
            self.kernel = "int4"
        else:
            return
        for name in SAVED_NAMES:
            if hasattr(self, name):
                delattr(self, name)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)  # [T, K]
        kind = "int8 groups" if self.kernel == "int8" and self.form.group else self.kernel
        few = flat.shape[0] <= PACKED_TOKENS.get(kind, 0)
        if few and self.kernel == "int8":
            y = self._int8(flat)
        elif few and self.kernel == "int4":
            y = torch._weight_int4pack_mm_for_cpu(
                flat.contiguous(), self.packed, self.form.group, self.scale.to(flat.dtype)
            )
        else:
            y = self._many(flat)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _int8(self, flat: Tensor) -> Tensor:
        """[T, K] to [T, N] by torch's int8 kernel, once a group; the groups are added in float32."""
        parts = flat.view(flat.shape[0], self.packed.shape[0], -1).transpose(0, 1).contiguous()  # [G, T, g]
        scale = self.scale.to(flat.dtype)
        y = torch._weight_int8pack_mm(parts[0], self.packed[0], scale[0])
        if self.packed.shape[0] > 1:
            y = y.float()
            for part, packed, steps in zip(parts[1:], self.packed[1:], scale[1:], strict=True):
                y += torch._weight_int8pack_mm(part, packed, steps)
        if self.shift is not None:
            y = y + parts.float().sum(-1).t() @ self.shift.float()  # [T, G] @ [G, N]
        return y.to(flat.dtype)

    def _many(self, flat: Tensor) -> Tensor:
        """[T, K] to [T, N] by dequantising; a block of rows at a time, so that the float weight stays in the cache of
        the processor and never exists whole."""
        rows = max(64, (1 << 19) // self.in_features // 64 * 64) if flat.device.type == "cpu" else self.out_features
        y = flat.new_empty(flat.shape[0], self.out_features)
        for start in range(0, self.out_features, rows):
            stop = min(start + rows, self.out_features)
            if self.kernel == "int4":
                product = flat @ self._columns(flat.dtype, start, stop)  # [blocks, T, block]
                y[:, start:stop] = product.transpose(0, 1).reshape(flat.shape[0], -1)
            else:
                y[:, start:stop] = F.linear(flat, self.dequantized(flat.dtype, start, stop))
        return y

    def _columns(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Rows start .. stop of an int4 weight as torch's kernel lays them out: [blocks, K, block] in `dtype`."""
        block = int4_block()
        raw = self.packed[start:stop].view(-1, self.in_features, block // 2)
        levels = raw.new_empty(raw.shape[0], self.in_features, block, dtype=dtype)
        levels[..., : block // 2] = raw & 15
        levels[..., block // 2 :] = raw >> 4
        levels -= 8
        parts = self.scale[:, start:stop].to(dtype).view(-1, raw.shape[0], block, 2)  # [G, blocks, block, 2]
        scale, shift = parts.permute(3, 1, 0, 2).contiguous().unbind(0)  # [blocks, G, block] each
        levels = levels.view(raw.shape[0], -1, self.form.group, block)
        return torch.addcmul(shift[:, :, None], levels, scale[:, :, None]).view(-1, self.in_features, block)

    def dequantized(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start .. stop of the weight [N, K] in `dtype`; both must be multiples of 64 or the end."""
        stop = self.out_features if stop is None else stop
        if self.kernel == "int8":
            weight = self.packed[:, start:stop].to(dtype) * self.scale[:, start:stop, None].to(dtype)  # [G, n, g]
            if self.shift is not None:
                weight += self.shift[:, start:stop, None].to(dtype)
            return weight.transpose(0, 1).reshape(stop - start, -1)
        if self.kernel == "int4":
            return self._columns(dtype, start, stop).transpose(1, 2).reshape(stop - start, -1)
        zero = None
        if not self.form.symmetric:
            per = 32 // self.form.bits  # rows in one int32 of the packed zeros
            zeros = self.weight_zero_point[start // per : -(-stop // per)]
            zero = unpack_bits(zeros.t().contiguous(), self.form.bits).t()[: stop - start].contiguous()
        q = unpack_bits(self.weight_packed[start:stop], self.form.bits)
        return dequantize_rows(q, self.weight_scale[start:stop], zero, self.form.bits, dtype)

    def extra_repr(self) -> str:
        group = f"groups of {self.form.group}" if self.form.group else "one scale a row"
        return f"{self.in_features} -> {self.out_features}, int{self.form.bits}, {group}, {self.kernel or 'plain'}"


class Workers:
    """`with Workers() as pool:` as many threads as torch would use, each with one torch thread of its own.

    Whole blocks side by side use the cores better than single operations split between them, which wait for each
    other at every step.
    """

    def __enter__(self) -> ThreadPoolExecutor:
        self.threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self._pool

    def __exit__(self, *rest: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)  # the workers' setting is also the default of threads yet to come


# ---- whole networks ----------------------------------------------------------------------------------------


def hollow(network: nn.Module, form: QuantFormat, names: Container[str]) -> None:
    """Replace each linear layer whose quantised weight is among the tensors of a checkpoint by an empty QuantLinear."""
    for path, linear in list(_linears(network)):
        if f"{path}.weight_packed" in names:
            layer = QuantLinear(linear.in_features, linear.out_features, form, linear.bias is not None)
            _replace(network, path, layer)


def quantize_network(network: nn.Module, bits: int, group: int | None = None) -> list[str]:
    """Quantise the linear layers of a live model in place, but for its head; `network` may be any torch module.

    bits   8 (one scale a row unless a group is given) or 4 (groups of 64 unless given)
    Returns the names of layers whose sizes do not fit the groups; where there are any, nothing was changed. Nor is
    anything changed when a weight is not finite (UserError).
    """
    form = default_form(bits, group)
    linears = [(path, linear) for path, linear in _linears(network) if path.rpartition(".")[2] != "lm_head"]
    if left := [path for path, linear in linears if not form.fits(linear.out_features, linear.in_features)]:
        return left
    for path, linear in linears:
        if not is_finite(linear.weight):
            raise UserError(NOT_FINITE.format(f"{path}.weight"))
    for path, linear in linears:
        layer = QuantLinear.from_linear(linear, form)
        layer.pack(linear.weight.dtype)
        _replace(network, path, layer)
    return []


def default_form(bits: int, group: int | None = None) -> QuantFormat:
    """int8: symmetric, one scale a row (torch's fast kernel); int4: with zero points, groups of 64."""
    if bits == 8:
        return QuantFormat(8, group or 0, symmetric=True)
    return QuantFormat(bits, 64 if group is None else group, symmetric=False)


def pack(network: nn.Module, dtype: torch.dtype, forget: Callable[[Tensor], None] | None = None) -> None:
    """`QuantLinear.pack` for every quantised layer. `forget` is told of each saved part that is done with, so that the
    pages of a mapped file do not stay beside what was made of them."""
    layers = [module for module in network.modules() if isinstance(module, QuantLinear)]

    def one(layer: QuantLinear) -> None:
        saved = [part for name in SAVED_NAMES if (part := getattr(layer, name, None)) is not None]
        layer.pack(dtype)
        if layer.kernel and forget is not None:
            for part in saved:
                forget(part)

    with Workers() as pool:
        list(pool.map(one, layers))  # to the end, and what one of them raised is raised here


def _linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module


def _replace(network: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, layer)
