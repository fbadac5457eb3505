"""Reads and writes nothing: what every model family provides, so that no other module knows a family by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassIds:
    """Conditions that are classes: int64 [B]; ``spec.null_label`` is the null condition."""

    ids_B: Tensor


#: An int64 tensor [B] means ``ClassIds``.
Cond = ClassIds | Tensor


def class_ids(cond: Cond) -> Tensor:
    """The int64 [B] class ids of a condition."""
    return cond.ids_B if isinstance(cond, ClassIds) else cond


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the tensors cannot tell about an autoregressive model; families extend it."""

    vocab_size: int
    #: Tokens of one image.
    num_tokens: int
    num_classes: int

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Tokens drawn by each model call of generation; they add up to ``num_tokens``."""
        return (1,) * self.num_tokens


class Decoder(ABC):
    """Generation state of R rows: caches and position. One ``step`` is one model call."""

    @abstractmethod
    def step(self, previous_tokens_Rn: Tensor | None) -> Tensor:
        """Feed the tokens drawn last (None at the start); return the next logits, float32 [R, n, V]."""


class ARImageModel(nn.Module, ABC):
    """An autoregressive image model. Calling it IS scoring: ``model(tokens_BL, cond)`` is the log-prob of each token.

    Deterministic in eval(); in train() the configured dropout applies.
    """

    spec: ModelSpec

    @abstractmethod
    def forward(self, tokens_BL: Tensor, cond: Cond) -> Tensor:
        """log p(token | earlier tokens, condition) in nats, float32 [B, L], for int64 tokens [B, L]."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks: what sharding, activation checkpointing and compilation wrap."""

    @abstractmethod
    def decoder(self, cond: Cond) -> Decoder:
        """A fresh decoder for the rows of ``cond``."""

    def guidance_scale(self, cfg_scale: float, cfg_interval: int, step: int) -> float:
        """The scale s of ``uncond + s * (cond - uncond)`` at model call ``step``; 1.0 means off."""
        del cfg_interval, step
        return cfg_scale


class ImageTokenizer(nn.Module, ABC):
    """Image <-> tokens. ``spec`` is the family's dataclass with at least ``codebook_size`` and ``downsample``."""

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Tokens int64 [B, L] of float images in [-1, 1] whose sides are multiples of ``downsample``."""

    @abstractmethod
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Images float [B, 3, H, W], about [-1, 1] (not clamped), of int64 tokens."""


def to_uint8(images_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 [B, H, W, 3]: clamp(127.5 x + 128) truncated, as both official samplers do."""
    pixels = (images_BCHW.float() * 127.5 + 128).clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8)
