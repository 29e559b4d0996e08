"""LoRA of the 13B shape on one card: the share of the card's peak, and the memory, at long rows.

    python benchmarks/gpu/lora_13b.py [--tokens 32768 65536] [--labels 0.125]
    python benchmarks/gpu/lora_13b.py --tiny          a small shape, on the CPU: only shows that the script runs

Weights are random, made on the card in bfloat16; rank 16 on all projections; one document a row, layers recomputed in
the backward pass. A step is a forward and a backward pass, timed once after a shorter one. Recomputation is not
counted as work, as in `log.jsonl`. Writes benchmarks/results/lora_13b.json after every length.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import table, write_results
from gpu_13b import SHAPE, TINY

from longverse.models.network import CausalLM, NetworkConfig, skeleton
from longverse.train.config import Lora
from longverse.train.examples import Example
from longverse.train.forecast import peak_flops
from longverse.train.forward import LossModel, training_flops
from longverse.train.lora import add_lora
from longverse.train.rows import make_row
from longverse.train.state import trained


def network_on(device: torch.device, tiny: bool) -> CausalLM:
    """Random weights of the shape, filled layer by layer."""
    network = skeleton(NetworkConfig.from_dict(TINY if tiny else SHAPE)).bfloat16()
    network.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "norm" in name:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0, 0.02)
    add_lora(network, Lora(rank=16))
    return network


def step(model: LossModel, tokens: int, labels: float) -> tuple[float, float]:
    """Seconds and floating-point operations of one forward and backward pass over a row of `tokens`."""
    shape = model.network.config
    device = model.network.device
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, tokens)
    count = int(tokens * labels)
    row = make_row([Example(ids, ((tokens - count, tokens, 1.0),), "random")], "token").to(device)
    begun = time.perf_counter()
    model(row, recompute=True).backward()
    for parameter in trained(model.network).values():
        parameter.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, training_flops(shape, tokens, tokens**2, count, full=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 65_536])
    parser.add_argument("--labels", type=float, default=0.125, help="share of the tokens that are learned")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    tokens = [256, 512] if options.tiny else options.tokens
    model = LossModel(network_on(device, options.tiny))
    model.train()
    peak = peak_flops(device, torch.bfloat16)
    rows: list[dict[str, Any]] = []
    lines = []
    for count in tokens:
        step(model, min(count, 4096), options.labels)  # sets up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, work = step(model, count, options.labels)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        mfu = work / seconds / peak
        rows.append({"tokens": count, "seconds": seconds, "mfu": mfu, "peak_bytes": memory})
        lines.append([f"{count:,}", f"{seconds:.2f}", f"{count / seconds:,.0f}", f"{mfu:.1%}", f"{memory / 2**30:.1f}"])
        if not options.tiny:
            write_results("lora_13b", {"rank": 16, "labels": options.labels, "rows": rows})
    print(table(["tokens", "seconds a step", "tokens/s", "of the peak", "peak GiB"], lines))


if __name__ == "__main__":
    main()
