"""Reads images in memory, writes nothing: trains the small tokenizer of the embedded default and of own data.

Squared error, codebook and commitment terms (LlamaGen, arXiv 2406.06525, without the perceptual and adversarial terms
that 256 px images want). Codes start on encoder outputs, and unused codes are moved back onto them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cca_core.config import TokenizerConfig
from cca_core.models import ImageTokenizer
from cca_core.models.base import CodeStep
from cca_core.models.family import Family
from cca_core.train.augment import shifted
from cca_core.train.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from cca_core.train.pace import Pace

COMMITMENT = 0.25
#: Unused codes are moved every so many epochs, during this share of the training.
RESET_EVERY_EPOCHS, RESET_UNTIL = 2, 0.6


def train_tokenizer(
    images_NCHW: Tensor,
    held_out_N: Tensor,
    config: TokenizerConfig,
    family: Family,
    *,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[dict[str, float]], None],
    on_log: Callable[[dict[str, float]], None] = lambda record: None,
) -> tuple[ImageTokenizer, dict[str, float]]:
    """Train on the uint8 images [N, 3, S, S] outside ``held_out_N`` (bool); return the tokenizer in eval mode and what
    it reaches on the others.

    ``on_epoch`` is given a point of the curve, ``on_log`` how far it is (``Pace``).

    The facts: mean squared error and PSNR (dB, for a range of 2) on held-out images, codes in use, parameters, seconds.
    """
    started = time.perf_counter()
    held_out_rows, train_rows = (mask.nonzero()[:, 0] for mask in (held_out_N, ~held_out_N))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = family.build_tokenizer(family.small_tokenizer_spec(config))
        # Channels last: a quarter off the step on a CPU, the same numbers.
        tokenizer = tokenizer.to(device, memory_format=torch.channels_last).train()
        generator = torch.Generator().manual_seed(seed)
        _start_codes_on_data(tokenizer, _pixels(images_NCHW[train_rows[:4096]], device), generator)
        optimizer = build_optimizer(tokenizer, config.optim)
        steps_per_epoch = -(-len(train_rows) // config.batch_size)
        total = config.epochs * steps_per_epoch
        step, seen = 0, 0
        pace = Pace(on_log, config.epochs * len(train_rows))
        for epoch in range(config.epochs):
            used = torch.zeros(config.codebook_size, dtype=torch.bool, device=device)
            squared_error = 0.0
            order = train_rows[torch.randperm(len(train_rows), generator=generator)]
            for rows in order.split(config.batch_size):
                pixels = shifted(_pixels(images_NCHW[rows], device), config.max_shift, generator)
                set_learning_rate(optimizer, learning_rate(config.optim, step, total))
                codes = tokenizer.code_step(pixels)
                error = F.mse_loss(codes.decoded_BCHW, pixels)
                optimizer.zero_grad(set_to_none=True)
                (error + codes.codebook + COMMITMENT * codes.commitment).backward()
                clip_gradients(tokenizer, config.optim)
                optimizer.step()
                used[codes.tokens_N] = True
                squared_error += error.item() * len(rows)
                step, seen = step + 1, seen + len(rows)
                pace(seen)
            if epoch % RESET_EVERY_EPOCHS == 0 and epoch < RESET_UNTIL * config.epochs:
                _move_unused_codes(tokenizer, used, codes, generator)
            on_epoch(
                {
                    "epoch": epoch + 1.0,
                    "squared_error": squared_error / len(train_rows),
                    "codes_used": float(used.sum()),
                }
            )
    tokenizer.eval()
    facts = reconstruction_facts(tokenizer, images_NCHW, held_out_rows, config.batch_size)
    facts["parameters"] = float(sum(p.numel() for p in tokenizer.parameters()))
    return tokenizer, facts | {"seconds": time.perf_counter() - started}


def _pixels(images_uint8: Tensor, device: torch.device) -> Tensor:
    return images_uint8.to(device).float() / 127.5 - 1


@torch.no_grad()
def _start_codes_on_data(tokenizer: ImageTokenizer, pixels: Tensor, generator: torch.Generator) -> None:
    latents = tokenizer.code_step(pixels).vectors_ND
    weight = tokenizer.quantize.embedding.weight
    rows = torch.randint(len(latents), (len(weight),), generator=generator)
    noise = torch.randn(weight.shape, generator=generator).to(weight) * 0.01
    weight.copy_(latents[rows.to(latents.device)] + noise)


@torch.no_grad()
def _move_unused_codes(tokenizer: ImageTokenizer, used: Tensor, codes: CodeStep, generator: torch.Generator) -> None:
    weight = tokenizer.quantize.embedding.weight
    unused = (~used).nonzero()[:, 0]
    rows = torch.randint(len(codes.vectors_ND), (len(unused),), generator=generator)
    weight[unused] = codes.vectors_ND[rows.to(weight.device)]


@torch.no_grad()
def reconstruction_facts(
    tokenizer: ImageTokenizer, images_NCHW: Tensor, rows: Tensor, batch_size: int
) -> dict[str, float]:
    """Squared error, PSNR and codes in use over these rows of uint8 images [N, 3, S, S]."""
    device = next(tokenizer.parameters()).device
    used = torch.zeros(tokenizer.spec.codebook_size, dtype=torch.bool, device=device)
    squared_error = torch.zeros((), device=device, dtype=torch.float64)
    for part in rows.split(batch_size):
        pixels = _pixels(images_NCHW[part], device)
        tokens = tokenizer.encode(pixels)
        used[tokens.flatten()] = True
        squared_error += (tokenizer.decode(tokens).clamp(-1, 1) - pixels).square().mean((1, 2, 3)).double().sum()
    mse = float(squared_error) / len(rows)
    psnr = 10 * torch.log10(torch.tensor(4.0 / max(mse, 1e-12))).item()
    return {"held_out_mse": mse, "held_out_psnr_db": psnr, "held_out_codes_used": float(used.sum())}
