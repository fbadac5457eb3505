"""Reads baseline/ and evaluate/ results, writes nothing: the tables that compare samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cca_core.stages.evaluate import load_results
from cca_core.stages.graph import candidates
from cca_core.stages.run import Context

Row = dict[str, Any]

#: What is measured -> (column title, decimals). A row that lacks one of them was measured without what it needs.
MEASURED = {
    "distance": ("distance", 2),
    "spatial_distance": ("spatial distance", 2),
    "inception_score": ("IS", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "density": ("density", 3),
    "coverage": ("coverage", 3),
    "class_consistency": ("class consistency", 3),
}
#: Of these the sampling seeds' standard deviation stands behind the mean.
WITH_SD = ("distance",)


def table_rows(context: Context) -> list[Row]:
    """All result rows, the base's first, then those of the candidates by their rank in the sweep."""
    stages = ("baseline", *candidates(context.recipe, "evaluate"))
    return [row for stage in stages for row in load_results(context.directory(stage))["rows"]]


def table_columns(rows: list[Row]) -> dict[str, list[str]]:
    """Column title -> cells: what was measured of some row, and the cost."""
    columns: dict[str, Callable[[Row], str]] = {"sampler": lambda row: row["label"]}
    columns |= _measured(rows)
    columns["calls/image"] = lambda row: str(row["cost"]["calls_per_image"])
    columns["images/s"] = lambda row: f"{row['cost']['images_per_s']:.0f}"
    return {title: [fill(row) for row in rows] for title, fill in columns.items()}


def markdown_table(rows: list[Row]) -> str:
    """The rows as a Markdown table, columns aligned for reading in a terminal too."""
    columns = table_columns(rows)
    lines = [list(columns), *(list(line) for line in zip(*columns.values(), strict=True))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    ]
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([text[0], rule, *text[1:]])


def _measured(rows: list[Row]) -> dict[str, Callable[[Row], str]]:
    found = {}
    for name, (title, decimals) in MEASURED.items():
        if any(name in row["mean"] for row in rows):
            title = rows[0]["distance_name"] if name == "distance" else title
            found[title] = lambda row, name=name, decimals=decimals: _mean(row, name, decimals)
    return found


def _mean(row: Row, name: str, decimals: int) -> str:
    if name not in row["mean"]:
        return "-"
    sd = f" +- {row['sd'][name]:.{decimals}f}" if name in WITH_SD else ""
    return f"{row['mean'][name]:.{decimals}f}{sd}"
