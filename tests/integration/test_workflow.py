"""Writes to temporary folders: the whole graph through `cca`, on a real local Ray and MLflow."""

from __future__ import annotations

import base64
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from tests.driver import TINY, cca, environment, manifests, written

STAGES = ["tokenizer", "tokens", "features", "base", "baseline", "reference", "align", "evaluate"]
STAGES += ["safety", "decide", "report"]


@pytest.fixture(scope="module")
def tracker(finished):
    folder, _ = finished
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/.cca/mlflow.db"
    from pipelines.settings import Settings
    from pipelines.tracking import Tracker

    yield Tracker(Settings())
    del os.environ["MLFLOW_TRACKING_URI"]


def test_a_run_ends_with_the_table_and_the_next_commands(finished):
    folder, output = finished
    for sampler in ("base", "base, CFG 1.5", "base, temperature 0.8", "aligned", "aligned, temperature 0.9"):
        assert f"| {sampler} " in output
    assert "calls/image" in output
    assert "cca ui" in output
    assert "cca serve" in output
    assert set(STAGES) <= set(manifests(folder))


def test_aligned_needs_half_the_calls_of_guidance(finished):
    _, output = finished
    table = [[cell.strip() for cell in line.split("|")] for line in output.splitlines() if line.startswith("| ")]
    calls = {line[1]: line[table[0].index("calls/image")] for line in table}
    assert (calls["base, CFG 1.5"], calls["aligned"]) == ("32", "16")


def test_a_second_run_does_nothing_in_under_ten_seconds(finished):
    folder, _ = finished
    before = written(folder)
    result = cca(folder, "run", str(TINY))
    assert result.returncode == 0, result.stderr
    # As it says itself: what Python takes to import Ray, MLflow and torch is the machine's.
    took = re.search(r"nothing had changed, ([0-9.]+) s", result.stdout)
    assert took, result.stdout
    assert written(folder) == before
    assert float(took[1]) < 10


def test_execution_settings_retrain_nothing(finished):
    folder, _ = finished
    before = written(folder)
    result = cca(folder, "run", str(TINY), "--set", "execution.num_workers=1", "--set", "execution.micro_batch_size=16")
    assert result.returncode == 0, result.stderr
    assert written(folder) == before


def test_plan_says_what_would_run_and_why(finished):
    folder, _ = finished
    result = cca(folder, "plan", str(TINY), "--set", "align.beta=0.3")
    by_stage = {
        line.split()[1]: line.split()[3] for line in result.stdout.splitlines() if len(line.split()) > 5 and "│" in line
    }
    assert by_stage["tokens"] == by_stage["base"] == by_stage["reference"] == "reuse"
    assert by_stage["align"] == by_stage["evaluate"] == "run"


def test_mlflow_holds_what_a_reviewer_needs(finished, tracker):
    parent = tracker.parents()[0]
    artifacts = {item.path for item in tracker.client.list_artifacts(parent.info.run_id)}
    assert {
        "recipe.yaml",
        "report.html",
        "report.json",
        "report.md",
        "quality_cost.png",
        "fidelity_diversity.png",
        "samples.png",
        "evaluation.json",
    } <= artifacts
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"].startswith("# tiny: promote")
    stages = {run.info.run_name: run for run in tracker.stage_runs(parent.info.run_id)}
    assert set(stages) == set(STAGES) - {"decide", "report"}
    assert all(run.info.status == "FINISHED" for run in stages.values())
    for metric in ("loss", "log_ratio_pos", "log_ratio_neg", "margin", "accuracy", "grad_norm", "images_per_s"):
        assert len(tracker.client.get_metric_history(stages["align"].info.run_id, metric)) > 3, metric
    measured = stages["evaluate"].data.metrics
    for metric in ("distance", "recall", "density", "coverage", "kernel_distance", "inception_score"):
        low, high = (measured[f"aligned.{metric}_{side}"] for side in ("low", "high"))
        assert low < measured[f"aligned.{metric}"] < high, metric
    inputs = stages["tokens"].inputs.dataset_inputs
    assert {data.dataset.name for data in inputs} == {"images", "tokens"}


