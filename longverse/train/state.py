"""Checkpoints of a run: everything needed to go on as if nothing had happened, in one safetensors file.

    OUT/checkpoints/00-sft-000120/state.safetensors   weight/NAME, exp_avg/NAME, exp_avg_sq/NAME, rng
    OUT/checkpoints/00-sft-000120/state.json          stage, steps done, what it belongs to

Only trained weights are in it. Tensors are whole, also when a run shards them over many ranks, so that a run may go on
with another number of ranks. A checkpoint is written under another name and renamed; the newest `keep` remain. One that
a failing disk damaged is passed over for the one before it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longverse.errors import UserError
from longverse.models.shards import SafetensorsFile, SafetensorsWriter, TensorInfo, read_json, write_json
from longverse.train.parallel import whole, write_whole

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"(\d\d)-(.+)-(\d{6,})")


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that get gradients, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def save_state(
    folder: Path,
    stage: tuple[int, str],
    network: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    *,
    rank: int = 0,
    keep: int = 2,
) -> Path:
    """Write a checkpoint; every rank must call it (sharded weights are gathered one by one), rank 0 writes.

    stage: its number and name; state: plain values with `step`, the steps done. optimizer None: between two stages.
    """
    target = folder / f"{stage[0]:02d}-{stage[1]}-{state['step']:06d}"
    aside = folder / f".{target.name}.{os.getpid()}"
    parameters = trained(network)
    infos = {f"weight/{name}": TensorInfo(tuple(p.shape), p.dtype) for name, p in parameters.items()}
    if optimizer is not None:
        for moment in MOMENTS:
            held = [(name, p) for name, p in parameters.items() if moment in optimizer.state.get(p, {})]
            infos |= {f"{moment}/{name}": TensorInfo(tuple(p.shape), p.dtype) for name, p in held}
    rng = torch.get_rng_state()
    infos["rng"] = TensorInfo(tuple(rng.shape), rng.dtype)
    writer = None
    if rank == 0:
        aside.mkdir(parents=True, exist_ok=True)
        writer = SafetensorsWriter(aside / "state.safetensors", infos)
    for name, tensor in _tensors(parameters, optimizer):
        full = whole(tensor)
        if writer is not None:
            writer.write(name, full)
    if writer is not None:
        writer.write("rng", rng)
        writer.close()
        write_json(aside / "state.json", {"format": FORMAT, "stage": list(stage), **state})
        for path in (aside / "state.safetensors", aside / "state.json", aside):
            _to_disk(path)
        if target.exists():  # saved twice after the same step: the one or the other is always there
            os.replace(target, folder / f".{target.name}.old")
        os.replace(aside, target)
        _to_disk(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        remove_remnants(folder)
    return target


def _to_disk(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk, not only on their way."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_remnants(folder: Path) -> None:
    """Delete what killed or failed writers left beside the checkpoints. Call it as the folder's only writer."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") and _NAME.match(path.name[1:]):
            shutil.rmtree(path, ignore_errors=True)


def _tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        yield f"weight/{name}", parameter.detach()
    if optimizer is None:
        return
    for moment in MOMENTS:
        for name, parameter in parameters.items():
            held = optimizer.state.get(parameter, {}).get(moment)
            if held is not None:
                yield f"{moment}/{name}", held


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; remnants of killed writers have other names."""
    if not folder.is_dir():
        return []
    names = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()}
    found = {path: match for path, match in names.items() if match and (path / "state.json").exists()}
    return sorted(found, key=lambda path: (int(found[path][1]), int(found[path][3])))


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint and its state.json, or None. Raises UserError when there are some and none can be
    read, or for a format of another version."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            state = read_json(path / "state.json")
            SafetensorsFile(path / "state.safetensors")
        except UserError:
            continue
        if state.get("format") != FORMAT:
            raise UserError(f"{path} has checkpoint format {state.get('format')}, known is {FORMAT}: begin anew.")
        return path, state
    if found:
        raise UserError(f"None of the checkpoints in {folder} can be read: delete {folder.parent} to begin anew.")
    return None


def load_state(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer | None, steps: int) -> None:
    """Put a checkpoint's weights, moments and random state in place. steps: optimizer steps behind the moments.

    Raises UserError when it belongs to another model or method.
    """
    file = SafetensorsFile(path / "state.safetensors")
    parameters = trained(network)
    held = {name.removeprefix("weight/") for name in file.infos if name.startswith("weight/")}
    if held != set(parameters):
        odd = sorted(held ^ set(parameters))[0]
        raise UserError(
            f"{path} holds other weights than this run trains ({odd} is in one only): it belongs to another model or"
            " recipe; give another --out."
        )
    for name, parameter in parameters.items():
        if file.infos[f"weight/{name}"].shape != tuple(parameter.shape):
            raise UserError(f"{path} has {name} in another shape: it belongs to another model; give another --out.")
        with torch.no_grad():
            write_whole(parameter, file.get(f"weight/{name}"))
    torch.set_rng_state(file.get("rng").clone())
    if optimizer is None or steps == 0:
        return
    for name, parameter in parameters.items():
        moments = {}
        for moment in MOMENTS:
            if f"{moment}/{name}" in file.infos:
                moments[moment] = torch.zeros_like(parameter)
                write_whole(moments[moment], file.get(f"{moment}/{name}"))
        if moments:
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
