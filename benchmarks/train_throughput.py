"""Training speed and memory: our loop against transformers' Trainer with PEFT, one run, one machine, the same examples.

    python benchmarks/train_throughput.py --tokens 1024 2048 --steps 3
    python benchmarks/train_throughput.py --loss            our loss against F.linear_cross_entropy and the plain one
    python benchmarks/train_throughput.py --attention       attention's ways on this processor, forward and backward

LoRA of rank 16 on all projections of smol, in bf16 where the processor multiplies it, else in float32; one conversation
a step, labels on its last answers, AdamW. Both sides get the same ids and labels; Trainer gets activation checkpointing
as ours does above `--recompute-above` tokens. Each side runs in a process of its own, in turn, so that peaks are its
own; both losses are kept beside the speeds. Seconds are given twice: by the clock, and of processor time, which other
programs on the machine disturb less.
Writes benchmarks/results/train_throughput.json (or train_loss.json, train_attention.json) with the machine in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import table, write_results

HERE = Path(__file__).resolve().parent


def number() -> str:
    """The type that both sides compute in."""
    from longverse.models.checkpoint import cpu_has_bfloat16

    return "bfloat16" if cpu_has_bfloat16() else "float32"


def examples(tokens: int, steps: int, vocabulary: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and label spans: eight answers of twelve tokens in the last tenth."""
    import random

    rng = random.Random(tokens)
    made = []
    for _ in range(steps):
        ids = [rng.randrange(100, vocabulary) for _ in range(tokens)]
        made.append((ids, [(tokens - 20 * n - 14, tokens - 20 * n - 2) for n in range(8)]))
    return made


def ours(tokens: int, steps: int, recompute: bool) -> dict[str, Any]:
    import numpy as np
    import torch

    from longverse.models.checkpoint import load
    from longverse.train.config import Lora
    from longverse.train.examples import Example
    from longverse.train.forward import LossModel
    from longverse.train.lora import add_lora
    from longverse.train.rows import make_rows
    from longverse.train.state import trained

    network = load("smol", dtype=number()).network
    add_lora(network, Lora())
    model = LossModel(network).train()
    parameters = list(trained(network).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    base, times, losses = peak(), [], []
    works: list[float] = []
    for ids, spans in examples(tokens, steps + 1, network.config.vocab_size):
        started, worked = time.perf_counter(), time.process_time()
        rows, total = make_rows([Example(np.array(ids), tuple((a, b, 1.0) for a, b in spans), "x")], "token", tokens)
        loss = model(rows[0], recompute=recompute) / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
        works.append(time.process_time() - worked)
        losses.append(float(loss.detach()))
    return {"seconds": times[1:], "cpu_seconds": works[1:], "losses": losses, "peak": peak(), "loaded": base}


def trainer(tokens: int, steps: int, recompute: bool) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from longverse.models.checkpoint import load

    loaded = load("smol", dtype=number())
    config = {key: value for key, value in loaded.config.items() if key not in ("model_type", "architectures", "dtype")}
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model = model.to_empty(device="cpu").to(getattr(torch, number()))
    model.load_state_dict(loaded.network.state_dict(), strict=True)
    for module in model.modules():  # a buffer that to_empty left blank
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(model.config)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    del loaded
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    if recompute:
        model.enable_input_require_grads()
    rows = []
    for ids, spans in examples(tokens, steps + 1, model.config.vocab_size):
        labels = [-100] * tokens
        for first, end in spans:
            labels[first:end] = ids[first:end]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * tokens})
    times: list[float] = []
    works: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started, self.worked = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.started)
            works.append(time.process_time() - self.worked)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            max_steps=steps + 1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=number() == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=recompute,
            train_sampling_strategy="sequential",
            dataloader_num_workers=0,
            disable_tqdm=True,
        )
        base = peak()
        run = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()])
        run.train()
    return {"seconds": times[1:], "cpu_seconds": works[1:], "losses": losses, "peak": peak(), "loaded": base}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loss_paths(vocabulary: int = 49_152, size: int = 576, labels: int = 1024) -> list[dict[str, Any]]:
    """Forward and backward seconds and peak bytes of three ways to a weighted loss."""
    rows = []
    for name in ("ours", "F.linear_cross_entropy", "plain"):
        text = f"import train_throughput as t; t.one_loss({name!r}, {vocabulary}, {size}, {labels})"
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=HERE)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def one_loss(name: str, vocabulary: int, size: int, labels: int) -> None:
    import torch
    import torch.nn.functional as F

    from longverse.train.loss import weighted_nll

    torch.manual_seed(0)
    head = (torch.randn(vocabulary, size) * 0.02).bfloat16()
    hidden = torch.randn(labels, size).bfloat16().requires_grad_()
    targets, weights = torch.randint(0, vocabulary, (labels,)), torch.rand(labels)
    before, times, value = peak(), [], 0.0
    for _ in range(3):
        hidden.grad = None
        started = time.perf_counter()
        if name == "ours":
            loss = weighted_nll(hidden, head, targets, weights)
        elif name == "plain":
            loss = (F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none") * weights).sum()
        else:
            options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
            per_label = F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options)  # type: ignore[attr-defined]
            loss = (per_label.float() * weights).sum()
        loss.backward()
        times.append(time.perf_counter() - started)
        value = float(loss.detach())
    print(json.dumps({"way": name, "seconds": min(times), "peak_bytes": peak() - before, "loss": value}))


