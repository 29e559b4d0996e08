"""The Triton kernel for one token, in Triton's interpreter on the CPU, against the cache's own reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from longverse.models.attention import folded_attention
from longverse.models.cache import KVCache
from longverse.models.kernels.gpu_decode import SplitK

generator = torch.Generator().manual_seed(0)
worst = {}
for format in ("full", "int8", "int4"):
    for heads, kv_heads, size in ((9, 3, 64), (4, 4, 128), (6, 2, 96)):
        every = ((1, 4), (64, 1), (65, 4), (130, 3), (500, 5))
        for length, most in every if heads == 9 else every[2:4]:
            cache = KVCache(2, kv_heads, size, 1024, torch.float32, format=format)
            for begin in range(0, length - 1, 200):  # in chunks, as a prompt is read
                count = min(200, length - 1 - begin)
                for layer in range(2):
                    k, v, q = (torch.randn(1, n, count, size, generator=generator) for n in (kv_heads, kv_heads, heads))
                    cache.attend(layer, q, k, v)
                cache.advance(count)
            k, v, q = (torch.randn(1, n, 1, size, generator=generator) for n in (kv_heads, kv_heads, heads))
            cache._kernel = lambda heads: None
            expected = [cache.attend(layer, q, k, v) for layer in range(2)]  # appends the token, too
            kernel = SplitK(cache, heads)
            kernel.most = most
            for layer in range(2):
                got = kernel.attend(layer, q, cache.spans(length))
                worst[format] = max(worst.get(format, 0.0), float((got - expected[layer]).abs().max()))
assert SplitK.of(cache, 6) is not None
assert SplitK.of(KVCache(2, 2, 64, 64, torch.float32), 6) is None
print(worst)
assert max(worst.values()) < 2e-5, worst
for format in ("full", "int8", "int4"):  # 16-bit products, as on cards (Triton interprets bfloat16 wrongly)
    cache = KVCache(1, 2, 64, 512, torch.float16, format=format)
    k, v = (torch.randn(1, 2, 300, 64, generator=generator).half() for _ in range(2))
    cache.attend(0, torch.randn(1, 6, 300, 64, generator=generator).half(), k, v)
    cache.advance(300)
    k, v, q = (torch.randn(1, n, 1, 64, generator=generator).half() for n in (2, 2, 6))
    cache._kernel = lambda heads: None
    expected = cache.attend(0, q, k, v).float()
    got = SplitK(cache, 6).attend(0, q, cache.spans(301)).float()
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < 2e-2, (format, error)
"""


@pytest.mark.skipif(__import__("importlib.util").util.find_spec("triton") is None, reason="triton is not installed")
def test_split_k_equals_the_reference() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=root, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
