"""Reads and writes nothing: LlamaGen's VQ tokenizer (arXiv 2406.06525; VQGAN, arXiv 2012.09841), with its tensor
names."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_core.config import ConfigError
from cca_core.models.base import CodeStep, ImageTokenizer
from cca_core.models.vqgan import Down, ResBlock, Up, group_norm, spatial_attention

#: Length of the usage ring that every official file carries.
USAGE_RING = 65536


@dataclass(frozen=True, kw_only=True)
class VQSpec:
    """Sizes of the tokenizer. Official: width 128, two residual blocks, 256 latent channels, 16384 codes of
    dimension 8."""

    width: int
    #: One level per entry, each but the last halving the side: (1, 1, 2, 2, 4) is VQ-16, (1, 2, 2, 4) VQ-8.
    width_multipliers: tuple[int, ...]
    #: Per encoder level; a decoder level has one more.
    num_res_blocks: int
    latent_channels: int
    codebook_size: int
    codebook_dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "width_multipliers", tuple(self.width_multipliers))

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.width_multipliers) - 1)

    def num_tokens(self, image_size: int) -> int:
        """Tokens of one image; ConfigError where the side does not fit."""
        if image_size % self.downsample:
            raise ConfigError(
                f"tokens.image_size={image_size} is no multiple of the tokenizer's {self.downsample} pixels per token"
            )
        return (image_size // self.downsample) ** 2


class AttnBlock(nn.Module):
    """Self-attention over all positions, one head of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.proj_out(spatial_attention(self.q(h), self.k(h), self.v(h)))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the lowest, then the resampling if any."""

    def __init__(self, in_channels: int, out_channels: int, num_res: int, *, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res
        self.res = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_res if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, res in enumerate(self.res):
            x = res(x)
            if self.attn:
                x = self.attn[index](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    def __init__(self, spec: VQSpec) -> None:
        super().__init__()
        widths = [spec.width * m for m in spec.width_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, spec.width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else spec.width, width, spec.num_res_blocks, attention=i == last)
            if i != last:
                level.downsample = Down(width)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], spec.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for module in (*self.conv_blocks, *self.mid):
            x = module(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """``conv_blocks`` counts in execution order: 0 is the lowest resolution."""

    def __init__(self, spec: VQSpec) -> None:
        super().__init__()
        widths = [spec.width * m for m in spec.width_multipliers][::-1]
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for j, width in enumerate(widths):
            level = Level(widths[max(j - 1, 0)], width, spec.num_res_blocks + 1, attention=j == 0)
            if j != len(widths) - 1:
                level.upsample = Up(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for module in (*self.mid, *self.conv_blocks):
            x = module(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """Nearest code on the unit sphere; codes are stored un-normalised and normalised on every use."""

    def __init__(self, spec: VQSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.codebook_size, spec.codebook_dim)
        self.register_buffer("codebook_used", torch.zeros(USAGE_RING))

    def codes(self) -> Tensor:
        """The normalised codebook [K, D]."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, latents_ND: Tensor) -> Tensor:
        """Index of the nearest code for normalised latents, in float32; the lowest index on exact ties."""
        codes, latents_ND = self.codes().float(), latents_ND.float()
        distances = latents_ND.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * latents_ND @ codes.T
        return distances.argmin(1)


class VQTokenizer(ImageTokenizer):
    """LlamaGen's image tokenizer; tokens are the grid of codes in raster order."""

    family = "llamagen"
    spec: VQSpec

    def __init__(self, spec: VQSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quantize = Quantizer(spec)
        self.quant_conv = nn.Conv2d(spec.latent_channels, spec.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(spec.codebook_dim, spec.latent_channels, 1)

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """Latents before quantisation, not yet normalised: [B, D, g, g]."""
        return self.quant_conv(self.encoder(images_BCHW))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        latents = F.normalize(self.latents(images_BCHW).float(), dim=1).permute(0, 2, 3, 1)
        return self.quantize.nearest(latents.flatten(0, 2)).view(len(images_BCHW), -1)

    def decode(self, tokens_BL: Tensor) -> Tensor:
        grid = int(tokens_BL.shape[1] ** 0.5 + 0.5)
        quantized = self.quantize.codes()[tokens_BL].transpose(1, 2).unflatten(2, (grid, grid))
        return self.decode_quantized(quantized)

    def decode_quantized(self, quantized_BDgg: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quantized_BDgg))

    def code_step(self, images_BCHW: Tensor) -> CodeStep:
        z = F.normalize(self.latents(images_BCHW), dim=1)
        latents = z.permute(0, 2, 3, 1).flatten(0, 2)
        tokens = self.quantize.nearest(latents.detach())
        codes = self.quantize.codes()[tokens]
        quantized = codes.view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
        return CodeStep(
            decoded_BCHW=self.decode_quantized(z + (quantized - z).detach()),
            codebook=F.mse_loss(codes, latents.detach()),
            commitment=F.mse_loss(latents, codes.detach()),
            tokens_N=tokens,
            vectors_ND=latents.detach(),
        )
