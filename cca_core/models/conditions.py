"""Reads and writes nothing: the table that condition indices point into, as classes or as captions.

Data sets, negatives and batches hold indices (``label``, ``cond_neg``: rows of ``conditions/``); only what calls a
model looks them up. The index after the last is the null condition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cca_core.models.base import Captions, ClassIds


class Conditions(Protocol):
    def lookup(self, index_B: Tensor) -> ClassIds | Captions:
        """The conditions at these int64 indices, on their device."""


def scorer(model: nn.Module, conditions: Conditions) -> Callable[[Tensor, Tensor], Tensor]:
    """``model`` for condition indices: (tokens [B, L], indices [B]) -> log-probs [B, L]."""
    return lambda tokens_BL, index_B: model(tokens_BL, conditions.lookup(index_B))


@dataclass(frozen=True)
class ClassConditions:
    """Classes: a condition is its index."""

    def lookup(self, index_B: Tensor) -> ClassIds:
        return ClassIds(index_B)


@dataclass(frozen=True)
class CaptionConditions:
    """Captions: features [N, T, D] and masks [N, T] of N texts; the null condition is ``null_TD`` on all positions.

    PARITY: officially a dropped caption keeps its mask; here the null condition belongs to no caption and has none.
    """

    features_NTD: Tensor
    mask_NT: Tensor
    null_TD: Tensor

    def lookup(self, index_B: Tensor) -> Captions:
        null_B = (index_B == len(self.features_NTD)).to(self.features_NTD.device)
        rows = index_B.to(self.features_NTD.device).masked_fill(null_B, 0)
        features = torch.where(null_B[:, None, None], self.null_TD, self.features_NTD[rows])
        mask = torch.where(null_B[:, None], torch.ones_like(self.mask_NT[:1]), self.mask_NT[rows])
        return Captions(features.to(index_B.device), mask.to(index_B.device))
