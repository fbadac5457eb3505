"""Reads baseline/ and evaluate/ results, writes nothing: the table that compares samplers."""

from __future__ import annotations

from typing import Any

from cca_core.stages.evaluate import load_results
from cca_core.stages.graph import candidates
from cca_core.stages.run import Context

#: Column title -> how a result row fills it.
COLUMNS = {
    "sampler": lambda row: row["label"],
    "distance": lambda row: f"{row['mean']['distance']:.2f} +- {row['sd']['distance']:.2f}",
    "IS": lambda row: f"{row['mean']['inception_score']:.2f}",
    "precision": lambda row: f"{row['mean']['precision']:.3f}",
    "recall": lambda row: f"{row['mean']['recall']:.3f}",
    "class consistency": lambda row: f"{row['mean']['class_consistency']:.3f}",
    "calls/image": lambda row: str(row["cost"]["calls_per_image"]),
    "images/s": lambda row: f"{row['cost']['images_per_s']:.0f}",
}


def table_rows(context: Context) -> list[dict[str, Any]]:
    """All result rows, the base's first, then those of the candidates by their rank in the sweep."""
    stages = ("baseline", *candidates(context.recipe, "evaluate"))
    return [row for stage in stages for row in load_results(context.directory(stage))["rows"]]


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[fill(row) for fill in COLUMNS.values()] for row in rows]


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, columns aligned for reading in a terminal too."""
    lines = [list(COLUMNS), *cells(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    ]
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([text[0], rule, *text[1:]])
