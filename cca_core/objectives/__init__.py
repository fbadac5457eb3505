"""Reads nothing on import: the losses, one file each, and their construction from a recipe."""

from cca_core.config import AlignConfig, ConfigError
from cca_core.objectives.base import REFERENCE, Batch, LossOutput, Objective
from cca_core.objectives.cca import CCA, cca_loss
from cca_core.objectives.dpo import DPO, dpo_loss
from cca_core.objectives.likelihood import Likelihood
from cca_core.objectives.unlearning import Unlearning, unlearning_loss

__all__ = [
    "CCA",
    "DPO",
    "REFERENCE",
    "Batch",
    "Likelihood",
    "LossOutput",
    "Objective",
    "Unlearning",
    "alignment_objective",
    "cca_loss",
    "dpo_loss",
    "unlearning_loss",
]


def alignment_objective(config: AlignConfig) -> Objective:
    """The objective a recipe's align section names. An adaptive lambda is 1 here; the loop sets it."""
    lambda_ = 1.0 if config.lambda_ == "auto" else config.lambda_
    if config.objective == "cca":
        return CCA(beta=config.beta, lambda_=lambda_)
    if config.objective == "dpo":
        return DPO(beta=config.beta)
    if config.objective == "unlearning":
        return Unlearning(lambda_=lambda_)
    raise ConfigError(f"unknown objective {config.objective!r}: cca, dpo or unlearning")
