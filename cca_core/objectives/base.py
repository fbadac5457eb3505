"""Reads and writes nothing: the batch a loss sees, what it returns, and what all contrastive losses share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

#: What an objective may need beside the tokens: the columns of the reference data set.
REFERENCE = "reference"


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows, padded to a fixed size; ``weight_B`` is 0 on padding and 1 elsewhere.

    Conditions are indices into ``conditions/`` (a class id is its index) or the null one behind the last: where
    ``null_B``, both conditions are null. Reference log-probs are
    float32, in nats, summed over the image's tokens, and already those of the conditions below.
    """

    tokens_BL: Tensor
    pos_cond_B: Tensor
    neg_cond_B: Tensor
    null_B: Tensor
    weight_B: Tensor
    ref_pos_B: Tensor | None = None
    ref_neg_B: Tensor | None = None

    @property
    def positive_B(self) -> Tensor:
        """Rows whose "negative" is no negative: null, or drawn with the true label."""
        return self.null_B | (self.neg_cond_B == self.pos_cond_B)


@dataclass(frozen=True)
class LossOutput:
    """``loss_sum`` over the real rows, to be divided by the global row count; ``metrics`` are sums over rows too."""

    loss_sum: Tensor
    rows: Tensor
    metrics: dict[str, Tensor]


#: (tokens [B, L], condition indices [B]) -> log-probs [B, L]: the model, or one that looks indices up.
Score = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """A loss. ``needs`` says which columns its batches carry beyond tokens and conditions."""

    needs: ClassVar[tuple[str, ...]]

    def step(self, model: Score, batch: Batch) -> LossOutput: ...


def sequence_logps(model: Score, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs of the images under their positive and negative conditions, float32 [B] each, in nats.

    One forward on the stacked rows: gradients of a second call would not be synchronised by DDP.
    """
    cond = torch.cat([batch.pos_cond_B, batch.neg_cond_B])
    logp = model(batch.tokens_BL.repeat(2, 1), cond).sum(-1)
    pos, neg = logp.chunk(2)
    return pos, neg


class Contrastive(ABC):
    """An objective over the log-probs of right and wrong conditions, under the policy and the reference."""

    needs: ClassVar[tuple[str, ...]] = (REFERENCE,)

    @abstractmethod
    def terms(
        self,
        policy_pos_B: Tensor,
        policy_neg_B: Tensor,
        ref_pos_B: Tensor,
        ref_neg_B: Tensor,
        positive_B: Tensor,
    ) -> Tensor:
        """The loss of each row [B]; ``positive_B`` marks rows whose second condition is no wrong one."""

    def step(self, model: Score, batch: Batch) -> LossOutput:
        pos, neg = sequence_logps(model, batch)
        terms_B = self.terms(pos, neg, batch.ref_pos_B, batch.ref_neg_B, batch.positive_B)
        metrics = contrast_metrics(pos.detach() - batch.ref_pos_B, neg.detach() - batch.ref_neg_B, batch)
        return LossOutput((terms_B * batch.weight_B).sum(), batch.weight_B.sum(), metrics)

    def mean(
        self,
        policy_pos_B: Tensor,
        policy_neg_B: Tensor,
        ref_pos_B: Tensor,
        ref_neg_B: Tensor,
        positive_B: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over rows, and the metrics as the official scripts report them: means over all rows."""
        loss = self.terms(policy_pos_B, policy_neg_B, ref_pos_B, ref_neg_B, positive_B).mean()
        pos, neg = (policy_pos_B - ref_pos_B).detach(), (policy_neg_B - ref_neg_B).detach()
        metrics = {
            "accuracy": (pos > neg).float().mean(),
            "margin": (pos - neg).mean(),
            "log_ratio_pos": pos.mean(),
            "log_ratio_neg": neg.mean(),
        }
        return loss, metrics


def contrast_metrics(log_ratio_pos_B: Tensor, log_ratio_neg_B: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Sums over the rows with a true negative (and their count), and over null rows.

    PARITY: the official scripts average over all rows, so their accuracy is low by about the share of null rows.
    """
    contrast_B = batch.weight_B * ~batch.positive_B
    null_B = batch.weight_B * batch.null_B
    return {
        "contrast_rows": contrast_B.sum(),
        "log_ratio_pos": (log_ratio_pos_B * contrast_B).sum(),
        "log_ratio_neg": (log_ratio_neg_B * contrast_B).sum(),
        "margin": ((log_ratio_pos_B - log_ratio_neg_B) * contrast_B).sum(),
        "accuracy": ((log_ratio_pos_B > log_ratio_neg_B) * contrast_B).sum(),
        "null_rows": null_B.sum(),
        "log_ratio_null": (log_ratio_pos_B * null_B).sum(),
    }
