"""Reads a finished sweep/ directory, writes to MLflow: one run per trial below the sweep's, and what compares them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cca_core.config import Recipe
from cca_core.manifest import Manifest
from cca_core.stages.evaluate import load_results
from cca_core.stages.grid import text
from cca_core.stages.sweep import METRIC, trial_records
from cca_core.stages.trial import trial_file
from cca_core.store import StageDirectory
from pipelines.stages.figures import sample_panels
from pipelines.tracking import STAGE, Tracker

#: Names in MLflow of what a trial has of its own; the same for every trial, so that the UI's charts can compare them.
PARAMETERS = {"objective": "objective", "beta": "beta", "lambda": "lambda_", "lr": "lr", "null_share": "null_share"}
#: Axes of the parallel coordinates behind the settings.
MEASURED = (METRIC, "class_consistency", "precision", "recall", f"{METRIC}_cfg")
#: Trials whose samples are shown below each other.
SHOWN_TRIALS = 8


def show_sweep(tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    """A run per trial with its settings, curve, evaluations and samples; on the sweep's own run the table, the
    parallel coordinates and the samples of the best trials."""
    rows = load_results(directory)["trials"]
    for row in rows:
        _trial(tracker, run_id, directory, row, kept=row["rank"] <= recipe.sweep.keep)
    tracker.table(run_id, trial_columns(rows), "trials.json")
    measured = [row for row in rows if not row["error"]]
    pictures = {
        f"{row['rank']}: {row['label']} ({row['metrics'][METRIC]:.2f})": directory.read_bytes(
            trial_file(row["key"], row["evaluations"], "png")
        )
        for row in measured[:SHOWN_TRIALS]
    }
    for path, figure in (
        ("parallel_coordinates.png", parallel_coordinates(measured, recipe.sweep.keep)),
        ("samples.png", sample_panels(pictures)),
    ):
        tracker.figure(run_id, figure, path)
        plt.close(figure)


def _trial(tracker: Tracker, parent_id: str, directory: StageDirectory, row: dict[str, Any], *, kept: bool) -> None:
    tags = {
        STAGE: "trial",
        "cca.trial": row["key"],
        "cca.rank": str(row["rank"]),
        "cca.winner": str(row["rank"] == 1).lower(),
        "cca.kept": str(kept).lower(),
        "cca.own_settings": str(row["own"]).lower(),
        "cca.ended": row["ended"],
    }
    run_id = tracker.start(f"{row['rank']}: {row['label']}", tags, parent_id)
    tracker.params(run_id, {name: row["settings"][field] for name, field in PARAMETERS.items()})
    points: dict[int, dict[str, float]] = {}
    for record in trial_records(directory, row):
        for point in record["curve"]:
            points.setdefault(int(point["step"]), {}).update(point)
        points.setdefault(record["step"], {}).update(record["metrics"])
        if record["metrics"]:
            picture = directory.read_bytes(trial_file(row["key"], record["evaluation"], "png"))
            tracker.image(run_id, picture, "samples", record["step"])
    for step, values in sorted(points.items()):
        tracker.metrics(run_id, values, step)
    tracker.metrics(run_id, {"rank": row["rank"], "seconds": row["seconds"]}, max(points, default=0))
    if row["error"]:
        tracker.note(run_id, f"Failed: {row['error']}")
    tracker.end(run_id, "FAILED" if row["error"] else "FINISHED")


def sweep_note(directory: StageDirectory, recipe: Recipe) -> str:
    """What was tried, the best trials, and where the UI compares them, in Markdown."""
    results, sweep = load_results(directory), recipe.sweep
    rows, guided = results["trials"], results["best_cfg"]
    return (
        f"{len(rows)} settings of align tried on {sweep.fraction:.0%} of the training images, all on one reference, "
        f"and ranked by distance: guidance-free, {sweep.num_samples} samples per seed. The base has "
        f"{results['base']['mean']['distance']:.2f}, {guided['label']} {guided['mean']['distance']:.2f}, each with "
        f"{recipe.evaluate.num_samples} samples. `_cfg` is behind what a trial reaches when it is guided all the same, "
        f"with scale {results['cfg_scale']:g}.\n\n"
        + "\n".join(trial_lines(rows, SHOWN_TRIALS))
        + "\n\nEach trial is a run below this one. To compare them in the chart view: parallel coordinates from "
        f"{', '.join(PARAMETERS)} to {METRIC}, and the image grid of `samples`. Under Artifacts: "
        "`parallel_coordinates.png`, `samples.png` and `trials.json`. "
    )


def trial_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The trials by column, best first."""
    columns: dict[str, list[Any]] = {"rank": [row["rank"] for row in rows]}
    columns |= {name: [row["settings"][field] for row in rows] for name, field in PARAMETERS.items()}
    columns |= {"ended": [row["ended"] for row in rows], "steps": [row["step"] for row in rows]}
    for name in dict.fromkeys(name for row in rows for name in row["metrics"]):
        columns[name] = [row["metrics"].get(name) for row in rows]
    return columns | {
        "recipe's own": [row["own"] for row in rows],
        "error": [row["error"] for row in rows],
    }


