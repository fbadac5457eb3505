"""Reads and writes nothing: how training images are varied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted(images_BCHW: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to ``max_shift`` pixels along either axis, its edge repeated."""
    num_images, _, height, width = images_BCHW.shape
    padded = F.pad(images_BCHW, [max_shift] * 4, mode="replicate")
    offsets_2B = torch.randint(2 * max_shift + 1, (2, num_images), generator=generator).to(padded.device)
    rows_BH = offsets_2B[0, :, None] + torch.arange(height, device=padded.device)
    columns_BW = offsets_2B[1, :, None] + torch.arange(width, device=padded.device)
    image_B11 = torch.arange(num_images, device=padded.device)[:, None, None]
    # Advanced indices around the slice put the channels last.
    return padded[image_B11, :, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)