def attention_paths() -> list[dict[str, Any]]:
    """Milliseconds of attention in bfloat16 with the shape of smol's layers: torch's flash kernel, products of blocks,
    and AMX tiles where there are any. The ways take turns."""
    import torch

    from longverse.train import cpu_attention, rows

    torch.manual_seed(0)
    found = []
    for lengths in ([128] * 32, [2048], [8192]):
        bounds = tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))
        q, k, v, slope = (torch.randn(1, bounds[-1], n, 64).bfloat16().transpose(1, 2) for n in (9, 3, 3, 9))
        ways = {
            "torch": partial(rows.plain_attention(lengths), 0),
            "blocks": lambda q, k, v, at=bounds: cpu_attention.causal_attention(q, k, v, list(at)),
        }
        if cpu_attention.tiles_here(q):
            ways["tiles"] = lambda q, k, v, at=bounds: cpu_attention.tile_attention(q, k, v, list(at))[0]
        best = {name: [1e9, 1e9] for name in ways}
        for _ in range(4):
            for name, way in ways.items():
                given = [x.detach().requires_grad_() for x in (q, k, v)]
                times = [time.perf_counter()]
                out = way(*given)
                times.append(time.perf_counter())
                out.backward(slope)
                times.append(time.perf_counter())
                best[name] = [min(best[name][n], (times[n + 1] - times[n]) * 1e3) for n in range(2)]
        found += [{"lengths": lengths, "way": name, "ms": best[name]} for name in ways]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute-above", type=int, default=2048)
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--name", help="another name for the result file")
    parser.add_argument("--side", choices=["ours", "trainer"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        side = {"ours": ours, "trainer": trainer}[asked.side]
        print(json.dumps(side(asked.tokens[0], asked.steps, asked.tokens[0] > asked.recompute_above)))
        return
    if asked.loss:
        rows = loss_paths()
        print(write_results(asked.name or "train_loss", {"rows": rows}))
        cells = [
            [row["way"], f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}", f"{row['loss']:.3f}"]
            for row in rows
        ]
        print(table(["way", "seconds", "MB", "loss"], cells))
        return
    if asked.attention:
        rows = attention_paths()
        print(write_results(asked.name or "train_attention", {"heads": [9, 3, 64], "rows": rows}))
        cells = [
            [f"{len(r['lengths'])} of {r['lengths'][0]:,}", r["way"], *(f"{ms:.1f}" for ms in r["ms"])] for r in rows
        ]
        print(table(["documents", "way", "forward, ms", "backward, ms"], cells))
        return
    rows, cells = [], []
    for tokens in asked.tokens:
        row: dict[str, Any] = {"tokens": tokens}
        for side_name in ("ours", "trainer"):
            command = [sys.executable, __file__, "--side", side_name, "--tokens", str(tokens), "--steps"]
            command += [str(asked.steps), "--recompute-above", str(asked.recompute_above)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{side_name} at {tokens} tokens failed:\n{done.stderr[-2000:]}")
            found = row[side_name] = json.loads(done.stdout.splitlines()[-1])
            found["tokens_per_second"] = tokens / min(found["seconds"])
            found["tokens_per_cpu_second"] = tokens / min(found["cpu_seconds"])
        for name in ("tokens_per_second", "tokens_per_cpu_second"):
            row[f"{name}_ratio"] = row["ours"][name] / row["trainer"][name]
        row["memory_ratio"] = row["ours"]["peak"] / row["trainer"]["peak"]
        rows.append(row)
        for side_name in ("ours", "trainer"):
            found = row[side_name]
            speeds = [f"{found[name]:.0f}" for name in ("tokens_per_second", "tokens_per_cpu_second")]
            cells.append([f"{tokens:,}", side_name, *speeds, f"{found['peak'] / 1e9:.2f}", f"{found['losses'][0]:.3f}"])
        print(table(["tokens", "side", "tok/s", "tok/s of processor time", "peak GB", "first loss"], cells), flush=True)
    print(write_results(asked.name or "train_throughput", {"dtype": number(), "steps": asked.steps, "rows": rows}))


if __name__ == "__main__":
    main()
