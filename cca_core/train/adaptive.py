"""Reads and writes nothing: weights of the alignment that follow the training, by dual ascent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cca_core.config import Recipe

#: Log-weight per nat of one token: what a step adds for good, and what an error adds for as long as it lasts. The
#: second damps: a weight acts on the slope of the log-ratio, so the first alone would swing for ever. It is smaller for
#: the null share, whose mean is over a few rows.
GAINS = {"lambda_": (0.3, 10.0), "null_share": (0.1, 1.0)}
#: Where an adaptive lambda starts, and the ends it stays between (the paper uses 0.3 to 10,000).
LAMBDA_START, LAMBDA_LOW, LAMBDA_HIGH = 1.0, 0.01, 10_000.0
#: An adaptive null share stays above this share of its maximum: without null rows nobody would see them change.
NULL_SHARE_LOW = 0.1
#: Images whose log-ratios before the first step give the offset.
OFFSET_IMAGES = 1024


@dataclass
class Control:
    """A weight that keeps a mean log-ratio at a target: dual ascent on that constraint, with a proportional term (the
    PI form of Stooke et al., arXiv 2007.03964), in the logarithm of the weight.

    The error of a step is (mean log-ratio per token, in nats, over the global batch) - offset - target. More lambda
    lowers the log-ratio of right conditions: wrong ones are pushed down harder, and the right ones go with them; so the
    weight rises with the error. More null_share raises that of the null condition, which is trained more; so it falls.

    Attributes:
        weight: what is controlled; ``value`` is what it is now, between ``low`` and ``high``.
        metric: the mean that is kept at ``target``, in nats per token.
        offset: what it is before the first step: the policy has dropout, its reference has none.
    """

    weight: Literal["lambda_", "null_share"]
    metric: Literal["log_ratio_pos", "log_ratio_null"]
    target: float
    value: float
    low: float
    high: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        self.sum = math.log(self.value)

    def update(self, log_ratio: float, num_tokens: int) -> None:
        """Move the weight after a step whose mean log-ratio of whole images was that; NaN (no such row, a skipped
        step) leaves it."""
        if not math.isfinite(log_ratio):
            return
        error = log_ratio / num_tokens - self.offset - self.target
        error = error if self.weight == "lambda_" else -error
        low, high = math.log(self.low), math.log(self.high)
        integral, proportional = GAINS[self.weight]
        self.sum = min(max(self.sum + integral * error, low), high)
        self.value = math.exp(min(max(self.sum + proportional * error, low), high))

    def state(self) -> list[float]:
        """What a train state keeps."""
        return [self.value, self.sum, self.offset]

    def restore(self, state: list[float]) -> None:
        self.value, self.sum, self.offset = state


def controls(recipe: Recipe) -> tuple[Control, ...]:
    """The weights of a recipe's alignment that are ``auto``; DPO has no lambda."""
    align, made = recipe.align, []
    if align.lambda_ == "auto" and align.objective != "dpo":
        made.append(Control("lambda_", "log_ratio_pos", align.log_ratio_target, LAMBDA_START, LAMBDA_LOW, LAMBDA_HIGH))
    if align.null_share == "auto":
        high = recipe.reference.null_share_max
        made.append(Control("null_share", "log_ratio_null", 0.0, high / 2, NULL_SHARE_LOW * high, high))
    return tuple(made)
