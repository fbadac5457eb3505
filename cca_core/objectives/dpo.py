"""Reads and writes nothing: direct preference optimisation (arXiv 2305.18290), the wrong condition being the
rejected one."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cca_core.objectives.base import Contrastive


@dataclass(frozen=True)
class DPO(Contrastive):
    """The DPO baseline. A row whose two conditions coincide is a constant: it has no gradient."""

    beta: float

    def terms(
        self,
        policy_pos_B: Tensor,
        policy_neg_B: Tensor,
        ref_pos_B: Tensor,
        ref_neg_B: Tensor,
        positive_B: Tensor,
    ) -> Tensor:
        return -F.logsigmoid(self.beta * ((policy_pos_B - ref_pos_B) - (policy_neg_B - ref_neg_B)))


def dpo_loss(
    policy_pos_B: Tensor,
    policy_neg_B: Tensor,
    ref_pos_B: Tensor,
    ref_neg_B: Tensor,
    positive_B: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean DPO loss over rows of sequence log-probs (nats), and the official metrics."""
    return DPO(beta).mean(policy_pos_B, policy_neg_B, ref_pos_B, ref_neg_B, positive_B)
