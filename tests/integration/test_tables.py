"""Reads and writes nothing: tables and gate where some numbers were not measured."""

from __future__ import annotations

from typing import Any

from cca_core.config import DecideConfig
from cca_core.metrics.votes import Tally
from cca_core.stages.table import markdown_table, table_columns
from pipelines.stages.decide import PROMOTE, decide

ALL = {
    "distance": 4.0,
    "inception_score": 9.0,
    "precision": 0.8,
    "recall": 0.7,
    "density": 1.1,
    "coverage": 0.9,
    "class_consistency": 0.9,
}

#: No checks of safety, no champion, no votes.
NOBODY = {"safety": [], "champion": None, "votes": Tally(), "pilot": False}


def row(label: str, *, cfg_scale: float = 1.0, leave_out: tuple[str, ...] = (), **values: float) -> dict[str, Any]:
    mean = {name: value for name, value in (ALL | values).items() if name not in leave_out}
    return {
        "label": label,
        "distance_name": "FID",
        "sampling": {"cfg_scale": cfg_scale, "temperature": 1.0},
        "mean": mean,
        "sd": {name: 0.5 for name in mean},
        "interval": {name: (value - 0.25, value + 0.25) for name, value in mean.items()},
        "class_consistency_per_class": [0.9, None],
        "cost": {"calls_per_image": 16, "images_per_s": 10.0, "tokens_images_per_s": 12.0, "batch_size": 8},
        "per_seed": [{"seed": 0, "n": 100, "n_real": 0 if "recall" in leave_out else 50}],
    }


def rows(**settings: Any) -> list[dict[str, Any]]:
    return [row("base", **settings), row("base, CFG 2", cfg_scale=2.0, **settings), row("aligned", **settings)]


def test_columns_are_what_was_measured_and_the_distance_has_its_name():
    titles = list(table_columns(rows()))
    measured = ["FID", "IS", "precision", "recall", "density", "coverage", "class consistency"]
    assert titles == ["sampler", *measured, "calls/image", "images/s"]
    assert "4.00 +- 0.50" in markdown_table(rows())
    without = rows(leave_out=("inception_score", "recall"))
    assert not {"IS", "recall"} & set(table_columns(without))
    assert table_columns([*without, row("other")])["recall"] == ["-", "-", "-", "0.700"]


def test_the_gate_without_recall_says_so_and_judges_by_the_rest():
    config = DecideConfig(max_distance_vs_base=1.5)
    found = decide(config, rows()[:2], [row("aligned", class_consistency=0.99)], **NOBODY)
    assert any(rule["name"].startswith("recall") for rule in found["rules"])
    assert found["left_out"] == []
    without = rows(leave_out=("recall",))
    found = decide(config, without[:2], without[2:], **NOBODY)
    assert found["verdict"] == PROMOTE
    assert not any("recall" in rule["name"] for rule in found["rules"])
    assert "lost diversity would pass" in found["left_out"][0]
