"""What the evaluation tests share: a tokenizer trained on the spot, a tiny random engine, a back end that echoes."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, trainers

from longverse.evaluation.backends import Failure, Lane, Reply, Request
from longverse.evaluation.engine_backend import prompt_ids
from longverse.evaluation.haystack import generated_text
from longverse.inference.engine import Engine
from longverse.models.chat import ChatFormat
from longverse.models.network import NetworkConfig
from longverse.models.tokenizer import Tokenizer
from tests.helpers import random_tensors, tiny_config

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIALS = ["<|end|>", "<|start|>"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: byte-level BPE for English and Chinese, a ChatML-like template, random weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    backend = Trained(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([generated_text(lang, 99, 20_000) for lang in ("en", "zh")], trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": "<|end|>",
                "pad_token": "<|end|>",
                "chat_template": TEMPLATE,
                "add_bos_token": False,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        )
    )
    config = tiny_config(vocab_size=backend.get_vocab_size(), max_position_embeddings=4096, eos_token_id=0)
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"})
    )
    save_file(
        random_tensors(NetworkConfig.from_dict(config), scale=0.3), folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture(scope="session")
def engine(model_folder: Path) -> Engine:
    torch.set_num_threads(1)
    return Engine.load(str(model_folder), dtype="float32", device="cpu")


@dataclass
class Echo:
    """A back end without a model: it answers with the last `sees` tokens of its prompt, so it finds what stands there.

    fail: which calls (counted from 0) fail.
    """

    tokenizer: Any
    chat: Any
    sees: int | None = None
    window: int | None = 100_000
    fail: Sequence[int] = ()
    name: str = "echo"
    side_by_side: int = 1
    calls: int = 0

    @property
    def lanes(self) -> Sequence[Lane]:
        return (self,) * self.side_by_side

    def describe(self) -> dict[str, Any]:
        return {"backend": "echo", "model": self.name, "window": self.window}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def count(self, request: Request) -> int:
        return len(prompt_ids(self.tokenizer, self.chat, request))

    def answer(self, request: Request) -> Reply:
        self.calls += 1
        if self.calls - 1 in self.fail:
            raise Failure("out of paper, after 5 tries")
        text = request.prompt if request.messages is None else request.messages[-1]["content"]
        assert text is not None
        if self.sees is not None:
            text = self.decode(self.encode(text)[-self.sees :])
        return Reply(text, self.count(request), 1, "stop", 0.0)


@pytest.fixture
def echo(model_folder: Path) -> Echo:
    tokenizer = Tokenizer.from_folder(model_folder)
    return Echo(tokenizer, ChatFormat.for_model(tokenizer, {}, "tiny"))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A small LongBench of our own rows: hotpotqa, trec, samsum, passage_retrieval_zh, lcc; config beside."""
    rng = random.Random(5)
    folder = tmp_path / "bench"
    prompts = {
        "hotpotqa": "Read.\n{context}\nQuestion: {input}\nAnswer:",
        "trec": "Types.\n{context}\n{input}",
        "samsum": "Summarise.\n{context}\n{input}",
        "passage_retrieval_zh": "请读。\n{context}\n摘要：{input}\n答案是：",
        "lcc": "Complete.\n{context}Next line:\n",
    }
    lengths = {"hotpotqa": 6, "trec": 6, "samsum": 8, "passage_retrieval_zh": 6, "lcc": 8}
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "dataset2prompt.json").write_text(json.dumps(prompts, ensure_ascii=False), encoding="utf-8")
    (folder / "config" / "dataset2maxlen.json").write_text(json.dumps(lengths))
    answers = {"trec": "Food", "passage_retrieval_zh": "段落2", "lcc": "return x"}
    for task in prompts:
        rows = []
        for number in range(6):
            language = "zh" if task.endswith("zh") else "en"
            context = generated_text(language, rng.randrange(10**6), rng.choice([300, 1500]))
            rows.append(
                {
                    "input": f"What is {{{number}}}?",
                    "context": context,
                    "answers": [answers.get(task, "the old mill")],
                    "length": [1000, 5000, 9000][number % 3],
                    "dataset": task,
                    "language": language,
                    "all_classes": ["Food", "Sport"] if task == "trec" else None,
                    "_id": f"{task}-{number}",
                }
            )
        write_jsonl(folder / "data" / f"{task}.jsonl", rows)
    return folder
