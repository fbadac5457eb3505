"""Reads and writes nothing: the VAR transformer (arXiv 2404.02905), with the tensor names of its checkpoints.

Class-conditional, one step per scale: all tokens of a scale are predicted at once from the scales before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_core.config import ConfigError
from cca_core.logprob import token_logp
from cca_core.models.base import ARImageModel, Captions, ClassIds, Cond, Decoder, ImageTokenizer, ModelSpec, class_ids
from cca_core.models.var.residual import ResidualCodes
from cca_core.models.var.tokenizer import MultiScaleVQTokenizer

#: exp of the stored attention scale is capped at 100.
MAX_LOG_SCALE = math.log(100)
#: Scale of the branches' gains at the start of training.
INITIAL_GAMMA = 1e-5


@dataclass(frozen=True, kw_only=True)
class VARSpec(ModelSpec):
    """Sizes of a VAR transformer; ``num_tokens`` is the sum over scales of patch_num^2. Official depth D has width
    64 D and D heads."""

    dim: int
    num_layers: int
    num_heads: int
    #: Dimension of the tokenizer's codes.
    codebook_dim: int
    patch_nums: tuple[int, ...]
    #: One modulation layer for all blocks (512 px model) instead of one per block.
    shared_adaln: bool = False
    #: l2-normalised queries and keys with a learned scale per head (all released models).
    qk_norm: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        if self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is no multiple of num_heads {self.num_heads}")
        if self.num_tokens != sum(self.step_sizes):
            raise ConfigError(f"num_tokens {self.num_tokens} is not the sum of squares of patch_nums {self.patch_nums}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def step_sizes(self) -> tuple[int, ...]:
        return tuple(p * p for p in self.patch_nums)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drop whole rows' branches with probability ``rate``; kept ones are divided by the keep rate."""
    if not training or rate == 0.0:
        return x
    keep = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


class KVCache:
    """Keys and values of one layer, [R, H, L, D]; ``extend`` returns the filled prefix."""

    def __init__(self, rows: int, spec: VARSpec, like: Tensor) -> None:
        shape = (rows, spec.num_heads, spec.num_tokens, spec.head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.filled = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        start, self.filled = self.filled, self.filled + keys.shape[2]
        self.keys[:, :, start : self.filled] = keys
        self.values[:, :, start : self.filled] = values
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


class SelfAttention(nn.Module):
    def __init__(self, spec: VARSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.qk_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, spec.num_heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(spec.dim, 3 * spec.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(spec.dim))
        self.v_bias = nn.Parameter(torch.zeros(spec.dim))
        self.proj = nn.Linear(spec.dim, spec.dim)

    def forward(self, x_BTC: Tensor, cache: KVCache | None) -> Tensor:
        spec = self.spec
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BTC, self.mat_qkv.weight, bias).unflatten(-1, (3, spec.num_heads, spec.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scale = 0.25 / math.sqrt(spec.head_dim)
        if spec.qk_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp().to(q.dtype)
            k = F.normalize(k, dim=-1)
            scale = 1.0
        if cache is not None:
            k, v = cache.extend(k, v)
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            out = torch.cat(list(self._by_scale(q, k, v, scale)), dim=2)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _by_scale(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[Tensor]:
        """Block-causal attention: each scale sees itself and the earlier ones, whole. One unmasked call per scale
        does half the work of a masked one and keeps the flash kernels."""
        stop = 0
        for size in self.spec.step_sizes:
            start, stop = stop, stop + size
            yield F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], scale=scale)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, outputs * dim))


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    def __init__(self, spec: VARSpec) -> None:
        super().__init__()
        self.attn = SelfAttention(spec)
        self.ffn = FeedForward(spec.dim)
        #: Probability of dropping a branch in train().
        self.drop_path = 0.0
        if spec.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, spec.dim))
        else:
            self.ada_lin = modulation(spec.dim, 6)

    def forward(self, x: Tensor, cond: Tensor, cache: KVCache | None = None) -> Tensor:
        """``cond`` is the class embedding [B, C], or the shared modulation [B, 1, 6, C]."""
        modulated = cond + self.ada_gss if hasattr(self, "ada_gss") else self.ada_lin(cond).unflatten(-1, (1, 6, -1))
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulated.unbind(2)
        branch = gamma1 * self.attn(layer_norm(x) * (1 + scale1) + shift1, cache)
        x = x + drop_path(branch, self.drop_path, self.training)
        branch = gamma2 * self.ffn(layer_norm(x) * (1 + scale2) + shift2)
        return x + drop_path(branch, self.drop_path, self.training)


