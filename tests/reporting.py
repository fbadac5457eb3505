"""Reads and writes nothing: the numbers of a report made by hand, a tag among its classes, and its pictures."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

from PIL import Image

from cca_core.config import DecideConfig, Recipe
from cca_core.cost_config import CostConfig
from cca_core.metrics.votes import summarize
from cca_core.pilot_config import PilotConfig
from cca_core.stages.safety import PICTURES
from cca_core.votes import Vote
from pipelines.pilot import expected
from pipelines.report.data import report_data
from pipelines.stages.decide import decide
from pipelines.stages.figures import PLOT, QUALITY_COST, SAMPLES
from pipelines.stages.rules import safety_rules

#: What a user may call a class.
TAG = "<script>alert('x')</script>|&"


def row(label: str, distance: float, *, cfg: float = 1.0, recall: float | None = 0.9) -> dict[str, Any]:
    mean = {"distance": distance, "inception_score": 9.0, "precision": 0.8, "class_consistency": 0.9}
    mean |= {} if recall is None else {"recall": recall}
    return {
        "label": label,
        "distance_name": "distance",
        "sampling": {"cfg_scale": cfg, "temperature": 1.0},
        "mean": mean,
        "sd": {name: 0.5 for name in mean},
        "interval": {name: (value - 0.25, value + 0.25) for name, value in mean.items()},
        "class_consistency_per_class": [0.9, 0.9],
        "cost": cost(32 if cfg > 1 else 16, 7.0),
        "per_seed": [{"seed": 0, "n": 2000, "n_real": 1797 if recall else 0}],
    }


def cost(calls: int, speed: float) -> dict[str, Any]:
    """Tokens alone are a quarter faster."""
    return {
        "calls_per_image": calls,
        "images_per_s": speed,
        "tokens_images_per_s": 1.25 * speed,
        "num_images": 100,
        "batch_size": 50,
    }


def safety_row(label: str) -> dict[str, Any]:
    return {
        "label": label,
        "within_class_diversity": 0.9,
        "twins": 0.01,
        "memorisation": 0.02,
        "class_disparity": 0.05,
        "leakage": 0.1,
        "worst": {"within_class_diversity": [TAG], "class_disparity": ["cat"], "leakage": [TAG, "cat"]},
    }


def votes(wins: int, losses: int) -> list[Vote]:
    """Of two reviewers on the same pairs; they agree."""
    choices = ["aligned"] * wins + ["guided"] * losses
    return [
        Vote(reviewer, pair, TAG if pair % 2 else "cat", choice, "left", pair)
        for reviewer in ("Ann", "Bob")
        for pair, choice in enumerate(choices)
    ]


def data(
    distance: float = 1.1,
    *,
    champion: dict[str, float] | None = None,
    min_votes: int = 0,
    given: list[Vote] | None = None,
    recall: float | None = 0.9,
    price: float = 3.6,
    pilot: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The numbers of a report on an aligned model of that distance; the best CFG has 1.0, at half the speed."""
    config = {"min_votes": min_votes, "beat_temperature": False}
    recipe = Recipe(decide=DecideConfig(**config), cost=CostConfig(price_per_device_hour=price))
    baseline = [row("base", 2.0, recall=recall), row("base, CFG 1.5", 1.0, cfg=1.5, recall=recall)]
    candidate = row("aligned", distance, recall=recall) | {"cost": cost(16, 20.0)}
    safety = [safety_row(label) for label in ("base", "base, CFG 1.5", "aligned")]
    summary = summarize(given or [])
    decision = decide(
        recipe.decide,
        baseline,
        [candidate],
        safety=safety_rules(recipe.safety, safety),
        champion=champion,
        votes=summary.tally,
        pilot=pilot is not None and pilot["kind"] == "pilot",
    )
    trial = {"rank": 1, "label": "cca, lr 1e-3", "own": True, "ended": "at its end", "distance": 1.2}
    trial |= {"distance_cfg": 1.4, "class_consistency": 0.9, "recall": recall}
    return report_data(
        recipe,
        decision,
        rows=[*baseline, candidate],
        compared={"base": cost(16, 20.0), "base, CFG 1.5": cost(32, 10.0)},
        safety=safety,
        votes=summary,
        device_hours=5.0,
        pilot=pilot,
        sweep={"rank": 1, "label": "cca, lr 1e-3", "trials": [trial]},
        lineage={
            "source": {"uri": f"s3://bucket/{TAG}", "digest": "a" * 64},
            "tokens": {"uri": "s3://bucket/tokens", "digest": "b" * 64},
            "digests": {"align": "c" * 64, "report": "d" * 64},
            "versions": {"base": "models:/cca/1", "aligned": "models:/cca/2", "champion": "models:/cca/2"},
            "run_id": "e" * 32,
            "package_version": "0.1.0",
            "commands": ["cca run recipe.yaml"],
        },
    )


def pictures() -> dict[str, bytes]:
    """A PNG for every picture that the report shows, wide and tiny ones."""
    sizes = {QUALITY_COST: (1320, 550), PLOT: (1320, 550), SAMPLES: (700, 900)} | dict.fromkeys(PICTURES, (96, 24))
    found = {}
    for name, size in sizes.items():
        out = io.BytesIO()
        Image.new("RGB", size, (90, 120, 160)).save(out, format="png")
        found[name] = out.getvalue()
    return found


def pilot(seconds: float | None = 60.0) -> dict[str, Any]:
    """What a pilot expects where its one stage took that long."""
    recipe = Recipe(pilot=PilotConfig(images=0.1), cost=CostConfig(price_per_device_hour=3.0))
    return {"kind": "pilot", **asdict(expected(recipe, {"align": seconds}))}


def passed_pilot() -> dict[str, Any]:
    return {
        "kind": "full",
        "run_id": "f" * 32,
        "expected_seconds": 600.0,
        "expected_device_hours": 0.3,
        "seconds": 540.0,
    }
