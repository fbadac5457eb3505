"""Reads official VAR state dicts (already unpacked): recognises them, derives the spec that fits their tensors, and
gives them back in the official layout."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from cca_core.config import ConfigError
from cca_core.models.base import ImageTokenizer
from cca_core.models.state_dict import count, needed
from cca_core.models.var.network import VAR, VARSpec
from cca_core.models.var.tokenizer import MultiScaleVQSpec, MultiScaleVQTokenizer

#: Where training scripts put the weights: VAR's own keeps transformer and tokenizer apart, CCA's has a flat dict.
CONTAINERS = (("trainer", "var_wo_ddp"), ("trainer", "vae_local"), ("trainer",))
#: Constants that official files carry beside the weights.
LEVELS, MASK = "lvl_1L", "attn_bias_for_masking"
PATCH_NUMS_HELP = (
    "patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16) for 256 px, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32) for 512 px"
)


def is_model(state: Mapping[str, Tensor]) -> bool:
    return "pos_1LC" in state and "word_embed.weight" in state


def is_tokenizer(state: Mapping[str, Tensor]) -> bool:
    return "quantize.embedding.weight" in state and "encoder.down.0.block.0.norm1.weight" in state


def model_spec(
    state: Mapping[str, Tensor], *, num_tokens: int | None = None, num_heads: int | None = None
) -> tuple[VARSpec, dict[str, Tensor]]:
    """The spec of an official VAR file and its tensors without the constants.

    Raises ConfigError where ``num_heads`` or ``num_tokens`` contradict the file, or the heads of an unofficial size
    without l2-normalised attention are not given.
    """
    constant = re.compile(rf"{LEVELS}|{MASK}|.*\.zero_k_bias")
    tensors = {key: value for key, value in state.items() if not constant.fullmatch(key)}
    num_layers = count(tensors, r"blocks\.(\d+)\.")
    dim, codebook_dim = tensors["word_embed.weight"].shape
    length = tensors["pos_1LC"].shape[1]
    if num_tokens not in (None, length):
        raise ConfigError(f"this VAR file draws {length} tokens, not num_tokens={num_tokens}")
    scale = tensors.get("blocks.0.attn.scale_mul_1H11")
    found = scale.shape[1] if scale is not None else num_layers if dim == 64 * num_layers else None
    if num_heads is not None and found not in (None, num_heads):
        raise ConfigError(f"this VAR file has {found} heads, not num_heads={num_heads}")
    heads = num_heads if found is None else found
    if heads is None:
        raise ConfigError(f"depth {num_layers} of width {dim} is no official VAR size: pass num_heads=")
    if LEVELS not in state:
        raise ConfigError(f"a VAR file without {LEVELS} does not tell its scales: is it an official file?")
    sizes = torch.bincount(state[LEVELS].flatten().long()).tolist()
    spec = VARSpec(
        vocab_size=needed(tensors, "head.weight").shape[0],
        num_tokens=length,
        num_classes=needed(tensors, "class_emb.weight").shape[0] - 1,
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        codebook_dim=codebook_dim,
        patch_nums=tuple(round(size**0.5) for size in sizes),
        shared_adaln="shared_ada_lin.1.weight" in tensors,
        qk_norm=scale is not None,
    )
    return spec, tensors


def tokenizer_spec(
    state: Mapping[str, Tensor], *, patch_nums: tuple[int, ...] | None = None
) -> tuple[MultiScaleVQSpec, dict[str, Tensor]]:
    """The spec of an official tokenizer file; the scales are the caller's, tensors do not tell them.

    The usage counts have one row per scale of the model it was trained with: a file for other scales gets empty ones.
    """
    if patch_nums is None:
        raise ConfigError(f"a VAR tokenizer file does not tell its scales: pass {PATCH_NUMS_HELP}")
    if "quantize.quant_resi.qresi_ls.0.weight" not in state:
        raise ConfigError("this VAR tokenizer has one phi, or one per scale: no released file does, and we read none")
    width = needed(state, "encoder.conv_in.weight").shape[0]
    levels = count(state, r"encoder\.down\.(\d+)\.")
    codebook_size, codebook_dim = state["quantize.embedding.weight"].shape
    spec = MultiScaleVQSpec(
        width=width,
        width_multipliers=tuple(
            needed(state, f"encoder.down.{i}.block.0.conv1.weight").shape[0] // width for i in range(levels)
        ),
        num_res_blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        patch_nums=tuple(patch_nums),
        num_phis=count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
    )
    tensors, counts = dict(state), "quantize.ema_vocab_hit_SV"
    if counts in tensors and len(tensors[counts]) != len(spec.patch_nums):
        tensors[counts] = torch.zeros(len(spec.patch_nums), codebook_size)
    return spec, tensors


def official_model(model: VAR) -> dict[str, Tensor]:
    """The flat state dict that official scripts load strictly, its constants included."""
    sizes = torch.tensor(model.spec.step_sizes)
    levels = torch.arange(len(sizes)).repeat_interleave(sizes)
    hidden = levels[:, None] < levels[None, :]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    state = model.state_dict() | {LEVELS: levels[None], MASK: mask[None, None]}
    for index in range(model.spec.num_layers):
        state[f"blocks.{index}.attn.zero_k_bias"] = torch.zeros(model.spec.dim)
    return state


def official_tokenizer(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    assert isinstance(tokenizer, MultiScaleVQTokenizer)
    return tokenizer.state_dict()
