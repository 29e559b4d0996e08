"""A small model from nothing: a tokenizer of XVERSE's construction trained on one's own texts, and random weights.

The tokenizer: BPE whose unknown characters are spelt in bytes (`<0xE4>`), spaces are the mark `▁` with none put before
the text, digits stand alone, punctuation is isolated. Weights: normal, those that end a residual branch divided by
sqrt(2 * layers) (GPT-2's initialisation), norms 1.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longverse.errors import UserError
from longverse.models.network import NetworkConfig
from longverse.models.shards import SafetensorsWriter, TensorInfo, replacing, write_json

SPECIALS = ("<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>")
PIECE = 20_000  # characters of a text shown to the tokenizer's training at once


@dataclass(frozen=True)
class NewModel:
    """What the folder named as the recipe's model is to hold when it is not there yet.

    texts       JSON-lines files (also .gz) with a `text` a line, or plain text files
    vocabulary  tokens, special and byte tokens included
    characters  of the texts that the tokenizer's training sees, the files in equal parts
    deviation   of the weights at the beginning; GPT-2's 0.02 is for a width of 768, and narrow models want more
    window, theta  the base model's window in tokens and RoPE base
    """

    texts: tuple[str, ...]
    vocabulary: int = 6000
    characters: int = 6_000_000
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 352
    deviation: float = 0.02
    window: int = 2048
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        if not self.texts:
            raise UserError("A new model needs at least one text file for its tokenizer.")
        for name in ("hidden", "layers", "heads", "mlp", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"A new model has {getattr(self, name)} as its {name} and must have 1 or more.")
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise UserError(f"{self.heads} heads do not divide a width of {self.hidden} into even sizes.")
        if self.deviation <= 0:
            raise UserError(f"Weights of deviation {self.deviation} are all alike: take one above 0, such as 0.02.")
        if self.vocabulary < 600:
            raise UserError(f"A vocabulary of {self.vocabulary} has no room beside 260 fixed tokens: take 600 or more.")


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file: a JSON object with `text` a line (.jsonl, .jsonl.gz), or the whole file as one."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            if ".jsonl" not in path.name:
                yield file.read()
                return
            for line in file:
                yield str(json.loads(line)["text"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a text file.") from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no text file or JSON lines with a text each ({error}).") from None


def make_model(new: NewModel, folder: Path, seed: int = 0) -> None:
    """Write config, tokenizer and random weights into `folder`. The same seed makes the same files."""
    from longverse.models.tokenizer import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    backend = train_tokenizer(new, seed)
    ids = {text: backend.token_to_id(text) for text in SPECIALS}
    config: dict[str, Any] = {
        "model_type": "xverse",
        "architectures": ["XverseForCausalLM"],
        "vocab_size": backend.get_vocab_size(),
        "hidden_size": new.hidden,
        "intermediate_size": new.mlp,
        "num_hidden_layers": new.layers,
        "num_attention_heads": new.heads,
        "num_key_value_heads": new.heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": new.window,
        "rope_parameters": {"rope_type": "default", "rope_theta": new.theta},
        "tie_word_embeddings": False,
        "bos_token_id": ids["<|startoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<pad>"],
        "dtype": "float32",
    }
    tokenizer = Tokenizer(
        backend,
        bos_id=ids["<|startoftext|>"],
        eos_ids=frozenset({ids["<|endoftext|>"]}),
        pad_id=ids["<pad>"],
        special_tokens={"bos_token": SPECIALS[2], "eos_token": SPECIALS[3], "pad_token": SPECIALS[1]},
    )
    tokenizer.save(folder)
    shapes = NetworkConfig.from_dict(config).parameter_shapes()
    generator = torch.Generator().manual_seed(seed)
    with replacing(folder / "model.safetensors") as aside:
        writer = SafetensorsWriter(aside, {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()})
        for name, shape in shapes.items():
            branch_end = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = new.deviation / math.sqrt(2 * new.layers) if branch_end else new.deviation
            values = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * deviation
            writer.write(name, values)
        writer.close()
    write_json(folder / "config.json", config)  # last: a folder with it is whole


def train_tokenizer(new: NewModel, seed: int = 0) -> Any:
    """A `tokenizers.Tokenizer`, trained on pieces drawn evenly from the files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def splitting(tokenizer: Tokenizer) -> Tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="never"),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Punctuation("isolated"),
            ]
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer

    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    room = new.vocabulary - len(bytes_)
    learner = splitting(Tokenizer(models.BPE()))
    pieces = list(_pieces(new, seed))
    # At most half of the vocabulary are single characters: rarer ones are spelt in bytes. They are named to the
    # trainer, which would choose among equally frequent ones by chance.
    counts = Counter(character for piece in pieces for character in piece.replace(" ", "▁"))
    letters = sorted(counts, key=lambda character: (-counts[character], character))[: room // 2]
    trainer = trainers.BpeTrainer(
        vocab_size=room, special_tokens=list(SPECIALS), initial_alphabet=letters, limit_alphabet=len(letters),
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(pieces, trainer)
    learned = json.loads(learner.to_str())["model"]
    words = [*SPECIALS, *bytes_]
    words += [word for word in sorted(learned["vocab"], key=learned["vocab"].__getitem__) if word not in words]
    merges = [tuple(pair) for pair in learned["merges"]]
    vocab = {word: n for n, word in enumerate(words)}
    made = splitting(Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)))
    made.add_special_tokens(list(SPECIALS))
    return made


def _pieces(new: NewModel, seed: int) -> Iterator[str]:
    rng = random.Random(f"tokenizer {seed}")
    each = new.characters // len(new.texts)
    for path in new.texts:
        pieces = [t[n : n + PIECE] for t in read_texts(Path(path).expanduser()) for n in range(0, len(t), PIECE)]
        rng.shuffle(pieces)
        left = each
        for piece in pieces:
            if left <= 0:
                break
            left -= len(piece)
            yield piece
