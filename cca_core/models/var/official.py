"""Reads and writes nothing: the released VAR sizes by their official names, known without a file."""

from __future__ import annotations

from cca_core.config import ConfigError
from cca_core.models.var.network import VARSpec
from cca_core.models.var.tokenizer import MultiScaleVQSpec

PUBLISHED = "https://huggingface.co/FoundationVision/var"
VOCAB_SIZE, CODEBOOK_DIM, NUM_CLASSES = 4096, 32, 1000
PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
#: Name -> (depth, sides of the token grids); the 512 px model shares one modulation layer.
MODELS = {
    "d16": (16, PATCH_NUMS_256),
    "d20": (20, PATCH_NUMS_256),
    "d24": (24, PATCH_NUMS_256),
    "d30": (30, PATCH_NUMS_256),
    "d36-s": (36, PATCH_NUMS_512),
}
TOKENIZER = "vae_ch160v4096z32"


def released_model_spec(name: str, num_tokens: int) -> VARSpec:
    """The spec of a released model; ConfigError names those there are, and where another image size is asked for."""
    if name not in MODELS:
        raise ConfigError(f"no released VAR model is called {name}: expect.model is one of {', '.join(MODELS)}")
    depth, patch_nums = MODELS[name]
    if num_tokens != sum(p * p for p in patch_nums):
        raise ConfigError(
            f"VAR {name} draws {sum(p * p for p in patch_nums)} tokens and the recipe's tokenizer makes {num_tokens}: "
            f"set tokenizer.patch_nums to {list(patch_nums)}, and tokens.image_size to {16 * patch_nums[-1]}"
        )
    return VARSpec(
        vocab_size=VOCAB_SIZE,
        num_tokens=num_tokens,
        num_classes=NUM_CLASSES,
        dim=64 * depth,
        num_layers=depth,
        num_heads=depth,
        codebook_dim=CODEBOOK_DIM,
        patch_nums=patch_nums,
        shared_adaln=name.endswith("-s"),
    )


def released_tokenizer_spec(name: str, patch_nums: tuple[int, ...]) -> MultiScaleVQSpec:
    """The spec of the released tokenizer for these scales, which its file does not tell."""
    if name != TOKENIZER:
        raise ConfigError(f"no released VAR tokenizer is called {name}: expect.tokenizer is {TOKENIZER}")
    if not patch_nums:
        raise ConfigError(f"a VAR tokenizer needs tokenizer.patch_nums: {list(PATCH_NUMS_256)} for 256 px")
    return MultiScaleVQSpec(
        width=160,
        width_multipliers=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        codebook_size=VOCAB_SIZE,
        codebook_dim=CODEBOOK_DIM,
        patch_nums=patch_nums,
    )
