"""Reads the numbers of a report in memory, writes nothing: the verdict, for who does not know the method."""

from __future__ import annotations

from typing import Any, Literal

from pipelines.report.costs import money
from pipelines.report.full_run import full_run_fact
from pipelines.report.parts import Fact
from pipelines.report.texts import Texts, duration
from pipelines.stages.decide import AWAITING_VOTES, GO, KEEP_CFG, KEEP_CHAMPION, NO_GO, PROMOTE

#: Verdict -> its key among the texts, and how it looks.
KINDS: dict[str, tuple[str, Literal["good", "bad", "open"]]] = {
    PROMOTE: ("promote", "good"),
    KEEP_CFG: ("keep_cfg", "bad"),
    KEEP_CHAMPION: ("keep_champion", "bad"),
    AWAITING_VOTES: ("awaiting_votes", "open"),
    GO: ("go", "good"),
    NO_GO: ("no_go", "bad"),
}


def headline(data: dict[str, Any], say: Texts) -> str:
    """What to do."""
    key, _ = KINDS[data["verdict"]]
    votes = data["votes"]["votes"] if data["votes"] else 0
    return say(f"do_{key}", guided=data["best_cfg"], votes=votes, min_votes=data["min_votes"])


def why(data: dict[str, Any], say: Texts) -> str:
    """What it saves, and what the gate said."""
    key, _ = KINDS[data["verdict"]]
    saved, calls, distances = data["costs"]["per_1000"], data["calls_per_image"], _distances(data)
    failed = [rule for rule in data["rules"] if not rule["passed"]]
    return say(
        "why_keep" if failed else f"why_{key}",
        whole=say.saving(saved["end_to_end"]["saved_share"]),
        tokens=say.saving(saved["tokens"]["saved_share"], short=True),
        guided=data["best_cfg"],
        guided_calls=calls["guided"],
        aligned_calls=calls["aligned"],
        distance=distance_title(data, say),
        best=distances["best_cfg"],
        aligned=distances["candidate"],
        rules=len(data["rules"]),
        failed=len(failed),
        names="; ".join(rule_name(rule, say) for rule in failed),
        share=f"{data['recipe']['pilot']['images']:.0%}",
    )


def facts(data: dict[str, Any], say: Texts) -> list[Fact]:
    """Calls, time and money, quality, safety, people."""
    calls, costs = data["calls_per_image"], data["costs"]
    return [
        Fact(
            say("fact_calls"),
            say("fact_calls_value", aligned=calls["aligned"], guided=calls["guided"]),
            say("fact_calls_note", guided_label=data["best_cfg"]),
        ),
        _saved("fact_whole", costs["per_1000"]["end_to_end"], costs["unit"], say),
        _saved("fact_tokens", costs["per_1000"]["tokens"], costs["unit"], say),
        _quality(data, say),
        _safety(data, say),
        _people(data, say),
        *([full_run_fact(data["pilot"], say)] if data["pilot"] else []),
    ]


def rule_name(rule: dict[str, Any], say: Texts) -> str:
    return say(f"rule_{rule['key']}", **rule["params"])


def _saved(name: str, cost: dict[str, float], unit: str, say: Texts) -> Fact:
    note = say(
        "fact_cost_note",
        guided_time=duration(cost["guided_seconds"]),
        aligned_time=duration(cost["aligned_seconds"]),
        guided=money(cost["guided"]),
        aligned=money(cost["aligned"]),
        unit=say(f"unit_{unit}"),
    )
    return Fact(
        say(name), say.saving(cost["saved_share"], short=True), note, "good" if cost["saved_share"] > 0 else "bad"
    )


def _quality(data: dict[str, Any], say: Texts) -> Fact:
    distances = _distances(data)
    return Fact(
        say("fact_quality", distance=distance_title(data, say)),
        say("fact_quality_value", aligned=distances["candidate"], guided=distances["best_cfg"]),
        say("fact_quality_note", guided_label=data["best_cfg"], base=distances["base"]),
    )


def _distances(data: dict[str, Any]) -> dict[str, str]:
    """The distances of base, best CFG and candidate, to be said."""
    measured = {row["label"]: row["measured"]["distance"]["mean"] for row in data["samplers"]}
    return {role: f"{measured[data[role]]:.2f}" for role in ("base", "best_cfg", "candidate")}


def _safety(data: dict[str, Any], say: Texts) -> Fact:
    checks = [rule for rule in data["rules"] if rule["safety"]]
    if not checks:
        return Fact(say("fact_safety"), say("fact_safety_none"), "")
    failed = [rule for rule in checks if not rule["passed"]]
    value = say("fact_safety_value", passed=len(checks) - len(failed), checks=len(checks))
    note = "; ".join(rule_name(rule, say) for rule in failed) or say("fact_safety_good")
    return Fact(say("fact_safety"), value, note, "bad" if failed else "good")


def _people(data: dict[str, Any], say: Texts) -> Fact:
    name, votes, least = say("fact_people"), data["votes"], data["min_votes"]
    if not least:
        return Fact(name, say("fact_people_none"), say("fact_people_none_note"))
    if votes is None:
        return Fact(name, say("fact_people_waiting", votes=0, min_votes=least), "")
    numbers = vote_numbers(votes)
    note = say("fact_people_note", reviewers=votes["reviewers"], **numbers)
    if votes["votes"] < least:
        return Fact(name, say("fact_people_waiting", votes=votes["votes"], min_votes=least), note)
    return Fact(name, say("fact_people_value", **numbers), note)


def vote_numbers(votes: dict[str, Any]) -> dict[str, str]:
    """Votes, win rate and its interval, to be said."""
    low, high = votes["interval"]
    rate = {"rate": votes["win_rate"], "low": low, "high": high}
    return {"votes": f"{votes['votes']:,}"} | {name: f"{value:.3f}" for name, value in rate.items()}


def distance_title(data: dict[str, Any], say: Texts) -> str:
    return "FID" if data["distance_name"] == "FID" else say("metric_distance")
