"""Reads nothing, writes nothing: which align settings a sweep tries and how long, as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cca_core.data_config import STRICT, require


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Trials of other align settings on a share of the training images; the best go to full scale.

    A trial is one combination of the lists below; whatever else ``align`` says holds for all of them, and all read the
    one reference of the run. The recipe's own align settings are always a trial, and the only one that early stopping
    spares: the winner has beaten them over the same steps. The result of a sweep depends on no timing: it is the same
    however many trials run at once."""

    __pydantic_config__: ClassVar = STRICT
    enabled: bool = False
    #: ``dpo`` does not look at lambda, nor ``unlearning`` at beta: such combinations are one trial.
    objectives: tuple[Literal["cca", "dpo", "unlearning"], ...] = ("cca", "dpo", "unlearning")
    betas: tuple[float, ...] = (0.05, 0.1, 0.3)
    #: Here and in ``null_shares`` ``auto`` is one of the values to try.
    lambdas: tuple[float | Literal["auto"], ...] = (0.5, 1.5, 5.0)
    lrs: tuple[float, ...] = (3e-5, 1e-4)
    #: None above reference.null_share_max, so that all share one reference.
    null_shares: tuple[float | Literal["auto"], ...] = (0.0, 0.1)
    #: Trials, the recipe's own settings included: drawn by a hash of ``seed``, one of each objective in turn, so that
    #: none is tuned more than another. 0 takes every combination.
    num_trials: int = 12
    #: Share of the training images, drawn by a hash of the id.
    fraction: float = 0.5
    #: Epochs of that share; at most align.epochs, which is what the reference holds. 0: as many.
    epochs: int = 0
    #: Times that a trial is measured, evenly over its steps. After each but the last the worse half of the trials
    #: stops; 1 runs all of them to their end.
    evaluations: int = 3
    #: Samples per evaluation and seed.
    num_samples: int = 1000
    seeds: tuple[int, ...] = (0, 1)
    #: Trials that go to full scale: each is aligned on everything and evaluated, and the gate judges the best of them.
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("objectives", "betas", "lambdas", "lrs", "null_shares", "seeds"):
            require(bool(getattr(self, name)), f"sweep.{name} is empty: give at least one value to try")
        require(min(self.betas) > 0 and min(self.lrs) > 0, "sweep.betas and sweep.lrs must be positive")
        require(min(numbers(self.lambdas), default=0) >= 0, "sweep.lambdas must not be negative")
        require(all(0 <= share < 1 for share in numbers(self.null_shares)), "sweep.null_shares must lie in [0, 1)")
        require(self.num_trials >= 0, "sweep.num_trials must not be negative: 0 tries every combination")
        require(0 < self.fraction <= 1, "sweep.fraction must lie in (0, 1]")
        require(self.epochs >= 0, "sweep.epochs must not be negative: 0 is as many as align.epochs")
        require(
            min(self.evaluations, self.num_samples, self.keep) > 0,
            "sweep.evaluations, sweep.num_samples and sweep.keep must be positive",
        )


def numbers(values: tuple[float | str, ...]) -> list[float]:
    """Without those that are ``auto``."""
    return [value for value in values if not isinstance(value, str)]
