"""Reads measured speeds in memory, writes nothing: what guidance costs, what an alignment costs, and when it has paid
for itself.

Money and device-hours are one arithmetic: with a price of 1 per device-hour the results are device-hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Ownership:
    """Guided and aligned at one price per device-hour.

    Attributes:
        guided_images_per_s, aligned_images_per_s: of one device, measured in one run.
        alignment_device_hours: what the alignment took, its reference included.
    """

    guided_images_per_s: float
    aligned_images_per_s: float
    alignment_device_hours: float
    price_per_device_hour: float

    @property
    def guided_per_1000(self) -> float:
        """Cost of 1,000 images by the base with its best CFG."""
        return self._images(1000, self.guided_images_per_s)

    @property
    def aligned_per_1000(self) -> float:
        """Cost of 1,000 images by the aligned model, its alignment left out."""
        return self._images(1000, self.aligned_images_per_s)

    @property
    def alignment(self) -> float:
        """Cost of the alignment."""
        return self.alignment_device_hours * self.price_per_device_hour

    @property
    def break_even_images(self) -> float:
        """Images after which the alignment has paid for itself; infinite where the aligned model is not faster. It does
        not depend on the price."""
        hours_per_image = (1 / self.guided_images_per_s - 1 / self.aligned_images_per_s) / SECONDS_PER_HOUR
        return math.ceil(self.alignment_device_hours / hours_per_image) if hours_per_image > 0 else math.inf

    def total(self, images: int) -> tuple[float, float]:
        """Cost of so many images, guided and aligned, the alignment in the latter."""
        guided = self._images(images, self.guided_images_per_s)
        return guided, self._images(images, self.aligned_images_per_s) + self.alignment

    def _images(self, count: int, images_per_s: float) -> float:
        return count / images_per_s / SECONDS_PER_HOUR * self.price_per_device_hour
