"""Reads and writes nothing: what one worker of the alignment step holds in memory, from the sizes alone.

Parameters, gradients and moments are float32, four bytes a number. Activations are counted as float32 too, which is
more than they are in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from cca_core.logprob import CHUNK_ELEMENTS
from cca_core.models import ARImageModel, family

FLOAT_BYTES = 4
#: Assumed, not measured: CUDA context, cuBLAS and NCCL buffers, fragmentation.
OVERHEAD_BYTES = 2_000_000_000
#: What a GPU has where none is to be seen and nobody says.
COMMON_GPU_BYTES = 80_000_000_000
#: More GPUs than this are not tried.
MOST_GPUS = 1024


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one worker by part, at the peak: the start of a backward pass, from the second step on."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What else of a recipe decides on memory: ``frozen_model`` is the reference in the loop, ``checkpointing`` that
    activations are computed again, ``bfloat16`` the precision."""

    dropout: bool
    frozen_model: bool = False
    checkpointing: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class Spread:
    """How the alignment step fits: a whole copy of the model per worker (DDP), or its state over GPUs (FSDP2)."""

    #: One of DDP, FSDP2; empty where one micro-batch fits no GPU of this size.
    kind: str
    #: The fewest GPUs: 1 for DDP, a power of two for FSDP2, 0 where nothing fits.
    gpus: int
    memory: StepMemory
    #: The largest smaller micro-batch that a whole copy leaves room for; 0 where there is none, or no need.
    micro_batch_size_with_ddp: int = 0


def step_memory(model: ARImageModel, options: StepOptions, *, micro_batch_size: int, gpus: int = 1) -> StepMemory:
    """The memory of one worker that aligns ``model`` (on the meta device) on micro-batches of b images, 2 b rows.

    With P parameters, R of them outside the blocks and K in the largest block, in floats:

        one GPU holds all (DDP)             state spread over n GPUs (FSDP2)
        weights     P                       P / n
        gradients   P                       P / n
        AdamW       2 P                     2 P / n
        exchange    0: gradients lie in     2 R + 3 K: weights of two blocks gathered, gradients of one not yet
                    DDP's buckets           scattered, and those outside the blocks, which stay
        frozen      P (reference: online)   P / n
        bfloat16    P / 2: autocast's copies of the weights, kept for the backward pass

    Activations are the family's (``activation_bytes``) for 2 b rows; with checkpointing, those of one block and the
    input of each (more than the peak: that block and the logits are not there at once). Logits are two chunks of at
    most CHUNK_ELEMENTS numbers (what waits for the backward pass, and what a product with it needs), and twice the
    gradient of the output layer while it is summed.

    Args:
        gpus: 1 for DDP.
    """
    spec, rows = model.spec, 2 * micro_batch_size
    all_, block = num_parameters(model), max(sum(p.numel() for p in b.parameters()) for b in model.blocks())
    outside = all_ - sum(p.numel() for b in model.blocks() for p in b.parameters())
    share = -(-all_ // gpus)
    chunk = min(max(1, CHUNK_ELEMENTS // spec.vocab_size), rows * spec.num_tokens) * spec.vocab_size
    floats = {
        "weights": share,
        "gradients": share,
        "AdamW's moments": 2 * share,
        "gathered by FSDP2": 0 if gpus == 1 else 2 * outside + 3 * block,
        "frozen reference": share if options.frozen_model else 0,
        "bfloat16 copies of weights": all_ // 2 if options.bfloat16 else 0,
        "logits": 2 * chunk + 2 * spec.vocab_size * spec.dim,
    }
    parts = {name: FLOAT_BYTES * count for name, count in floats.items() if count}
    parts["activations"] = _activations(model, rows, options)
    parts["CUDA, NCCL (assumed)"] = OVERHEAD_BYTES
    return StepMemory(parts)


def _activations(model: ARImageModel, rows: int, options: StepOptions) -> int:
    """Bytes that the forward pass of ``rows`` sequences saves."""
    spec, of = model.spec, family(model.family).activation_bytes
    if not options.checkpointing:
        return of(spec, rows, dropout=options.dropout)
    inputs = FLOAT_BYTES * spec.num_layers * rows * spec.num_tokens * spec.dim
    return of(replace(spec, num_layers=1), rows, dropout=options.dropout) + inputs


def spread(model: ARImageModel, gpu_bytes: int, options: StepOptions, *, micro_batch_size: int) -> Spread:
    """DDP where a whole copy fits a GPU of that size, else the fewest GPUs (a power of two) that FSDP2 needs."""

    def memory(size: int, gpus: int) -> StepMemory:
        return step_memory(model, options, micro_batch_size=size, gpus=gpus)

    whole = memory(micro_batch_size, 1)
    if whole.total_bytes <= gpu_bytes:
        return Spread("DDP", 1, whole)
    smaller = (size for size in range(micro_batch_size - 1, 0, -1) if memory(size, 1).total_bytes <= gpu_bytes)
    instead = next(smaller, 0)
    gpus = 2
    while gpus <= MOST_GPUS:
        sharded = memory(micro_batch_size, gpus)
        if sharded.total_bytes <= gpu_bytes:
            return Spread("FSDP2", gpus, sharded, instead)
        gpus *= 2
    return Spread("", 0, whole, instead)


def gpu_memory_bytes() -> int:
    """Memory of the GPU of this machine, or of a common one where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else COMMON_GPU_BYTES


def num_parameters(module: nn.Module) -> int:
    """Numbers that training moves."""
    return sum(parameter.numel() for parameter in module.parameters())
