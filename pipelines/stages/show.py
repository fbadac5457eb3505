"""Reads finished stage directories, writes to MLflow: what a reviewer sees of each stage without asking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from matplotlib import pyplot as plt

from cca_core.config import Recipe
from cca_core.dataset import class_names, shard_tables
from cca_core.manifest import Manifest
from cca_core.stages.evaluate import load_results
from cca_core.stages.table import COLUMNS, cells
from cca_core.stages.tokenizer import PICTURE
from cca_core.store import StageDirectory
from cca_core.train.jobs import CURVE_NAME
from cca_core.workers.sample import grid_file
from pipelines.tracking import Tracker


def show(
    tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe, logged_steps: set[int]
) -> None:
    """Log a stage's facts, curve, tables and pictures to its run.

    Args:
        logged_steps: steps of the curve that went to this run while it trained; the others are added.
    """
    numbers = {name: value for name, value in manifest.facts.items() if isinstance(value, (int, float))}
    tracker.metrics(run_id, numbers)
    tracker.artifact(run_id, "manifest.json", manifest.to_json())
    if CURVE_NAME in manifest.files:
        for record in directory.read_json(CURVE_NAME):
            step = int(record.get("step", record["epoch"]))
            if step not in logged_steps:
                tracker.metrics(run_id, record, step)
    if manifest.stage in _SHOW:
        _SHOW[manifest.stage](tracker, run_id, directory, manifest, recipe)


def _tokenizer(tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    if PICTURE in manifest.files:
        tracker.artifact(run_id, PICTURE, directory.read_bytes(PICTURE))
        tracker.note(run_id, f"Held-out images above their reconstructions: `{PICTURE}` under Artifacts.")


def _tokens(tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    source = recipe.source.uri or "scikit-learn load_digits"
    tracker.dataset(
        run_id,
        uri=recipe.source.uri or directory.uri,
        name="images",
        digest=manifest.upstream["source"],
        context="input",
    )
    tracker.dataset(run_id, uri=directory.uri, name="tokens", digest=manifest.digest, context="output")
    names, counts = class_names(directory), manifest.facts["images_per_class"]
    figure, axis = plt.subplots(figsize=(8, 3.5), constrained_layout=True)
    axis.bar(range(len(counts)), counts)
    axis.set_title(f"images per class ({sum(counts)} in all)")
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=45 if len(names) > 10 else 0)
    tracker.figure(run_id, figure, "images_per_class.png")
    plt.close(figure)
    bad = pa.concat_tables(shard_tables(directory.sibling("quarantine")))
    if bad.num_rows:
        tracker.table(run_id, bad.to_pydict(), "quarantine.json")
    tracker.note(
        run_id,
        f"{sum(counts)} images of {source} as {manifest.facts['num_tokens']} tokens each; {bad.num_rows} in quarantine"
        + (" (see `quarantine.json`)" if bad.num_rows else "")
        + f". Stored at `{directory.uri}`.",
    )


def _evaluation(tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    rows = load_results(directory)["rows"]
    tracker.table(run_id, table_columns(rows), "evaluation.json")
    for index, row in enumerate(rows):
        key = row["label"].replace(", ", "_").replace(" ", "_")
        tracker.metrics(run_id, {f"{key}.{name}": value for name, value in row["mean"].items()})
        tracker.artifact(run_id, f"samples/{key}.png", directory.read_bytes(grid_file(index)))


def table_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The evaluation table by column, for MLflow."""
    return dict(zip(COLUMNS, map(list, zip(*cells(rows), strict=True)), strict=True))


_SHOW: dict[str, Callable[[Tracker, str, StageDirectory, Manifest, Recipe], None]] = {
    "tokenizer": _tokenizer,
    "tokens": _tokens,
    "baseline": _evaluation,
    "evaluate": _evaluation,
}
