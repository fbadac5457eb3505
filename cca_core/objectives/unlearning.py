"""Reads and writes nothing: unlearning of wrong conditions, the paper's baseline without a sigmoid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cca_core.objectives.base import Contrastive


@dataclass(frozen=True)
class Unlearning(Contrastive):
    """Likelihood up, likelihood under the wrong condition down with weight lambda; weights and divisor as in CCA."""

    lambda_: float

    def terms(
        self,
        policy_pos_B: Tensor,
        policy_neg_B: Tensor,
        ref_pos_B: Tensor,
        ref_neg_B: Tensor,
        positive_B: Tensor,
    ) -> Tensor:
        lambda_ = torch.tensor(self.lambda_, dtype=torch.float32, device=positive_B.device)
        weight_B = torch.where(positive_B, -1.0, lambda_)
        return (weight_B * (policy_neg_B - ref_neg_B) - (policy_pos_B - ref_pos_B)) / max(self.lambda_, 1.0)


def unlearning_loss(
    policy_pos_B: Tensor,
    policy_neg_B: Tensor,
    ref_pos_B: Tensor,
    ref_neg_B: Tensor,
    positive_B: Tensor,
    *,
    lambda_: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean unlearning loss over rows of sequence log-probs (nats), and the official metrics."""
    return Unlearning(lambda_).mean(policy_pos_B, policy_neg_B, ref_pos_B, ref_neg_B, positive_B)
