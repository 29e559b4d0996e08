"""The 13B shape at 256K tokens on one card: peak memory, a token of writing, a chunk of reading at the context's end.

Weights are random and made on the card, layer by layer, and the cache is filled with noise instead of being read, so
that the whole takes minutes: what is measured is memory and time, not text. Each pair of weights and cache is a process
of its own; one that does not fit says so. Writes results/gpu_13b.json.

    python benchmarks/gpu_13b.py [--context 262144] [--weights bf16 int8 int4] [--caches full int8 int4]
    python benchmarks/gpu_13b.py --host          the cache in the machine's memory; written as gpu_13b_host.json
    python benchmarks/gpu_13b.py --tiny          a small shape, on the CPU: only shows that the script runs
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

SHAPE = {
    "model_type": "xverse", "vocab_size": 100_534, "hidden_size": 5120, "intermediate_size": 13_824,
    "num_hidden_layers": 40, "num_attention_heads": 40, "max_position_embeddings": 262_144, "rms_norm_eps": 1e-6,
    "rope_theta": 500_000.0,
}  # fmt: skip
TINY = SHAPE | {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
CHUNK = 512  # read at once, of which the speed of reading is told
TOKENS = 16  # written


def measure(weights: str, format: str, context: int, tiny: bool, host: bool) -> dict[str, Any]:
    import torch

    from longverse.models.cache import KVCache
    from longverse.models.network import NetworkConfig, skeleton
    from longverse.models.quant_linear import quantize_network

    device = torch.device("cpu" if tiny else "cuda")
    config = NetworkConfig.from_dict(TINY if tiny else SHAPE)
    network = skeleton(config).bfloat16().eval().requires_grad_(False)

    def fill(part: torch.nn.Module) -> None:
        part.to_empty(device=device)
        for name, tensor in part.state_dict().items():
            tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02)

    with torch.inference_mode():
        for layer in network.model.layers:  # one at a time in bf16, then rounded: the card never holds them all so
            fill(layer)
            if weights != "bf16":
                quantize_network(layer, int(weights[3:]))
        for part in (network.model.embed_tokens, network.model.norm, network.lm_head):
            fill(part)
        cache = KVCache(
            config.num_layers, config.num_kv_heads, config.head_dim, context, torch.bfloat16, device, format=format,
            home=("cpu:0" if tiny else "cpu") if host else None,  # cpu:0 counts as another device than cpu
        )  # fmt: skip
        for name, array in cache.storage().items():
            if name == "recent_tokens":
                continue
            for layer_part in array:
                if array.dtype.is_floating_point:
                    layer_part.normal_(0, 0.02)
                else:
                    layer_part.random_(0, 100)
        past = context - CHUNK - TOKENS - 1
        cache.restore(past)

        def forward(ids: list[int]) -> None:
            positions = torch.arange(cache.length, cache.length + len(ids), device=device)[None]
            hidden = network.model(torch.tensor([ids], device=device), positions, context, cache.attend)
            cache.advance(len(ids))
            network.lm_head(hidden[:, -1]).argmax().item()  # awaits the card

        begun = time.perf_counter()
        forward(list(range(CHUNK)))
        chunk = time.perf_counter() - begun
        forward([1])
        begun = time.perf_counter()
        for _ in range(TOKENS):
            forward([1])
        token = (time.perf_counter() - begun) / TOKENS
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    found = {"chunk_seconds": chunk, "token_seconds": token, "peak_bytes": peak}
    return {**found, "cache_bytes": sum(x.nbytes for x in cache.storage().values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=262_144)
    parser.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--caches", nargs="+", default=["full", "int8", "int4"], choices=["full", "int8", "int4"])
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.context = min(options.context, 2048)
    if options.worker:
        print(json.dumps(measure(*options.worker, options.context, options.tiny, options.host)))
        return
    from common import table, write_results

    rows: dict[str, Any] = {}
    lines = []
    for weights in options.weights:
        for format in options.caches:
            command = [sys.executable, __file__, "--context", str(options.context), "--worker", weights, format]
            command += ["--tiny"] * options.tiny + ["--host"] * options.host
            done = subprocess.run(command, capture_output=True, text=True, timeout=580)
            name = f"{weights} weights, {format} cache"
            if done.returncode:
                rows[name] = {"failed": done.stderr.strip().splitlines()[-1]}
                lines.append([name, "–", "–", "–", rows[name]["failed"][:80]])
                continue
            rows[name] = row = json.loads(done.stdout.splitlines()[-1])
            lines.append(
                [
                    name, f"{row['cache_bytes'] / 2**30:.1f}", f"{row['peak_bytes'] / 2**30:.1f}",
                    f"{1 / row['token_seconds']:.1f}", f"{CHUNK / row['chunk_seconds']:,.0f}",
                ]
            )  # fmt: skip
    print(table(["", "cache GiB", "peak GiB", "written, tokens/s", "read at the end, tokens/s"], lines))
    if not options.tiny:
        print(write_results("gpu_13b_host" if options.host else "gpu_13b", {"context": options.context, "rows": rows}))


if __name__ == "__main__":
    main()
