"""Reads a TorchScript file that is pinned by its sha256, and makes images what its network takes; writes nothing.

The file is code: it is checked before a byte of it is interpreted.
"""

from __future__ import annotations

import hashlib
import io
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cca_core.config import ConfigError
from cca_core.evaluate_config import InputRange
from cca_core.models import to_uint8

#: Mean and standard deviation of ImageNet's pixels in [0, 1], per channel.
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TakesImages(Protocol):
    """The images that a network takes: their side in pixels (0: any), and the range of their values."""

    @property
    def input_size(self) -> int: ...

    @property
    def input_range(self) -> InputRange: ...


def network_input(images_BCHW: Tensor, config: TakesImages) -> Tensor:
    """Images in [-1, 1] as a scripted network takes them: saved as uint8 first, as published numbers are."""
    images = to_uint8(images_BCHW).permute(0, 3, 1, 2)
    if config.input_size and images.shape[-1] != config.input_size:
        size = (config.input_size, config.input_size)
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255)
    if config.input_range == "uint8":
        return images.to(torch.uint8).contiguous()
    unit = images.float() / 255
    if config.input_range == "symmetric":
        return unit * 2 - 1
    if config.input_range == "imagenet":
        mean, sd = (torch.tensor(v, device=unit.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_SD))
        return (unit - mean) / sd
    return unit


def check_sha256(found: str, pinned: str, *, name: str, key: str) -> None:
    """Refuse a file that is not the one that ``key`` pins."""
    if found != pinned:
        raise ConfigError(
            f"{name} has sha256 {found}, not {pinned} as {key} says. A TorchScript file is code: find out why it "
            "differs, and only then pin what you found"
        )


def load_torchscript(data: bytes, pinned: str, *, name: str, key: str) -> torch.jit.ScriptModule:
    """A TorchScript file on the CPU in eval mode, checked before it is loaded.

    Args:
        pinned: the sha256 that it must have, as ``key`` says.
        name: what errors call it.
    """
    check_sha256(hashlib.sha256(data).hexdigest(), pinned, name=name, key=key)
    try:
        return torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except RuntimeError as error:
        raise ConfigError(
            f"{name} is no TorchScript file: write one with torch.jit.script or torch.jit.trace, and save()"
        ) from error