class BlockList(nn.ModuleList):
    """The official name of the blocks is that of our contract's method: calling the list gives them."""

    def forward(self) -> list[nn.Module]:
        return list(self)


class HeadNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ada_lin = modulation(dim, 2)

    def forward(self, x: Tensor, cond_BC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BC).unflatten(-1, (1, 2, -1)).unbind(2)
        return layer_norm(x) * (1 + scale) + shift


class VAR(ARImageModel):
    """VAR. It reads the reconstruction that earlier scales leave, so it needs its tokenizer's codebook and phi."""

    family = "var"
    tokenizer_fields = ("patch_nums",)
    undecayed = ("pos_start", "pos_1LC", "lvl_embed", "scale_mul", "ada_gss")
    spec: VARSpec

    def __init__(self, spec: VARSpec) -> None:
        super().__init__()
        self.spec = spec
        dim = spec.dim
        self.word_embed = nn.Linear(spec.codebook_dim, dim)
        self.class_emb = nn.Embedding(spec.num_classes + 1, dim)
        self.pos_start = nn.Parameter(torch.zeros(1, spec.step_sizes[0], dim))
        self.pos_1LC = nn.Parameter(torch.zeros(1, spec.num_tokens, dim))
        self.lvl_embed = nn.Embedding(len(spec.patch_nums), dim)
        if spec.shared_adaln:
            self.shared_ada_lin = modulation(dim, 6)
        self.blocks = BlockList(Block(spec) for _ in range(spec.num_layers))
        self.head_nm = HeadNorm(dim)
        self.head = nn.Linear(dim, spec.vocab_size)
        # Of the tokenizer: they move with the model, and are no part of its checkpoint.
        self.register_buffer("codebook", None, persistent=False)
        self.register_buffer("phi_weight", None, persistent=False)
        self.register_buffer("phi_bias", None, persistent=False)

    def attach_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Take codebook and phi from the tokenizer whose codes this model draws."""
        if not isinstance(tokenizer, MultiScaleVQTokenizer):
            raise ConfigError(f"VAR needs its multi-scale VQ tokenizer, not one of family {tokenizer.family!r}")
        found, own = tokenizer.spec, self.spec
        for name, theirs, ours in (
            ("patch_nums", found.patch_nums, own.patch_nums),
            ("codebook_size", found.codebook_size, own.vocab_size),
            ("codebook_dim", found.codebook_dim, own.codebook_dim),
        ):
            if theirs != ours:
                raise ConfigError(f"the tokenizer's {name} is {theirs}, the model was made for {ours}")
        codes, device = tokenizer.residual(), self.head.weight.device
        self.codebook = codes.codebook_VC.detach().float().to(device)
        self.phi_weight = codes.phi_weight_KCC33.detach().float().to(device)
        self.phi_bias = codes.phi_bias_KC.detach().float().to(device)

    def residual(self) -> ResidualCodes:
        if self.codebook is None:
            raise ConfigError("this VAR has no tokenizer: pass tokenizer= to load_model (a path, or a loaded one)")
        return ResidualCodes(self.spec.patch_nums, self.codebook, self.phi_weight, self.phi_bias)

    def init_weights(self, generator: torch.Generator) -> None:
        """Official initialisation: truncated normals of std sqrt(1 / 3C), branches near zero."""
        std = math.sqrt(1 / (3 * self.spec.dim))
        depth_share = math.sqrt(2 * self.spec.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("scale_mul_1H11"):
                nn.init.constant_(parameter, math.log(4.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("ada_gss"):
                nn.init.normal_(parameter, std=1 / math.sqrt(self.spec.dim), generator=generator)
            else:
                nn.init.trunc_normal_(parameter, std=std, generator=generator)
        gammas = 2 * self.spec.dim
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_nm.ada_lin[1].weight.mul_(0.5)
            for block in self.blocks():
                block.attn.proj.weight.div_(depth_share)
                block.ffn.fc2.weight.div_(depth_share)
                if self.spec.shared_adaln:
                    block.ada_gss[:, :, :2].mul_(INITIAL_GAMMA)
                    block.ada_gss[:, :, 2:].mul_(0.5)
                else:
                    block.ada_lin[1].weight[:gammas].mul_(INITIAL_GAMMA)
                    block.ada_lin[1].weight[gammas:].mul_(0.5)

    def set_dropout(self, rate: float) -> None:
        """Stochastic depth that rises linearly over the blocks to ``rate`` (officially 0.1 D / 24)."""
        blocks = self.blocks()
        for index, block in enumerate(blocks):
            block.drop_path = rate * index / max(len(blocks) - 1, 1)

    def places(self, start: int, stop: int) -> Tensor:
        """Level and position embeddings of these positions: [1, n, C]."""
        sizes = torch.tensor(self.spec.step_sizes, device=self.pos_1LC.device)
        levels = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        return self.lvl_embed(levels[start:stop])[None] + self.pos_1LC[:, start:stop]

    def conditions(self, ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """The class embedding [B, C] and what the blocks take: itself, or the shared modulation [B, 1, 6, C]."""
        embedded = self.class_emb(ids_B)
        if self.spec.shared_adaln:
            return embedded, self.shared_ada_lin(embedded).unflatten(-1, (1, 6, -1))
        return embedded, embedded

    def hidden(self, tokens_BL: Tensor, cond: Cond) -> Tensor:
        """Hidden states [B, L, C] that predict each token, from the class and the tokens of earlier scales."""
        embedded, modulation_B = self.conditions(class_ids(cond))
        inputs = self.residual().inputs(tokens_BL).to(self.word_embed.weight.dtype)
        x = torch.cat([embedded[:, None] + self.pos_start, self.word_embed(inputs)], dim=1)
        x = x + self.places(0, self.spec.num_tokens)
        for block in self.blocks():
            x = block(x, modulation_B)
        return self.head_nm(x, embedded)

    def forward(self, tokens_BL: Tensor, cond: Cond) -> Tensor:
        return token_logp(self.hidden(tokens_BL, cond), self.head.weight, tokens_BL, bias_V=self.head.bias)

    def null_cond(self, cond: Cond) -> ClassIds | Captions:
        return ClassIds(torch.full_like(class_ids(cond), self.spec.null_label))

    def decoder(self, cond: Cond) -> Decoder:
        return VARDecoder(self, class_ids(cond))

    def guidance_scale(self, cfg_scale: float, cfg_interval: int, step: int) -> float:
        """PARITY: officially (1 + t) cond - t null with t = cfg s / (S - 1) and 0 for off; t is ``cfg_scale`` - 1 here,
        so the first scale is never guided. An interval n guides the scales 0..n."""
        if 0 <= cfg_interval < step:
            return 1.0
        return 1.0 + (cfg_scale - 1.0) * step / max(len(self.spec.patch_nums) - 1, 1)


class VARDecoder(Decoder):
    """Decoding scale by scale: f_hat, and the keys and values of all earlier scales."""

    def __init__(self, model: VAR, ids_R: Tensor) -> None:
        self.model = model
        self.codes = model.residual()
        self.embedded, self.modulation = model.conditions(ids_R)
        self.caches = [KVCache(len(ids_R), model.spec, model.head.weight) for _ in model.blocks()]
        self.f_hat: Tensor | None = None
        self.scale = 0
        self.position = 0

    def step(self, previous_tokens_Rn: Tensor | None) -> Tensor:
        model = self.model
        if previous_tokens_Rn is None:
            x = self.embedded[:, None] + model.pos_start
        else:
            added = self.codes.contribution(self.scale - 1, previous_tokens_Rn)
            self.f_hat = added if self.f_hat is None else self.f_hat + added
            inputs = self.codes.at_scale(self.f_hat, self.scale).flatten(2).transpose(1, 2)
            x = model.word_embed(inputs.to(model.word_embed.weight.dtype))
        x = x + model.places(self.position, self.position + x.shape[1])
        for block, cache in zip(model.blocks(), self.caches, strict=True):
            x = block(x, self.modulation, cache)
        self.position += x.shape[1]
        self.scale += 1
        return model.head(model.head_nm(x, self.embedded)).float()
