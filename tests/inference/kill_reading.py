"""Run by test_store.py: reads a document in a process that is killed (SIGKILL) again and again, at random moments.

python -m tests.inference.kill_reading FOLDER FORMAT KILLS SEED
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from longverse.inference import engine as engine_module
from longverse.inference import store_reading
from longverse.inference.store import Store
from tests.inference.test_store import LENGTH, document, make_engine


def main(folder: Path, cache: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    engine_module.CHUNK, store_reading.FLUSH_SECONDS = 7, 0.0
    chance = random.Random(seed)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            Store(folder / "library").read(
                make_engine(folder), document(LENGTH), LENGTH + 50, cache=cache,
                on_progress=lambda done, total: time.sleep(0.003),
            )  # fmt: skip
            os._exit(0)
        while not list((folder / "library").glob("*/progress.json")) and not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
