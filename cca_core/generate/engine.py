"""Reads and writes nothing: draws the tokens of whole images with a KV cache, one model call per step (two if guided).

A seed per sequence and fixed padded batches: the same (condition, seed, sampling) gives the same tokens whatever it is
batched with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cca_core.generate.sampling import Sampling, draw
from cca_core.models.base import ARImageModel, Captions, ClassIds, Cond, as_condition
from cca_core.pairs import sequence_uniforms

#: Rows of one padded batch unless the caller knows better.
BATCH_SIZE = 32


def calls_per_image(model: ARImageModel, sampling: Sampling) -> int:
    """Model calls (rows through the network, prefill included) that one image costs."""
    steps = len(model.spec.step_sizes)
    return steps * (2 if sampling.guided else 1)


def padded_batches(size: int, batch_size: int) -> Iterator[slice]:
    """The slices of ``size`` rows; the caller pads the last to ``batch_size``."""
    for start in range(0, size, batch_size):
        yield slice(start, min(start + batch_size, size))


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Repeat the last row until there are ``rows``."""
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


@torch.no_grad()  # not inference_mode: its tensors could not be scored with gradients afterwards
def generate(
    model: ARImageModel,
    cond: Cond,
    sampling: Sampling,
    seeds_B: Tensor,
    *,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Draw images as tokens.

    Args:
        cond: classes int64 [B], or captions.
        seeds_B: one int64 seed per image; equal seeds give equal tokens for equal conditions.
        batch_size: rows of one batch; the last is padded, because a different shape rounds differently.

    Returns:
        int64 [B, L] on the CPU.
    """
    given = as_condition(cond)
    device = next(model.parameters()).device
    uniforms_BL = torch.from_numpy(sequence_uniforms(seeds_B.cpu().numpy(), model.spec.num_tokens))
    tokens = []
    for rows in padded_batches(len(given), batch_size):

        def part(tensor: Tensor, rows: slice = rows) -> Tensor:
            return pad_rows(tensor[rows], batch_size).to(device)

        drawn = _generate_batch(model, given.map(part), part(uniforms_BL), sampling)
        tokens.append(drawn[: rows.stop - rows.start].cpu())
    return torch.cat(tokens) if tokens else torch.empty(0, model.spec.num_tokens, dtype=torch.int64)


def _generate_batch(model: ARImageModel, cond: ClassIds | Captions, uniforms_BL: Tensor, sampling: Sampling) -> Tensor:
    decoder = model.decoder(cond.append(model.null_cond(cond)) if sampling.guided else cond)
    drawn: list[Tensor] = []
    previous: Tensor | None = None
    position = 0
    for step, size in enumerate(model.spec.step_sizes):
        if previous is not None and sampling.guided:
            previous = torch.cat([previous, previous])
        logits = decoder.step(previous)
        if sampling.guided:
            logits_cond, logits_null = logits.chunk(2)
            scale = model.guidance_scale(sampling.cfg_scale, sampling.cfg_interval, step)
            logits = logits_null + (logits_cond - logits_null) * scale if scale != 1.0 else logits_cond
        uniforms = uniforms_BL[:, position : position + size]
        previous = draw(logits.flatten(0, 1), uniforms.flatten(), sampling).view(-1, size)
        drawn.append(previous)
        position += size
    return torch.cat(drawn, dim=1)


@torch.inference_mode()
def decode_images(tokenizer: torch.nn.Module, tokens_BL: Tensor, *, batch_size: int = BATCH_SIZE) -> Tensor:
    """Images in [-1, 1], float32 [B, 3, H, W] on the CPU, decoded in padded batches of one shape."""
    device = next(tokenizer.parameters()).device
    images = [
        tokenizer.decode(pad_rows(tokens_BL[rows], batch_size).to(device))[: rows.stop - rows.start].float().cpu()
        for rows in padded_batches(len(tokens_BL), batch_size)
    ]
    return torch.cat(images).clamp(-1, 1)
