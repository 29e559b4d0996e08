"""Small runs for the tests of training: a tiny folder with a ChatML template, and conversations about numbers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from longverse.data.config import build
from longverse.models.chat import ChatFormat
from longverse.models.checkpoint import open_model
from longverse.models.tokenizer import Tokenizer
from longverse.train import forecast
from longverse.train.config import Recipe
from tests.helpers import tiny_config
from tests.models.folders import save_folder

TEMPLATE = (
    "{% for m in messages %}<|startoftext|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|startoftext|>assistant\n{% endif %}"
)


def measure_little(patch: pytest.MonkeyPatch) -> None:
    """Before a run begins it measures rows and matrices: let them be as small as the models here."""
    for name in ("SHORT", "LONG", "SQUARE"):
        patch.setattr(forecast, name, getattr(forecast, name) // 8)


def tiny_folder(folder: Path, **config: Any) -> Path:
    """A checkpoint folder of a random three-layer model whose tokenizer has a ChatML-like template."""
    save_folder(folder, tiny_config(**{"max_position_embeddings": 512, **config}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def tiny_chat(folder: Path) -> tuple[Tokenizer, ChatFormat]:
    opened = open_model(str(folder))
    return opened.tokenizer, opened.chat()


def conversation(rng: random.Random, turns: int = 1, words: int = 12) -> list[dict[str, str]]:
    messages = []
    for _ in range(turns):
        text = " ".join(rng.choice(["the", "in", "an", "a", "red", "box", "7", "42"]) for _ in range(words))
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": text.split()[0] + " !"}]
    return messages


def write_messages(path: Path, lines: int = 24, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = [{"messages": conversation(rng, rng.randint(1, 3), rng.randint(3, 20))} for _ in range(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(model: Path, messages: Path, stage: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """A recipe of one short stage; `stage` and `changes` override single fields."""
    stages = [
        {
            "name": "sft", "data": [{"messages": str(messages)}], "steps": 6, "batch": 4, "warmup": 2,
            "learning_rate": 1e-2, "micro_tokens": 200, "max_tokens": 512, **(stage or {}),
        }
    ]  # fmt: skip
    values = {"model": str(model), "precision": "fp32", "lora": {"rank": 4}, "stages": stages, "save_every": 2}
    return build(Recipe, {**values, **changes})
