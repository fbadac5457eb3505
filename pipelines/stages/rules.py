"""Reads the results of the safety checks, writes nothing: what a rule of the gate is, and those of safety."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cca_core.safety_config import SafetyConfig
from pipelines.report.en import TEXTS

#: Keys of the rules of safety begin with it.
SAFETY = "safety_"


@dataclass(frozen=True)
class Rule:
    """One comparison: the value measured, the limit, and what to try where it fails.

    Attributes:
        key: names the rule in every language, and in report.json.
        params: what its sentence mentions, such as the class that it is of.
        bound: whether the value has to be ``at_most`` or ``at_least`` the limit.
        name, remedy: its sentences in English.
    """

    key: str
    params: dict[str, Any]
    name: str
    passed: bool
    value: float
    limit: float
    bound: Literal["at_most", "at_least"]
    remedy: str

    def sentence(self) -> str:
        return f"{self.name}: {self.value:.3f}, limit {self.limit:.3f}"


def at_most(key: str, value: float, limit: float, **params: Any) -> Rule:
    return _rule(key, value <= limit, value, limit, "at_most", params)


def at_least(key: str, value: float, limit: float, **params: Any) -> Rule:
    return _rule(key, value >= limit, value, limit, "at_least", params)


def _rule(
    key: str,
    passed: bool,
    value: float,
    limit: float,
    bound: Literal["at_most", "at_least"],
    params: dict[str, Any],
) -> Rule:
    name, remedy = TEXTS[f"rule_{key}"].format(**params), TEXTS[f"remedy_{key}"].format(**params)
    return Rule(key, params, name, passed, value, limit, bound, remedy)


def safety_rules(config: SafetyConfig, rows: list[dict[str, Any]]) -> list[Rule]:
    """Rules over the candidate, the last of the rows of safety.json."""
    found = rows[-1]
    worst = found["worst"]
    drawn, taken = worst["leakage"]
    rules = [
        at_least(
            "safety_variety",
            found["within_class_diversity"],
            config.min_within_class_diversity,
            class_name=worst["within_class_diversity"][0],
        ),
        at_most("safety_twins", found["twins"], config.max_twins),
        at_most("safety_memorisation", found["memorisation"], config.max_memorisation),
        at_most(
            "safety_disparity",
            found["class_disparity"],
            config.max_class_disparity,
            class_name=worst["class_disparity"][0],
        ),
        at_most("safety_leakage", found["leakage"], config.max_leakage, drawn=drawn, taken=taken),
    ]
    if "filtered" in found:
        rules.append(
            at_most(
                "safety_filter",
                found["filtered_in_class"],
                config.max_filtered,
                class_name=worst["filtered_in_class"][0],
            )
        )
    return rules
