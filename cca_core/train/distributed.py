"""Reads nothing, writes nothing: the process group and the wrapped model; one process takes the same path as many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cca_core.config import ExecutionConfig
from cca_core.models import ARImageModel

#: Collectives of tensors on a GPU go through NCCL, those of the host (checkpoints) through gloo.
GPU_BACKEND = "cpu:gloo,cuda:nccl"


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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Networks compute in bfloat16 where ``precision`` says so; log-probs stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The group the launcher made (Ray Train, torchrun), or a group of this process alone for as long as it is
    needed."""
    own = not dist.is_initialized()
    if own:
        backend = GPU_BACKEND if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if own:
            dist.destroy_process_group()


class Parallel:
    """A model as the loop calls it: a whole copy on every rank (DDP) or spread over the ranks (FSDP2). In both,
    gradients are averaged over ranks when the last micro-batch goes backward.

    Blocks are checkpointed, compiled and sharded, in this order. ``plain`` takes the first two back, for calls that
    are not training steps.
    """

    def __init__(self, model: ARImageModel, world: World, execution: ExecutionConfig) -> None:
        self.model, self.execution = model.to(world.device), execution
        self._wrap_blocks()
        if execution.sharding == "fsdp2":
            mesh = init_device_mesh(world.device.type, (world.size,))
            for block in model.blocks():
                fully_shard(block, mesh=mesh)
            self.wrapped: Any = fully_shard(model, mesh=mesh)
        else:
            # Gradients lie in DDP's buckets: one copy of them, not two.
            self.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def __call__(self, *args: Any) -> Tensor:
        return self.wrapped(*args)

    def synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: gradients stay on their rank until the last one."""
        if self.execution.sharding == "fsdp2":
            self.wrapped.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.wrapped.no_sync()

    @contextmanager
    def plain(self) -> Iterator[ARImageModel]:
        """The model in eval mode with its blocks as they are: for sampling and scoring between steps."""
        self.unwrap_blocks()
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            self._wrap_blocks()

    def _wrap_blocks(self) -> None:
        for block in self.model.blocks():
            forward: Any = block.forward
            if self.execution.activation_checkpointing:
                forward = partial(checkpoint, forward, use_reentrant=False)
            if self.execution.compile:
                # Dropout masks are those of eager mode: what is compiled changes no result beyond rounding.
                forward = torch.compile(forward, dynamic=False, options={"fallback_random": True})
            block.forward = forward

    def unwrap_blocks(self) -> None:
        for block in self.model.blocks():
            block.__dict__.pop("forward", None)

    def close(self) -> None:
        """Leave the model as it was given. DDP must go before the process group does: as its last holder it would wait
        for gloo's threads without giving up the GIL, which they need to end."""
        self.unwrap_blocks()
        self.wrapped = None


def full_state_dict(model: ARImageModel) -> dict[str, Tensor]:
    """The whole weights on the host, on rank 0 alone where they are sharded. Called by all ranks."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def sum_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """The sums over all ranks of named scalars, in one all-reduce (float64 where the device has it)."""
    stacked = torch.stack([value.detach().double() for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))