def test_safety_is_seen_beside_the_base_with_pictures_of_the_worst_cases(finished, tracker):
    folder, _ = finished
    parent = tracker.parents()[0]
    (safety,) = [run for run in tracker.stage_runs(parent.info.run_id) if run.info.run_name == "safety"]
    assert {"base.memorisation", "aligned.memorisation", "aligned.twins"} <= set(safety.data.metrics)
    artifacts = {item.path for item in tracker.client.list_artifacts(safety.info.run_id)}
    pictures = {"copies.png", "twins.png", "least_varied.png", "worst_class.png", "confusion.png"}
    assert pictures | {"safety_table.json"} <= artifacts
    (report,) = (folder / ".cca" / "storage" / "report").glob("*/report.md")
    lines = report.read_text().splitlines()
    assert sum(line.startswith("| memorisation:") and "| yes |" in line for line in lines) == 1
    begins = lines.index("## Safety")
    assert [line.split(" | ")[0] for line in lines[begins + 4 : begins + 7]] == [
        "| base",
        "| base, CFG 1.5",
        "| aligned",
    ]


def test_registry_holds_base_then_champion(finished, tracker):
    from pipelines.tracking import Registry

    registry = Registry(tracker, "cca-tiny")
    base, aligned = registry.versions()
    assert (base.version, aligned.version) == ("1", "2")
    assert base.tags["cca.cfg_scale"] == "1.5"
    assert (base.tags["cca.calls_per_image"], aligned.tags["cca.calls_per_image"]) == ("32", "16")
    assert registry.alias("champion").version == "2"


def test_champion_draws_through_pyfunc_without_pickle(finished, tracker, monkeypatch):
    import mlflow
    import pandas as pd

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model = mlflow.pyfunc.load_model("models:/cca-tiny@champion")
    drawn = model.predict(pd.DataFrame({"class": ["3", "7"], "seed": [1, 2]}))
    again = model.predict(pd.DataFrame({"class": ["7"], "seed": [2]}))
    image = Image.open(io.BytesIO(base64.b64decode(drawn["image_png_base64"][0])))
    assert image.size == (8, 8)
    assert drawn["image_png_base64"][1] == again["image_png_base64"][0]
    assert model.metadata.signature.params is not None


def test_samples_of_a_run_are_exported_for_the_official_evaluator(finished, tmp_path):
    folder, _ = finished
    (bundle,) = (folder / ".cca" / "storage" / "align").iterdir()
    result = cca(tmp_path, "export-samples", str(bundle), "samples.npz", "--num-samples", "12")
    assert result.returncode == 0, result.stderr
    assert "12 images of 8 x 8 pixels" in result.stdout
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as found:
        assert found["arr_0"].shape == (12, 8, 8, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--set", "align.bta=1"], "did you mean align.beta?"),
        (["run", "--set", "source.kind=folder", "--set", "source.uri=/nowhere"], "/nowhere"),
        (["run", "digts"], "did you mean digits?"),
        (["run", "--only", "aline"], "unknown stage aline"),
        (["run", "--set", "base.checkpoint=missing.pt"], "no checkpoint at missing.pt"),
        (["run", "--set", "align.null_share=0.5"], "raise reference.null_share_max"),
        (["run", "--set", "align.beta=big"], "align.beta"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, arguments, says):
    result = cca(tmp_path, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert says in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_unwritable_storage_and_silent_server_are_said(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = cca(tmp_path, "run", env={"CCA_STORAGE": str(blocked / "storage")})
    assert (result.returncode, "CCA_STORAGE" in result.stderr) == (2, True), result.stderr
    result = cca(tmp_path, "run", env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    assert (result.returncode, "does not answer" in result.stderr) == (2, True), result.stderr


def test_environment_is_that_of_a_user():
    assert not any(name.startswith("CCA_") for name in environment())
