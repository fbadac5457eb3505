"""Reads nothing, writes nothing: what a pilot takes of a recipe, as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cca_core.data_config import STRICT, require


@dataclass(frozen=True, kw_only=True)
class PilotConfig:
    """``profile: pilot`` runs everything else as the recipe has it, and registers nothing: its verdict is go or no-go,
    with the time and cost that the full run is expected to take. It changes nothing without that profile."""

    __pydantic_config__: ClassVar = STRICT
    #: Share of the source's images, drawn by a hash of the id: the full run has them too.
    images: float = 0.5
    #: Share of evaluate.num_samples.
    samples: float = 0.25

    def __post_init__(self) -> None:
        for name in ("images", "samples"):
            require(0 < getattr(self, name) <= 1, f"pilot.{name} is a share: it must lie above 0 and at most at 1")
