"""Two processes over gloo: sharded weights, shared sequences, and going on with another number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longverse.errors import UserError
from longverse.models.network import NetworkConfig
from longverse.train.parallel import check_degree
from tests.helpers import tiny_config
from tests.train.common import tiny_folder, write_messages
from tests.train.parallel_worker import Job, losses, run

DYNAMIC = {"rope": "dynamic:2:64", "steps": 4, "batch": 5, "micro_tokens": 300, "weighting": "sample"}


METHODS = ("lora", "full")
MUON = {"method": "full", "optimizer": "muon"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, made once: alone/METHOD on one rank; METHOD-1 (FSDP) and METHOD-2 (FSDP and Ulysses) on two; and a
    recipe of two stages whole on one rank, begun on two and ended on one (cut), begun on one and ended on two
    (back)."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_folder(folder / "model", max_position_embeddings=64)
    data = write_messages(folder / "m.jsonl", 40)
    base: dict[str, Any] = {"model": str(folder / "model"), "messages": str(data)}
    single = {**base, "stage": DYNAMIC}
    stage = {**DYNAMIC, "steps": 2, "data": [{"messages": str(data)}], "learning_rate": 1e-2, "warmup": 1}
    stages = [{**stage, "name": "one"}, {**stage, "name": "two", "rope": None}]
    double = {**base, "method": "full", "stages": stages}
    run(1, [({**single, "method": method}, folder / "alone" / method, None) for method in METHODS])
    run(1, [(double, folder / "whole", None), (double, folder / "back", 1)])
    jobs: list[Job] = []
    for method in METHODS:
        for degree in (1, 2):
            jobs.append(({**single, "method": method, "sequence": degree}, folder / f"{method}-{degree}", None))
    half = {**single, "method": "lora", "precision": "bf16"}  # frozen bf16 weights beside trained float32 ones
    run(1, [(half, folder / "alone" / "bf16", None)])
    jobs.append((half, folder / "bf16", None))
    full = {**single, "method": "full", "precision": "bf16"}
    run(1, [({**single, **MUON}, folder / "alone" / "muon", None), (full, folder / "alone" / "full-bf16", None)])
    jobs += [({**single, **MUON}, folder / "muon", None)]
    jobs += [({**full, "sequence": degree}, folder / f"full-bf16-{degree}", None) for degree in (1, 2)]
    run(2, [*jobs, ({**double, "sequence": 2}, folder / "cut", 1), (double, folder / "back", None)])
    run(1, [(double, folder / "cut", None)])
    return folder


def result(out: Path) -> dict[str, torch.Tensor]:
    [path] = [*out.glob("adapter/*.safetensors"), *out.glob("model/*.safetensors")]
    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("degree", [1, 2])
def test_two_ranks_train_as_one(runs: Path, method: str, degree: int) -> None:
    """degree 1: FSDP over packed documents; 2: Ulysses over the same, one row on both ranks."""
    here, alone = runs / f"{method}-{degree}", runs / "alone" / method
    assert losses(here) == pytest.approx(losses(alone), rel=2e-3)
    for (name, a), b in zip(result(here).items(), result(alone).values(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=2e-2, msg=name)


@pytest.mark.slow
def test_two_ranks_train_frozen_bfloat16_as_one(runs: Path) -> None:
    assert losses(runs / "bf16") == pytest.approx(losses(runs / "alone" / "bf16"), rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 2])
def test_two_ranks_train_all_weights_by_bfloat16_products_as_one(runs: Path, degree: int) -> None:
    """On a processor with AMX tiles through their kernel."""
    assert losses(runs / f"full-bf16-{degree}") == pytest.approx(losses(runs / "alone" / "full-bf16"), rel=2e-2)


@pytest.mark.slow
def test_two_ranks_turn_whole_matrices_as_one_does(runs: Path) -> None:
    assert losses(runs / "muon") == pytest.approx(losses(runs / "alone" / "muon"), rel=2e-3)
    for (name, a), b in zip(result(runs / "muon").items(), result(runs / "alone" / "muon").values(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=2e-2, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cut", "back"])
def test_goes_on_with_another_number_of_ranks(runs: Path, name: str) -> None:
    assert len(losses(runs / name)) == 4
    assert losses(runs / name) == pytest.approx(losses(runs / "whole"), rel=2e-3)


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused_by_every_rank(runs: Path) -> None:
    for rank in (0, 1):
        said = (runs / f"own-{rank}.txt").read_text()
        assert said.startswith("1 of 2 ranks do not see the same ")
    assert not [*(runs / "own-0").iterdir(), *(runs / "lora-1").glob(".shared-*")]


def test_degrees() -> None:
    shape = NetworkConfig.from_dict(tiny_config(num_attention_heads=10, num_key_value_heads=10, head_dim=8))
    check_degree(2, shape, 4)
    with pytest.raises(UserError, match="possible are 1, 2"):
        check_degree(4, shape, 4)
    with pytest.raises(UserError, match="possible are 1, 2, 5"):
        check_degree(3, shape, 10)
