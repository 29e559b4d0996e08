"""Small checkpoint folders for the tests of loading: a byte-level BPE tokenizer and random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from longverse.models.network import NetworkConfig
from tests.helpers import random_tensors, tiny_config

SPECIALS = ["<pad>", "<|startoftext|>", "<|endoftext|>"]


def save_tokenizer(folder: Path, vocab_size: int = 151) -> None:
    """A byte-level tokenizer of `vocab_size` tokens at most: special tokens, printable ASCII, a few merges."""
    letters = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("Ġ", "a")]
    words = SPECIALS + letters + ["".join(pair) for pair in merges]
    assert len(words) <= vocab_size
    backend = Backend(models.BPE({word: n for n, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "pad_token": SPECIALS[0], "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_folder(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a safetensors folder of a random tiny model; returns its tensors (float32, before rounding to dtype)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config or tiny_config()
    tensors = random_tensors(NetworkConfig.from_dict(config))
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    stored = {name: tensor.to(dtype) for name, tensor in {**tensors, **(extra or {})}.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
        return tensors
    names = sorted(stored)
    index = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[n::shards]}
        save_file(part, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tensors
