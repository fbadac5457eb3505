"""Reads recipe sections, writes nothing: the small VAR and tokenizer that a recipe without checkpoints trains."""

from __future__ import annotations

from cca_core.config import BaseConfig, ConfigError, TokenizerConfig
from cca_core.models.var.network import VARSpec
from cca_core.models.var.tokenizer import MultiScaleVQSpec


def small_tokenizer_spec(config: TokenizerConfig) -> MultiScaleVQSpec:
    if not config.patch_nums:
        raise ConfigError("a VAR tokenizer needs tokenizer.patch_nums: the sides of its grids, as in [1, 2, 3, 4]")
    if config.latent_channels:
        raise ConfigError("a VAR tokenizer has no tokenizer.latent_channels: its latents are codebook_dim wide")
    return MultiScaleVQSpec(
        width=config.width,
        width_multipliers=config.width_multipliers,
        num_res_blocks=config.num_res_blocks,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
        patch_nums=config.patch_nums,
    )


def small_model_spec(config: BaseConfig, tokenizer: MultiScaleVQSpec, *, num_tokens: int, num_classes: int) -> VARSpec:
    return VARSpec(
        vocab_size=tokenizer.codebook_size,
        num_tokens=num_tokens,
        num_classes=num_classes,
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        codebook_dim=tokenizer.codebook_dim,
        patch_nums=tokenizer.patch_nums,
    )
