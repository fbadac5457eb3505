"""Reads and writes nothing: the LlamaGen transformer (arXiv 2406.06525), with the tensor names of its checkpoints.

Class-conditional: one condition token, then the image's tokens in raster order, causal attention, 2-D rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_core.config import ConfigError
from cca_core.logprob import token_logp
from cca_core.models.base import ARImageModel, Captions, ClassIds, Cond, Decoder, ModelSpec, class_ids

NUM_COND_TOKENS = 1


def default_ffn_dim(dim: int) -> int:
    """8/3 of the width, rounded up to a multiple of 256."""
    return -(-(8 * dim // 3) // 256) * 256


@dataclass(frozen=True, kw_only=True)
class LlamaGenSpec(ModelSpec):
    """Sizes of a class-conditional LlamaGen; ``num_tokens`` is a square number (the image's grid of tokens)."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int

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
    return torch.cat([torch.zeros(NUM_COND_TOKENS, half, 2, device="cpu"), table])


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
        shape = (rows, spec.num_kv_heads, NUM_COND_TOKENS + spec.num_tokens - 1, spec.head_dim)
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

    def forward(self, x_BTC: Tensor, table: Tensor, cache: KVCache | None, position: int) -> Tensor:
        spec = self.spec
        qkv = self.wqkv(x_BTC).unflatten(-1, (-1, spec.head_dim))
        q, k, v = qkv.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=2)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, table), rotate(k, table), v))
        if cache is not None:
            k, v = cache.extend(position, k, v)
        # One new position sees the whole filled prefix, so only teacher forcing needs the causal mask.
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=cache is None, enable_gqa=spec.num_kv_heads != spec.num_heads
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

    def forward(self, x: Tensor, table: Tensor, cache: KVCache | None = None, position: int = 0) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, cache, position)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """One vector per class, and the last row for the null condition."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, ids_B: Tensor) -> Tensor:
        return self.embedding_table(ids_B)[:, None]


class LlamaGen(ARImageModel):
    """Class-conditional LlamaGen. PARITY: officially only train mode gives teacher-forced logits; here both
    modes do."""

    family = "llamagen"
    spec: LlamaGenSpec

    def __init__(self, spec: LlamaGenSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tok_embeddings = nn.Embedding(spec.vocab_size, spec.dim)
        self.cls_embedding = ClassEmbedding(spec.num_classes, spec.dim)
        self.tok_dropout = nn.Dropout(0.0)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.dim)
        self.output = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self.register_buffer("rotary", rotary_table(spec), persistent=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, 0.02^2) for matrices, zero for the output layer, as in official training."""
        for name, parameter in self.named_parameters():
            if name == "output.weight":
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def hidden(self, tokens_BL: Tensor, cond: Cond) -> Tensor:
        """Hidden states [B, L, C] that predict each token, from the condition and the earlier tokens."""
        embedded = self.tok_embeddings(tokens_BL[:, :-1])
        x = self.tok_dropout(torch.cat([self.cls_embedding(class_ids(cond)), embedded], dim=1))
        table = self.rotary[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, table)
        return self.norm(x)

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
        return ClassIds(torch.full_like(class_ids(cond), self.spec.null_label))

    def decoder(self, cond: Cond) -> Decoder:
        return LlamaGenDecoder(self, class_ids(cond))

    def guidance_scale(self, cfg_scale: float, cfg_interval: int, step: int) -> float:
        """cfg_interval n guides the tokens 0..n+1 (the prefill, then decode steps 0..n); negative guides all."""
        return cfg_scale if cfg_interval < 0 or step <= cfg_interval + 1 else 1.0


class LlamaGenDecoder(Decoder):
    """Decoding with a static cache: call 0 reads the condition, call k reads token k - 1."""

    def __init__(self, model: LlamaGen, ids_R: Tensor) -> None:
        self.model = model
        self.ids_R = ids_R
        self.position = 0
        self.caches = [KVCache(len(ids_R), model.spec, model.output.weight) for _ in model.layers]

    def step(self, previous_tokens_Rn: Tensor | None) -> Tensor:
        model = self.model
        x = model.cls_embedding(self.ids_R) if previous_tokens_Rn is None else model.tok_embeddings(previous_tokens_Rn)
        table = model.rotary[self.position : self.position + 1]
        for layer, cache in zip(model.layers, self.caches, strict=True):
            x = layer(x, table, cache, self.position)
        self.position += 1
        return model.output(model.norm(x)).float()
