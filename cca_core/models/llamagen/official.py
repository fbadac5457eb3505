"""Reads and writes nothing: the released class-conditional LlamaGen sizes by their official names, known without a
file."""

from __future__ import annotations

from cca_core.config import ConfigError
from cca_core.models.llamagen.network import LlamaGenSpec, default_ffn_dim
from cca_core.models.llamagen.tokenizer import VQSpec
from cca_core.models.llamagen.weights import OFFICIAL_HEADS

PUBLISHED = "https://huggingface.co/FoundationVision/LlamaGen"
VOCAB_SIZE, NUM_CLASSES = 16384, 1000
#: Name -> (layers, width).
MODELS = {
    "GPT-B": (12, 768),
    "GPT-L": (24, 1024),
    "GPT-XL": (36, 1280),
    "GPT-XXL": (48, 1536),
    "GPT-XXXL": (48, 2560),
    "GPT-3B": (24, 3200),
}
#: Name, which tells the pixels per token along a side -> width multipliers.
TOKENIZERS = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}


def released_model_spec(name: str, num_tokens: int) -> LlamaGenSpec:
    """The spec of a released model; ConfigError names those there are."""
    if name not in MODELS:
        raise ConfigError(f"no released LlamaGen model is called {name}: expect.model is one of {', '.join(MODELS)}")
    num_layers, dim = MODELS[name]
    heads = OFFICIAL_HEADS[num_layers, dim]
    return LlamaGenSpec(
        vocab_size=VOCAB_SIZE,
        num_tokens=num_tokens,
        num_classes=NUM_CLASSES,
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_dim=default_ffn_dim(dim),
    )


def released_tokenizer_spec(name: str, patch_nums: tuple[int, ...]) -> VQSpec:
    """The spec of a released tokenizer; ConfigError names those there are."""
    if name not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise ConfigError(f"no released LlamaGen tokenizer is called {name}: expect.tokenizer is one of {known}")
    if patch_nums:
        raise ConfigError("LlamaGen draws one grid of tokens: tokenizer.patch_nums belongs to family: var")
    return VQSpec(
        width=128,
        width_multipliers=TOKENIZERS[name],
        num_res_blocks=2,
        latent_channels=256,
        codebook_size=VOCAB_SIZE,
        codebook_dim=8,
    )
