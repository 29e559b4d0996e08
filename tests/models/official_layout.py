"""Random checkpoints laid out as the official XVERSE repositories are: several `.bin` shards, old `inv_freq` entries, a
config.json without a word on RoPE, and tokenizer files of an old version."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from longverse.models.network import NetworkConfig
from tests.helpers import random_tensors

OLD_TOKENIZERS = Path(__file__).parent.parent / "fixtures" / "old_tokenizer"
LONG_NAME = "XVERSE-13B-256K"  # the name by which the release is recognised


def official_config(**changes: Any) -> dict[str, Any]:
    """config.json as XVERSE-13B-256K has it, with small sizes."""
    config = {
        "architectures": ["XverseForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM"},
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 32768,
        "max_tokenizer_truncation": 262144,
        "model_type": "xverse",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.30.2",
        "use_cache": False,
        "vocab_size": 1024,
    }  # fmt: skip
    return {**config, **changes}


def make_official(
    home: Path,
    name: str = LONG_NAME,
    *,
    shards: int = 3,
    dtype: torch.dtype = torch.float32,
    tokenizer: str = "0.15.2-plain.json",
    zipped: bool = True,
    **changes: Any,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write such a folder; returns it and its weights (in `dtype`).

    `zipped` False writes the pickles of torch below 1.6.
    """
    folder = home / name
    folder.mkdir(parents=True)
    old = OLD_TOKENIZERS / tokenizer
    vocabulary = json.loads(old.read_text(encoding="utf-8"))
    config = official_config(**{"vocab_size": vocabulary_size(vocabulary), **changes})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({key: config[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id") if key in config})
    )
    shutil.copyfile(old, folder / "tokenizer.json")
    names = ("unk", "pad", "bos", "eos")
    tokens = dict(
        zip((f"{n}_token" for n in names), ("<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>"), strict=True)
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "modeling_xverse.py").write_text("raise RuntimeError('the code beside the weights must not run')\n")
    (folder / "MODEL_LICENSE.pdf").write_bytes(b"%PDF")
    tensors = {n: t.to(dtype) for n, t in random_tensors(NetworkConfig.from_dict(config)).items()}
    stored = dict(tensors)
    size = config["hidden_size"] // config["num_attention_heads"]
    for layer in range(config["num_hidden_layers"]):
        frequencies = 1.0 / 10_000 ** (torch.arange(0, size, 2).float() / size)
        stored[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies
    order = list(stored)
    index = {}
    for n in range(shards):
        file = f"pytorch_model-{n + 1:05}-of-{shards:05}.bin"
        part = {key: stored[key] for key in order[n * len(order) // shards : (n + 1) * len(order) // shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
        index.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder, tensors


def vocabulary_size(tokenizer: dict[str, Any]) -> int:
    """Embeddings that a tokenizer.json needs."""
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    return max(ids) + 1
