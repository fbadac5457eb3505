"""Reads the results of base and candidate, writes decide/: the gate's verdict, rule by rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cca_core.config import DecideConfig
from cca_core.stages.evaluate import best_cfg

DECISION = "decision.json"
PROMOTE, KEEP_CFG, KEEP_CHAMPION = "promote", "keep CFG", "keep the champion"


@dataclass(frozen=True)
class Rule:
    """One comparison: the value measured, the limit, and what to try where it fails."""

    name: str
    passed: bool
    value: float
    limit: float
    remedy: str

    def sentence(self) -> str:
        return f"{self.name}: {self.value:.3f}, limit {self.limit:.3f}"


def decide(
    config: DecideConfig,
    baseline: list[dict[str, Any]],
    candidates: list[dict[str, Any]],
    champion: dict[str, float] | None,
) -> dict[str, Any]:
    """The verdict over the aligned model at temperature 1, guidance-free.

    Args:
        baseline, candidates: result rows of the stages baseline and evaluate.
        champion: metrics of the present champion, measured on the same real images; None without one.
    """
    base, guided, aligned = baseline[0], best_cfg(baseline), candidates[0]
    rules = [
        _at_most(
            "distance over that of the base without guidance",
            _ratio(aligned, base, "distance"),
            config.max_distance_vs_base,
            "raise align.epochs or align.lambda_, or train the base longer",
        ),
        _at_most(
            f"distance over that of {guided['label']}",
            _ratio(aligned, guided, "distance"),
            config.max_distance_vs_best_cfg,
            "try align.beta and align.lambda_ from 0.3 to 10",
        ),
        _at_least(
            f"recall over that of {guided['label']}",
            _ratio(aligned, guided, "recall"),
            config.min_recall_share,
            "lower align.lambda_ or align.epochs: the model has lost diversity",
        ),
        _at_most(
            "class consistency lost by the worst class",
            _class_drop(base, aligned),
            config.max_class_drop,
            "look at the images of that class: wrong labels or too few of them",
        ),
    ]
    if config.beat_temperature:
        rules.append(
            _at_least(
                "class consistency above that of a base temperature of the same recall",
                aligned["mean"]["class_consistency"],
                temperature_at_recall(baseline, aligned["mean"]["recall"]),
                "a lower temperature alone does as well: raise align.lambda_ or align.epochs",
            )
        )
    if champion is not None:
        rules.append(
            _at_most(
                "distance over that of the present champion",
                aligned["mean"]["distance"] / champion["distance"],
                config.max_distance_vs_champion,
                "the champion is better: keep it",
            )
        )
    failed = [rule for rule in rules if not rule.passed]
    verdict = PROMOTE if not failed else KEEP_CHAMPION if champion is not None else KEEP_CFG
    return {
        "verdict": verdict,
        "rules": [asdict(rule) for rule in rules],
        "candidate": aligned["label"],
        "best_cfg": guided["label"],
        "says": _says(verdict, failed, base, guided, aligned),
    }


def temperature_at_recall(baseline: list[dict[str, Any]], recall: float) -> float:
    """Class consistency of the base's temperature curve at that recall: the honest control at equal diversity.

    Linear between the measured temperatures; beyond them the nearest one counts.
    """
    points = sorted(
        (row["mean"]["recall"], row["mean"]["class_consistency"])
        for row in baseline
        if row["sampling"]["cfg_scale"] <= 1
    )
    recalls, consistencies = zip(*points, strict=True)
    return float(np.interp(recall, recalls, consistencies))


def _ratio(row: dict[str, Any], other: dict[str, Any], name: str) -> float:
    return row["mean"][name] / max(other["mean"][name], 1e-9)


def _class_drop(base: dict[str, Any], aligned: dict[str, Any]) -> float:
    pairs = zip(base["class_consistency_per_class"], aligned["class_consistency_per_class"], strict=True)
    return max(before - after for before, after in pairs if before is not None and after is not None)


def _at_most(name: str, value: float, limit: float, remedy: str) -> Rule:
    return Rule(name, value <= limit, value, limit, remedy)


def _at_least(name: str, value: float, limit: float, remedy: str) -> Rule:
    return Rule(name, value >= limit, value, limit, remedy)


def _says(
    verdict: str, failed: list[Rule], base: dict[str, Any], guided: dict[str, Any], aligned: dict[str, Any]
) -> str:
    calls = aligned["cost"]["calls_per_image"], guided["cost"]["calls_per_image"]
    distances = f"{aligned['mean']['distance']:.2f} against {guided['mean']['distance']:.2f} of {guided['label']}"
    if verdict == PROMOTE:
        return (
            f"Promote the aligned model: {calls[0]} model calls per image instead of {calls[1]}, distance {distances} "
            f"and {base['mean']['distance']:.2f} of the base without guidance."
        )
    reasons = "; ".join(f"{rule.sentence()} ({rule.remedy})" for rule in failed)
    kept = guided["label"] if verdict == KEEP_CFG else "the present champion"
    return f"Keep {kept}. The aligned model did not pass: {reasons}."
