"""int8 and int4 weights from disk to disk, in compressed-tensors' `pack-quantized` form.

Why that form and not torchao's: it is plain safetensors with a JSON description, which transformers reads too (with
the `compressed-tensors` package, where there are no zero points), and its integers can be repacked for torch's CPU
kernels without loss.
torchao's files hold tensor subclasses whose layout follows the version and the device they were made on.

Embeddings, norms, biases and the head stay as they are, as is usual: they are the most sensitive, and in a large model
they are few.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .checkpoint import IGNORED, open_model, stored_dtype, verify
from .convert import SHARD_BYTES, Cancelled, Written, settled_config, write_folder
from .quant_linear import GROUPS, QuantFormat, Workers, default_form, pack_bits, quantize_rows, write_form
from .shards import Progress, TensorInfo

ROWS = 256  # rows quantised at a time: small enough for the processor's cache


def quantize(
    model: str,
    target: Path,
    *,
    bits: int,
    group: int | None = None,
    symmetric: bool | None = None,
    calibration: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> Written:
    """Quantise the linear layers of a checkpoint and write them to a new folder.

    bits       8 or 4
    group      weights that share a scale: 32, 64 or 128, or 0 for one scale a row (int8 only); default 0 for int8,
               64 for int4
    symmetric  without zero points; default: int8 yes, int4 no
    calibration  text like what the model will read: rounding errors are then balanced against each other on it
               (GPTQ), which takes minutes instead of seconds; None rounds to nearest
    Memory: a few hundred rows of the largest weight; with calibration one layer in float32, the second moments of its
    inputs, and the hidden states of the text. Progress counts written bytes.
    Raises UserError when no layer fits the group, or as `convert` does.
    """
    form = default_form(bits, group)
    if symmetric is not None:
        form = QuantFormat(form.bits, form.group, symmetric)
    source = open_model(model)
    if source.form is not None:
        raise UserError(f"{source.name} is quantised already: take the model in bf16 or float32.")
    shape = verify(source)
    shapes = shape.parameter_shapes()
    stored = stored_dtype(source.tensors.infos)
    scale_dtype = torch.float32 if stored == torch.float32 else torch.bfloat16
    kept_dtype = torch.float32 if stored == torch.float32 else stored
    names = [name for name in source.tensors.infos if name in shapes]
    chosen = {name for name in names if is_linear(name)}
    unfit = sorted(name for name in chosen if not form.fits(*shapes[name]))
    if unfit:
        fitting = [g for g in GROUPS if all(shapes[name][1] % g == 0 for name in chosen)]
        advice = f"use a group of {' or '.join(map(str, fitting))}" if fitting else "keep this model in bf16"
        raise UserError(
            f"{unfit[0]} has {shapes[unfit[0]][1]} inputs, which groups of {form.group} do not divide: {advice}."
        )
    infos: dict[str, TensorInfo] = {}
    for name in names:
        if name not in chosen:
            infos[name] = TensorInfo(shapes[name], kept_dtype)
            continue
        types = {"weight_scale": scale_dtype, "weight_shape": torch.int64}
        for part, size in form.shapes(*shapes[name]).items():
            infos[f"{name.removesuffix('.weight')}.{part}"] = TensorInfo(size, types.get(part, torch.int32))
    config, extras = settled_config(source)
    config.pop("torch_dtype", None)
    config["dtype"] = str(kept_dtype).removeprefix("torch.")
    config["quantization_config"] = write_form(form, ["lm_head"])

    def calibrated(text: str) -> Iterator[tuple[str, Tensor]]:
        from .calibrate import gptq_layers

        ids = source.tokenizer.encode(text)
        yield from ((name, tensor) for name, tensor in source.tensors.stream() if name in shapes and name not in chosen)
        for name, saved in gptq_layers(shape, source.tensors, ids, form, scale_dtype, cancelled):
            for part, value in saved.items():
                yield f"{name.removesuffix('.weight')}.{part}", value

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with Quantizer(form, scale_dtype) as quantizer:
            for name, tensor in source.tensors.stream():
                if name in chosen:
                    for part, value in quantizer(tensor, name).items():
                        yield f"{name.removesuffix('.weight')}.{part}", value
                elif not name.endswith(IGNORED):
                    yield name, tensor
                source.tensors.forget(tensor)

    notes = list(source.notes)
    if not form.symmetric:
        notes.append(
            "Written with zero points, which transformers 5.23 with compressed-tensors 0.20 does not read: write with"
            " --symmetric for it."
        )
    made = tensors() if calibration is None else calibrated(calibration)
    return write_folder(source, target, config, shape, infos, made, notes, shard_bytes, on_progress, cancelled, extras)


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer inside the decoder's layers."""
    return name.endswith("_proj.weight")


class Quantizer:
    """Quantises weights in blocks of rows, several blocks at once. A context manager: it keeps threads."""

    def __init__(self, form: QuantFormat, scale_dtype: torch.dtype) -> None:
        self.form, self.scale_dtype = form, scale_dtype
        self._workers = Workers()

    def __enter__(self) -> Quantizer:
        self._pool = self._workers.__enter__()
        return self

    def __exit__(self, *rest: object) -> None:
        self._workers.__exit__(*rest)

    def __call__(self, weight: Tensor, name: str = "A weight") -> dict[str, Tensor]:
        """The saved tensors of a weight [N, K]; equal to `quant_linear.save_form`. UserError when it is not finite."""
        outputs, inputs = weight.shape
        parts = self.form.shapes(outputs, inputs)
        packed = torch.empty(parts["weight_packed"], dtype=torch.int32)
        scale = torch.empty(parts["weight_scale"], dtype=self.scale_dtype)
        zero = None if self.form.symmetric else torch.empty(parts["weight_scale"], dtype=torch.uint8)

        def block(start: int) -> None:
            stop = min(start + ROWS, outputs)
            q, scale[start:stop], zeros = quantize_rows(weight[start:stop], self.form, self.scale_dtype, name)
            packed[start:stop] = pack_bits(q, self.form.bits)
            if zero is not None and zeros is not None:
                zero[start:stop] = zeros

        waiting: deque[Future[None]] = deque()
        for start in range(0, outputs, ROWS):
            waiting.append(self._pool.submit(block, start))
            if len(waiting) > 4 * self._workers.threads:
                waiting.popleft().result()
        for future in waiting:
            future.result()
        saved = {"weight_packed": packed, "weight_scale": scale}
        if zero is not None:
            saved["weight_zero_point"] = pack_bits(zero.t().contiguous(), self.form.bits).t().contiguous()
        return {**saved, "weight_shape": torch.tensor([outputs, inputs])}
