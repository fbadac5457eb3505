"""Reads and writes nothing: VAR's multi-scale VQ tokenizer (arXiv 2404.02905), with the tensor names of its files."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_core.config import ConfigError
from cca_core.models.base import CodeStep, ImageTokenizer
from cca_core.models.var.residual import ResidualCodes
from cca_core.models.vqgan import Down, ResBlock, Up, group_norm, spatial_attention


@dataclass(frozen=True, kw_only=True)
class MultiScaleVQSpec:
    """Sizes of the tokenizer. Official: width 160, multipliers (1, 1, 2, 2, 4), two residual blocks, 4096 codes of
    dimension 32, four phis."""

    width: int
    #: One level per entry, each but the last halving the side.
    width_multipliers: tuple[int, ...]
    #: Per encoder level; a decoder level has one more.
    num_res_blocks: int
    codebook_size: int
    codebook_dim: int
    #: Sides of the token grids, coarse to fine: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16) for 256 px.
    patch_nums: tuple[int, ...]
    num_phis: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "width_multipliers", tuple(self.width_multipliers))
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        if len(self.patch_nums) < 2 or list(self.patch_nums) != sorted(set(self.patch_nums)):
            raise ConfigError(f"patch_nums {self.patch_nums} must be sides of growing grids, as in (1, 2, 3, 4)")

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def image_size(self) -> int:
        """The one image side, in pixels, that these scales fit."""
        return self.downsample * self.patch_nums[-1]

    def num_tokens(self, image_size: int) -> int:
        """Tokens of one image; ConfigError where the side does not fit."""
        if image_size != self.image_size:
            raise ConfigError(
                f"tokens.image_size={image_size} does not fit scales {self.patch_nums}: {self.downsample} pixels per "
                f"token of the last make {self.image_size}"
            )
        return sum(p * p for p in self.patch_nums)


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(spatial_attention(*self.qkv(self.norm(x)).chunk(3, dim=1)))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the lowest, then the resampling if any."""

    def __init__(self, in_channels: int, out_channels: int, num_res: int, *, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_res if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, spec: MultiScaleVQSpec) -> None:
        super().__init__()
        widths = [spec.width * m for m in spec.width_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, spec.width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else spec.width, width, spec.num_res_blocks, attention=i == last)
            if i != last:
                level.downsample = Down(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], spec.codebook_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """``up`` counts levels: 0 is full resolution, executed last."""

    def __init__(self, spec: MultiScaleVQSpec) -> None:
        super().__init__()
        widths = [spec.width * m for m in spec.width_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(spec.codebook_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, last)], width, spec.num_res_blocks + 1, attention=i == last)
            if i:
                level.upsample = Up(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class SharedPhi(nn.Module):
    def __init__(self, spec: MultiScaleVQSpec) -> None:
        super().__init__()
        channels = spec.codebook_dim
        self.qresi_ls = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(spec.num_phis))


class Quantizer(nn.Module):
    """Codebook and phi; the usage counts that every official file carries."""

    def __init__(self, spec: MultiScaleVQSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.codebook_size, spec.codebook_dim)
        self.quant_resi = SharedPhi(spec)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(spec.patch_nums), spec.codebook_size))


class MultiScaleVQTokenizer(ImageTokenizer):
    """VAR's image tokenizer; tokens are the grids of all scales, coarse to fine, each in raster order."""

    family = "var"
    spec: MultiScaleVQSpec

    def __init__(self, spec: MultiScaleVQSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quantize = Quantizer(spec)
        self.quant_conv = nn.Conv2d(spec.codebook_dim, spec.codebook_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(spec.codebook_dim, spec.codebook_dim, 3, padding=1)

    def residual(self) -> ResidualCodes:
        """Codebook and phi, for this tokenizer and for the transformer that reads its codes."""
        phis = self.quantize.quant_resi.qresi_ls
        return ResidualCodes(
            self.spec.patch_nums,
            self.quantize.embedding.weight,
            torch.stack([phi.weight for phi in phis]),
            torch.stack([phi.bias for phi in phis]),
        )

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """Latents before quantisation: [B, c, P, P]."""
        return self.quant_conv(self.encoder(images_BCHW))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        self.spec.num_tokens(images_BCHW.shape[-1])
        codes, left = self.residual(), self.latents(images_BCHW).float()
        tokens = []
        for scale in range(len(self.spec.patch_nums)):
            vectors = codes.at_scale(left, scale).flatten(2).transpose(1, 2)
            tokens.append(self._nearest(vectors))
            left = left - codes.contribution(scale, tokens[-1])
        return torch.cat(tokens, dim=1)

    def _nearest(self, vectors_BnC: Tensor) -> Tensor:
        """Index of the nearest code in plain Euclidean distance, float32; the lowest index on exact ties."""
        codes, vectors = self.quantize.embedding.weight.float(), vectors_BnC.flatten(0, 1)
        distances = vectors.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * vectors @ codes.T
        return distances.argmin(1).view(vectors_BnC.shape[:2])

    def decode(self, tokens_BL: Tensor) -> Tensor:
        *_, f_hat = self.residual().partial_sums(tokens_BL)
        return self.decode_quantized(f_hat).clamp(-1, 1)  # as officially

    def decode_quantized(self, f_hat_BCPP: Tensor) -> Tensor:
        dtype = self.post_quant_conv.weight.dtype
        return self.decoder(self.post_quant_conv(f_hat_BCPP.to(dtype)))

    def code_step(self, images_BCHW: Tensor) -> CodeStep:
        """Straight-through reconstruction; codebook and commitment terms are means over scales of every partial sum's
        error (architectures section 6.3)."""
        f = self.latents(images_BCHW)
        codes, left = self.residual(), f.detach()
        f_hat = torch.zeros_like(f)
        tokens, vectors, codebook, commitment = [], [], 0.0, 0.0
        for scale in range(len(self.spec.patch_nums)):
            vectors.append(codes.at_scale(left, scale).flatten(2).transpose(1, 2))
            tokens.append(self._nearest(vectors[-1]))
            added = codes.contribution(scale, tokens[-1])
            left = left - added.detach()
            f_hat = f_hat + added
            codebook = codebook + F.mse_loss(f_hat, f.detach())
            commitment = commitment + F.mse_loss(f_hat.detach(), f)
        decoded = self.decode_quantized(f + (f_hat - f).detach())
        count = len(self.spec.patch_nums)
        flat = torch.cat(vectors, dim=1).flatten(0, 1)
        return CodeStep(decoded, codebook / count, commitment / count, torch.cat(tokens, dim=1).flatten(), flat)
