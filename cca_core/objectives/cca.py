"""Reads and writes nothing: Condition Contrastive Alignment (arXiv 2410.09347, equation 12)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cca_core.objectives.base import Contrastive


@dataclass(frozen=True)
class CCA(Contrastive):
    """Pull the right condition up, push the wrong one down with weight lambda.

    On ``positive`` rows the second condition is pulled up as well, with weight 1. Divided by max(lambda, 1), as the
    official weighted branch is. PARITY: lambda is rounded to float32 there, and here.
    """

    beta: float
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
        weight_B = torch.where(positive_B, 1.0, lambda_)
        sign_B = torch.where(positive_B, 1.0, -1.0)
        pull_B = -F.logsigmoid(self.beta * (policy_pos_B - ref_pos_B))
        push_B = -weight_B * F.logsigmoid(sign_B * self.beta * (policy_neg_B - ref_neg_B))
        return (pull_B + push_B) / max(self.lambda_, 1.0)


def cca_loss(
    policy_pos_B: Tensor,
    policy_neg_B: Tensor,
    ref_pos_B: Tensor,
    ref_neg_B: Tensor,
    positive_B: Tensor,
    *,
    beta: float,
    lambda_: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean CCA loss over rows of sequence log-probs (nats), and the official metrics."""
    return CCA(beta, lambda_).mean(policy_pos_B, policy_neg_B, ref_pos_B, ref_neg_B, positive_B)
