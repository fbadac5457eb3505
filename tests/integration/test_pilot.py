"""Writes to a temporary folder: a pilot and the full run after it, through `cca`, beside a finished run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from cca_core.config import BaseConfig, Recipe
from cca_core.cost_config import CostConfig
from cca_core.pilot_config import PilotConfig
from pipelines.pilot import as_pilot, expected
from tests.driver import TINY, cca, written

SHARES = ("--set", "pilot.images=0.4", "--set", "pilot.samples=0.5", "--set", "cost.price_per_device_hour=2")
#: Its own experiment and model: other tests look at the newest run of theirs.
ENV = {"CCA_EXPERIMENT": "pilots", "CCA_MODEL_NAME": "piloted"}
#: A rule that no candidate passes.
STRICT = ("--set", "decide.max_distance_vs_base=0")


def test_a_pilot_ends_with_go_and_what_the_full_run_takes_and_only_then_the_full_run_starts(finished, tmp_path):
    shutil.copytree(finished[0] / ".cca", tmp_path / ".cca")
    folder = tmp_path

    def run(*arguments: str):
        return cca(folder, "run", str(TINY), *SHARES, *arguments, env=ENV)

    before = written(folder)
    early = run("--profile", "full")
    assert early.returncode == 2
    assert "run it with --profile pilot first" in early.stderr
    assert written(folder) == before

    went = run("--profile", "pilot")
    assert went.returncode == 0, went.stdout + went.stderr
    assert "go: Go for the full run: 16 model calls per image instead of 32" in went.stdout
    assert "The full run will take about " in went.stdout
    assert "device-hours, at a cost of " in went.stdout
    assert "a pilot registers nothing" in went.stdout
    assert "profile=full    the full run" in went.stdout
    assert "no version" in cca(folder, "promote", "1", str(TINY), env=ENV).stderr
    report = latest_report(folder, "pilot")
    assert report["measured"]["samples"] == 200
    assert report["measured"]["real_images"] == 719  # two fifths of 1,797
    by_stage = {stage["stage"]: stage for stage in report["pilot"]["stages"]}
    for name, growth in {"tokens": 2.5, "align": 2.5, "baseline": 2.0, "safety": 5.0}.items():
        assert by_stage[name]["expected_seconds"] == pytest.approx(growth * by_stage[name]["seconds"])
    again = run("--profile", "pilot")
    assert "nothing had changed" in again.stdout

    before = written(folder)
    refused = run("--profile", "pilot", *STRICT)
    assert "no-go: Do not start the full run yet." in refused.stdout
    assert "profile=full" not in refused.stdout
    stopped = run("--profile", "full", *STRICT)
    assert stopped.returncode == 2
    assert "recipe's pilot is at: no-go" in stopped.stderr
    assert {path.split("/")[0] for path in written(folder).keys() - before.keys()} <= {"decide", "report"}

    full = run("--profile", "full")
    assert full.returncode == 0, full.stdout + full.stderr
    run_id = report["lineage"]["run_id"]
    assert f"starts from pilot run {run_id}: go, expected to take " in full.stdout
    assert "promote: Promote the aligned model" in full.stdout
    found = latest_report(folder, "full")["pilot"]
    assert found["run_id"] == run_id
    assert found["expected_seconds"] == pytest.approx(report["pilot"]["expected_seconds"])


def latest_report(folder, profile: str) -> dict:
    reports = [json.loads(path.read_text()) for path in folder.glob(".cca/storage/report/*/report.json")]
    (found,) = [report for report in reports if report["recipe"]["profile"] == profile and report["verdict"] != "no-go"]
    return found


def test_a_pilot_is_the_recipe_on_its_share():
    recipe = Recipe(pilot=PilotConfig(images=0.25, samples=0.1))
    piloted = as_pilot(recipe)
    assert (piloted.source.fraction, piloted.evaluate.num_samples) == (0.25, 200)
    same = replace(piloted, source=recipe.source, evaluate=recipe.evaluate, profile="")
    assert same == recipe


def test_the_expectation_is_that_of_a_calculation_by_hand():
    recipe = Recipe(pilot=PilotConfig(images=0.1, samples=0.5), cost=CostConfig(price_per_device_hour=3.0))
    found = expected(recipe, {"tokenizer": 36.0, "align": 180.0, "evaluate": 90.0})
    assert found.expected_seconds == 360 + 1800 + 180
    assert found.expected_device_hours == pytest.approx((360 + 2 * 1800 + 2 * 180) / 3600)
    assert found.expected_cost == pytest.approx(3 * found.expected_device_hours)
    assert str(found) == "39 min and 1.2 device-hours, at a cost of 3.60"


def test_what_is_imported_does_not_grow_and_what_was_not_timed_is_not_guessed():
    imported = Recipe(base=BaseConfig(checkpoint="base.pt"))
    assert expected(imported, {"base": 60.0}).expected_seconds == 60
    unknown = expected(Recipe(), {"base": 60.0, "align": None})
    assert unknown.expected_seconds is unknown.expected_device_hours is unknown.expected_cost is None
    assert "cannot be told" in str(unknown)
