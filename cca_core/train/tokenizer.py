"""Reads images in memory, writes nothing: trains the small VQ tokenizer of the embedded default and of own data.

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
from cca_core.models import family
from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer
from cca_core.train.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate

COMMITMENT = 0.25
#: Unused codes are moved every so many epochs, during this share of the training.
RESET_EVERY_EPOCHS, RESET_UNTIL = 2, 0.6


def tokenizer_spec(config: TokenizerConfig) -> VQSpec:
    return VQSpec(
        width=config.width,
        width_multipliers=config.width_multipliers,
        num_res_blocks=config.num_res_blocks,
        latent_channels=config.latent_channels,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
    )


def train_tokenizer(
    images_NCHW: Tensor,
    held_out_NCHW: Tensor,
    config: TokenizerConfig,
    *,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[dict[str, float]], None],
) -> tuple[VQTokenizer, dict[str, float]]:
    """Train on uint8 images [N, 3, S, S]; return the tokenizer in eval mode and what it reaches on held-out images.

    The facts: mean squared error and PSNR (dB, for a range of 2) on held-out images, codes in use, parameters, seconds.
    """
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = family("llamagen").build_tokenizer(tokenizer_spec(config))
        # Channels last: a quarter off the step on a CPU, the same numbers.
        tokenizer = tokenizer.to(device, memory_format=torch.channels_last).train()
        generator = torch.Generator().manual_seed(seed)
        _start_codes_on_data(tokenizer, _pixels(images_NCHW[:4096], device), generator)
        optimizer = build_optimizer(tokenizer, config.optim)
        steps_per_epoch = -(-len(images_NCHW) // config.batch_size)
        total = config.epochs * steps_per_epoch
        step = 0
        for epoch in range(config.epochs):
            used = torch.zeros(config.codebook_size, dtype=torch.bool, device=device)
            squared_error = 0.0
            for rows in torch.randperm(len(images_NCHW), generator=generator).split(config.batch_size):
                pixels = _pixels(images_NCHW[rows], device)
                set_learning_rate(optimizer, learning_rate(config.optim, step, total))
                loss, error, tokens, latents = _loss(tokenizer, pixels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                clip_gradients(tokenizer, config.optim)
                optimizer.step()
                used[tokens] = True
                squared_error += error.item() * len(rows)
                step += 1
            if epoch % RESET_EVERY_EPOCHS == 0 and epoch < RESET_UNTIL * config.epochs:
                _move_unused_codes(tokenizer, used, latents, generator)
            on_epoch(
                {
                    "epoch": epoch + 1.0,
                    "squared_error": squared_error / len(images_NCHW),
                    "codes_used": float(used.sum()),
                }
            )
    tokenizer.eval()
    facts = reconstruction_facts(tokenizer, held_out_NCHW, config.batch_size)
    facts["parameters"] = float(sum(p.numel() for p in tokenizer.parameters()))
    return tokenizer, facts | {"seconds": time.perf_counter() - started}


def _pixels(images_uint8: Tensor, device: torch.device) -> Tensor:
    return images_uint8.to(device).float() / 127.5 - 1


def _loss(tokenizer: VQTokenizer, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, squared error, tokens [N] and normalised latents [N, D] of one batch; straight-through codes."""
    z = F.normalize(tokenizer.latents(pixels), dim=1)
    latents = z.permute(0, 2, 3, 1).flatten(0, 2)
    tokens = tokenizer.quantize.nearest(latents.detach())
    codes = tokenizer.quantize.codes()[tokens]
    quantized = codes.view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    decoded = tokenizer.decode_quantized(z + (quantized - z).detach())
    error = F.mse_loss(decoded, pixels)
    codebook = (codes - latents.detach()).square().mean()
    commitment = COMMITMENT * (codes.detach() - latents).square().mean()
    return error + codebook + commitment, error.detach(), tokens, latents.detach()


@torch.no_grad()
def _start_codes_on_data(tokenizer: VQTokenizer, pixels: Tensor, generator: torch.Generator) -> None:
    latents = F.normalize(tokenizer.latents(pixels), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    weight = tokenizer.quantize.embedding.weight
    rows = torch.randint(len(latents), (len(weight),), generator=generator)
    noise = torch.randn(weight.shape, generator=generator).to(weight) * 0.01
    weight.copy_(latents[rows.to(latents.device)] + noise)


@torch.no_grad()
def _move_unused_codes(tokenizer: VQTokenizer, used: Tensor, latents: Tensor, generator: torch.Generator) -> None:
    weight = tokenizer.quantize.embedding.weight
    unused = (~used).nonzero()[:, 0]
    rows = torch.randint(len(latents), (len(unused),), generator=generator)
    weight[unused] = latents[rows.to(latents.device)]


@torch.no_grad()
def reconstruction_facts(tokenizer: VQTokenizer, images_NCHW: Tensor, batch_size: int) -> dict[str, float]:
    """Squared error, PSNR and codes in use over uint8 images [N, 3, S, S]."""
    device = next(tokenizer.parameters()).device
    used = torch.zeros(tokenizer.spec.codebook_size, dtype=torch.bool, device=device)
    squared_error = torch.zeros((), device=device, dtype=torch.float64)
    for part in images_NCHW.split(batch_size):
        pixels = _pixels(part, device)
        tokens = tokenizer.encode(pixels)
        used[tokens.flatten()] = True
        squared_error += (tokenizer.decode(tokens).clamp(-1, 1) - pixels).square().mean((1, 2, 3)).double().sum()
    mse = float(squared_error) / len(images_NCHW)
    psnr = 10 * torch.log10(torch.tensor(4.0 / max(mse, 1e-12))).item()
    return {"held_out_mse": mse, "held_out_psnr_db": psnr, "held_out_codes_used": float(used.sum())}
