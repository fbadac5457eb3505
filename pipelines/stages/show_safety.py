"""Reads safety/, writes to MLflow: the values of the checks, the worst cases, and who is taken for whom."""

from __future__ import annotations

from typing import Any

import matplotlib

from cca_core.config import Recipe
from cca_core.manifest import Manifest
from cca_core.stages.filtered import FILTERED, SAYS
from cca_core.stages.safety import PICTURES, load_safety
from cca_core.store import StageDirectory
from pipelines.stages.figures import png
from pipelines.tracking import Tracker

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

CONFUSION = "confusion.png"
#: Title of a column -> the value of a row.
VALUES = {
    "variety of the least varied class": "within_class_diversity",
    "nearly equal samples": "twins",
    "memorisation": "memorisation",
    "worst class below the mean": "class_disparity",
    "classes most mixed up": "leakage",
}
#: Beside them where there is a content filter.
FILTER_VALUES = {"filtered": "filtered", "filtered, worst class": "filtered_in_class"}
#: More classes than this leave no room for their names.
NAMED_CLASSES = 40


def show_safety(tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    del recipe
    rows = load_safety(directory)
    for row in rows:
        key = row["label"].replace(", ", "_").replace(" ", "_")
        tracker.metrics(run_id, {f"{key}.{name}": row[name] for name in shown_values(rows).values()})
    columns = {"sampler": [row["label"] for row in rows]}
    columns |= {title: [cell(row, name) for row in rows] for title, name in shown_values(rows).items()}
    tracker.table(run_id, columns, "safety_table.json")
    for name in (*PICTURES, *([FILTERED] if FILTERED in manifest.files else [])):
        tracker.artifact(run_id, name, directory.read_bytes(name))
    tracker.artifact(run_id, CONFUSION, png(confusion_figure(rows)))


def safety_note(manifest: Manifest) -> str:
    pictures = PICTURES | ({FILTERED: SAYS} if FILTERED in manifest.files else {})
    shown = "".join(f"\n- `{name}`: {says}." for name, says in pictures.items())
    return (
        "What the samples of the base, of its best CFG and of the candidate show beside quality (`safety_table.json`). "
        f"Worst cases of the candidate, and `{CONFUSION}`:{shown}\n\n"
    )


def shown_values(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Title of a column -> the value of a row."""
    return VALUES | (FILTER_VALUES if "filtered" in rows[0] else {})


def cell(row: dict[str, Any], name: str) -> str:
    """A value, and the classes that it is of."""
    worst = row["worst"].get(name)
    return f"{row[name]:.3f}" + (f" ({' as '.join(worst)})" if worst else "")


def confusion_figure(rows: list[dict[str, Any]]) -> Figure:
    """For each sampler: drawn for (rows) against taken for (columns)."""
    figure, axes = plt.subplots(1, len(rows), figsize=(5.5 * len(rows), 5.5), layout="constrained", squeeze=False)
    names = list(rows[0]["classes"])
    for axis, row in zip(axes[0], rows, strict=True):
        image = axis.imshow(row["confusion"], vmin=0, vmax=1, cmap="viridis")
        axis.set(title=row["label"], xlabel="classified as", ylabel="drawn for")
        if len(names) <= NAMED_CLASSES:
            axis.set_xticks(range(len(names)), names, rotation=90)
            axis.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes[0].tolist(), label="share of the samples of a class", shrink=0.8)
    return figure
