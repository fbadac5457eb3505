"""Writes to temporary folders: a sweep through `cca` on a real local Ray Tune and MLflow, and what a reviewer sees."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines.recipe import load_recipe
from tests.driver import TINY, cca, written
from tests.invariant.test_codes import run

#: The smallest run with a sweep in it; one of the lrs can only break.
SETTINGS = (
    "source.limit=300",
    "tokenizer.epochs=1",
    "features.epochs=2",
    "base.epochs=2",
    "align.epochs=2",
    "align.global_batch_size=32",
    "evaluate.num_samples=100",
    "evaluate.seeds=[0]",
    "evaluate.cost_images=50",
    "sweep.enabled=true",
    'sweep.objectives=["cca", "unlearning"]',
    "sweep.betas=[0.1]",
    "sweep.lambdas=[1.5]",
    "sweep.lrs=[1e-3, 1e30]",
    "sweep.null_shares=[0.1]",
    "sweep.num_trials=0",
    "sweep.evaluations=2",
    "sweep.num_samples=50",
    "sweep.seeds=[0]",
)
OPTIONS = [part for setting in SETTINGS for part in ("--set", setting)]
BEFORE = ("tokenizer", "tokens", "features", "base", "baseline", "reference")
#: The recipe's own, and both objectives with both lrs.
TRIALS = 5


class Swept(NamedTuple):
    """A sweep that ended in this process, lost some of its trials, and was finished by `cca run` on Ray."""

    folder: Path
    directory: Path
    #: The ranking before, and the files that were lost.
    ranked: list[dict]
    lost: set[str]
    before: dict[str, int]
    after: dict[str, int]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Swept:
    folder = tmp_path_factory.mktemp("sweep")
    recipe = load_recipe(str(TINY), list(SETTINGS))
    context = run(recipe, folder / ".cca" / "storage", *BEFORE, "sweep")
    directory = Path(context.directory("sweep").path)
    ranked = json.loads((directory / "results.json").read_text())["trials"]
    first = {f"trials/{row['key']}-e1.json" for row in ranked if row["own"] or row["error"]}
    lost = first | {f"trials/{path.name}" for path in directory.glob("trials/*-e2.json")}
    for name in ("_manifest.json", "results.json", *lost):
        (directory / name).unlink()
    before = written(folder)
    # Only the sweep: the stages after it have tests of their own on Ray.
    result = cca(folder, "run", str(TINY), *OPTIONS, "--only", "sweep")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"best of {TRIALS} trials, 2 of which failed: " in result.stdout
    assert "Trial" not in result.stdout, "Tune says nothing itself"
    return Swept(folder, directory, ranked, lost, before, written(folder))


@pytest.fixture(scope="module")
def finished(swept) -> str:
    """What `cca run` printed that found the candidates aligned and measured."""
    recipe = load_recipe(str(TINY), list(SETTINGS))
    run(recipe, swept.folder / ".cca" / "storage", "align", "align-2", "evaluate", "evaluate-2")
    result = cca(swept.folder, "run", str(TINY), *OPTIONS)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tracker(swept):
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{swept.folder}/.cca/mlflow.db"
    from pipelines.settings import Settings
    from pipelines.tracking import Tracker

    yield Tracker(Settings())
    del os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="module")
def sweep_run(swept, tracker):
    """The sweep's run in MLflow."""
    (found,) = [run for run in tracker.stage_runs(tracker.parents()[0].info.run_id) if run.info.run_name == "sweep"]
    return found


def test_a_killed_sweep_measures_what_was_lost_again_and_nothing_else(swept):
    changed = {path for path in swept.after if swept.after[path] != swept.before.get(path)}
    names = {path.removeprefix(f"sweep/{swept.directory.name}/") for path in changed}
    pictures = {
        f"trials/{row['key']}-e{number}.png"
        for row in swept.ranked
        for number in (1, 2)
        if f"trials/{row['key']}-e{number}.json" in swept.lost and not row["error"]
    }
    assert names == {"_manifest.json", "results.json"} | swept.lost | pictures
    assert len(swept.lost) >= 5
    assert not list((swept.folder / ".cca" / "storage" / "ray_train").iterdir())


