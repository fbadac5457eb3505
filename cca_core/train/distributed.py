"""Reads nothing, writes nothing: the process group and the wrapped model; one process takes the same path as many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device


def pick_device(device: str) -> torch.device:
    """``auto`` takes the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The group the launcher made (Ray Train, torchrun), or a group of this process alone for as long as it is
    needed."""
    own = not dist.is_initialized()
    if own:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if own:
            dist.destroy_process_group()


def parallelize(model: nn.Module, world: World) -> DistributedDataParallel:
    """The model as the loop calls it; gradients are averaged over ranks when the last micro-batch goes backward."""
    return DistributedDataParallel(model.to(world.device))


def sum_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The sums over all ranks of named scalars, in one all-reduce (float64 where the device has it)."""
    stacked = torch.stack([value.detach().double() for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))
