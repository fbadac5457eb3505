"""Reads a recipe, writes nothing: the settings that a sweep tries, and a recipe with other settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from itertools import product, zip_longest
from typing import Any

from cca_core.config import AlignConfig, ConfigError, Recipe
from cca_core.objectives import alignment_objective
from cca_core.parse import as_dict


@dataclass(frozen=True)
class Settings:
    """What one trial has of its own, and what a winner brings to alignment; the rest is the recipe's ``align``."""

    objective: str
    beta: float
    lambda_: float | str
    lr: float
    null_share: float | str

    @classmethod
    def of(cls, align: AlignConfig) -> Settings:
        return cls(align.objective, align.beta, align.lambda_, align.optim.lr, align.null_share)

    @property
    def key(self) -> str:
        """Names the trial's files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def apply(self, align: AlignConfig) -> AlignConfig:
        """``align`` with these settings in the place of its own."""
        return replace(
            align,
            objective=self.objective,
            beta=self.beta,
            lambda_=self.lambda_,
            null_share=self.null_share,
            optim=replace(align.optim, lr=self.lr),
        )

    def label(self) -> str:
        """For people, without what the objective does not look at."""
        words = {"beta": f"beta {self.beta:g}", "lambda_": f"lambda {text(self.lambda_)}"}
        looked_at = [word for name, word in words.items() if name in _looked_at(self.apply(AlignConfig()))]
        return ", ".join([self.objective, *looked_at, f"lr {self.lr:g}", f"null share {text(self.null_share)}"])


def text(value: float | str) -> str:
    """A number, or ``auto``, for people."""
    return value if isinstance(value, str) else f"{value:g}"


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe whose alignment runs with these settings."""
    return replace(recipe, align=settings.apply(recipe.align))


def trials(recipe: Recipe) -> tuple[Settings, ...]:
    """The trials of a recipe's sweep, its own settings first, then those of each objective in turn.

    Raises ConfigError where fewer are left than ``sweep.keep`` asks for.
    """
    sweep, own = recipe.sweep, Settings.of(recipe.align)
    by_objective = []
    for objective in dict.fromkeys(sweep.objectives):
        values = product(sweep.betas, sweep.lambdas, sweep.lrs, sweep.null_shares)
        points = {_settled(Settings(objective, *point), recipe.align) for point in values} - {own}
        by_objective.append(sorted(points, key=lambda point: _draw(recipe.seed, point)))
    others = [point for round_ in zip_longest(*by_objective) for point in round_ if point is not None]
    found = (own, *(others[: sweep.num_trials - 1] if sweep.num_trials else others))
    if len(found) < sweep.keep:
        raise ConfigError(
            f"sweep.keep={sweep.keep}, but the sweep has {len(found)} trials: lower it, or give more values to try"
        )
    return found


def shared(align: AlignConfig) -> dict[str, Any]:
    """What of ``align`` holds for every trial, JSON-ready: all but the settings and the number of epochs."""
    values = as_dict(align)
    for name in ("objective", "beta", "lambda_", "null_share", "epochs"):
        del values[name]
    del values["optim"]["lr"]
    return values


def _settled(settings: Settings, align: AlignConfig) -> Settings:
    """The recipe's value in the place of one that the objective does not look at, so that equal trials are equal."""
    ignored = {"beta", "lambda_"} - _looked_at(settings.apply(align))
    return replace(settings, **{name: getattr(align, name) for name in ignored})


def _looked_at(align: AlignConfig) -> set[str]:
    """Which of its weights an objective has."""
    objective: Any = alignment_objective(align)
    return {field.name for field in fields(objective)}


def _draw(seed: int, settings: Settings) -> str:
    return hashlib.sha256(f"{seed} {settings.key}".encode()).hexdigest()
