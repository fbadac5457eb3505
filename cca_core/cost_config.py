"""Reads nothing, writes nothing: prices that turn measured seconds into money, as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cca_core.data_config import STRICT, require


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What a device costs and how much it will be asked for. It changes the report, and nothing that is computed."""

    __pydantic_config__: ClassVar = STRICT
    #: Of one device (a GPU; without one, the machine), in any currency; 0: unknown, and the report has device-hours.
    price_per_device_hour: float = 0.0
    #: Levels of traffic that the report compares.
    images_per_month: tuple[int, ...] = (10_000, 1_000_000, 100_000_000)
    #: How long the aligned model will be served.
    months: int = 12

    def __post_init__(self) -> None:
        require(
            self.price_per_device_hour >= 0, "cost.price_per_device_hour must not be negative: 0 is an unknown price"
        )
        require(
            bool(self.images_per_month) and min(self.images_per_month) > 0,
            "cost.images_per_month needs levels of traffic above 0, such as [10000, 1000000]",
        )
        require(self.months > 0, "cost.months must be positive")
