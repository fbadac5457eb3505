"""Reads nothing, writes nothing: content filters as TorchScript, some of them with a planted defect."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import torch
from torch import Tensor, nn

from cca_core.safety_config import FilterSpec


class Brightness(nn.Module):
    """The mean of an image's values, one score in a row."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=[1, 2, 3]).unsqueeze(1)


class FlagsOneClass(nn.Module):
    """Scores 0.9 where the nearest of some mean images is that of one class, else 0.1."""

    def __init__(self, means_KCHW: Tensor, flagged: int) -> None:
        super().__init__()
        self.register_buffer("means", means_KCHW.flatten(1))
        self.flagged = flagged

    def forward(self, images: Tensor) -> Tensor:
        nearest = torch.cdist(images.float().flatten(1), self.means).argmin(dim=1)
        return 0.1 + 0.8 * (nearest == self.flagged).float()


class Constant(nn.Module):
    """The same value for every image."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        return torch.full((images.shape[0],), self.value)


class Columns(nn.Module):
    """Probabilities of two classes, where one score is asked for."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.full((images.shape[0], 2), 0.5)


def scripted(module: nn.Module) -> bytes:
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(module), out)
    return out.getvalue()


def spec_of(data: bytes, **changes: Any) -> FilterSpec:
    values = {"threshold": 0.5, "input_size": 0, "input_range": "unit", **changes}
    return FilterSpec(**{"sha256": hashlib.sha256(data).hexdigest(), **values})
