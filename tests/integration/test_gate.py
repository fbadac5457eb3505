"""Reads results made by hand: the gate's verdict over people's votes, and when there is none yet."""

from __future__ import annotations

from typing import Any

import pytest

from cca_core.config import ConfigError, DecideConfig
from cca_core.metrics.votes import Tally
from pipelines.stages.decide import AWAITING_VOTES, GO, KEEP_CFG, NO_GO, PROMOTE, decide
from pipelines.stages.rules import at_most


def row(label: str, distance: float, consistency: float, *, cfg: float = 1.0) -> dict[str, Any]:
    return {
        "label": label,
        "sampling": {"cfg_scale": cfg},
        "mean": {"distance": distance, "recall": 0.9, "class_consistency": consistency},
        "class_consistency_per_class": [consistency, consistency],
        "cost": {"calls_per_image": 32 if cfg > 1 else 16},
    }


BASELINE = [row("base", 2.0, 0.8), row("base, CFG 1.5", 1.0, 0.9, cfg=1.5)]
GOOD, BAD = [row("aligned", 1.1, 0.9)], [row("aligned", 1.9, 0.9)]


def verdict(
    config: DecideConfig, votes: Tally, candidate: list[dict[str, Any]] = GOOD, pilot: bool = False
) -> dict[str, Any]:
    return decide(config, BASELINE, candidate, safety=[], champion=None, votes=votes, pilot=pilot)


def rules(decision: dict[str, Any]) -> list[str]:
    return [rule["name"] for rule in decision["rules"]]


def test_without_a_number_nobody_is_asked():
    for votes in (Tally(), Tally(losses=100)):
        decision = verdict(DecideConfig(), votes)
        assert decision["verdict"] == PROMOTE
        assert not any("people" in name for name in rules(decision))


@pytest.mark.parametrize("votes", [Tally(), Tally(wins=29), Tally(losses=29)])
def test_a_model_that_passes_all_else_waits_for_enough_votes(votes):
    decision = verdict(DecideConfig(min_votes=30), votes)
    assert decision["verdict"] == AWAITING_VOTES
    assert f"{votes.votes} of the 30 votes" in decision["says"]
    assert not any("people" in name for name in rules(decision))


def test_a_model_that_fails_another_rule_waits_for_nobody():
    decision = verdict(DecideConfig(min_votes=30), Tally(), BAD)
    assert decision["verdict"] == KEEP_CFG
    assert "distance over that of the base" in decision["says"]


@pytest.mark.parametrize(
    ("votes", "found"),
    [
        (Tally(wins=14, losses=16), PROMOTE),
        (Tally(wins=13, losses=16, equal=1), PROMOTE),  # 13.5 of 30 is the limit
        (Tally(wins=13, losses=17), KEEP_CFG),
        (Tally(equal=30), PROMOTE),
        (Tally(wins=2, losses=300), KEEP_CFG),
    ],
)
def test_with_enough_votes_the_win_rate_has_a_floor(votes, found):
    decision = verdict(DecideConfig(min_votes=30), votes)
    assert decision["verdict"] == found
    rule = decision["rules"][-1]
    assert (rule["value"], rule["limit"]) == (votes.win_rate, 0.45)
    low, high = votes.interval
    assert f"{votes.votes} votes, 95 % interval {low:.3f} to {high:.3f}" in rule["name"]
    assert ("people prefer guidance" in decision["says"]) == (found == KEEP_CFG)


def test_what_cannot_be_is_refused():
    for values in ({"min_votes": -1}, {"min_win_rate": 1.1}, {"min_win_rate": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            DecideConfig(**values)


def test_a_failed_check_of_safety_keeps_guidance_and_says_by_how_much_and_what_to_try():
    rule = at_most("safety_memorisation", 0.9, 0.3)
    decision = decide(DecideConfig(), BASELINE, GOOD, safety=[rule], champion=None, votes=Tally(), pilot=False)
    assert decision["verdict"] == KEEP_CFG
    assert "0 is chance: 0.900, limit 0.300 (the model copies training images (copies.png): train" in decision["says"]


def test_a_pilot_says_go_or_no_go_by_the_same_rules():
    assert verdict(DecideConfig(), Tally(), pilot=True)["verdict"] == GO
    bad = verdict(DecideConfig(), Tally(), BAD, pilot=True)
    assert bad["verdict"] == NO_GO
    assert rules(bad) == rules(verdict(DecideConfig(), Tally(), BAD))
    assert "1.900, limit 1.3" in bad["says"]
    waiting = verdict(DecideConfig(min_votes=30), Tally(wins=5), pilot=True)
    assert waiting["verdict"] == AWAITING_VOTES
