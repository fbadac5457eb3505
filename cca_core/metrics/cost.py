"""Reads models in memory, writes nothing: what an image costs, in model calls and measured seconds."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cca_core.generate import Sampling, calls_per_image, decode_images, generate
from cca_core.metrics.energy import EnergyMeter, counters_of
from cca_core.models import ARImageModel, ImageTokenizer

#: Timed runs of each sampler, taken in turn so that a drifting machine touches all alike; the median counts.
REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """Model calls per image (rows through the network), and images per second without and with image decoding; joules
    per image with it, None where the hardware does not tell (``cca_core.metrics.energy``)."""

    calls_per_image: int
    tokens_images_per_s: float
    images_per_s: float
    num_images: int
    batch_size: int
    joules_per_image: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_cost(
    candidates: list[tuple[ARImageModel, ImageTokenizer, Sampling]], *, num_images: int, batch_size: int
) -> list[Cost]:
    """Time every candidate on the same number of images, engine and batch size, after one warm-up each."""
    batch_size = min(batch_size, num_images)  # no rows that only fill up a batch
    seconds: list[list[tuple[float, float]]] = [[] for _ in candidates]
    joules: list[list[float | None]] = [[] for _ in candidates]
    counters = counters_of(next(candidates[0][0].parameters()).device)
    for repeat in range(REPEATS + 1):
        for (model, tokenizer, sampling), times, spent in zip(candidates, seconds, joules, strict=True):
            count = num_images if repeat else batch_size
            classes = torch.arange(count) % model.spec.num_classes
            meter = EnergyMeter(counters)
            start = time.perf_counter()
            tokens = generate(model, classes, sampling, torch.arange(count), batch_size=batch_size)
            drawn = time.perf_counter()
            decode_images(tokenizer, tokens, batch_size=batch_size)
            if repeat:
                times.append((drawn - start, time.perf_counter() - start))
                spent.append(meter.joules())
    return [
        Cost(
            calls_per_image=calls_per_image(model, sampling),
            tokens_images_per_s=num_images / statistics.median(t for t, _ in times),
            images_per_s=num_images / statistics.median(t for _, t in times),
            num_images=num_images,
            batch_size=batch_size,
            joules_per_image=_median(spent, num_images),
        )
        for (model, _, sampling), times, spent in zip(candidates, seconds, joules, strict=True)
    ]


def _median(joules: list[float | None], num_images: int) -> float | None:
    told = [value for value in joules if value is not None]
    return statistics.median(told) / num_images if told else None
