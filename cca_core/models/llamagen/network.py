"""Reads and writes nothing: the LlamaGen transformer (arXiv 2406.06525), with the tensor names of its checkpoints.

The condition's tokens (one of a class, or those of a caption), then the image's in raster order; causal attention, 2-D
rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_core.config import ConfigError
from cca_core.logprob import token_logp
from cca_core.models.base import (
    ARImageModel,
    Captions,
    ClassIds,
    Cond,
    Decoder,
    ModelSpec,
    SlotDecoder,
    captions,
    class_ids,
)

#: Rows of the null caption in every official file, whatever the number of condition tokens.
NULL_CAPTION_ROWS = 120


def default_ffn_dim(dim: int) -> int:
    """8/3 of the width, rounded up to a multiple of 256."""
    return -(-(8 * dim // 3) // 256) * 256


@dataclass(frozen=True, kw_only=True)
class LlamaGenSpec(ModelSpec):
    """Sizes of a LlamaGen; ``num_tokens`` is a square number (the image's grid of tokens)."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    #: Positions before the image's tokens: 1 for a class, the positions of a caption otherwise.
    num_cond_tokens: int = 1
    #: Width of the caption's features; 0 is a class-conditional model.
    caption_dim: int = 0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.dim // self.num_heads % 4:
            raise ConfigError(
                f"dim {self.dim} over {self.num_heads} heads must give a multiple of 4 (2-D rotary pairs)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.grid**2 != self.num_tokens:
            raise ConfigError(
                f"num_tokens {self.num_tokens} is not a square number: LlamaGen draws a square grid of tokens"
            )
        if not self.caption_dim and self.num_cond_tokens != 1:
            raise ConfigError(f"num_cond_tokens={self.num_cond_tokens} needs captions: a class is one token")
        if self.caption_dim and self.num_classes:
            raise ConfigError(f"a model is conditioned on captions or on {self.num_classes} classes, not on both")
        if not 1 <= self.num_cond_tokens <= NULL_CAPTION_ROWS:
            raise ConfigError(
                f"num_cond_tokens={self.num_cond_tokens} must lie between 1 and the {NULL_CAPTION_ROWS} rows of the "
                "null caption"
            )

    @property
    def grid(self) -> int:
        return int(self.num_tokens**0.5 + 0.5)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def rotary_table(spec: LlamaGenSpec) -> Tensor:
    """cos and sin, float32 [T + N, head_dim/2, 2]; the first half of the pairs turns with the row, the second
    with the column.

    Rows of condition positions are zero, cos included: their queries and keys vanish, which is the checkpoints' format.
    """
    half = spec.head_dim // 2
    exponents = torch.arange(0, half, 2, device="cpu")[: half // 2].float() / half
    frequencies = 1.0 / (10000**exponents)
    cells = torch.arange(spec.num_tokens, device="cpu")
    rows, columns = cells // spec.grid, cells % spec.grid
    angles = torch.cat([torch.outer(axis.float(), frequencies) for axis in (rows, columns)], dim=-1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(spec.num_cond_tokens, half, 2, device="cpu"), table])


def visible(mask_BT: Tensor, start: int, stop: int) -> Tensor:
    """Which positions the queries ``start:stop`` see of the first ``stop`` under a caption's mask: bool
    [B, 1, stop - start, stop].

    The earlier ones but those that the mask leaves out, and always themselves: a row without keys has no softmax.
    """
    keys = torch.arange(stop, device=mask_BT.device)
    queries = keys[start:, None]
    valid = F.pad(mask_BT.bool(), (0, stop - mask_BT.shape[1]), value=True)
    return (valid[:, None, None] & (keys <= queries)) | (keys == queries)


def rotate(x_BTHD: Tensor, table: Tensor) -> Tensor:
    """Turn interleaved pairs (x_2p, x_2p+1) by the table's angles, in float32."""
    a, b = x_BTHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x_BTHD)


class RMSNorm(nn.Module):
    """Scaling in float32, cast back, then times the weight: the order matters in bfloat16."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class KVCache:
    """Keys and values of one layer, [R, H_kv, T + N - 1, D]; ``extend`` returns the filled prefix only."""

    def __init__(self, rows: int, spec: LlamaGenSpec, like: Tensor) -> None:
        shape = (rows, spec.num_kv_heads, spec.num_cond_tokens + spec.num_tokens - 1, spec.head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)

    def extend(self, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = position + keys.shape[2]
        self.keys[:, :, position:end] = keys
        self.values[:, :, position:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    def __init__(self, spec: LlamaGenSpec) -> None:
        super().__init__()
        self.spec = spec
        self.wqkv = nn.Linear(spec.dim, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, bias=False)
        self.wo = nn.Linear(spec.dim, spec.dim, bias=False)
        self.resid_dropout = nn.Dropout(0.0)

    def forward(
        self, x_BTC: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, position: int
    ) -> Tensor:
        spec = self.spec
        qkv = self.wqkv(x_BTC).unflatten(-1, (-1, spec.head_dim))
        q, k, v = qkv.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=2)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, table), rotate(k, table), v))
        if cache is not None:
            k, v = cache.extend(position, k, v)
        # One new position sees the whole filled prefix, so only teacher forcing and the prefill need the causal mask.
        causal = mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=spec.num_kv_heads != spec.num_heads
        )
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, spec: LlamaGenSpec) -> None:
        super().__init__()
        self.w1 = nn.Linear(spec.dim, spec.ffn_dim, bias=False)
        self.w3 = nn.Linear(spec.dim, spec.ffn_dim, bias=False)
        self.w2 = nn.Linear(spec.ffn_dim, spec.dim, bias=False)
        self.ffn_dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, spec: LlamaGenSpec) -> None:
        super().__init__()
        self.attention = Attention(spec)
        self.feed_forward = FeedForward(spec)
        self.attention_norm = RMSNorm(spec.dim)
        self.ffn_norm = RMSNorm(spec.dim)

    def forward(
        self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None = None, position: int = 0
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, mask, cache, position)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """One vector per class, and the last row for the null condition."""

    def __init__(self, spec: LlamaGenSpec) -> None:
        super().__init__()
        self.null_label = spec.null_label
        self.embedding_table = nn.Embedding(spec.num_classes + 1, spec.dim)

    def forward(self, cond: Cond) -> tuple[Tensor, None]:
        """The condition's tokens [B, 1, C]; a class needs no mask."""
        return self.embedding_table(class_ids(cond))[:, None], None

    def null(self, cond: Cond) -> ClassIds:
        return ClassIds(torch.full_like(class_ids(cond), self.null_label))


class CaptionProjection(nn.Module):
    def __init__(self, spec: LlamaGenSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.caption_dim, spec.dim, bias=False)
        self.fc2 = nn.Linear(spec.dim, spec.dim, bias=False)

    def forward(self, features_BTD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features_BTD.to(self.fc1.weight.dtype)), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """One vector per caption position; the null condition takes the place of the features, so it is projected too.

    The null features are never trained: a buffer, though part of the checkpoint.
    """

    uncond_embedding: Tensor

    def __init__(self, spec: LlamaGenSpec) -> None:
        super().__init__()
        self.shape = (spec.num_cond_tokens, spec.caption_dim)
        self.cap_proj = CaptionProjection(spec)
        self.register_buffer("uncond_embedding", torch.zeros(NULL_CAPTION_ROWS, spec.caption_dim))

    def fitting(self, cond: Cond) -> Captions:
        """The condition as captions of this model's shape.

        PARITY: officially longer captions are cut at the end, which is where left padding has the words.
        """
        given = captions(cond)
        if tuple(given.features_BTD.shape[1:]) != self.shape:
            raise ConfigError(
                f"captions of {tuple(given.features_BTD.shape[1:])} (positions, width) do not fit the model's "
                f"{self.shape}: positions are padded or cut on the left"
            )
        if given.mask_BT is not None and given.mask_BT.shape != given.features_BTD.shape[:2]:
            raise ConfigError(
                f"the captions' mask {tuple(given.mask_BT.shape)} is not that of their {len(given)} rows of "
                f"{self.shape[0]} positions"
            )
        return given

    def forward(self, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The condition's tokens [B, T, C], and which of them count."""
        given = self.fitting(cond)
        return self.cap_proj(given.features_BTD), given.mask_BT

    def null(self, cond: Cond) -> Captions:
        """PARITY: the null caption keeps the mask of the caption that it stands for. Officially it is added only to
        captions of 120 tokens; shorter ones take its first rows."""
        given = self.fitting(cond)
        return Captions(self.uncond_embedding[: self.shape[0]].expand(len(given), -1, -1), given.mask_BT)


class LlamaGen(ARImageModel):
    """LlamaGen, of classes or of captions. PARITY: officially only train mode gives teacher-forced logits; here both
    modes do."""

    family = "llamagen"
    spec: LlamaGenSpec
    rotary: Tensor

    def __init__(self, spec: LlamaGenSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tok_embeddings = nn.Embedding(spec.vocab_size, spec.dim)
        self.cls_embedding = CaptionEmbedding(spec) if spec.caption_dim else ClassEmbedding(spec)
        self.tok_dropout = nn.Dropout(0.0)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.dim)
        self.output = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self.register_buffer("rotary", rotary_table(spec), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, but for the rotary table: angles are float32 in every model."""
        super()._apply(fn, recurse)
        self.rotary = rotary_table(self.spec).to(self.rotary.device)
        return self

    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, 0.02^2) for matrices, zero for the output layer, N(0, 1) / sqrt(width) for the null caption, as in
        official training."""
        for name, parameter in self.named_parameters():
            if name == "output.weight":
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)
        if isinstance(self.cls_embedding, CaptionEmbedding):
            std = self.spec.caption_dim**-0.5
            nn.init.normal_(self.cls_embedding.uncond_embedding, std=std, generator=generator)

    def hidden(self, tokens_BL: Tensor, cond: Cond) -> Tensor:
        """Hidden states [B, L, C] that predict each token, from the condition and the earlier tokens."""
        embedded, mask_BT = self.cls_embedding(cond)
        x = self.tok_dropout(torch.cat([embedded, self.tok_embeddings(tokens_BL[:, :-1])], dim=1))
        table = self.rotary[: x.shape[1]]
        mask = None if mask_BT is None else visible(mask_BT, 0, x.shape[1])
        for layer in self.layers:
            x = layer(x, table, mask)
        return self.norm(x[:, self.spec.num_cond_tokens - 1 :])

    def forward(self, tokens_BL: Tensor, cond: Cond) -> Tensor:
        return token_logp(self.hidden(tokens_BL, cond), self.output.weight, tokens_BL)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def set_dropout(self, rate: float) -> None:
        """One rate for embedded tokens, attention and feed-forward branches (officially 0.1)."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate

    def null_cond(self, cond: Cond) -> ClassIds | Captions:
        return self.cls_embedding.null(cond)

    def decoder(self, cond: Cond) -> Decoder:
        return LlamaGenDecoder(self, cond)

    def slots(self, num_slots: int) -> SlotDecoder:
        """Continuous ones for classes; captions are read by one call of all rows."""
        from cca_core.models.llamagen.slots import LlamaGenSlots  # which reads this module

        return super().slots(num_slots) if self.spec.caption_dim else LlamaGenSlots(self, num_slots)

    def guidance_scale(self, cfg_scale: float, cfg_interval: int, step: int) -> float:
        """cfg_interval n guides the tokens 0..n+1 (the prefill, then decode steps 0..n); negative guides all."""
        return cfg_scale if cfg_interval < 0 or step <= cfg_interval + 1 else 1.0


class LlamaGenDecoder(Decoder):
    """Decoding with a static cache: call 0 reads the condition, call k reads token k - 1."""

    def __init__(self, model: LlamaGen, cond: Cond) -> None:
        self.model = model
        self.embedded_RTC, self.mask_RT = model.cls_embedding(cond)
        self.position = 0
        rows = len(self.embedded_RTC)
        self.caches = [KVCache(rows, model.spec, model.output.weight) for _ in model.layers]

    def step(self, previous_tokens_Rn: Tensor | None) -> Tensor:
        model = self.model
        x = self.embedded_RTC if previous_tokens_Rn is None else model.tok_embeddings(previous_tokens_Rn)
        end = self.position + x.shape[1]
        table = model.rotary[self.position : end]
        mask = None if self.mask_RT is None else visible(self.mask_RT, self.position, end)
        for layer, cache in zip(model.layers, self.caches, strict=True):
            x = layer(x, table, mask, cache, self.position)
        self.position = end
        return model.output(model.norm(x[:, -1:])).float()
