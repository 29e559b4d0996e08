"""A random ChatML model whose tokenizer spells every byte, and a real server around it for the tests."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from longverse.inference.engine import Engine
from longverse.models.network import NetworkConfig
from longverse.models.tokenizer import gpt2_bytes
from longverse.server.app import create_app
from longverse.server.library import Library
from longverse.server.run import Server, address_of, bind, configured
from longverse.server.service import Settings
from longverse.server.worker import Worker
from tests.helpers import random_tensors, tiny_config

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_model(folder: Path, window: int = 2048, **changes: Any) -> Path:
    """A folder that `--model` takes: three random layers, a vocabulary of bytes and some merges, ChatML."""
    letters = sorted(gpt2_bytes())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ('"', ":"), ("{", '"'), ('"', "}"), ("Ċ", "{"), ('"', ",")]
    merges += [("ä", "¸"), ("ä¸", "Ń")]  # 中
    words = SPECIALS + letters + ["".join(pair) for pair in merges]
    backend = Backend(models.BPE({word: n for n, word in enumerate(words)}, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIALS[2], "pad_token": SPECIALS[0], "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = tiny_config(vocab_size=len(words), max_position_embeddings=window, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(NetworkConfig.from_dict(config), seed=3)
    tensors["lm_head.weight"][2] = 0  # a random model ends soon; here a logit of 0 makes that rare
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path) -> Engine:
    return Engine.load(str(folder), dtype="float32", device="cpu", weights="full")


class Running:
    """A server in a thread of this process."""

    def __init__(self, engine: Engine, folder: Path, settings: Settings | None = None, **worker: Any) -> None:
        self.engine = engine
        self.model = Path(engine.name).name
        self.library = Library(folder, lambda text: len(engine.tokenizer.encode(text)))
        self.worker = Worker(engine, **worker)
        self.sock: socket.socket = bind("127.0.0.1", 0)
        self.url = address_of(self.sock)
        self.port = int(self.url.rsplit(":", 1)[1])
        app = create_app(engine, self.worker, self.library, settings or Settings())
        self.server = Server(configured(app), self.worker, 0.0)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.sock]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@contextmanager
def serving(engine: Engine, folder: Path, settings: Settings | None = None, **worker: Any) -> Iterator[Running]:
    running = Running(engine, folder, settings, **worker)
    try:
        yield running
    finally:
        running.stop()


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Until it is true; AssertionError when it never becomes so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def ids_of(count: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 200, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
