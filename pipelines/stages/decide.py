"""Reads the results of base and candidate and the votes on them, writes decide/: the gate's verdict, rule by rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cca_core.config import DecideConfig
from cca_core.metrics.votes import Tally
from cca_core.stages.evaluate import best_cfg
from pipelines.report.en import TEXTS
from pipelines.stages.rules import Rule, at_least, at_most

DECISION = "decision.json"
PROMOTE, KEEP_CFG, KEEP_CHAMPION = "promote", "keep CFG", "keep the champion"
#: Of a pilot, which promotes nothing: whether the full run is worth it.
GO, NO_GO = "go", "no-go"
#: No verdict yet: every other rule has passed, and people have not voted often enough.
AWAITING_VOTES = "awaiting votes"


def decide(
    config: DecideConfig,
    baseline: list[dict[str, Any]],
    candidates: list[dict[str, Any]],
    *,
    safety: Sequence[Rule],
    champion: dict[str, float] | None,
    votes: Tally,
    pilot: bool,
) -> dict[str, Any]:
    """The verdict over the aligned model at temperature 1, guidance-free.

    Args:
        baseline, candidates: result rows of the stages baseline and evaluate.
        safety: rules of the stage safety.
        champion: metrics of the present champion, measured on the same real images; None without one.
        votes: what people chose between the aligned model and the base with its best CFG.
        pilot: the run promotes nothing, and the verdict is on the full one.
    """
    base, guided, aligned = baseline[0], best_cfg(baseline), candidates[0]
    rules = [
        at_most("distance_vs_base", _ratio(aligned, base, "distance"), config.max_distance_vs_base),
        at_most(
            "distance_vs_best_cfg",
            _ratio(aligned, guided, "distance"),
            config.max_distance_vs_best_cfg,
            guided=guided["label"],
        ),
        at_most("class_drop", _class_drop(base, aligned), config.max_class_drop),
    ]
    diverse = "recall" in aligned["mean"]
    if diverse:
        share = _ratio(aligned, guided, "recall")
        rules.append(at_least("recall_share", share, config.min_recall_share, guided=guided["label"]))
    if diverse and config.beat_temperature:
        limit = temperature_at_recall(baseline, aligned["mean"]["recall"])
        rules.append(at_least("beat_temperature", aligned["mean"]["class_consistency"], limit))
    rules += safety
    if champion is not None:
        ratio = aligned["mean"]["distance"] / champion["distance"]
        rules.append(at_most("distance_vs_champion", ratio, config.max_distance_vs_champion))
    enough = votes.votes >= config.min_votes
    if config.min_votes and enough:
        low, high = votes.interval
        rules.append(at_least("win_rate", votes.win_rate, config.min_win_rate, votes=votes.votes, low=low, high=high))
    failed = [rule for rule in rules if not rule.passed]
    if pilot:
        verdict = NO_GO if failed else GO
    else:
        verdict = PROMOTE if not failed else KEEP_CHAMPION if champion is not None else KEEP_CFG
    says = _says(verdict, failed, base, guided, aligned)
    if not failed and not enough:
        verdict = AWAITING_VOTES
        says = (
            f"Every other rule has passed; {votes.votes} of the {config.min_votes} votes are in that the recipe asks "
            "for (decide.min_votes). Nothing is registered until then."
        )
    return {
        "verdict": verdict,
        "rules": [asdict(rule) for rule in rules],
        "left_out": [] if diverse else [TEXTS["left_out_no_recall"]],
        "candidate": aligned["label"],
        "best_cfg": guided["label"],
        "says": says,
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


def _says(
    verdict: str, failed: list[Rule], base: dict[str, Any], guided: dict[str, Any], aligned: dict[str, Any]
) -> str:
    calls = aligned["cost"]["calls_per_image"], guided["cost"]["calls_per_image"]
    distances = f"{aligned['mean']['distance']:.2f} against {guided['mean']['distance']:.2f} of {guided['label']}"
    if verdict in (PROMOTE, GO):
        does = "Promote the aligned model" if verdict == PROMOTE else "Go for the full run"
        return (
            f"{does}: {calls[0]} model calls per image instead of {calls[1]}, distance {distances} "
            f"and {base['mean']['distance']:.2f} of the base without guidance."
        )
    reasons = "; ".join(f"{rule.sentence()} ({rule.remedy})" for rule in failed)
    if verdict == NO_GO:
        return (
            f"Do not start the full run yet. The aligned model of the pilot did not pass: {reasons}. A larger "
            "pilot.images trains for more steps."
        )
    kept = guided["label"] if verdict == KEEP_CFG else "the present champion"
    return f"Keep {kept}. The aligned model did not pass: {reasons}."
