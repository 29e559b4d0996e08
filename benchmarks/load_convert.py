"""Loading and converting a large checkpoint of `.bin` shards: peak memory and time, beside transformers and the disk.

A 7B-shaped official folder (bf16, several shards, no RoPE in its config) is made shard by shard from random numbers;
`--layers` scales it down, since a whole 7B takes 14 GB of disk. Every measurement is a process of its own, and its peak
resident memory (VmHWM: pages of mapped files count) is set against the size of the weights in the format it ends in.
Loading is complete when every weight has been read once.

    python benchmarks/load_convert.py [--layers 4] [--folder DIR]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import table, write_results

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TOKENIZER = ROOT / "tests" / "fixtures" / "old_tokenizer" / "0.15.2-plain.json"


# ---- the checkpoint ----------------------------------------------------------------------------------------


def make(folder: Path, layers: int, layers_a_shard: int = 2) -> int:
    """Write the folder; returns the bytes of its weights. Memory: one shard."""
    folder.mkdir(parents=True)
    config = {**SHAPE, "num_hidden_layers": layers, "model_type": "xverse", "architectures": ["XverseForCausalLM"]}
    config |= {
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    config |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "use_cache": False, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.json")
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    pool = torch.randn(1 << 24).mul_(0.02).bfloat16()  # drawn once: random numbers are slower than the disk

    def draw(*size: int) -> torch.Tensor:
        count = torch.Size(size).numel()
        start = int(torch.randint(0, 1 << 20, (1,)))
        return pool[start:].repeat(-(-count // (pool.numel() - start)))[:count].view(*size).clone()

    hidden, wide, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    parts: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, hidden)}]
    for first in range(0, layers, layers_a_shard):
        part: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + layers_a_shard, layers)):
            name = f"model.layers.{layer}"
            part |= {f"{name}.self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
            part |= {f"{name}.mlp.{x}_proj.weight": (wide, hidden) for x in ("gate", "up")}
            part |= {f"{name}.mlp.down_proj.weight": (hidden, wide)}
            part |= {f"{name}.{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
        parts.append(part)
    parts.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)})
    index, total = {}, 0
    for number, part in enumerate(parts):
        file = f"pytorch_model-{number + 1:05}-of-{len(parts):05}.bin"
        tensors = {name: draw(*size) for name, size in part.items()}
        torch.save(tensors, folder / file)
        index |= dict.fromkeys(part, file)
        total += sum(t.nbytes for t in tensors.values())
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


# ---- what runs in a process of its own ---------------------------------------------------------------------


def touch(tensors: Any) -> float:
    """Read every weight once."""
    return sum(float(t.flatten()[:: 2048 // t.element_size()].float().sum()) for t in tensors)


def job(name: str, source: str, target: str) -> dict[str, Any]:
    """One piece of work; returns its figures. Imports come first, since they are no part of loading."""
    if name.startswith("ours load"):
        from longverse.models.checkpoint import load

        dtype = "float32" if name.endswith("float32") else "bfloat16"
        work: Callable[[], Any] = lambda: load(source, dtype=dtype, device="cpu")  # noqa: E731
    elif name.startswith("transformers load"):
        from transformers import LlamaForCausalLM

        dtype = torch.float32 if name.endswith("float32") else torch.bfloat16
        work = lambda: LlamaForCausalLM.from_pretrained(source, dtype=dtype)  # noqa: E731
    elif name.startswith("convert"):
        from longverse.models.convert import convert

        work = lambda: convert(source, Path(target), dtype=name.split()[-1])  # noqa: E731
    else:
        from longverse.models.quantize import quantize

        bits = int(name.split()[0].removeprefix("int"))
        work = lambda: quantize(source, Path(target), bits=bits, symmetric="symmetric" in name)  # noqa: E731
    base = memory("VmRSS")
    start = time.perf_counter()
    result = work()
    if "load" in name:
        network = getattr(result, "network", result)
        state = list(network.state_dict().values())
        touch(t for t in state if t.is_floating_point())
        for tensor in state:
            if not tensor.is_floating_point():
                tensor.view(torch.uint8).flatten()[::4096].sum()
        final = sum({t.data_ptr(): t.nbytes for t in state}.values())
    else:
        final = result.written_bytes
    return {
        "seconds": time.perf_counter() - start,
        "imports_bytes": base,
        "peak_bytes": memory("VmHWM"),
        "final_bytes": final,
    }


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run(name: str, source: Path, target: Path | None = None) -> dict[str, Any]:
    """`job` in a fresh process."""
    command = [sys.executable, __file__, "--job", name, "--source", str(source), "--target", str(target or "")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LONGVERSE_COMMAND": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- limits of the machine ---------------------------------------------------------------------------------


def limits(folder: Path, count: int = 1 << 29) -> dict[str, float]:
    """MB/s that the disk writes (synced) and that memory is copied with, one thread and all."""
    data = torch.ones(count, dtype=torch.uint8)
    path = folder / "speed"
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(data.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    path.unlink()
    copy = torch.empty_like(data)
    copy.copy_(data)
    start = time.perf_counter()
    copy.copy_(data)
    copied = time.perf_counter() - start
    return {"disk_write_mb_s": count / 1e6 / written, "memory_copy_mb_s": count / 1e6 / copied}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the 32 of a 7B")
    parser.add_argument("--small", action="store_true", help="a sixteenth of the width: to try the script")
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    parser.add_argument("--job")
    parser.add_argument("--source")
    parser.add_argument("--target")
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(job(arguments.job, arguments.source, arguments.target)))
        return
    if arguments.small:
        SHAPE.update(hidden_size=256, intermediate_size=704, num_attention_heads=4)
    home = Path(tempfile.mkdtemp(prefix="load-convert-", dir=arguments.folder))
    try:
        source = home / "official"
        size = make(source, arguments.layers)
        llama = home / "llama"  # the same shards under a config that transformers' Llama class takes
        shutil.copytree(source, llama, copy_function=os.link)
        (llama / "config.json").unlink()
        config = json.loads((source / "config.json").read_text()) | {"model_type": "llama"}
        (llama / "config.json").write_text(json.dumps(config))
        plan = [
            ("ours load bfloat16", source, None),
            ("transformers load bfloat16", llama, None),
            ("ours load float32", source, None),
            ("transformers load float32", llama, None),
            ("convert to bfloat16", source, home / "bf16"),
            ("int8 from .bin", source, home / "int8"),
            ("int4 from .bin", source, home / "int4"),
            ("int4 symmetric from .bin", source, home / "int4s"),
            ("ours load int8", home / "int8", None),
            ("ours load int4", home / "int4", None),
        ]
        results: dict[str, Any] = {}
        rows = []
        for name, where, target in plan:
            figures = results[name] = run(name, where, target)
            over = (figures["peak_bytes"] - figures["final_bytes"]) / 1e9
            read = "-" if "load" in name else f"{size / 1e6 / figures['seconds']:,.0f}"
            rows.append(
                [
                    name,
                    f"{figures['seconds']:.1f}",
                    f"{figures['final_bytes'] / 1e9:.2f}",
                    f"{figures['peak_bytes'] / 1e9:.2f}",
                    f"{over:+.2f}",
                    read,
                ]
            )
        speed = limits(home)
        print(f"{size / 1e9:.2f} GB of bf16 weights in .bin shards, {arguments.layers} layers\n")
        print(table(["", "seconds", "final GB", "peak GB", "peak - final", "MB/s of input"], rows))
        print(
            f"\ndisk writes {speed['disk_write_mb_s']:,.0f} MB/s, memory copies {speed['memory_copy_mb_s']:,.0f} MB/s"
        )
        if not arguments.small:
            shape = {**SHAPE, "layers": arguments.layers, "input_bytes": size}
            print(write_results("load_convert", {"shape": shape, "limits": speed, "jobs": results}))
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
