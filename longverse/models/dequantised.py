"""A quantised checkpoint's tensors read as float ones: for whatever works on plain weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .quant_linear import SAVED_NAMES, QuantFormat, load_form
from .shards import TensorInfo, Tensors


class DequantisedTensors:
    """The tensors of a checkpoint whose linear layers are saved as `form`, each of those as one weight [N, K] that is
    made in `dtype`, one at a time. `infos` gives it the type of its scales, which is what it holds digits for."""

    def __init__(self, base: Tensors, form: QuantFormat, dtype: torch.dtype) -> None:
        self.base, self.form, self.dtype = base, form, dtype
        self.infos: dict[str, TensorInfo] = {}  # shape and dtype by name, in the base's order
        for name, info in base.infos.items():
            module, _, ending = name.rpartition(".")
            if ending == "weight_packed":
                outputs, words = info.shape
                shape = (outputs, words * 32 // form.bits)
                self.infos[f"{module}.weight"] = TensorInfo(shape, base.infos[f"{module}.weight_scale"].dtype)
            elif ending not in (*SAVED_NAMES, "weight_shape"):
                self.infos[name] = info

    def get(self, name: str) -> Tensor:
        """One tensor, dequantised."""
        module = name.removesuffix(".weight")
        if f"{module}.weight_packed" not in self.base.infos:
            return self.base.get(name)
        parts = {part: f"{module}.{part}" for part in SAVED_NAMES}
        saved = {part: self.base.get(held) for part, held in parts.items() if held in self.base.infos}
        return load_form(saved, self.form, self.dtype)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, in the base's order. What one is made of is let go of when the next is asked for."""
        for name, tensor in self.base.stream():
            module, _, ending = name.rpartition(".")
            if ending == "weight_packed":
                yield f"{module}.weight", self.get(f"{module}.weight")
            elif name in self.infos:
                yield name, tensor
            self.base.forget(tensor)

    def forget(self, tensor: Tensor) -> None:
        """Nothing: a dequantised tensor is of ordinary memory, and what it was made of is let go of in `stream`."""

    def is_mapped(self, name: str) -> bool:
        """Whether a tensor is a view of a file, whose memory the system only lends."""
        return name in self.base.infos and self.base.is_mapped(name)

    def origin(self, name: str) -> str:
        """What an error message calls the place of a tensor."""
        return self.base.origin(name if name in self.base.infos else f"{name}_packed")
