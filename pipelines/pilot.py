"""Reads a recipe and stage runs in MLflow, writes nothing: the pilot of a recipe, and what its full run will take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from cca_core.config import ConfigError, Recipe
from cca_core.stages.graph import folder_of
from pipelines.report.texts import duration
from pipelines.stages.decide import GO
from pipelines.tracking import STATE, Tracker

PILOT, FULL = "pilot", "full"
#: Tag of a full run: the pilot that it starts from. Metrics of a pilot: what it expects.
PILOT_RUN, EXPECTED_S, EXPECTED_HOURS = "cca.pilot", "pilot.expected_seconds", "pilot.expected_device_hours"
#: Stages whose work grows with the samples; safety's grows with both, since it compares samples with images.
SAMPLED = ("baseline", "evaluate", "safety")


def as_pilot(recipe: Recipe) -> Recipe:
    """The recipe on its pilot's share of images and samples."""
    source = replace(recipe.source, fraction=recipe.source.fraction * recipe.pilot.images)
    samples = math.ceil(recipe.evaluate.num_samples * recipe.pilot.samples)
    return replace(recipe, source=source, evaluate=replace(recipe.evaluate, num_samples=samples), profile=PILOT)


def devices(recipe: Recipe, stage: str) -> int:
    """Devices that a stage keeps busy: its actors or training workers; the small networks train on one."""
    execution, folder = recipe.execution, folder_of(stage)
    if folder == "align" or (folder == "base" and not recipe.base.checkpoint):
        return execution.max_workers
    return execution.num_actors if folder in ("tokens", "reference", "sweep", *SAMPLED) else 1


def growth(recipe: Recipe, stage: str) -> float:
    """How many times as long a stage of the full run takes as in the pilot: in proportion to what it works on.

    Args:
        recipe: the full one, with its pilot's shares.
    """
    folder, images, samples = folder_of(stage), 1 / recipe.pilot.images, 1 / recipe.pilot.samples
    imported = {"tokenizer": recipe.tokenizer.checkpoint, "base": recipe.base.checkpoint}
    if imported.get(folder):
        return 1.0
    return (samples if folder in SAMPLED else 1.0) * (images if folder not in ("baseline", "evaluate") else 1.0)


@dataclass(frozen=True)
class Expected:
    """What the full run will take, by the times of its pilot's stages; None where one of them is not known."""

    stages: tuple[dict[str, Any], ...]
    expected_seconds: float | None
    expected_device_hours: float | None
    #: At cost.price_per_device_hour; None without a price.
    expected_cost: float | None

    def __str__(self) -> str:
        if self.expected_seconds is None or self.expected_device_hours is None:
            return "cannot be told: a stage of the pilot was adopted from storage, without its run"
        money = "" if self.expected_cost is None else f", at a cost of {self.expected_cost:,.2f}"
        return f"{duration(self.expected_seconds)} and {self.expected_device_hours:.3g} device-hours{money}"


def expected(recipe: Recipe, seconds: dict[str, float | None]) -> Expected:
    """The expectation from the seconds of every stage of the pilot.

    Overheads that do not grow (start-up, small data sets) are counted as if they did, so that it is rather too high.
    """
    stages = tuple(
        {
            "stage": stage,
            "seconds": took,
            "expected_seconds": None if took is None else took * growth(recipe, stage),
            "devices": devices(recipe, stage),
        }
        for stage, took in seconds.items()
    )
    if None in seconds.values():
        return Expected(stages, None, None, None)
    total = sum(stage["expected_seconds"] for stage in stages)
    hours = sum(stage["expected_seconds"] * stage["devices"] for stage in stages) / 3600
    price = recipe.cost.price_per_device_hour
    return Expected(stages, total, hours, hours * price if price else None)


def stage_seconds(tracker: Tracker, digests: dict[str, str], stages: Iterable[str]) -> dict[str, float | None]:
    """How long each stage took, whichever run computed it; None for one that was adopted from storage without a
    run."""
    found: dict[str, float | None] = {}
    for stage in stages:
        run = tracker.finished_stage(stage, digests[stage])
        known = run is not None and "cca.adopted" not in run.data.tags
        found[stage] = run.data.metrics["seconds"] if run is not None and known else None
    return found


def passed_pilot(tracker: Tracker, pilot_key: str) -> dict[str, Any]:
    """The pilot that a full run starts from: its run, and what it expected.

    Raises ConfigError where there is none with go.
    """
    run, ask = tracker.find_parent(pilot_key), "run it with --profile pilot first, or run without a profile"
    if run is None:
        raise ConfigError(
            f"profile full starts from a passed pilot of this recipe and source, and there is none: {ask}"
        )
    state = run.data.tags.get(STATE, "")
    if run.info.status != "FINISHED" or state != GO:
        raise ConfigError(
            f"profile full starts from a passed pilot, and run {run.info.run_id} of this recipe's pilot is at: "
            f"{state or run.info.status}. Go on with --profile pilot; its report says what to try"
        )
    metrics = run.data.metrics
    return {
        "run_id": run.info.run_id,
        "expected_seconds": metrics.get(EXPECTED_S),
        "expected_device_hours": metrics.get(EXPECTED_HOURS),
    }
