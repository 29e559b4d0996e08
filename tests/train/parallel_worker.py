"""What the processes of tests/train/test_parallel.py run, started by torch.multiprocessing."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from longverse.errors import UserError
from longverse.train.config import Recipe
from longverse.train.parallel import Ranks, check_shared
from longverse.train.run import run_recipe
from tests.train.common import measure_little, recipe


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


Job = tuple[dict, Path, int | None]  # what make() takes; the run's folder; stages to run


def _rank(rank: int, world: int, port: int, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    measure_little(pytest.MonkeyPatch())
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    for values, out, stages in jobs:
        run_recipe(make(values), out, device="cpu", stages=stages)
    own = jobs[0][1].parent / f"own-{rank}"  # a folder under one name that is another on each machine
    try:
        check_shared(own, Ranks(rank, world))
    except UserError as error:
        own.with_suffix(".txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def make(values: dict) -> Recipe:
    values = dict(values)
    return recipe(Path(values.pop("model")), Path(values.pop("messages")), values.pop("stage", None), **values)


def run(world: int, jobs: list[Job]) -> None:
    """Run recipes one after another on `world` processes over gloo; with 1, in this process."""
    if world == 1:
        for values, out, stages in jobs:
            run_recipe(make(values), out, device="cpu", stages=stages)
        return
    os.environ["LONGVERSE_COMMAND"] = "1"  # the children then start without transformers
    try:
        mp.spawn(_rank, (world, free_port(), jobs), nprocs=world)
    finally:
        del os.environ["LONGVERSE_COMMAND"]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
