"""Reads measured speeds and prices, writes nothing: what quality costs, as numbers of the report."""

from __future__ import annotations

import math
from typing import Any

from cca_core.cost_config import CostConfig
from cca_core.metrics.ownership import Ownership

#: What is timed -> the speed in a row's cost.
SPEEDS = {"end_to_end": "images_per_s", "tokens": "tokens_images_per_s"}


def cost_data(
    config: CostConfig, guided: dict[str, Any], aligned: dict[str, Any], device_hours: float | None
) -> dict[str, Any]:
    """Cost per 1,000 images of base with its best CFG and aligned model, of the alignment, and over traffic levels.

    Without a price costs are device-hours.

    Args:
        guided, aligned: costs of two rows that were timed in one run.
        device_hours: those of the alignment; None where no finished run recorded them.
    """
    price = config.price_per_device_hour
    ways = {
        way: Ownership(guided[speed], aligned[speed], device_hours or 0.0, price or 1.0)
        for way, speed in SPEEDS.items()
    }
    whole = ways["end_to_end"]
    totals = [(monthly, *whole.total(monthly * config.months)) for monthly in config.images_per_month]
    return {
        "price_per_device_hour": price,
        "unit": "money" if price else "device-hours",
        "per_1000": {way: _per_1000(cost) for way, cost in ways.items()},
        "alignment": None
        if device_hours is None
        else {
            "device_hours": device_hours,
            "cost": whole.alignment,
            "break_even_images": None if math.isinf(whole.break_even_images) else whole.break_even_images,
            "months": config.months,
            "totals": [
                {"images_per_month": monthly, "guided": before, "aligned": after, "saved": before - after}
                for monthly, before, after in totals
            ],
        },
    }


def per_1000(config: CostConfig, cost: dict[str, Any]) -> float:
    """Cost of 1,000 images of one row, end to end."""
    return Ownership(
        cost["images_per_s"], cost["images_per_s"], 0.0, config.price_per_device_hour or 1.0
    ).aligned_per_1000


def _per_1000(cost: Ownership) -> dict[str, float]:
    return {
        "guided": cost.guided_per_1000,
        "aligned": cost.aligned_per_1000,
        "saved_share": 1 - cost.aligned_per_1000 / cost.guided_per_1000,
        "guided_seconds": 1000 / cost.guided_images_per_s,
        "aligned_seconds": 1000 / cost.aligned_images_per_s,
    }


def money(value: float) -> str:
    """Three significant digits without an exponent, and whole numbers from 100 on."""
    if not value or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}".rstrip("0").rstrip(".")