def test_ray_tune_ranks_the_trials_as_one_process_does(swept):
    ranked = json.loads((swept.directory / "results.json").read_text())["trials"]
    assert [(row["key"], row["ended"]) for row in ranked] == [(row["key"], row["ended"]) for row in swept.ranked]
    for row, before in zip(ranked, swept.ranked, strict=True):
        assert row["metrics"] == pytest.approx(before["metrics"], rel=1e-6)


def test_mlflow_has_a_run_per_trial_with_names_that_compare(tracker, sweep_run):
    runs = sorted(tracker.stage_runs(sweep_run.info.run_id), key=lambda run: int(run.data.tags["cca.rank"]))
    assert [run.info.status for run in runs] == ["FINISHED"] * 3 + ["FAILED"] * 2
    assert [run.data.tags["cca.winner"] for run in runs] == ["true", *["false"] * 4]
    names = {frozenset(run.data.params) for run in runs}
    assert names == {frozenset({"objective", "beta", "lambda", "lr", "null_share"})}
    working = runs[:3]
    assert len({frozenset(run.data.metrics) for run in working}) == 1
    assert {"distance", "class_consistency", "recall", "precision", "distance_cfg"} <= set(working[0].data.metrics)
    for one in working:
        history = tracker.client.get_metric_history(one.info.run_id, "log_ratio_pos")
        assert len({point.step for point in history}) > 1
        pictures = tracker.client.list_artifacts(one.info.run_id, "images")
        assert any(item.path.endswith(".png") for item in pictures)
    assert "not finite" in runs[-1].data.tags["mlflow.note.content"]


def test_the_sweeps_own_run_compares_the_trials(tracker, sweep_run):
    artifacts = {item.path for item in tracker.client.list_artifacts(sweep_run.info.run_id)}
    assert {"trials.json", "parallel_coordinates.png", "samples.png", "manifest.json"} <= artifacts
    assert "parallel coordinates" in sweep_run.data.tags["mlflow.note.content"]
    assert sweep_run.data.metrics["failed_trials"] == 2


def test_the_gate_judges_the_better_candidate_and_the_table_shows_both(swept, finished):
    assert all(f"| {sampler} " in finished for sampler in ("base", "aligned", "aligned 2"))
    storage = swept.folder / ".cca" / "storage"
    (decision,) = [json.loads(path.read_text()) for path in storage.glob("decide/*/decision.json")]
    rows = [json.loads(path.read_text())["rows"][0] for path in storage.glob("evaluate/*/results.json")]
    distances = {row["label"]: row["mean"]["distance"] for row in rows}
    assert len(set(distances.values())) == 2
    assert decision["candidate"] == min(distances, key=distances.__getitem__)
    (report,) = [path.read_text() for path in storage.glob("report/*/report.md")]
    assert "## The sweep" in report


def test_a_run_after_it_does_nothing_and_makes_no_trial_again(swept, finished, tracker, sweep_run):
    before = written(swept.folder)
    result = cca(swept.folder, "run", str(TINY), *OPTIONS)
    assert result.returncode == 0, result.stderr
    assert "nothing had changed" in result.stdout
    assert written(swept.folder) == before
    assert len(tracker.stage_runs(sweep_run.info.run_id)) == TRIALS


def test_the_trials_that_a_dead_driver_left_open_are_marked_with_their_stage(tracker):
    parent = tracker.start("parent", {})
    stage = tracker.start("sweep", {}, parent)
    trial = tracker.start("trial", {}, stage)
    assert tracker.kill_stale(parent) == ["sweep"]
    assert {tracker.client.get_run(run).info.status for run in (stage, trial)} == {"KILLED"}