def best_trials(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The best trials that gave something, as numbers of the report."""
    return [
        {name: row[name] for name in ("rank", "label", "own", "ended")}
        | {name: row["metrics"].get(name) for name in (METRIC, f"{METRIC}_cfg", "class_consistency", "recall")}
        for row in rows
        if not row["error"]
    ][:count]


def trial_lines(rows: list[dict[str, Any]], count: int) -> list[str]:
    """The best trials as a Markdown table."""
    lines = [
        f"| rank | settings | {METRIC} | class consistency | recall | {METRIC} with CFG | ended |",
        "| ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for found in best_trials(rows, count):
        own = " (the recipe's own)" if found["own"] else ""
        recall = "-" if found["recall"] is None else f"{found['recall']:.3f}"
        lines.append(
            f"| {found['rank']} | {found['label']}{own} | {found[METRIC]:.2f} | {found['class_consistency']:.3f} | "
            f"{recall} | {found[f'{METRIC}_cfg']:.2f} | {found['ended']} |"
        )
    return lines


def parallel_coordinates(rows: list[dict[str, Any]], kept: int) -> Figure:
    """One line per trial through its settings and what was measured; dark is a good rank."""
    figure, axis = plt.subplots(figsize=(13, 5), constrained_layout=True)
    columns: dict[str, list[Any]] = {
        name: [row["settings"][field] for row in rows] for name, field in PARAMETERS.items()
    }
    measured = [name for name in MEASURED if all(name in row["metrics"] for row in rows)]
    heights = []
    for place, values in enumerate(columns.values()):
        # A few values each, over orders of magnitude: evenly spaced.
        choices = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        scale = {value: (index + 0.5) / len(choices) for index, value in enumerate(choices)}
        heights.append([scale[value] for value in values])
        for value, height in scale.items():
            _say(axis, text(value), place, height)
    for place, name in enumerate(measured, start=len(columns)):
        values = np.array([row["metrics"][name] for row in rows])
        # A spoilt model is a hundred times as far away: on a linear axis the others would be one point.
        drawn = np.log(values + 1e-3) if name.startswith(METRIC) else values
        low, high = drawn.min(), drawn.max()
        heights.append(list((drawn - low) / (high - low)) if high > low else [0.5] * len(rows))
        _say(axis, f"{values.min():.3g}", place, 0.0)
        _say(axis, f"{values.max():.3g}", place, 1.0)
    # Lines that share a setting would hide each other there.
    nudge = np.linspace(-0.03, 0.03, len(rows))
    colours = colormaps["viridis"](np.linspace(0, 1, len(rows)))
    for index in reversed(range(len(rows))):
        line = [column[index] + (nudge[index] if place < len(columns) else 0) for place, column in enumerate(heights)]
        style = "-" if rows[index]["ended"] == "at its end" else ":"
        width = 3.5 if rows[index]["rank"] <= kept else 1.2
        axis.plot(line, style, color=colours[index], linewidth=width, label=f"{rows[index]['rank']}")
    names = [*columns, *(name.replace("_", " ") for name in measured)]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks([])
    axis.set_ylim(-0.08, 1.12)
    axis.grid(axis="x")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], title="rank", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axis.set_title(
        "thick: goes to full scale; dotted: stopped early; a value that an objective does not look at is the recipe's",
        fontsize=9,
        loc="left",
    )
    return figure


def _say(axis: Axes, text: str, place: int, height: float) -> None:
    axis.annotate(
        text,
        (place, height),
        textcoords="offset points",
        xytext=(5, 3),
        fontsize=8,
        zorder=10,
        bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )
