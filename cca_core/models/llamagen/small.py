"""Reads recipe sections, writes nothing: the small LlamaGen and VQ tokenizer that a recipe without checkpoints
trains."""

from __future__ import annotations

from cca_core.config import BaseConfig, ConfigError, TokenizerConfig
from cca_core.models.llamagen.network import LlamaGenSpec, default_ffn_dim
from cca_core.models.llamagen.tokenizer import VQSpec


def small_tokenizer_spec(config: TokenizerConfig) -> VQSpec:
    if config.patch_nums:
        raise ConfigError("LlamaGen draws one grid of tokens: tokenizer.patch_nums belongs to family: var")
    return VQSpec(
        width=config.width,
        width_multipliers=config.width_multipliers,
        num_res_blocks=config.num_res_blocks,
        latent_channels=config.latent_channels or config.width * config.width_multipliers[-1],
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
    )


def small_model_spec(config: BaseConfig, tokenizer: VQSpec, *, num_tokens: int, num_classes: int) -> LlamaGenSpec:
    return LlamaGenSpec(
        vocab_size=tokenizer.codebook_size,
        num_tokens=num_tokens,
        num_classes=num_classes,
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        ffn_dim=default_ffn_dim(config.dim),
    )
