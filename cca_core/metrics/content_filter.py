"""Reads a content filter, a pinned TorchScript file in memory or in a bundle, and scores images; writes nothing.

What the network takes and gives:

- in: images as they would be saved, RGB [B, 3, H, W], in the size and range that its spec names;
- out: scores in [0, 1], [B] or [B, 1]; an image is blocked whose score is the threshold or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cca_core.bundle import INFO_NAME, read_filter, read_info
from cca_core.config import ConfigError
from cca_core.generate import pad_rows, padded_batches
from cca_core.metrics.torchscript import load_torchscript, network_input
from cca_core.safety_config import FilterSpec


class ContentFilter:
    """The network, in the spec's setting."""

    def __init__(self, data: bytes, spec: FilterSpec, *, key: str, device: str = "cpu") -> None:
        """``key`` says where the sha256 is pinned, for the error."""
        self.spec, self.device = spec, torch.device(device)
        self.network = load_torchscript(data, spec.sha256, name="the content filter", key=key).to(self.device)

    @torch.inference_mode()
    def scores(self, images_NCHW: Tensor, batch_size: int) -> Tensor:
        """Scores float32 [N] on the CPU of images in [-1, 1], in padded batches of one shape.

        ConfigError for a network that gives anything but one score in [0, 1] per image.
        """
        parts = []
        for rows in padded_batches(len(images_NCHW), batch_size):
            images = pad_rows(images_NCHW[rows], batch_size).to(self.device)
            found = self.network(network_input(images, self.spec))
            parts.append(_checked(found, batch_size)[: rows.stop - rows.start])
        return torch.cat(parts)

    def blocked(self, images_NCHW: Tensor, batch_size: int) -> list[bool]:
        """Which of the images it blocks; as ``scores``."""
        return (self.scores(images_NCHW, batch_size) >= self.spec.threshold).tolist()


def _checked(found: object, batch_size: int) -> Tensor:
    if not isinstance(found, Tensor) or tuple(found.shape) not in ((batch_size,), (batch_size, 1)):
        is_ = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"the content filter gives {is_} for {batch_size} images, not one score each ([B] or [B, 1]): script it so "
            "that it gives the one score of what is to be blocked"
        )
    scores_B = found.reshape(-1).float().cpu()
    # A NaN is in no range: it must not pass as a low score.
    if not bool(((scores_B >= 0) & (scores_B <= 1)).all()):
        raise ConfigError("the content filter gives scores outside [0, 1]: end it with a sigmoid or a softmax")
    return scores_B


def load_filter(uri: str, device: str = "cpu") -> ContentFilter | None:
    """The content filter of a bundle, checked against the sha256 in its bundle.json; None where it has none."""
    spec = read_info(uri).filter
    if spec is None:
        return None
    return ContentFilter(read_filter(uri), spec, key=INFO_NAME, device=device)
