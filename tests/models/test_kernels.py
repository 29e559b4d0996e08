"""The compiled decoder against the network it stands for, and the choice of what it computes with."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longverse import UserError
from longverse.inference.engine import Engine
from longverse.models import kernels
from longverse.models.cache import KVCache
from longverse.models.network import CausalLM
from longverse.models.packing import Packing
from tests.helpers import random_network, tiny_config

needs_kernels = pytest.mark.skipif(bool(kernels.unavailable()), reason=f"no CPU kernels: {kernels.unavailable()}")
READ, WRITTEN = 70, 6
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "qk_norm": True},
}


def both(network: CausalLM, weights: str, format: str = "full", threads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [WRITTEN, V] after the same tokens, by the network and by the decoder, each over a cache of its own."""
    from longverse.models.kernels.decoder import Decoder

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = Decoder.of(network, weights)
        assert decoder is not None
        shape, total = network.config, READ + WRITTEN
        ids = torch.randint(0, shape.vocab_size, (1, total), generator=torch.Generator().manual_seed(3))
        sizes = (shape.num_layers, shape.num_kv_heads, shape.head_dim, total, network.dtype)
        caches = [KVCache(*sizes, format=format) for _ in range(2)]
        ours, theirs = [], []
        with torch.inference_mode():
            for cache in caches:
                network.model(ids[:, :READ], torch.arange(READ)[None], total, cache.attend)
                cache.advance(READ)
            for n in range(READ, total):
                theirs.append(network(ids[:, n : n + 1], torch.tensor([[n]]), total, caches[0].attend)[0, 0])
                caches[0].advance(1)
                logits = decoder.step(int(ids[0, n]), caches[1])
                assert logits is not None
                ours.append(logits)
        assert caches[1].length == total
        return torch.stack(theirs), torch.stack(ours)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_the_decoder_is_the_network(shape: str) -> None:
    theirs, ours = both(random_network(tiny_config(**SHAPES[shape])), "full", threads=3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_the_decoder_leaves_out_what_the_cache_does() -> None:
    from longverse.models.kernels.decoder import Decoder
    from longverse.models.sparse import Sparse

    network = random_network(tiny_config(num_key_value_heads=2, max_position_embeddings=1024))
    decoder, shape = Decoder.of(network, "full"), network.config
    assert decoder is not None
    ids = torch.randint(0, shape.vocab_size, (1, 904), generator=torch.Generator().manual_seed(3))
    caches = [KVCache(shape.num_layers, 2, shape.head_dim, 1000, torch.float32) for _ in range(3)]
    logits = []
    with torch.inference_mode():
        for cache, mass in zip(caches, (0.5, 0.5, 1.0), strict=True):
            network.model(ids[:, :900], torch.arange(900)[None], 1000, cache.attend)
            cache.advance(900)
            cache.sparse = Sparse(mass, writing=True)
            for n in range(900, 904):
                if cache is caches[0]:
                    last = network(ids[:, n : n + 1], torch.tensor([[n]]), 1000, cache.attend)[0, 0]
                    cache.advance(1)
                else:
                    step = decoder.step(int(ids[0, n]), cache)
                    assert step is not None
                    last = step
            logits.append(last)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    kept = [cache.sparse.mass_written for cache in caches if cache.sparse is not None]
    assert kept[0] == pytest.approx(kept[1], abs=2e-3)
    assert 0.5 <= kept[0] < 0.95
    assert kept[2] == 1
    assert not torch.allclose(logits[2], logits[0], rtol=1e-3, atol=1e-3)


@needs_kernels
def test_rounded_weights_are_those_of_the_packing() -> None:
    network = random_network(tiny_config(**SHAPES["everything"]))
    rounded = random_network(tiny_config(**SHAPES["everything"]))
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear):
            packing = Packing("int8" if name == "lm_head" else "int4", module.weight.shape[1], 32)
            module.weight.data = packing.dequantize(*packing.quantize(module.weight.data), torch.float32)
    # What was read before came through the unrounded network, so only one token is compared, over no past.
    from longverse.models.kernels.decoder import Decoder

    decoder, shape = Decoder.of(network, "int4"), network.config
    assert decoder is not None
    rounded.model.embed_tokens.weight.data = network.model.embed_tokens.weight.data
    cache = KVCache(shape.num_layers, shape.num_kv_heads, shape.head_dim, 4, torch.float32)
    ours = decoder.step(7, cache)
    assert ours is not None
    torch.testing.assert_close(ours, rounded(torch.tensor([[7]]))[0, 0], rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_are_the_same_wherever_they_lie(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many to a block, or in blocks too small for some of them."""
    from longverse.models.kernels import decoder

    network = random_network(tiny_config(num_key_value_heads=2))
    _, together = both(network, weights)
    monkeypatch.setattr(decoder, "BLOCK", 3000)
    _, apart = both(network, weights)
    assert torch.equal(together, apart)


@needs_kernels
def test_a_bfloat16_network_over_an_int8_cache_stays_within_their_rounding() -> None:
    network = random_network(tiny_config(num_key_value_heads=2)).bfloat16()
    theirs, ours = both(network, "int8", "int8")
    assert ((ours - theirs.float()).norm() / theirs.float().norm()).item() < 0.03


@needs_kernels
def test_auto_takes_int4_only_for_weights_that_were_four_bit() -> None:
    from longverse.models.kernels.decoder import COPY_LIMIT, Decoder, settled

    network = random_network(tiny_config())
    assert settled(network, "auto") == "int8"  # in float32, too, which many processors read prompts fastest in
    network = network.bfloat16()
    assert settled(network, "auto") == "int8"
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            packing = Packing("int4", module.weight.shape[1], 32)
            rows = packing.dequantize(*packing.quantize(module.weight.data.float()), torch.float32)
            module.weight.data = rows.bfloat16()
    assert settled(network, "auto") == "int4"
    assert COPY_LIMIT >= 1 << 30
    assert Decoder.of(random_network(tiny_config(hidden_size=40)), "full") is None


def test_the_engine_says_what_wrote_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from longverse.inference.sampling import Sampling
    from longverse.models.chat import ChatFormat
    from longverse.models.tokenizer import Tokenizer
    from tests.models.folders import save_tokenizer

    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)

    def engine() -> Engine:
        network = random_network(tiny_config(max_position_embeddings=64))
        return Engine(network, tokenizer, ChatFormat("plain", tokenizer))

    prompt, sampling = list(range(5, 30)), Sampling(max_new_tokens=8)
    compiled = engine().session(40).complete(prompt, sampling)
    if not kernels.unavailable():
        assert (compiled.stats.kernels, compiled.stats.weights) == ("compiled", "full")
    monkeypatch.setattr(kernels, "unavailable", lambda: "numba is not installed")
    plain = engine().session(40).complete(prompt, sampling)
    assert plain.stats.kernels == "torch (numba is not installed)"
    assert plain.tokens == compiled.tokens
    with pytest.raises(UserError, match="no 'int3' weights: choose one of auto, full, int8, int4"):
        Engine(random_network(tiny_config()), tokenizer, ChatFormat("plain", tokenizer), weights="int3")


def test_no_start_pays_for_kernels_it_does_not_use() -> None:
    code = "import sys, longverse.inference.engine; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_kernels
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("format", ["full", "int8"])
def test_rounded_weights_over_float32_stay_near_the_network(weights: str, format: str) -> None:
    theirs, ours = both(random_network(tiny_config()), weights, format)
    assert torch.isfinite(ours).all()
    assert (ours - theirs).norm() < {"int8": 0.05, "int4": 0.5}[weights] * theirs.norm()


@needs_kernels
def test_kernels_kept_on_disk_do_not_run_with_anothers_constants(tmp_path: Any) -> None:
    """Compiled in processes of their own, then loaded into one: the linker must not mix their pieces."""
    script = (
        "import sys, torch\n"
        "from tests.models.test_kernels import both\n"
        "from tests.helpers import random_network, tiny_config\n"
        "for weights in sys.argv[1:]:\n"
        "    theirs, ours = both(random_network(tiny_config(num_hidden_layers=1)), weights, threads=1)\n"
        "    assert (ours - theirs).norm() < 0.3 * theirs.norm(), weights\n"
    )
    environment = {**os.environ, "LONGVERSE_CACHE": str(tmp_path), "LONGVERSE_COMMAND": "1"}
    for order in (["int4"], ["full"], ["int4", "full"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *order], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-500:]


@needs_kernels
def test_the_process_that_compiles_computes_the_same_bits(tmp_path: Path) -> None:
    """A machine's first process and all later ones: a resumed run must not differ from one that was not broken off.
    Whatever it calls first: kernels hold pieces of the same names."""
    program = (
        "import hashlib, sys, torch\n"
        "from longverse.models.sparse import Sparse\n"
        "from longverse.models.cache import KVCache\n"
        "cache = KVCache(1, 3, 64, 400, torch.bfloat16)\n"
        "draw = lambda heads, tokens: torch.randn(1, heads, tokens, 64, generator=rng).bfloat16()\n"
        "rng = torch.Generator().manual_seed(0)\n"
        "cache.attend(0, draw(9, 300), draw(3, 300), draw(3, 300))\n"
        "cache.advance(300)\n"
        "kernel = cache._kernel(9)\n"
        "queries = torch.randn(1, 9, 1, 64, generator=rng)\n"
        "write = lambda: [kernel.attend(0, queries * n, cache.spans(300)) for n in range(1, 40)]\n"
        "chunk = [draw(heads, 300).float() for heads in (9, 3, 3, 9, 3, 3)]\n"
        "reader = KVCache(1, 3, 64, 700, torch.float32, kept=torch.bfloat16)\n"
        "reader.sparse = Sparse(0.7)\n"
        "reader.attend(0, *chunk[:3])\n"
        "reader.advance(300)\n"
        "ways = {'write': write, 'read': lambda: [reader.attend(0, *chunk[3:])]}\n"
        "for way in sys.argv[1:]:\n"
        "    print(way, hashlib.sha256(torch.stack(ways[way]()).numpy().tobytes()).hexdigest())\n"
        "assert 0 < reader.sparse.density < 1\n"
    )
    environment = os.environ | {"LONGVERSE_CACHE": str(tmp_path), "LONGVERSE_COMPILES": "", "LONGVERSE_COMMAND": "1"}
    seen = []
    for order in (["write", "read"], ["read", "write"]):
        command = [sys.executable, "-c", program, *order]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        seen.append(sorted(done.stdout.splitlines()))
    assert seen[0] == seen[1]
    assert list((tmp_path / "kernels").rglob("*.nbc"))


@needs_kernels
@pytest.mark.parametrize("before", [True, False])
def test_a_ctrl_c_in_the_callers_share_leaves_the_team_whole(before: bool) -> None:
    """Where it falls before the share began the others wait for it at their first meeting; after it they are done."""
    from longverse.models.kernels.team import Team, meet

    team, ran, pressed = Team(3), [0, 0, 0], False

    def share(rank: int, size: int, counter: Any) -> None:
        nonlocal pressed
        if rank == 0 and before and not pressed:
            pressed = True
            raise KeyboardInterrupt
        meet(counter, size)
        ran[rank] += 1
        meet(counter, size)
        if rank == 0 and not pressed:
            pressed = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        team.run(share)
    assert ran == [1, 1, 1]
    team.run(share)
    assert ran == [2, 2, 2]
