"""Reads and writes nothing: what every model family provides, so that no other module knows a family by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from cca_core.config import ConfigError


@dataclass(frozen=True)
class Rows:
    """Tensors with one row per image."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same conditions with ``change`` applied to every tensor."""
        return type(self)(**{name: change(value) for name, value in vars(self).items() if value is not None})

    def append(self, *others: Self) -> Self:
        """These rows, then the others'; ConfigError where one has a tensor that another lacks."""
        columns = {name: [vars(rows)[name] for rows in (self, *others)] for name in vars(self)}
        for name, values in columns.items():
            if 0 < sum(value is None for value in values) < len(values):
                raise ConfigError(f"rows with and without {name} do not go into one batch: give it to all of them")
        return type(self)(**{name: torch.cat(values) for name, values in columns.items() if values[0] is not None})


@dataclass(frozen=True)
class ClassIds(Rows):
    """Conditions that are classes: int64 [B]; ``spec.null_label`` is the null condition."""

    ids_B: Tensor


@dataclass(frozen=True)
class Captions(Rows):
    """Conditions that are texts: features [B, T, D] of a frozen text encoder, left padded with zeros.

    ``mask_BT`` is 1 on valid positions; without it every position counts.
    """

    features_BTD: Tensor
    mask_BT: Tensor | None = None


#: An int64 tensor [B] means ``ClassIds``.
Cond = ClassIds | Captions | Tensor


def as_condition(cond: Cond) -> ClassIds | Captions:
    """The condition as an object."""
    return ClassIds(cond) if isinstance(cond, Tensor) else cond


def class_ids(cond: Cond) -> Tensor:
    """The int64 [B] class ids of a condition; ConfigError where it is a caption."""
    cond = as_condition(cond)
    if not isinstance(cond, ClassIds):
        raise ConfigError("this model is conditioned on classes, not on captions: give it class ids")
    return cond.ids_B


def captions(cond: Cond) -> Captions:
    """The condition as captions; ConfigError where it is classes."""
    cond = as_condition(cond)
    if not isinstance(cond, Captions):
        raise ConfigError("this model is conditioned on captions, not on classes: give it Captions")
    return cond


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the tensors cannot tell about an autoregressive model; families extend it."""

    vocab_size: int
    #: Tokens of one image.
    num_tokens: int
    #: 0 where the conditions are captions.
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


class SlotDecoder(ABC):
    """Generation state of a fixed number of slots, each a row or idle. One ``step`` is one model call over all slots:
    its shape never changes, so that a row is drawn alike whatever is in the other slots."""

    #: Whether rows may enter while others are under way; otherwise only when all slots are idle.
    continuous: ClassVar[bool]

    @abstractmethod
    def enter(self, slots: list[int], cond: ClassIds | Captions) -> None:
        """Start the rows of ``cond`` in these slots, at the next step."""

    @abstractmethod
    def leave(self, slots: list[int]) -> None:
        """These slots are idle from now on."""

    @abstractmethod
    def step(self, previous_Sn: Tensor) -> Tensor:
        """Feed the tokens drawn last (of rows that just entered they do not count); return the next logits, float32
        [S, n, V], which mean nothing in idle slots."""


class LockstepSlots(SlotDecoder):
    """Slots over a ``Decoder``, which has all rows at one step."""

    continuous = False

    def __init__(self, model: ARImageModel, num_slots: int) -> None:
        self.model, self.num_slots = model, num_slots
        self.decoder: Decoder | None = None
        self.started = False

    def enter(self, slots: list[int], cond: ClassIds | Captions) -> None:
        rows = [0] * self.num_slots  # idle ones draw what the first row does
        for row, slot in enumerate(slots):
            rows[slot] = row
        self.decoder, self.started = self.model.decoder(cond.map(lambda tensor: tensor[rows])), False

    def leave(self, slots: list[int]) -> None:
        del slots

    def step(self, previous_Sn: Tensor) -> Tensor:
        assert self.decoder is not None, "a row has entered"
        logits = self.decoder.step(previous_Sn if self.started else None)
        self.started = True
        return logits


class ARImageModel(nn.Module, ABC):
    """An autoregressive image model. Calling it IS scoring: ``model(tokens_BL, cond)`` is the log-prob of each token.

    Deterministic in eval(); in train() the configured dropout applies.
    """

    #: Name in the registry.
    family: ClassVar[str]
    spec: ModelSpec
    #: The repeated blocks: what sharding, activation checkpointing and compilation wrap.
    blocks: Callable[[], list[nn.Module]]
    #: Fields of the tokenizer's spec that the model's must equal, where the model reads its tokenizer's codes.
    tokenizer_fields: ClassVar[tuple[str, ...]] = ()
    #: Parts of the names of parameters that weight decay spares, beside all of fewer than two dimensions.
    undecayed: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def forward(self, tokens_BL: Tensor, cond: Cond) -> Tensor:
        """log p(token | earlier tokens, condition) in nats, float32 [B, L], for int64 tokens [B, L]."""

    @abstractmethod
    def decoder(self, cond: Cond) -> Decoder:
        """A fresh decoder for the rows of ``cond``."""

    def slots(self, num_slots: int) -> SlotDecoder:
        """Idle slots to draw in."""
        return LockstepSlots(self, num_slots)

    @abstractmethod
    def null_cond(self, cond: Cond) -> ClassIds | Captions:
        """The null condition for as many rows: what guidance and label dropout put in place of ``cond``."""

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill the parameters as official training starts."""

    @abstractmethod
    def set_dropout(self, rate: float) -> None:
        """What the family drops in train(): LlamaGen tokens and branches, VAR whole branches of a row."""

    @abstractmethod
    def guidance_scale(self, cfg_scale: float, cfg_interval: int, step: int) -> float:
        """The scale s of ``null + s * (cond - null)`` at model call ``step``; 1.0 means off."""

    def attach_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Take from the tokenizer what the model reads of it: nothing, unless the family says otherwise."""
        del tokenizer


@dataclass(frozen=True)
class CodeStep:
    """One training step of a tokenizer's codes.

    ``decoded_BCHW`` lets gradients through the quantisation; ``tokens_N`` are the codes that were used and
    ``vectors_ND`` what was coded, in the space of the codebook's stored vectors.
    """

    decoded_BCHW: Tensor
    codebook: Tensor
    commitment: Tensor
    tokens_N: Tensor
    vectors_ND: Tensor


class ImageTokenizer(nn.Module, ABC):
    """Image <-> tokens. ``spec`` is the family's dataclass with at least ``codebook_size``, ``downsample`` and
    ``num_tokens(image_size)``; ``quantize.embedding`` is the codebook."""

    family: ClassVar[str]
    quantize: nn.Module

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Tokens int64 [B, L] of float images in [-1, 1] whose sides are multiples of ``downsample``."""

    @abstractmethod
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Images float [B, 3, H, W], about [-1, 1] (not clamped), of int64 tokens."""

    @abstractmethod
    def code_step(self, images_BCHW: Tensor) -> CodeStep:
        """Encode, quantise and decode with gradients; squared codebook and commitment errors beside it."""


def to_uint8(images_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 [B, H, W, 3]: clamp(127.5 x + 128) truncated, as the official LlamaGen sampler does.

    PARITY: VAR's truncates 127.5 x + 127.5, which is darker by half a grey level on average.
    """
    pixels = (images_BCHW.float() * 127.5 + 128).clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8)
