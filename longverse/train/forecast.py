"""What a stage will take, before it begins: time from two dry rows, memory from what a dry row keeps; and how much this
machine could do at best."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longverse.errors import UserError
from longverse.inference.engine import free_on_card
from longverse.train.config import Recipe, Stage
from longverse.train.cpu_attention import tile_bytes, tiles_here
from longverse.train.examples import Example, Mixture
from longverse.train.forward import LossModel
from longverse.train.loss import loss_chunk
from longverse.train.muon import is_turned
from longverse.train.parallel import Ranks
from longverse.train.rows import Row, make_row
from longverse.train.state import trained

SHORT, LONG = 256, 1024  # tokens of the two dry rows
# 10^12 dense bfloat16 operations a second, from the makers' data sheets, by what the card's name holds.
CARDS = {
    "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "GH200": 989, "B200": 2250, "A100": 312,
    "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A40": 150, "A6000": 155, "4090": 165, "3090": 71,
}  # fmt: skip
SQUARE = 1024  # rows and columns of the matrices whose product is timed on a CPU


@dataclass(frozen=True)
class Forecast:
    """Of one stage on all ranks. Seconds are those of the steps alone; bytes are of one rank."""

    steps: int
    tokens: int
    longest: int  # tokens of the longest example
    seconds: float
    weight_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and moments, and activations of the longest row."""
        return self.weight_bytes + self.optimizer_bytes + self.activation_bytes


def forecast(model: LossModel, mixture: Mixture, stage: Stage, recipe: Recipe, ranks: Ranks) -> Forecast:
    """Measure two short rows and extend to the stage's lengths: a * tokens + b * sum of squares. Nothing is updated.

    Raises UserError when the longest row cannot fit the memory at hand.
    """
    model.train()
    times, kept = [], 0
    for tokens in (SHORT, LONG):
        row = _dry_row(tokens, model.network.config.vocab_size).to(ranks.device)
        _pass(model, row)  # the first pass also pays for allocations
        seconds, kept = _pass(model, row)
        times.append(seconds)
    # t = a T + b T^2 through both points; noise must not make either negative
    b = max(0.0, (times[1] / LONG - times[0] / SHORT) / (LONG - SHORT))
    a = max(times[1] / LONG - b * LONG, 0.1 * times[1] / LONG)
    per_token = kept / LONG
    again = 4 / 3 if recipe.method == "full" else 3 / 2  # linear work of a row that is computed anew in its backward
    total = squares = longest = widest = 0
    linear = 0.0
    for lengths in mixture.lengths():
        width = min(int(lengths.sum()), max(stage.micro_tokens, int(lengths.max())))
        total += int(lengths.sum())
        linear += int(lengths.sum()) * (again if width > stage.recompute_above else 1.0)
        squares += int((lengths.astype(np.float64) ** 2).sum())
        longest, widest = max(longest, int(lengths.max())), max(widest, width)
    shape = model.network.config
    layer_inputs = 2 * shape.hidden_size * model.network.model.norm.weight.element_size() * shape.num_layers
    part = widest / ranks.sequence
    if widest > stage.recompute_above:
        activations = part * ((0 if stage.offload else layer_inputs) + 2 * per_token / shape.num_layers)
    else:
        activations = part * per_token
    # A chunk of logits: as they come, in float32 and as gradients (train/loss.py).
    activations += loss_chunk(ranks.device) * shape.vocab_size * 8
    products = torch.bfloat16 if model.autocast else model.network.dtype
    if tiles_here(torch.empty(0, shape.head_dim, dtype=products, device=ranks.device)):
        heads, kv_heads = (max(1, n // ranks.sequence) for n in (shape.num_heads, shape.num_kv_heads))
        activations += tile_bytes(widest, heads, kv_heads, shape.head_dim)
    parameters = sum(p.numel() * p.element_size() for p in [*model.network.parameters(), *model.network.buffers()])
    muon = recipe.optimizer == "muon"  # gradient and two moments in float32, or one
    moments = sum(p.numel() * (8 if muon and is_turned(name, p) else 12) for name, p in trained(model.network).items())
    result = Forecast(
        stage.steps,
        total,
        longest,
        (a * linear + b * squares) / ranks.data / ranks.sequence,
        parameters // ranks.world,
        moments // ranks.world,
        int(activations),
        available_memory(ranks.device),
    )
    if result.optimizer_bytes + result.activation_bytes > result.available_bytes:
        raise UserError(
            f"Stage {stage.name} needs about {(result.optimizer_bytes + result.activation_bytes) / 1e9:.1f} GB for its"
            f" longest row of {widest:,} tokens and {result.available_bytes / 1e9:.1f} GB are free: lower max_tokens or"
            " micro_tokens, set recompute_above: 0, or spread it over more ranks."
        )
    return result


def _dry_row(tokens: int, vocabulary: int) -> Row:
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens)
    return make_row([Example(ids, ((tokens - tokens // 8, tokens, 1.0),), "dry")], "token")


def _pass(model: LossModel, row: Row) -> tuple[float, int]:
    """Seconds of a forward and backward pass, and bytes kept between the two beside the weights."""
    # Gathered copies of sharded weights are counted: they are held while their layer works.
    whole = [parameter for parameter in model.parameters() if not hasattr(parameter, "device_mesh")]
    weights = {parameter.untyped_storage().data_ptr() for parameter in whole}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(row)
    loss.backward()
    if row.ids.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds, sum(kept.values())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that one processor does at best, 0 where that is not known: of a card by its name (bfloat16
    only), of a CPU the product of two large matrices timed here with as many threads as there are, in `dtype` or in
    float32, whichever is faster."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((teraflops for card, teraflops in CARDS.items() if card in name), 0)
        return known * 1e12 if dtype == torch.bfloat16 else 0.0
    if device.type != "cpu":
        return 0.0
    best, small = _product_flops(torch.float32, SQUARE), SQUARE // 8
    # Where a processor has no products of a narrow type, torch's own of this size take seconds each.
    if dtype != torch.float32 and _product_flops(dtype, small) > _product_flops(torch.float32, small) / 4:
        best = max(best, _product_flops(dtype, SQUARE))
    return best


def _product_flops(dtype: torch.dtype, size: int) -> float:
    """Operations a second of the product of two square matrices on the CPU, the best of three."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(4):  # the first one also sets up
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def available_memory(device: torch.device) -> int:
    """Bytes that a process may still take on a device."""
    if device.type == "cuda":
        return free_on_card(device)
    import psutil

    return int(psutil.virtual_memory().available)
