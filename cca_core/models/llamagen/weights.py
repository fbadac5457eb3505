"""Reads official LlamaGen state dicts (already unpacked): recognises them and derives the spec that fits their
tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cca_core.config import ConfigError
from cca_core.models.llamagen.network import LlamaGenSpec
from cca_core.models.llamagen.tokenizer import VQSpec
from cca_core.models.state_dict import count, needed

#: (layers, dim) -> heads of the released sizes (B, L, XL, XXL, XXXL, 3B, 1B, 7B); the text-conditional ones are XL.
OFFICIAL_HEADS = {
    (12, 768): 12,
    (24, 1024): 16,
    (36, 1280): 20,
    (48, 1536): 24,
    (48, 2560): 40,
    (24, 3200): 32,
    (22, 2048): 32,
    (32, 4096): 32,
}

CLASSES, CAPTIONS = "cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"
#: Caption tokens of every released text-conditional file, whose tensors do not tell.
OFFICIAL_CAPTION_TOKENS = 120

NUM_TOKENS_HELP = (
    "num_tokens=256 (256 px), 576 (384 px), 784 (448 px) or 1024 (512 px) with VQ-16; "
    "1024, 2304, 3136 or 4096 with VQ-8"
)


def is_model(state: Mapping[str, Tensor]) -> bool:
    return (CLASSES in state or CAPTIONS in state) and "tok_embeddings.weight" in state


def is_tokenizer(state: Mapping[str, Tensor]) -> bool:
    return "quantize.embedding.weight" in state and "encoder.conv_blocks.0.res.0.norm1.weight" in state


def model_spec(
    state: Mapping[str, Tensor],
    *,
    num_tokens: int | None = None,
    num_heads: int | None = None,
    num_cond_tokens: int | None = None,
) -> tuple[LlamaGenSpec, dict[str, Tensor]]:
    """The spec of an official file and its tensors without the rotary table that old files carry.

    Raises ConfigError where num_tokens is missing (256 and 384 px files are tensor-identical), num_heads cannot be
    told from an official size, or num_cond_tokens (120 unless stated) is given for a file of classes.
    """
    tensors = {key: value for key, value in state.items() if key != "freqs_cis"}
    vocab_size, dim = needed(tensors, "tok_embeddings.weight").shape
    num_layers = count(tensors, r"layers\.(\d+)\.")
    if num_tokens is None:
        raise ConfigError(f"a LlamaGen file does not tell its image size: pass {NUM_TOKENS_HELP}")
    if num_heads is None:
        num_heads = OFFICIAL_HEADS.get((num_layers, dim))
        if num_heads is None:
            raise ConfigError(
                f"{num_layers} layers of width {dim} is no official LlamaGen size: pass num_heads= "
                "(or make a bundle of the file with cca convert --num-heads)"
            )
    if CAPTIONS in tensors:
        num_classes, caption_dim = 0, tensors[CAPTIONS].shape[1]
        num_cond_tokens = OFFICIAL_CAPTION_TOKENS if num_cond_tokens is None else num_cond_tokens
    elif num_cond_tokens is None:
        num_classes, caption_dim, num_cond_tokens = tensors[CLASSES].shape[0] - 1, 0, 1
    else:
        raise ConfigError(f"num_cond_tokens={num_cond_tokens} belongs to captions, and this LlamaGen file has classes")
    if dim % num_heads:
        raise ConfigError(f"num_heads={num_heads} does not divide the width {dim} of the file")
    qkv_rows = needed(tensors, "layers.0.attention.wqkv.weight").shape[0]
    spec = LlamaGenSpec(
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        num_classes=num_classes,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=(qkv_rows // (dim // num_heads) - num_heads) // 2,
        ffn_dim=needed(tensors, "layers.0.feed_forward.w1.weight").shape[0],
        num_cond_tokens=num_cond_tokens,
        caption_dim=caption_dim,
    )
    return spec, tensors


def tokenizer_spec(state: Mapping[str, Tensor]) -> tuple[VQSpec, dict[str, Tensor]]:
    """The spec of an official VQ file, read off its tensors."""
    width = needed(state, "encoder.conv_in.weight").shape[0]
    levels = count(state, r"encoder\.conv_blocks\.(\d+)\.")
    codebook_size, codebook_dim = needed(state, "quantize.embedding.weight").shape
    spec = VQSpec(
        width=width,
        width_multipliers=tuple(
            needed(state, f"encoder.conv_blocks.{i}.res.0.conv1.weight").shape[0] // width for i in range(levels)
        ),
        num_res_blocks=count(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        latent_channels=needed(state, "encoder.conv_out.weight").shape[0],
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
    )
    return spec, dict(state)


def official_file(module: nn.Module) -> dict[str, Any]:
    """What official scripts load strictly: our tensors have their names."""
    return {"model": module.state_dict()}
