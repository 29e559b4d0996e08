"""Many ranks: FSDP2 shards the weights over all of them, Ulysses splits each sequence over some of them.

Shapes: R ranks that share a sequence (the Ulysses degree), H query heads, G key/value heads, T tokens of the row.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509): every rank holds T / R tokens of the row through the whole network; for
attention the ranks exchange so that each holds H / R heads of all T tokens, attends within the documents of the row
as one rank would, and they exchange back. Positions, the lengths behind the dynamic RoPE base and the loss weights
are those of the whole document, so the result is the same for every degree.

Started by torchrun; without it, one rank and no communication.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longverse.errors import UserError
from longverse.models.network import Attend, CausalLM, NetworkConfig
from longverse.train.rows import Row, document_attention

CPU = torch.device("cpu")
PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class Ranks:
    """This process among all. `sequence` ranks with consecutive numbers share a sequence; there are `data` such
    groups."""

    rank: int = 0
    world: int = 1
    sequence: int = 1
    group: Any = None  # the process group of those that share this rank's sequence
    device: torch.device = CPU

    @property
    def data(self) -> int:
        """How many sequences are worked on at once."""
        return self.world // self.sequence

    @property
    def data_rank(self) -> int:
        """Which of them this rank belongs to."""
        return self.rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Which part of its sequence this rank holds."""
        return self.rank % self.sequence

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others: it writes what they then find."""
        if self.world == 1:
            yield
            return
        import torch.distributed as dist

        if self.rank:
            dist.barrier()
        yield
        if self.rank == 0:
            dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """The sum of numbers over all ranks, in float64."""
        if self.world == 1:
            return list(values)
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()  # type: ignore[no-any-return]

    def gather(self, values: list[str]) -> list[str]:
        """The values of all ranks, each once, in the order of the ranks."""
        if self.world == 1:
            return values
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, values)
        return list(dict.fromkeys(value for own in found for value in own))


def check_degree(degree: int, shape: NetworkConfig, world: int) -> None:
    """Raise UserError unless a Ulysses degree divides the heads and the ranks; the message names those that do."""
    fitting = [n for n in range(1, world + 1) if shape.num_heads % n == 0 and world % n == 0]
    if degree not in fitting:
        raise UserError(
            f"A sequence cannot be shared by {degree} ranks: the degree must divide the {shape.num_heads} heads and the"
            f" {world} ranks; possible are {', '.join(map(str, fitting))}."
        )


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: torch.device) -> torch.device:
    """The card of this rank among those of its machine; to be asked before anything is put on one."""
    if device.type != "cuda" or world_size() == 1:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)
    return own


def start(shape: NetworkConfig, degree: int, device: torch.device) -> Ranks:
    """Join the ranks that torchrun started (its environment variables say how many), or be alone. device: this rank's
    own."""
    world = world_size()
    check_degree(degree, shape, world)
    if world == 1:
        return Ranks(device=device)
    import torch.distributed as dist

    if not dist.is_initialized():
        # The others wait at a barrier while rank 0 builds and tokenises data.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    rank = dist.get_rank()
    group = None
    for first in range(0, world, degree):  # every rank must take part in making every group
        made = dist.new_group(list(range(first, first + degree)))
        if first <= rank < first + degree:
            group = made
    return Ranks(rank, world, degree, group, device)


def check_shared(folder: Path, ranks: Ranks) -> None:
    """UserError on every rank where one of them sees another folder under this name: checkpoints, tokens and results
    are written by rank 0 and read by all."""
    if ranks.world == 1:
        return
    [name] = ranks.gather([f".shared-{secrets.token_hex(8)}"] if ranks.rank == 0 else [])
    mark = folder / name
    if ranks.rank == 0:
        with suppress(OSError):  # a folder that cannot be written is told by whoever writes into it next
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    ranks.sum(0.0)  # it is there now
    [there, missing] = ranks.sum(float(ranks.rank == 0 and mark.exists()), float(not mark.exists()))
    if ranks.rank == 0:
        mark.unlink(missing_ok=True)
    if there and missing:
        raise UserError(
            f"{missing:.0f} of {ranks.world} ranks do not see the same {folder} as the first: give an --out on a disk"
            " that all machines share."
        )


# ---- FSDP2 --------------------------------------------------------------------------------------------


def shard(model: nn.Module, network: CausalLM, ranks: Ranks, autocast: bool) -> None:
    """Shard the weights over all ranks, layer by layer (in place). One rank: nothing happens."""
    if ranks.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in network.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def synchronise(model: nn.Module, ranks: Ranks, now: bool) -> None:
    """Whether the next backward pass adds gradients up over the ranks: only that of a step's last row must."""
    if ranks.world > 1:
        model.set_requires_gradient_sync(now)  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full (a collective call); others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_whole(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into one that may be sharded: every rank takes its part."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)  # type: ignore[arg-type]
    with torch.no_grad():
        target.copy_(value)


# ---- Ulysses ------------------------------------------------------------------------------------------


def split(row: Row, ranks: Ranks) -> Row:
    """The part of a row that this rank holds: T / R consecutive tokens and the labels whose places lie there. A row
    that does not divide is padded at its end by a document of its own, which carries no label."""
    if ranks.sequence == 1:
        return row
    missing = -row.tokens % ranks.sequence
    bounds = (*row.bounds, row.tokens + missing) if missing else row.bounds
    each = (row.tokens + missing) // ranks.sequence
    first = ranks.sequence_rank * each
    own = slice(first, first + each)
    padding = torch.arange(missing)[None]
    ids = torch.cat((row.ids, torch.zeros_like(padding)), 1)[:, own]
    positions = torch.cat((row.positions, padding), 1)[:, own]
    lengths = torch.cat((row.rope_length, torch.full_like(padding, max(missing, 1))), 1)[:, own]
    mine = (row.places >= first) & (row.places < first + each)
    return Row(
        ids, positions, lengths, bounds, row.places[mine] - first, row.targets[mine], row.weights[mine], row.names
    )


def ulysses_attention(bounds: tuple[int, ...], ranks: Ranks) -> Attend:
    """Attention within the documents of a row whose tokens are spread over the ranks of a group."""
    inner = document_attention(bounds)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # q [1, H, T/R, D]; k, v [1, G, T/R, D]
        degree, heads = ranks.sequence, q.shape[1]
        copies = 1
        while k.shape[1] * copies % degree:  # fewer key/value heads than ranks: several ranks hold the same one
            copies += 1
        if copies > 1:
            k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        q, k, v = (_tokens_to_heads(x, ranks) for x in (q, k, v))  # [1, H/R, T, D], [1, G/R, T, D]
        group = q.shape[1] / k.shape[1]
        assert group == int(group), f"{heads} heads over {degree} ranks"
        return _heads_to_tokens(inner(layer, q, k, v), ranks)  # [1, H, T/R, D]

    return attend


def _exchange(x: Tensor, ranks: Ranks) -> Tensor:
    """x [R, ...]: part i goes to rank i of the group; returns what the others sent, in their order."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    out = all_to_all_single_autograd(x.contiguous(), None, None, ranks.group)
    return out.wait() if hasattr(out, "wait") else out


def _tokens_to_heads(x: Tensor, ranks: Ranks) -> Tensor:
    """[1, H, T/R, D] -> [1, H/R, T, D]."""
    degree = ranks.sequence
    parts = x[0].unflatten(0, (degree, -1))  # [R, H/R, T/R, D]
    return _exchange(parts, ranks).transpose(0, 1).flatten(1, 2)[None]


def _heads_to_tokens(x: Tensor, ranks: Ranks) -> Tensor:
    """[1, H/R, T, D] -> [1, H, T/R, D]."""
    degree = ranks.sequence
    parts = x[0].unflatten(1, (degree, -1)).transpose(0, 1)  # [R, H/R, T/R, D]
    return _exchange(parts, ranks).flatten(0, 1)[None]


def attention(row: Row, ranks: Ranks) -> Attend:
    """How the documents of a row are attended on these ranks; `row` is this rank's part."""
    return document_attention(row.bounds) if ranks.sequence == 1 else ulysses_attention(row.bounds, ranks)
