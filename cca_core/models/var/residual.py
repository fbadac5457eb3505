"""Reads and writes nothing: VAR's residual codes over scales (arXiv 2404.02905), as functions of codebook and phi.

An image is S grids of codes, of sides ``patch_nums``. Each adds phi(bicubic upsampling of its code vectors) to the
reconstruction f_hat [B, c, P, P]; scale s is coded from, and the transformer's scale s reads, what the earlier leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def phi_index(num_scales: int, num_phis: int) -> list[int]:
    """The phi of each scale: the nearest of ``num_phis`` ticks to s / (S - 1), the lower of two as near.

    PARITY: four phis (all released tokenizers) have ticks from 1/12 to 11/12, other counts 1/2K to 1 - 1/2K; and these
    are numpy's float64 numbers, whose rounding decides: scales 2 and 7 of ten lie between two ticks on paper.
    """
    margin = 1 / 12 if num_phis == 4 else 1 / (2 * num_phis)
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return [int(np.abs(ticks - s / max(num_scales - 1, 1)).argmin()) for s in range(num_scales)]


@dataclass(frozen=True)
class ResidualCodes:
    """Codebook [V, c] and the shared phi convolutions [K, c, c, 3, 3], [K, c]; all arithmetic is float32."""

    patch_nums: tuple[int, ...]
    codebook_VC: Tensor
    phi_weight_KCC33: Tensor
    phi_bias_KC: Tensor

    @property
    def sizes(self) -> list[int]:
        """Tokens of each scale."""
        return [p * p for p in self.patch_nums]

    def embed(self, scale: int, vectors_BnC: Tensor) -> Tensor:
        """What the code vectors of one scale add to f_hat: [B, c, P, P]."""
        side, full = self.patch_nums[scale], self.patch_nums[-1]
        h = vectors_BnC.float().transpose(1, 2).unflatten(2, (side, side))
        if side != full:
            h = F.interpolate(h, size=(full, full), mode="bicubic")
        k = phi_index(len(self.patch_nums), len(self.phi_weight_KCC33))[scale]
        return 0.5 * h + 0.5 * F.conv2d(h, self.phi_weight_KCC33[k].float(), self.phi_bias_KC[k].float(), padding=1)

    def contribution(self, scale: int, tokens_Bn: Tensor) -> Tensor:
        """What the tokens of one scale add to f_hat: [B, c, P, P]."""
        return self.embed(scale, self.codebook_VC[tokens_Bn])

    def at_scale(self, f_BCPP: Tensor, scale: int) -> Tensor:
        """f averaged down to the grid of a scale: [B, c, p, p]."""
        side = self.patch_nums[scale]
        return f_BCPP if side == f_BCPP.shape[-1] else F.adaptive_avg_pool2d(f_BCPP, side)

    def partial_sums(self, tokens_BL: Tensor) -> Iterator[Tensor]:
        """f_hat after each scale; the last is the whole image."""
        f_hat: Tensor | None = None
        for scale, tokens in enumerate(tokens_BL.split(self.sizes, dim=1)):
            added = self.contribution(scale, tokens)
            f_hat = added if f_hat is None else f_hat + added
            yield f_hat

    def inputs(self, tokens_BL: Tensor) -> Tensor:
        """What the transformer reads at scales 1.. in teacher forcing: float32 [B, L - p_0^2, c]."""
        sums = zip(range(1, len(self.patch_nums)), self.partial_sums(tokens_BL), strict=False)
        return torch.cat([self.at_scale(f_hat, scale).flatten(2).transpose(1, 2) for scale, f_hat in sums], dim=1)
