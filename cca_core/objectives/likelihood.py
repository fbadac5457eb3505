"""Reads and writes nothing: plain maximum likelihood, which trains the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cca_core.objectives.base import Batch, LossOutput, Score


@dataclass(frozen=True)
class Likelihood:
    """Mean cross-entropy per token, in nats; the batch's positive condition already holds the label dropout."""

    needs: ClassVar[tuple[str, ...]] = ()

    def step(self, model: Score, batch: Batch) -> LossOutput:
        nats_per_token_B = -model(batch.tokens_BL, batch.pos_cond_B).mean(-1)
        return LossOutput((nats_per_token_B * batch.weight_B).sum(), batch.weight_B.sum(), {})
