"""Reads results, decision, votes and lineage in memory, writes nothing: all numbers of the report, in no language.

report.json is this, and the pages are renderings of it. Keys stay what they are within a format version.
"""

from __future__ import annotations

import math
from typing import Any

from cca_core.config import Recipe
from cca_core.evaluate_config import PUBLISHED_INCEPTION
from cca_core.metrics.votes import Tally, VoteSummary
from cca_core.parse import as_dict
from cca_core.stages.table import MEASURED
from pipelines.report.costs import cost_data, per_1000
from pipelines.stages.rules import SAFETY
from pipelines.stages.show_safety import shown_values

FORMAT_VERSION = 1


def report_data(
    recipe: Recipe,
    decision: dict[str, Any],
    *,
    rows: list[dict[str, Any]],
    compared: dict[str, dict[str, Any]],
    safety: list[dict[str, Any]],
    votes: VoteSummary,
    device_hours: float | None,
    sweep: dict[str, Any] | None,
    pilot: dict[str, Any] | None,
    lineage: dict[str, Any],
) -> dict[str, Any]:
    """The report as JSON-ready data.

    Args:
        rows: result rows of all samplers, those of the base first.
        compared: costs of base and best CFG, timed in one run with the candidate, by label.
        safety: rows of safety.json.
        votes: what people chose, as far as the gate asks for votes.
        device_hours: what the alignment took; None where it is not known.
        sweep: rank and label of the candidate and the best trials; None without a sweep.
        pilot: what a pilot expects of the full run, or the pilot that a full run started from; None without one.
    """
    by_label = {row["label"]: row | {"cost": compared.get(row["label"], row["cost"])} for row in rows}
    base = rows[0]["label"]
    guided, aligned = by_label[decision["best_cfg"]], by_label[decision["candidate"]]
    rules = [
        {name: rule[name] for name in _RULE} | {"safety": rule["key"].startswith(SAFETY)} for rule in decision["rules"]
    ]
    return _plain(
        {
            "format_version": FORMAT_VERSION,
            "recipe_name": recipe.name,
            "verdict": decision["verdict"],
            "says": decision["says"],
            "base": base,
            "best_cfg": guided["label"],
            "candidate": aligned["label"],
            "distance_name": rows[0]["distance_name"],
            "calls_per_image": {
                "guided": guided["cost"]["calls_per_image"],
                "aligned": aligned["cost"]["calls_per_image"],
            },
            "costs": cost_data(recipe.cost, guided["cost"], aligned["cost"], device_hours),
            "samplers": [
                {name: row[name] for name in ("label", "sampling", "cost")}
                | {
                    "cost_per_1000": per_1000(recipe.cost, row["cost"]),
                    "measured": {
                        name: {"mean": row["mean"][name], "sd": row["sd"][name], "interval": row["interval"].get(name)}
                        for name in MEASURED
                        if name in row["mean"]
                    },
                    "class_consistency_per_class": row["class_consistency_per_class"],
                }
                for row in by_label.values()
            ],
            "rules": rules,
            "left_out": [] if "recall" in aligned["mean"] else ["no_recall"],
            "safety": [
                {name: row[name] for name in ("label", "worst", *shown_values(safety).values())} for row in safety
            ],
            "min_votes": recipe.decide.min_votes,
            "votes": _votes(votes) if votes.tally.votes else None,
            "sweep": sweep,
            "pilot": pilot,
            "measured": _measured(recipe, rows[0], aligned["cost"]),
            "lineage": lineage,
            "recipe": as_dict(recipe),
        }
    )


_RULE = ("key", "params", "name", "passed", "value", "limit", "bound", "remedy")


def _votes(votes: VoteSummary) -> dict[str, Any]:
    found = votes.agreement
    return {
        **_tally(votes.tally),
        "reviewers": votes.reviewers,
        "pairs": votes.pairs,
        "agreement": {"compared": found.compared, "share": found.share, "kappa": found.kappa},
        "by_class": {name: _tally(tally) for name, tally in votes.by_class.items()},
    }


def _tally(tally: Tally) -> dict[str, Any]:
    return {
        "votes": tally.votes,
        "wins": tally.wins,
        "losses": tally.losses,
        "equal": tally.equal,
        "win_rate": tally.win_rate,
        "interval": tally.interval,
    }


def _measured(recipe: Recipe, base: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
    first, features = base["per_seed"][0], recipe.features
    kind = "fid" if features.published else "file" if features.network else "embedded"
    name = PUBLISHED_INCEPTION[features.sha256] if features.published else features.network.rsplit("/", 1)[-1]
    return {
        "samples": first["n"],
        "seeds": [seed["seed"] for seed in base["per_seed"]],
        "real_images": first["n_real"],
        "real": recipe.evaluate.real,
        "real_statistics": recipe.evaluate.real_statistics.rsplit("/", 1)[-1],
        "codes": recipe.source.kind == "codes",
        "network": {"kind": kind, "name": name, "sha256": features.sha256},
        "cost_images": cost.get("num_images"),
        "batch_size": cost["batch_size"],
    }


def _plain(value: Any) -> Any:
    """Lists for tuples, and None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
